"""Cityscapes' fine annotations."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .annotations import Faults
from .augment import IGNORE
from .label_maps import class_of_values, images_in

# Cityscapes' 19 classes by the id that its label maps have; the other ids of 0 to 33 aren't counted.
CLASS_OF_ID = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}


def find_maps(root: Path, data: dict, split: str, faults: Faults) -> tuple[list, Sequence[str], np.ndarray]:
    """Return Cityscapes' files: of the ids 0 to 33, 19 are classes."""
    files, part = [], data[split]["split"]
    for image in images_in(root / "leftImg8bit" / part):
        name = image.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png")
        files.append((image, root / "gtFine" / part / image.parent.name / name))
    values = dict.fromkeys((*range(34), 255), IGNORE)
    return files, list(CLASS_OF_ID.values()), class_of_values(values | {v: k for k, v in enumerate(CLASS_OF_ID)})


def recognise(root: Path) -> dict | None:
    """Return the settings of ``data`` by which a folder is read, if it looks like Cityscapes; else None."""
    there = (root / "leftImg8bit" / "train").is_dir() and (root / "gtFine" / "train").is_dir()
    return {"train": {"split": "train"}, "val": {"split": "val"}} if there else None
