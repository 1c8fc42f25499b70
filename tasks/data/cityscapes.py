"""Cityscapes' fine annotations."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import TaskError
from .annotations import Faults, in_threads
from .augment import IGNORE
from .coco import Instances, Record, encode_mask
from .images import DamagedImageError, read_values
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
# The ids of the classes whose objects are told apart.
THINGS = (24, 25, 26, 27, 28, 31, 32, 33)


def find_maps(root: Path, data: dict, split: str, faults: Faults) -> tuple[list, Sequence[str], np.ndarray]:
    """Return Cityscapes' files: of the ids 0 to 33, 19 are classes."""
    files, part = [], data[split]["split"]
    for image in images_in(root / "leftImg8bit" / part):
        name = image.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png")
        files.append((image, root / "gtFine" / part / image.parent.name / name))
    values = dict.fromkeys((*range(34), 255), IGNORE)
    return files, list(CLASS_OF_ID.values()), class_of_values(values | {v: k for k, v in enumerate(CLASS_OF_ID)})


def find_instances(
    root: Path, data: dict, split: str, skip_damaged: bool
) -> tuple[list[Record], list[str], list[bool]]:
    """Return the images of a split with their objects by ``*_gtFine_instanceIds.png``, the 8 classes, all of things.

    An id of 1000 or more is that of an object, a thousand times its class and a number; a class's own id is that of a
    group whose objects aren't told apart: a crowd.
    """
    part, faults, pairs = data[split]["split"], Faults(root), []
    for image in images_in(root / "leftImg8bit" / part):
        name = image.name.replace("_leftImg8bit.png", "_gtFine_instanceIds.png")
        path = root / "gtFine" / part / image.parent.name / name
        if path.is_file():
            pairs.append((image, path))
        else:
            faults.add("pair", image)
    read = in_threads(_read_objects, pairs)
    present = [record for record in read if isinstance(record, Record)]
    for (_, path), record in zip(pairs, read, strict=True):
        if isinstance(record, DamagedImageError):
            faults.add("damaged", record)
        elif not isinstance(record, Record):
            faults.add("value", f"{path.name} has ids that stand for no class: {record}")
    fits = faults.check_pictures([(record.file, record.size) for record in present], skip_damaged)
    records = [record for record, fit in zip(present, fits, strict=True) if fit]
    faults.settle(data["broken"], "correct or complete them", len(records))
    if not records:
        raise TaskError(f"{root}: holds no image to {'train on' if split == 'train' else 'validate by'}")
    return records, [CLASS_OF_ID[value] for value in THINGS], [True] * len(THINGS)


def _read_objects(pair: tuple[Path, Path]) -> Record | DamagedImageError | int:
    """Return an image's objects; else what is wrong with its picture, or the first id in it that stands for nothing."""
    image, path = pair
    try:
        ids = read_values(path)
    except DamagedImageError as error:
        return error
    objects = []
    for number in np.unique(ids).tolist():
        kind = number // 1000 if number >= 1000 else number
        if not 0 <= kind < 34:
            return number
        if kind in THINGS:
            mask = ids == number
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            objects.append((box, mask.sum(), number < 1000, encode_mask(mask), THINGS.index(kind)))
    return Record(image, ids.shape, image.stem, Instances.gather(objects, True))


def recognise(root: Path) -> dict | None:
    """Return the settings of ``data`` by which a folder is read, if it looks like Cityscapes; else None."""
    there = (root / "leftImg8bit" / "train").is_dir() and (root / "gtFine" / "train").is_dir()
    return {"train": {"split": "train"}, "val": {"split": "val"}} if there else None
