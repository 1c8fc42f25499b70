"""Pascal VOC: objects in XML, and the pictures that number them."""

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from . import TaskError
from .annotations import Faults, has_area, is_count, is_number, read_lines
from .coco import Instances, Record, encode_mask
from .images import DamagedImageError, has_image_name, open_picture, read_size

_NAMES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
)
CLASSES = _NAMES.split()


def read_list(root: Path, part: str, split: str) -> list[str]:
    """Return the names of ``ImageSets/PART/SPLIT.txt``, each once; they may hold spaces.

    Pascal's lists of one class have a second column of 1, 0 (difficult) or -1 (absent), which is left out.

    Raises:
        TaskError: If there is no such list, or it isn't UTF-8.
    """
    listing = root / "ImageSets" / part / f"{split}.txt"
    if not listing.is_file():
        raise TaskError(f"{listing}: no such file; data.root is a folder such as VOCdevkit/VOC2012")
    names = list(dict.fromkeys(line for line in read_lines(listing) if line))
    columns = [name.rsplit(maxsplit=1) for name in names]
    # A name such as "cell 1" has files of its own.
    if all(len(column) == 2 and column[1] in ("-1", "0", "1") for column in columns) and not any(
        (root / "Annotations" / f"{name}.xml").is_file() or find_picture(root, name) for name in names
    ):
        names = list(dict.fromkeys(column[0] for column in columns))
    return names


def find_picture(root: Path, name: str) -> Path | None:
    """Return the picture of a name in ``JPEGImages``: NAME.jpg, or else the only one with a known ending.

    Raises:
        TaskError: If there are several, of which none is NAME.jpg.
    """
    usual = root / "JPEGImages" / f"{name}.jpg"
    if os.path.isfile(usual):
        return usual
    found = [
        usual.parent / entry for entry in _entries(usual.parent) if has_image_name(entry) and _stem(entry) == usual.stem
    ]
    if len(found) > 1:
        raise TaskError(f"{' and '.join(map(str, sorted(found)))} have one name; keep one of them")
    return found[0] if found else None


def check_classes(root: Path, names: Sequence[str], classes: Sequence[str], broken: str) -> None:
    """Compare the objects that ``Annotations`` names with the classes.

    Raises:
        TaskError: If there are objects of other classes, unless ``broken`` is ``"drop"``.
    """
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
