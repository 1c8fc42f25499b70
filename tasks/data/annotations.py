"""What is wrong with a data set's annotations, collected, so that one message lists all of it with counts."""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .. import TaskError
from .images import DamagedImageError, read_size

# What each kind of fault is called for one and for many of them.
KINDS = {
    "image": ("missing image", "missing images"),
    "elsewhere": ("file name that leads out of its folder", "file names that lead out of their folder"),
    "pair": ("image without a label map", "images without a label map"),
    "unpaired": ("label map without an image", "label maps without an image"),
    "damaged": ("damaged file", "damaged files"),
    "rotated": (
        "image that its EXIF entry turns on its side, annotated as it lies in the file",
        "images that their EXIF entries turn on their side, annotated as they lie in the file",
    ),
    "resized": ("image of another size than annotated", "images of another size than annotated"),
    "size": ("mask of another size than its image", "masks of another size than their image"),
    "value": ("label map with unknown values", "label maps with unknown values"),
    "field": ("missing or malformed entry", "missing or malformed entries"),
    "box": ("box outside its image", "boxes outside their image"),
    "flat": ("box that isn't four numbers with a positive width and height",) * 2,
    "mask": ("malformed mask", "malformed masks"),
    "polygon": ("empty polygon", "empty polygons"),
    "outside": ("polygon outside its image", "polygons outside their image"),
    "unmasked": ("box without a polygon, where masks are needed", "boxes without polygons, where masks are needed"),
    "category": ("unknown category", "unknown categories"),
    "owner": ("annotation of an unknown image", "annotations of unknown images"),
    "id": ("duplicate id", "duplicate ids"),
    "segment": ("segment that differs from its picture", "segments that differ from their picture"),
}
_T = TypeVar("_T")
_R = TypeVar("_R")


class Faults:
    """The faults of one data set, by kind.

    Args:
        source: File or folder that holds the annotations; every message begins with it.
    """

    def __init__(self, source: str | Path):
        self.source = source
        self.places: dict[str, list[str]] = {}

    def add(self, kind: str, where: object) -> None:
        """Note a fault of a kind of `KINDS` at a place, such as ``"annotation 7"`` or a file's name."""
        self.places.setdefault(kind, []).append(" ".join(str(where).split()))

    def __len__(self) -> int:
        return sum(map(len, self.places.values()))

    def __str__(self) -> str:
        listed = []
        for kind in KINDS:
            places = self.places.get(kind, [])
            if places:
                shown = ", ".join(places[:5]) + (", ..." if len(places) > 5 else "")
                listed.append(f"{len(places)} {KINDS[kind][len(places) > 1]} ({shown})")
        return f"{self.source}: {'; '.join(listed)}"

    def settle(self, broken: str, cure: str, left: int) -> None:
        """Answer the faults, if there are any, in one line that counts and lists them.

        Args:
            broken: ``"refuse"``: raise; ``"drop"``: warn that they are left out.
            cure: What can be done besides leaving them out, such as ``"correct the file"``.
            left: How many images are left without them.

        Raises:
            TaskError: See ``broken``; also if nothing is left.
        """
        if not self.places:
            return
        if broken != "drop":
            raise TaskError(f"{self}; {cure}, or leave them out with data.broken=drop")
        if not left:
            raise TaskError(f"{self}; without them no image is left; {cure}")
        warnings.warn(f"{self}; left out", stacklevel=3)

    def check_pictures(self, pictures: Sequence[tuple[Path, tuple[int, int]]], skip_damaged: bool) -> list[bool]:
        """Compare pictures, by their headers alone, with the sizes that annotations give them.

        Args:
            pictures: Files, which exist, and the height and width that each should have.
            skip_damaged: Whether what can't be read is left to those who will read it.

        Returns:
            For each whether it is as annotated.
        """
        readings = in_threads(size_or_error, [file for file, _ in pictures])
        for (file, size), read in zip(pictures, readings, strict=True):
            if isinstance(read, DamagedImageError):
                if not skip_damaged:
                    self.add("damaged", read)
            elif read[0] != tuple(size):
                (height, width), turned = read
                kind = "rotated" if turned and (width, height) == tuple(size) else "resized"
                self.add(kind, f"{file} is {height}x{width}, annotated {size[0]}x{size[1]}")
        return [
            skip_damaged if isinstance(read, DamagedImageError) else read[0] == tuple(size)
            for (_, size), read in zip(pictures, readings, strict=True)
        ]


def size_or_error(file: Path) -> Any:
    """Return what `read_size` does, or the error that it raises of an image that is damaged."""
    try:
        return read_size(file)
    except DamagedImageError as error:
        return error


def in_threads(function: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    """Return what ``function`` does with every item, which waits for disks, or decodes, more than it computes."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, items))


def lies_in(folder: Path, file: Path) -> bool:
    """Return whether a path leads to a place in a folder; links in it may lead anywhere, for its owner set them."""
    return os.path.abspath(file).startswith(os.path.join(os.path.abspath(folder), ""))


def is_number(value: Any) -> bool:
    """Return whether a value of JSON is a number that a float can hold; true and false are none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def is_count(value: Any) -> bool:
    """Return whether a value of JSON is a whole number above 0; 480.0 is one."""
    return is_number(value) and value > 0 and value == int(value)


def distinct(values: np.ndarray) -> np.ndarray:
    """Return the values that are in a map, ascending; of each run of equal ones only one is sorted."""
    flat = values.ravel()
    return np.unique(flat[np.concatenate([[True], flat[1:] != flat[:-1]])])


def count_values(values: np.ndarray) -> dict[int, int]:
    """Return how often each value is in a map; of each run of equal ones only one is sorted."""
    flat = values.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    unique, run_values = np.unique(flat[starts], return_inverse=True)
    counts = np.bincount(run_values, np.diff(starts, append=flat.size))
    return {int(value): int(count) for value, count in zip(unique, counts, strict=True)}


def check_names(names: Sequence[Any], source: object) -> list[str]:
    """Return the names of classes, or raise a TaskError that begins with ``source`` if one is empty or there twice."""
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise TaskError(f"{source}: class {number + 1} of {len(names)} has no name")
        if name in names[:number]:
            raise TaskError(f"{source}: names the class {name!r} twice")
    if not names:
        raise TaskError(f"{source}: names no class")
    return list(names)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file in UTF-8, with or without its mark, without blanks around them.

    Raises:
        TaskError: If the file can't be read or isn't UTF-8.
    """
    try:
        return [line.strip() for line in path.read_bytes().decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise TaskError(f"{path}, line {line}: is not text in UTF-8; save it with that encoding") from None
    except OSError as error:
        raise TaskError(f"{path}: can't be read ({error.strerror})") from error
