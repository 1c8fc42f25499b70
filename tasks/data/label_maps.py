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


def add_unpaired(folder: Path, files: list[tuple[Path, Path]], faults: Faults) -> None:
    """Name the label maps in a folder that aren't among ``files``, images with their maps: their images are gone."""
    owned = {file for _, file in files}
    for file in list_images(folder) if folder.is_dir() else ():
        if file.suffix == ".png" and file not in owned:
            faults.add("unpaired", file)


def class_of_values(labels: dict[int, int]) -> np.ndarray:
    """Return the class of each value of 0 to 255, int32 ``[256]``; -1 where there is none."""
    values = np.full(256, -1, np.int32)
    for value, label in labels.items():
        values[value] = label
    return values
