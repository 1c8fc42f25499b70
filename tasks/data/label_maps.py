"""What the formats of label maps have in common: pictures beside pictures, and which class a value stands for."""

from pathlib import Path

import numpy as np

from .. import TaskError
from .annotations import Faults
from .images import list_images


def images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise TaskError(f"{folder}: no such folder")
    return list_images(folder)


def check_pairs(folder: Path, files: list[tuple[Path, Path]], faults: Faults) -> list[tuple[Path, Path]]:
    """Return images with their label maps, each map once, and note maps in the folder that belong to no image.

    Of those the images are gone, or they have another ending than .png; a picture beside a map of its name is none.
    """
    owners: dict[Path, Path] = {}
    for image, file in files:
        other = owners.setdefault(file, image)
        if other != image:
            faults.add("id", f"{other} and {image.name} share one label map")
    for file in list_images(folder) if folder.is_dir() else ():
        beside = file.with_suffix(".png")
        if file not in owners and not (file != beside and beside in owners and beside.is_file()):
            faults.add("unpaired", file)
    return [(image, file) for file, image in owners.items()]


def class_of_values(labels: dict[int, int]) -> np.ndarray:
    """Return the class of each value of 0 to 255, int32 ``[256]``; -1 where there is none."""
    values = np.full(256, -1, np.int32)
    for value, label in labels.items():
        values[value] = label
    return values
