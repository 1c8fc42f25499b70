"""Labelled images: the bundled digits, and folders laid out as ImageNet's."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, InterpolationMode, RandomAffine, Resize

from .. import TaskError, nearest
from ..images import EXTENSIONS, read_image
from ..samples import DIGITS_TRAIN, load_digits


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
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != self.channels:
                raise TaskError(f"data.{name} needs one number for each of the {self.channels} channels")

    def transform(self, augment: dict | None = None):
        """Return timm's transform from a PIL image to ``[channels, size, size]``; ``augment`` makes it random.

        Args:
            augment: Arguments of timm's ``create_transform``; and ``affine``, those of torchvision's ``RandomAffine``,
                which then comes first, on the resized image. None for the transform of evaluation.
        """
        augment = None if augment is None else dict(augment)
        affine = (augment or {}).pop("affine", None)
        transform = create_transform(
            input_size=(self.channels, self.size, self.size),
            is_training=augment is not None,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            **(augment or {}),
        )
        if affine is None:
            return transform
        resize = Resize(self.size, InterpolationMode(self.interpolation))
        return Compose([resize, RandomAffine(interpolation=InterpolationMode.BILINEAR, **affine), transform])


class Digits(Dataset):
    """UCI's digits as dark ink on white, ``"train"`` (1400) or ``"val"`` (the other 397)."""

    classes = tuple("0123456789")

    def __init__(self, split: str, transform=None):
        images, labels = load_digits()
        part = slice(None, DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
        # Ink of 0..16 to brightness, as on paper.
        self.pixels = (255 - np.rint(images[part] * (255 / 16))).astype(np.uint8)
        self.labels = labels[part].tolist()
        self.transform = transform

    def image(self, index: int) -> Image.Image:
        """Return a digit as it is, 8x8 grey."""
        return Image.fromarray(self.pixels[index])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.image(index)), self.labels[index]


class LabelledFolder(ImageFolder):
    """Images in one folder a class; ``classes`` fixes the order, and then any other folder is an error."""

    def __init__(self, root: Path, transform, channels: int, classes: Sequence[str] | None = None):
        self._expected = classes
        try:
            super().__init__(
                root, transform, loader=partial(read_image, channels=channels), is_valid_file=_has_image_name
            )
        except FileNotFoundError as error:
            raise TaskError(f"{root}: {str(error).splitlines()[0]}") from error

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the class folders, in the expected order where there is one."""
        folders = sorted(entry.name for entry in Path(directory).iterdir() if entry.is_dir())
        if not folders:
            raise TaskError(f"{directory}: holds no folder; each class needs one, named after it, with its images")
        for name in folders:
            if self._expected is not None and name not in self._expected:
                raise TaskError(f"{directory}/{name}: train/ has no such class{nearest(name, self._expected)}")
            if not any(_has_image_name(file) for file in (Path(directory) / name).rglob("*")):
                raise TaskError(f"{directory}/{name}: the class has no image; looked for {', '.join(EXTENSIONS)}")
        classes = folders if self._expected is None else list(self._expected)
        # Only folders that exist: torchvision takes a class without images for an error.
        return classes, {name: index for index, name in enumerate(classes) if name in folders}


def _has_image_name(path: str | Path) -> bool:
    return Path(path).suffix.lower() in EXTENSIONS


def build_datasets(data: dict, rule: InputRule) -> tuple[Dataset, Dataset]:
    """Return the training and the validation set that a config's ``data`` describes; both have ``classes``.

    Raises:
        TaskError: If the data set is unknown, its folders are missing or empty, or its classes aren't as many as
            ``data["num_classes"]``.
    """
    augment = dict(data["augment"])
    if data["name"] == "digits":
        if rule.channels != 1:
            raise TaskError(f"the digits are grey: data.channels must be 1, not {rule.channels}")
        train, val = Digits("train", rule.transform(augment)), Digits("val", rule.transform())
    elif data["name"] == "folder":
        if data["root"] is None:
            raise TaskError("data.root is not set; name a folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
        root = Path(data["root"]).expanduser()
        for folder in (root, root / "train", root / "val"):
            if not folder.is_dir():
                raise TaskError(f"{folder}: no such folder; data.root needs train/CLASS/*.jpg and val/CLASS/*.jpg")
        train = LabelledFolder(root / "train", rule.transform(augment), rule.channels)
        val = LabelledFolder(root / "val", rule.transform(), rule.channels, train.classes)
    else:
        raise TaskError(f"unknown data set {data['name']!r}{nearest(data['name'], ('digits', 'folder'))}")
    if data["num_classes"] not in (None, len(train.classes)):
        raise TaskError(
            f"data.num_classes is {data['num_classes']}, but {data['root'] or data['name']} has {len(train.classes)} "
            f"classes; leave it None to take what is there"
        )
    return train, val
