"""Pascal VOC: objects in XML, and the pictures that number them."""

import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from . import TaskError
from .annotations import Faults
from .coco import Instances, Record, encode_mask

_NAMES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
)
CLASSES = _NAMES.split()


def read_voc(
    root: str | Path, split: str, classes: Sequence[str] = CLASSES, with_masks: bool = False, broken: str = "refuse"
) -> list[Record]:
    """Read Pascal VOC's annotations.

    Boxes count pixels from 1 and include their last one: ``xmin .. xmax`` becomes ``xmin - 1 .. xmax``. Difficult
    objects are taken as crowds: not trained on, not counted.

    Args:
        root: Folder with ``Annotations``, ``JPEGImages`` and ``ImageSets``.
        split: Name of a list of images: a file of ``ImageSets/Main``, or with masks of ``ImageSets/Segmentation``.
        classes: Names of the classes, in the order of the labels.
        with_masks: Whether to read ``SegmentationObject``, where object k of the XML has the value k.
        broken: ``"refuse"`` or ``"drop"``, as for `coco.read_instances`.

    Raises:
        TaskError: If files are missing or broken; one error lists them.
    """
    root = Path(root)
    listing = root / "ImageSets" / ("Segmentation" if with_masks else "Main") / f"{split}.txt"
    if not listing.is_file():
        raise TaskError(f"{listing}: no such file; data.root is a folder such as VOCdevkit/VOC2012")
    faults, records = Faults(root), []
    for name in dict.fromkeys(line.split()[0] for line in listing.read_text().splitlines() if line.strip()):
        file = root / "JPEGImages" / f"{name}.jpg"
        if not file.is_file():
            faults.add("image", file)
            continue
        try:
            tree = ElementTree.parse(root / "Annotations" / f"{name}.xml").getroot()
            size = (int(tree.findtext("size/height")), int(tree.findtext("size/width")))
        except (OSError, ElementTree.ParseError, TypeError, ValueError):
            faults.add("damaged", f"Annotations/{name}.xml")
            continue
        numbers = None
        if with_masks:
            numbers = _object_numbers(root / "SegmentationObject" / f"{name}.png", size, faults)
            if numbers is None:
                continue
        objects = []
        for number, node in enumerate(tree.iter("object"), start=1):
            place = f"{name}.xml, object {number}"
            label = node.findtext("name")
            if label not in classes:
                faults.add("category", f"{place}: {label}")
                continue
            try:
                box = [float(node.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
            except (TypeError, ValueError):
                faults.add("flat", place)
                continue
            if min(box[:2]) < 0 or box[2] > size[1] + 1 or box[3] > size[0] + 1:
                faults.add("box", place)
                continue
            box = [max(box[0] - 1, 0), max(box[1] - 1, 0), min(box[2], size[1]), min(box[3], size[0])]
            if box[2] <= box[0] or box[3] <= box[1]:
                faults.add("flat", place)
                continue
            mask = None if numbers is None else numbers == number
            if mask is not None and not mask.any():
                faults.add("polygon", place)
                continue
            difficult = (node.findtext("difficult") or "0").strip() == "1"
            area = float((box[2] - box[0]) * (box[3] - box[1]) if mask is None else mask.sum())
            objects.append((box, area, difficult, None if mask is None else encode_mask(mask), classes.index(label)))
        records.append(Record(file, size, name, Instances.gather(objects, with_masks)))
    if broken == "drop" and faults:
        warnings.warn(f"{faults}; left out", stacklevel=2)
    else:
        faults.refuse("correct them, or leave them out with data.broken=drop")
    return records


def _object_numbers(path: Path, size: tuple[int, int], faults: Faults) -> np.ndarray | None:
    if not path.is_file():
        faults.add("image", path)
        return None
    with Image.open(path) as picture:
        numbers = np.asarray(picture)
    if numbers.shape != size:
        faults.add("size", path)
        return None
    return numbers
