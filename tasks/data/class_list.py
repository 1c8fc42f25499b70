"""Images and their classes in a CSV file."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .. import TaskError
from .classification import SEVERAL
from .images import EXTENSIONS, FULL_WHITE, has_image_name, read_image
from .labels import classes_of, number_of


class LabelledList(Dataset):
    """Images listed in a CSV file, with at least the columns ``path`` and ``label``.

    Attributes:
        classes: Names of the classes: all labels in order, numbers by their value.
        samples: ``(file, index of its class)`` of every image; with ``several``, a tuple of indices.
        white: As for `read_image`.

    Args:
        listing: The CSV file, with a header, in UTF-8.
        root: Folder from which paths count that are not absolute.
        transform: Applied to the image.
        channels: 1 for grey, 3 for RGB.
        classes: Fixes the order, and then any other label is an error.
        several: Whether an image may have any number of labels, ``"cat|dog"``, also none. Its target is then
            ``[classes]``, 1 for those that it has, else 0.

    Raises:
        TaskError: If the list is missing or empty, or a line of it is wrong; the message names file and line.
    """

    white = FULL_WHITE
    collate = None

    def __init__(
        self,
        listing: Path,
        root: Path,
        transform,
        channels: int,
        classes: Sequence[str] | None = None,
        several: bool = False,
    ):
        entries = _read_list(listing, root, several)
        for _, label, line in entries if not several else ():
            if len(_split(label)) > 1:
                raise TaskError(
                    f"{listing}, line {line}: {label!r} names several classes, which data.multi_label=True lets an "
                    "image have"
                )
        named = [_split(label) if several else [label] for _, label, _ in entries]
        if classes is None:
            classes = classes_of(label for each in named for label in each)
        self.classes, self.several = list(classes), several
        indices = {label: index for index, label in enumerate(self.classes)}
        self.samples: list[tuple[str, int | tuple[int, ...]]] = []
        for (path, _, line), labels in zip(entries, named, strict=True):
            own = tuple(number_of(label, indices, f"{listing}, line {line}") for label in labels)
            self.samples.append((path, own if several else own[0]))
        self.targets = [label for _, label in self.samples]
        self.transform = transform
        self.channels = channels

    @classmethod
    def of_root(
        cls,
        root: Path,
        listing: Path,
        transform,
        channels: int,
        classes: Sequence[str] | None = None,
        layout: str = "",
        several: bool = False,
    ) -> "LabelledList":
        """Return the images of a list of a data set's root."""
        return cls(listing, root, transform, channels, classes, several)

    def image(self, index: int) -> Image.Image:
        """Return an image as it is in its file."""
        return read_image(self.samples[index][0], self.channels, self.white)

    def inventory(self) -> list[tuple[str, int]]:
        """Return every file with its class."""
        return self.samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        label = self.samples[index][1]
        if self.several:
            flags = torch.zeros(len(self.classes))
            flags[list(label)] = 1
            label = flags
        return self.transform(self.image(index)), label


def holds_several(listing: Path, root: Path) -> bool:
    """Return whether any image of a list has several labels, or none, so that ``data.multi_label`` is to be set.

    Raises:
        TaskError: If the list can't be read.
    """
    return any(len(_split(label)) != 1 for _, label, _ in _read_list(listing, root, several=True))


def _split(label: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in label.split(SEVERAL) if part.strip()))


def _read_list(listing: Path, root: Path, several: bool = False) -> list[tuple[str, str, int]]:
    """Return path, label and number of the line of every entry; with ``several`` there may be no label."""
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
                if any(row.get(None, ())):
                    count = len(columns) + len(row[None])
                    raise TaskError(
                        f"{listing}, line {line}: has {count} fields, but line 1 {len(columns)}; put what holds "
                        "a comma in quotes"
                    )
                if not name or not (label or several):
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


def recognise(root: Path) -> dict | None:
    """Return the settings of ``data`` by which a folder is read, if it holds a list to train on; else None."""
    if not (root / "train.csv").is_file():
        return None
    return {"train": "train.csv", "val": "val.csv" if (root / "val.csv").is_file() else None}
