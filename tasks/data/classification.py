"""Labelled images: the bundled digits, folders laid out as ImageNet's, and lists of files."""

import csv
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, InterpolationMode, RandomAffine, Resize

from .. import TaskError, nearest
from .images import (
    EXTENSIONS,
    FULL_WHITE,
    check_white,
    choose_white,
    has_image_name,
    is_hidden,
    list_images,
    read_image,
)
from .samples import DIGITS_TRAIN, load_digits

DATA_SETS = ("csv", "digits", "folder")
CROP_MODES = ("center", "squash", "border")


@dataclasses.dataclass(frozen=True)
class InputRule:
    """How an image becomes the model's input; kept in every checkpoint, so that prediction does as training did.

    Attributes:
        size: Height and width, in pixels, of the square input.
        channels: 1 for grey, 3 for RGB.
        mean: Subtracted from pixels of 0 to 1, for each channel.
        std: Divides the difference, for each channel.
        interpolation: Of the resize, such as ``"bicubic"``.
        crop_pct: Part of the resized image's side that the central crop keeps.
        crop_mode: How an image that isn't square is fitted, as timm names it: ``"center"`` resizes the shorter side,
            ``"squash"`` both, ``"border"`` the longer one.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != self.channels:
                raise TaskError(f"data.{name} needs one number for each of the {self.channels} channels")
        if self.crop_mode not in CROP_MODES:
            raise TaskError(f"data.crop_mode is {self.crop_mode!r}{nearest(self.crop_mode, CROP_MODES)}")

    def transform(self, augment: dict | None = None):
        """Return timm's transform from a PIL image to ``[channels, size, size]``; ``augment`` makes it random.

        Args:
            augment: Arguments of timm's ``create_transform``, of which ``interpolation`` may be ``"random"``; and
                ``affine``, those of torchvision's ``RandomAffine``, which then comes first, on the resized image. None
                for the transform of evaluation.
        """
        augment = None if augment is None else dict(augment)
        affine = (augment or {}).pop("affine", None)
        transform = create_transform(
            input_size=(self.channels, self.size, self.size),
            is_training=augment is not None,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            **{"interpolation": self.interpolation, **(augment or {})},
        )
        keep_posterize_total(transform)
        if affine is None:
            return transform
        resize = Resize(self.size, InterpolationMode(self.interpolation))
        return Compose([resize, RandomAffine(interpolation=InterpolationMode.BILINEAR, **affine), transform])


def keep_posterize_total(transform: Compose) -> None:
    """Let timm's augmentation posterize to no bits at all, a black image, as published training did.

    At the greatest magnitude, which noise on the magnitude reaches now and then, timm asks for 0 bits; Pillow now
    refuses that.
    """
    for step in transform.transforms:
        chains = [getattr(step, "ops", ()), *getattr(step, "policy", ())]
        for op in (op for chain in chains for op in chain if op.aug_fn is posterize):
            op.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **kwargs) -> Image.Image:
    return posterize(image, bits, **kwargs) if bits >= 1 else image.point(lambda value: 0)


class Digits(Dataset):
    """UCI's digits as dark ink on white, ``"train"`` (1400) or ``"val"`` (the other 397)."""

    classes = tuple("0123456789")
    white = FULL_WHITE

    def __init__(self, split: str, transform=None):
        images, labels = load_digits()
        part = slice(None, DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
        # Ink of 0..16 to brightness, as on paper.
        self.pixels = (255 - np.rint(images[part] * (255 / 16))).astype(np.uint8)
        self.targets = labels[part].tolist()
        self.transform = transform

    def image(self, index: int) -> Image.Image:
        """Return a digit as it is, 8x8 grey."""
        return Image.fromarray(self.pixels[index])

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.image(index)), self.targets[index]


class LabelledFolder(ImageFolder):
    """Images in one folder a class; ``classes`` fixes the order, and then any other folder is an error.

    What systems hide or add is left out, as `list_images` does it.

    Attributes:
        white: As for `read_image`.
    """

    white = FULL_WHITE

    def __init__(self, root: Path, transform, channels: int, classes: Sequence[str] | None = None):
        self._expected = classes
        self.channels = channels
        try:
            super().__init__(root, transform, loader=self._read)
        except FileNotFoundError as error:
            raise TaskError(f"{root}: {str(error).splitlines()[0]}") from error

    def _read(self, path: str) -> Image.Image:
        return read_image(path, self.channels, self.white)

    def image(self, index: int) -> Image.Image:
        """Return an image as it is in its file."""
        return self.loader(self.samples[index][0])

    def inventory(self) -> list[tuple[str, int]]:
        """Return every file with its class."""
        return self.samples

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the class folders, in the expected order where there is one."""
        folders = sorted(
            entry.name for entry in Path(directory).iterdir() if entry.is_dir() and not is_hidden(entry.name)
        )
        if not folders:
            raise TaskError(f"{directory}: holds no folder; each class needs one, named after it, with its images")
        for name in folders:
            if self._expected is not None and name not in self._expected:
                raise TaskError(f"{directory}/{name}: train/ has no such class{nearest(name, self._expected)}")
        classes = folders if self._expected is None else list(self._expected)
        # Only folders that exist: torchvision takes a class without images for an error.
        return classes, {name: index for index, name in enumerate(classes) if name in folders}

    @staticmethod
    def make_dataset(directory: str | Path, class_to_idx: dict[str, int], *args, **kwargs) -> list[tuple[str, int]]:
        """Return file and class of every image, folder by folder as torchvision orders them."""
        samples = []
        for name, index in sorted(class_to_idx.items()):
            images = list_images(Path(directory) / name)
            if not images:
                raise TaskError(f"{directory}/{name}: the class has no image; looked for {', '.join(EXTENSIONS)}")
            samples += [(file, index) for file in sorted(map(str, images), key=os.path.split)]
        return samples


class LabelledList(Dataset):
    """Images listed in a CSV file, with at least the columns ``path`` and ``label``.

    Attributes:
        classes: Names of the classes: all labels in order, numbers by their value.
        samples: ``(file, index of its class)`` of every image.
        white: As for `read_image`.

    Args:
        listing: The CSV file, with a header, in UTF-8.
        root: Folder from which paths count that are not absolute.
        transform: Applied to the image.
        channels: 1 for grey, 3 for RGB.
        classes: Fixes the order, and then any other label is an error.

    Raises:
        TaskError: If the list is missing or empty, or a line of it is wrong; the message names file and line.
    """

    white = FULL_WHITE

    def __init__(self, listing: Path, root: Path, transform, channels: int, classes: Sequence[str] | None = None):
        entries = _read_list(listing, root)
        if classes is None:
            labels = {label for _, label, _ in entries}
            numbers = all(label.isascii() and label.isdigit() for label in labels)
            classes = sorted(labels, key=(lambda label: (int(label), label)) if numbers else None)
        self.classes = list(classes)
        indices = {label: index for index, label in enumerate(self.classes)}
        for _, label, line in entries:
            if label not in indices:
                raise TaskError(
                    f"{listing}, line {line}: no training image has the label {label!r}{nearest(label, indices)}"
                )
        self.samples = [(path, indices[label]) for path, label, _ in entries]
        self.targets = [label for _, label in self.samples]
        self.transform = transform
        self.channels = channels

    def image(self, index: int) -> Image.Image:
        """Return an image as it is in its file."""
        return read_image(self.samples[index][0], self.channels, self.white)

    def inventory(self) -> list[tuple[str, int]]:
        """Return every file with its class."""
        return self.samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.image(index)), self.samples[index][1]


def _read_list(listing: Path, root: Path) -> list[tuple[str, str, int]]:
    """Return path, label and number of the line of every entry."""
    if not listing.is_file():
        raise TaskError(f"{listing}: no such list; it is a CSV file with the columns path and label")
    entries: list[tuple[str, str, int]] = []
    seen: dict[str, tuple[str, int]] = {}
    try:
        with open(listing, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or []
            for column in ("path", "label"):
                if column not in columns:
                    raise TaskError(
                        f"{listing}, line 1: has no column {column!r}, but {', '.join(map(repr, columns)) or 'nothing'}"
                    )
            for row in rows:
                line = rows.line_num
                name, label = ((row[column] or "").strip() for column in ("path", "label"))
                if not name or not label:
                    raise TaskError(f"{listing}, line {line}: has no {'label' if name else 'path'}")
                path = os.path.join(root, os.path.expanduser(name))
                if not os.path.isfile(path):
                    raise TaskError(
                        f"{listing}, line {line}: {path}: no such file; paths count from data.root ({root})"
                    )
                if not has_image_name(path):
                    raise TaskError(f"{listing}, line {line}: {path}: is no image; known are {', '.join(EXTENSIONS)}")
                other, where = seen.setdefault(path, (label, line))
                if other != label:
                    raise TaskError(
                        f"{listing}, line {line}: {name} is labelled {label!r} here and {other!r} in line {where}"
                    )
                entries.append((path, label, line))
    except UnicodeDecodeError:
        raise TaskError(f"{listing}: is not text in UTF-8; save the table as CSV UTF-8") from None
    except csv.Error as error:
        raise TaskError(f"{listing}: is no CSV table ({error})") from error
    if not entries:
        raise TaskError(f"{listing}: lists no image")
    return entries


def build_datasets(data: dict, rule: InputRule) -> tuple[Dataset, Dataset]:
    """Return the training and the validation set that a config's ``data`` describes; both have ``classes``.

    Raises:
        TaskError: If the data set is unknown, its folders are missing or empty, or its classes aren't as many as
            ``data["num_classes"]``.
    """
    augment = dict(data["augment"])
    white = check_white(data.get("white"))
    if data["name"] == "digits":
        if rule.channels != 1:
            raise TaskError(f"the digits are grey: data.channels must be 1, not {rule.channels}")
        train, val = Digits("train", rule.transform(augment)), Digits("val", rule.transform())
    elif data["name"] in ("folder", "csv"):
        listed = data["name"] == "csv"
        layout = "train.csv and val.csv" if listed else "train/CLASS/*.jpg and val/CLASS/*.jpg"
        if data["root"] is None:
            raise TaskError(f"data.root is not set; name a folder with {layout}")
        root = Path(data["root"]).expanduser()
        parts = [root / (data.get(split) or (f"{split}.csv" if listed else split)) for split in ("train", "val")]
        for folder in (root,) if listed else (root, *parts):
            if not folder.is_dir():
                raise TaskError(f"{folder}: no such folder; data.root needs {layout}")
        if listed:
            train = LabelledList(parts[0], root, rule.transform(augment), rule.channels)
            val = LabelledList(parts[1], root, rule.transform(), rule.channels, train.classes)
        else:
            train = LabelledFolder(parts[0], rule.transform(augment), rule.channels)
            val = LabelledFolder(parts[1], rule.transform(), rule.channels, train.classes)
        train.white = val.white = white or choose_white([path for path, _ in train.samples])
    else:
        raise TaskError(f"unknown data set {data['name']!r}{nearest(data['name'], DATA_SETS)}")
    if data["num_classes"] not in (None, len(train.classes)):
        raise TaskError(
            f"data.num_classes is {data['num_classes']}, but {data['root'] or data['name']} has {len(train.classes)} "
            f"classes; leave it None to take what is there"
        )
    return train, val
