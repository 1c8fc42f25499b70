"""Label maps in folders of one's own: ``images/train``, ``masks/train``, ``images/val`` and ``masks/val``."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import TaskError
from .annotations import Faults, check_names, read_lines
from .augment import IGNORE
from .label_maps import check_pairs, class_of_values, images_in


def find_maps(root: Path, data: dict, split: str, faults: Faults) -> tuple[list, Sequence[str], np.ndarray]:
    """Return the files of ``images/train``, ``masks/train``, ``images/val`` and ``masks/val``."""
    classes, values = read_classes(root, data)
    folder = root / "images" / split
    masks = root / "masks" / split
    files = [(image, (masks / image.relative_to(folder)).with_suffix(".png")) for image in images_in(folder)]
    return check_pairs(masks, files, faults), classes, values


def read_classes(root: Path, data: dict) -> tuple[Sequence[str], np.ndarray]:
    """Return the names of the classes of one's own label maps, and the class that each value stands for."""
    if data["classes"] is not None:
        classes = check_names(data["classes"], "data.classes")
    else:
        listing = root / "classes.txt"
        if not listing.is_file():
            raise TaskError(f"{listing}: no such file; list the classes' names there, a line each, or in data.classes")
        lines = read_lines(listing)
        while lines and not lines[-1]:
            lines.pop()
        # An empty line between others may be a class of its own.
        classes = check_names(lines, listing)
    unlabelled = [255] if data["unlabelled"] is None else list(data["unlabelled"])
    left = [value for value in range(256) if data["unlabelled"] is None or value not in unlabelled]
    values = left[: len(classes)] if data["values"] is None else list(data["values"])
    for key, numbers in (("values", values), ("unlabelled", unlabelled)):
        if not all(type(value) is int and 0 <= value < 256 for value in numbers) or len({*numbers}) < len(numbers):
            raise TaskError(f"data.{key} takes different numbers of 0 to 255, not {numbers}")
    if len(values) != len(classes):
        raise TaskError(f"data.values needs a number of 0 to 255 for each of the {len(classes)} classes, not {values}")
    both = sorted({*values} & {*unlabelled})
    if data["unlabelled"] is not None and both:
        raise TaskError(f"data.unlabelled and data.values both hold {both[0]}")
    labels = {value: label for label, value in enumerate(values)}
    return classes, class_of_values(dict.fromkeys(unlabelled, IGNORE) | labels)


def recognise(root: Path) -> dict | None:
    """Return the settings of ``data`` by which a folder is read, if it holds images and masks; else None."""
    if not (root / "masks" / "train").is_dir() or not (root / "images" / "train").is_dir():
        return None
    return {"train": {}, "val": {} if any((root / part / "val").is_dir() for part in ("images", "masks")) else None}
