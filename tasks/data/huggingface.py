"""Tables of the library ``datasets``, from the hub or a folder: images with a label, or with objects.

A folder is one that ``save_to_disk`` wrote, or holds parquet files or what else ``load_dataset`` reads. Objects are, as
most tables have them, a column of dicts with lists: ``bbox`` (``x, y, width, height`` in pixels, as COCO's) and
``category`` (or ``categories``, ``category_id``, ``label``), and perhaps ``segmentation``, polygons or run lengths.
"""

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ...zoo.library_errors import first_line
from .. import TaskError, nearest
from ..extras import require
from . import mask_folder
from .annotations import Faults
from .coco import Instances, Record, check_object
from .images import FULL_WHITE, DamagedImageError, read_image, read_values
from .labels import classes_of, number_of
from .segmentation import LabelMaps

LAYOUT = "a folder of save_to_disk or of parquet files, or a name on the hub"
_IMAGES, _LABELS, _OBJECTS = ("image", "img", "pixel_values"), ("label", "labels", "class", "fine_label"), ("objects",)
_MASKS = (
    "mask",
    "masks",
    "annotation",
    "segmentation",
    "segmentation_mask",
    "semantic_segmentation",
    "label",
    "labels",
)
_CATEGORIES = ("category", "categories", "category_id", "label", "labels")
_HELD_OUT = ("validation", "val", "valid", "test")
# Of what `datasets` writes and reads.
_MARKS = ("dataset_dict.json", "dataset_info.json", "*.parquet", "data/*.parquet", "*/*.parquet")


def open_table(root: str | Path, split: str) -> Any:
    """Return the split of a data set, whose images stay encoded.

    Raises:
        TaskError: If the library isn't installed, or the data set, or the split, can't be had.
    """
    table = _splits(root)
    if split not in table:
        raise TaskError(f"{root}: has no split {split!r}; it has {', '.join(table)}")
    return table[split]


def _splits(root: str | Path) -> dict[str, Any]:
    datasets = require("datasets")
    root = Path(root)
    try:
        if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
            table = datasets.load_from_disk(str(root))
        else:
            table = datasets.load_dataset(str(root))
    except Exception as error:
        raise TaskError(f"{root}: `datasets` can't read it ({type(error).__name__}: {first_line(error)})") from error
    table = table if isinstance(table, dict) else {"train": table}
    plain = datasets.Image(decode=False)
    for split, part in table.items():
        for column, kind in part.features.items():
            if isinstance(kind, datasets.Image):
                part = part.cast_column(column, plain)
        table[split] = part
    return table


def _column(root: object, table: Any, named: str | None, usual: Sequence[str], key: str) -> str:
    """Return the column that a config names, or else the first usual one."""
    columns = list(table.features)
    column = named if named is not None else next((name for name in usual if name in columns), None)
    if column not in columns:
        what = f"no column {named!r}{nearest(named, columns)}" if named is not None else f"none of {', '.join(usual)}"
        raise TaskError(f"{root}: has {what}; its columns are {', '.join(columns)}; name it by data.{key}")
    return column


def _read(table: Any, column: str, row: int, name: str, channels: int = 3, white: int = FULL_WHITE) -> Image.Image:
    """Return the image of a row, upright, as `read_image` does of a file."""
    return read_image(_encoded(table[row][column], name), channels, white, name)


def _encoded(cell: Any, name: str) -> io.BytesIO | str:
    """Return what a cell holds of an image, or the file that it names."""
    content = cell.get("bytes") if isinstance(cell, dict) else None
    path = cell.get("path") if isinstance(cell, dict) else None
    if content is None and path is None:
        raise DamagedImageError(f"{name}: holds no image")
    return path if content is None else io.BytesIO(content)


class LabelledTable(Dataset):
    """Images with a label, a row each.

    Attributes:
        classes: Names of the classes: the features', or else all labels in order, numbers by their value.
        samples: ``(split/row, index of its class)`` of every image.
        white: As for `read_image`.

    Args:
        root: Folder, or name on the hub.
        split: Of it.
        transform: Applied to the image.
        channels: 1 for grey, 3 for RGB.
        classes: Fixes the order, and then any other label is an error.
        columns: Names of the columns of images and labels; the usual ones if None.

    Raises:
        TaskError: If the data set, a split or a column isn't there, or a label is none.
    """

    white = FULL_WHITE
    collate = None

    def __init__(
        self,
        root: Path,
        split: str,
        transform,
        channels: int,
        classes: Sequence[str] | None = None,
        columns: tuple[str | None, str | None] = (None, None),
    ):
        self._root, self._table = root, open_table(root, split)
        self._column = _column(root, self._table, columns[0], _IMAGES, "image_column")
        column = _column(root, self._table, columns[1], _LABELS, "label_column")
        names = getattr(self._table.features[column], "names", None)
        labels = self._table[column][:]
        for row, label in enumerate(labels):
            one = isinstance(label, str | int | float) and label == label and label != ""
            if not one or (names is not None and not 0 <= label < len(names)):
                raise TaskError(
                    f"{root}, {split}, row {row}: {column} is {label!r:.60}, which is no class; correct it, or filter "
                    "such rows out"
                )
        named = [str(label) if names is None else names[label] for label in labels]
        if classes is None:
            classes = classes_of(named) if names is None else names
        self.classes = list(classes)
        indices = {name: index for index, name in enumerate(self.classes)}
        self.samples = [
            (f"{split}/{row}", number_of(name, indices, f"{root}, {split}, row {row}"))
            for row, name in enumerate(named)
        ]
        self.targets = [label for _, label in self.samples]
        self.transform, self.channels = transform, channels
        if not self.samples:
            raise TaskError(f"{root}, {split}: has no row")

    @classmethod
    def of_root(
        cls,
        root: Path,
        place: Path,
        transform,
        channels: int,
        classes: Sequence[str] | None = None,
        layout: str = "",
        columns: tuple[str | None, str | None] = (None, None),
    ) -> "LabelledTable":
        """Return a split of a data set, named by its place below the root."""
        return cls(root, str(place.relative_to(root)), transform, channels, classes, columns)

    def image(self, index: int) -> Image.Image:
        """Return an image as it is in its row."""
        name = self.samples[index][0]
        row = int(name.rpartition("/")[2])
        return _read(self._table, self._column, row, f"{self._root}, {name}", self.channels, self.white)

    def inventory(self) -> list[tuple[str, int]]:
        """Return every row with its class."""
        return self.samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.image(index)), self.samples[index][1]


def find_objects(
    root: Path, data: dict, split: str, with_masks: bool | None, skip_damaged: bool
) -> tuple[list[Record], list[str]]:
    """Return the images of a split with their objects, and the classes."""
    name = data[split]["split"]
    table = open_table(root, name)
    image_column = _column(root, table, data.get("image_column"), _IMAGES, "image_column")
    column = _column(root, table, data.get("objects_column"), _OBJECTS, "objects_column")
    kinds = _fields(table.features[column])
    category = next((key for key in _CATEGORIES if key in kinds), None)
    if category is None or "bbox" not in kinds:
        raise TaskError(f"{root}: {column} needs bbox and one of {', '.join(_CATEGORIES)}; it has {', '.join(kinds)}")
    rows = [_by_field(cell, ("bbox", category)) for cell in table[column][:]]
    names = getattr(_inner(kinds[category]), "names", None)
    if names is None:
        labels = sorted({label for row in rows if row for label in row[category] if label is not None})
        numbers, names = {label: number for number, label in enumerate(labels)}, list(map(str, labels))
    else:
        numbers = {number: number for number in range(len(names))}
    records, faults = [], Faults(root)
    for number, row in enumerate(rows):
        place = f"{root}, {name}/{number}"
        picture = partial(_read, table, image_column, number, place)
        size, objects = (1, 1), []
        try:
            size = picture().size[::-1]
        except DamagedImageError as error:
            if not skip_damaged:
                faults.add("damaged", error)
                continue
            row = {}  # the loader finds it, and counts it
        if row is None:
            faults.add("field", f"{place}: {column} needs lists of equally many bbox and {category}, or empty ones")
            continue
        for index, label in enumerate(row.get(category, ())):
            checked = _check(row, index, size, with_masks, faults, f"{place}, object {index}")
            if label not in numbers:
                faults.add("category", f"{place}, object {index}: {label}")
            elif checked is not None:
                objects.append((*checked, numbers[label]))
        gathered = Instances.gather(objects, with_masks)
        records.append(Record(Path(f"{name}/{number}"), size, number, gathered, picture))
    faults.settle(data["broken"], "correct the data set", len(records))
    return records, list(names)


def _check(row: dict, index: int, size: tuple[int, int], with_masks: bool | None, faults: Faults, place: str) -> Any:
    """Return what `check_object` does of an object of a row."""
    annotation = {key: row[key][index] for key in ("bbox", "segmentation", "iscrowd") if row.get(key)}
    return check_object(annotation, {"height": size[0], "width": size[1]}, with_masks, faults, place)


class TableMaps(LabelMaps):
    """Rows of an image and a label map each; ``files`` are the names of the rows, twice.

    Args:
        rows: Reads images, with so many channels and such a white, and what label maps hold, by the rows' names.
        **settings: As for `LabelMaps`.
    """

    def __init__(self, rows: "Rows", **settings):
        super().__init__(**settings)
        self._rows = rows

    def image(self, index: int) -> Image.Image:
        """Return an image as it is in its row."""
        return self._rows.image(self.files[index][0], self.rule.channels, self.white)

    def _values(self, index: int) -> np.ndarray:
        return self._rows.values(self.files[index][1])

    def _size(self, index: int) -> tuple[tuple[int, int], bool]:
        return self._rows.image(self.files[index][0]).size[::-1], False


class Rows(NamedTuple):
    """The rows of a split that hold images and label maps."""

    root: Path
    split: str
    table: Any
    columns: tuple[str, str]

    def image(self, name: Path, channels: int = 3, white: int = FULL_WHITE) -> Image.Image:
        """Return the image of a row, given by its name."""
        return _read(self.table, self.columns[0], int(name.name), f"{self.root}, {name}", channels, white)

    def values(self, name: Path) -> np.ndarray:
        """Return what the label map of a row holds, ``[H, W]``."""
        place = f"{self.root}, {name}, {self.columns[1]}"
        content = _encoded(self.table[int(name.name)][self.columns[1]], place)
        return read_values(content, place)


def find_maps(root: Path, data: dict, split: str, faults: Faults) -> tuple[Rows, Sequence[str], np.ndarray]:
    """Return the rows of a split that have an image and a label map, the classes, and the class of each value.

    The classes' names are ``data.classes``, or ``classes.txt`` in the root. Values stand for them in their order, and
    255 for none, unless ``data.values`` and ``data.unlabelled`` say otherwise.
    """
    name = data[split]["split"]
    table = open_table(root, name)
    columns = (
        _column(root, table, data.get("image_column"), _IMAGES, "image_column"),
        _column(root, table, data.get("mask_column"), _MASKS, "mask_column"),
    )
    classes, values = mask_folder.read_classes(root, data)
    return Rows(root, name, table, columns), classes, values


def _fields(feature: Any) -> dict[str, Any]:
    """Return the fields of a column of objects: a dict of lists, or a list of dicts."""
    feature = _inner(feature)
    return dict(feature) if isinstance(feature, dict) else {}


def _inner(feature: Any) -> Any:
    feature = getattr(feature, "feature", feature)
    return feature[0] if isinstance(feature, list) else feature


def _by_field(cell: Any, needed: Sequence[str]) -> dict[str, list] | None:
    """Return the objects of a row as lists by field, however they are written; None if they aren't equally long."""
    if isinstance(cell, list) and all(isinstance(entry, dict) for entry in cell):
        cell = {key: [entry.get(key) for entry in cell] for key in (cell[0] if cell else needed)}
    if not isinstance(cell, dict):
        return None
    lists = [cell.get(key) for key in needed] + [cell[key] for key in ("segmentation", "iscrowd") if cell.get(key)]
    if not all(isinstance(values, list) for values in lists) or len({*map(len, lists)}) > 1:
        return None
    return cell


def recognise(root: Path, kind: str = "classes") -> dict[str, Any] | None:
    """Return the settings of ``data`` by which a folder is read, if it is a data set of such a kind; else None."""
    if not any(next(root.glob(mark), None) for mark in _MARKS):
        return None
    table = _splits(root)
    columns = list(next(iter(table.values())).features)
    features = next(iter(table.values())).features
    pictures = [name for name in columns if type(features[name]).__name__ == "Image"]
    usual = {"classes": _LABELS, "objects": _OBJECTS, "maps": _MASKS}[kind]
    there = [name for name in usual if name in columns and (name in pictures) == (kind == "maps")]
    if not there or not any(name in columns for name in _IMAGES):
        return None
    train = "train" if "train" in table else next((name for name in table if name not in _HELD_OUT), None)
    if train is None:
        key = "data.train" if kind == "classes" else "data.train.split"
        raise TaskError(
            f"{root}: has no split to train on, only {', '.join(table)}; name one of them: data.name=huggingface "
            f"{key}={next(iter(table))}"
        )
    val = next((name for name in _HELD_OUT if name in table and name != train), None)
    if kind == "classes":
        return {"train": train, "val": val}
    return {"train": {"split": train}, "val": None if val is None else {"split": val}}
