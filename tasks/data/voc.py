"""Pascal VOC: objects in XML, and the pictures that number them."""

import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import TaskError
from ..dense.detect.boxes import has_area
from .annotations import Faults, check_names, is_count, is_number, read_lines
from .augment import IGNORE
from .coco import Instances, Record, encode_mask
from .images import DamagedImageError, list_images, read_size, read_values
from .label_maps import class_of_values

_NAMES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
)
CLASSES = _NAMES.split()
# So many files are looked at to know which classes a folder of one's own has.
_LOOKED_AT = 5000


def name_classes(given: Sequence[str] | None) -> list[str]:
    """Return the names of the objects' classes, by ``data.classes`` or else Pascal's 20; the background is none.

    Raises:
        TaskError: If one is the background, empty or there twice.
    """
    names = CLASSES if given is None else check_names(given, "data.classes")
    if "background" in names:
        raise TaskError("data.classes: of voc name the objects' classes only; label maps have the background as 0")
    return list(names)


class Names:
    """The images of a Pascal VOC folder by their names.

    Attributes:
        root: Folder with ``Annotations``, ``JPEGImages`` and ``ImageSets``.

    Raises:
        TaskError: If the folder has no ``JPEGImages``.
    """

    def __init__(self, root: Path):
        self.root = root
        self._pictures: dict[str, list[Path]] = {}
        for picture in list_images(root / "JPEGImages"):
            name = picture.relative_to(root / "JPEGImages").with_suffix("").as_posix()
            self._pictures.setdefault(name, []).append(picture)

    def picture(self, name: str, faults: Faults) -> Path | None:
        """Return a name's picture: NAME.jpg, or the only one with another ending; None with a fault noted."""
        usual, files = self.root / "JPEGImages" / f"{name}.jpg", self._pictures.get(name, [])
        if not files:
            faults.add("image", usual)
        elif len(files) > 1 and usual not in files:
            faults.add("id", " and ".join(map(str, files)))
        else:
            return usual if usual in files else files[0]
        return None

    def listed(self, part: str, split: str) -> list[str]:
        """Return the names of ``ImageSets/PART/SPLIT.txt``, each once; they may hold spaces.

        Pascal's lists of one class have a second column, of 1, 0 (difficult) or -1 (absent), which is left out.

        Raises:
            TaskError: If there is no such list, or it isn't UTF-8.
        """
        listing = self.root / "ImageSets" / part / f"{split}.txt"
        if not listing.is_file():
            raise TaskError(f"{listing}: no such file; data.root is a folder such as VOCdevkit/VOC2012")
        names = list(dict.fromkeys(line for line in read_lines(listing) if line))
        if not names:
            raise TaskError(f"{listing}: lists no image")
        columns = [name.rsplit(maxsplit=1) for name in names]
        # A name such as "cell 1" has a picture of its own.
        if all(column[1:] in (["-1"], ["0"], ["1"]) for column in columns) and not self._pictures.keys() & set(names):
            names = list(dict.fromkeys(column[0] for column in columns))
        return names


def read_voc(
    root: str | Path,
    split: str,
    classes: Sequence[str] = CLASSES,
    with_masks: bool = False,
    broken: str = "refuse",
    skip_damaged: bool = False,
) -> list[Record]:
    """Read Pascal VOC's annotations.

    Boxes count pixels from 1 and include their last one: ``xmin .. xmax`` becomes ``xmin - 1 .. xmax``. Difficult
    objects are taken as crowds: not trained on, not counted. A size that is missing, or 0 as labelImg writes where it
    doesn't know it, is the picture's.

    Args:
        root: Folder with ``Annotations``, ``JPEGImages`` and ``ImageSets``.
        split: Name of a list of images: a file of ``ImageSets/Main``, or with masks of ``ImageSets/Segmentation``.
        classes: Names of the classes, in the order of the labels.
        with_masks: Whether to read ``SegmentationObject``, where object k of the XML has the value k.
        broken: ``"refuse"`` or ``"drop"``, as for `coco.read_instances`.
        skip_damaged: Whether images that can't be read are no fault here.

    Raises:
        TaskError: If files are missing or broken; one error lists them.
    """
    root = Path(root)
    names, faults = Names(root), Faults(root)
    parsed = []
    for name in names.listed("Segmentation" if with_masks else "Main", split):
        file = names.picture(name, faults)
        tree = None if file is None else _read_tree(root, name, faults)
        if tree is not None:
            size = _read_size(tree, file, faults, name)
            if size is not None:
                parsed.append((name, file, tree, size))
    fits = faults.check_pictures([(file, size) for _, file, _, size in parsed], skip_damaged)
    records, unknown = [], {}
    for (name, file, tree, size), good in zip(parsed, fits, strict=True):
        numbers = _read_numbers(root / "SegmentationObject" / f"{name}.png", size, faults) if with_masks else None
        if not good or (with_masks and numbers is None):
            continue
        objects = []
        for number, node in enumerate(tree.iter("object"), start=1):
            checked = _check_object(node, size, numbers, number, faults, f"{name}.xml, object {number}")
            label = (node.findtext("name") or "").strip()
            if label not in classes:
                faults.add("category", f"{name}.xml, object {number}: {label or 'no name'}")
                unknown[label] = None
            elif checked is not None:
                objects.append((*checked, classes.index(label)))
        records.append(Record(file, size, name, Instances.gather(objects, with_masks)))
    unknown.pop("", None)
    cure = f"if these are your classes, name all with data.classes, such as {list(unknown)[:5]}" if unknown else None
    faults.settle(broken, cure or "correct them", len(records))
    return records


def check_classes(names: Names, listed: Sequence[str], classes: Sequence[str], given: bool) -> None:
    """Compare the classes that label maps are taken for with the objects that ``Annotations`` names.

    Args:
        names: The folder.
        listed: Names of the images.
        classes: Names of the classes, without the background.
        given: Whether the user named them; else a warning says what is assumed where no annotation tells.

    Raises:
        TaskError: If there are objects of other classes.
    """
    object_names: dict[str, None] = {}
    for name in listed:
        if (names.root / "Annotations" / f"{name}.xml").is_file():
            tree = _read_tree(names.root, name, Faults(names.root))
            object_names |= (
                {} if tree is None else {(node.findtext("name") or "").strip(): None for node in tree.iter("object")}
            )
    strange = sorted(object_names.keys() - set(classes) - {""})
    if strange:
        raise TaskError(
            f"{names.root}: Annotations name objects of other classes than {'data.classes' if given else 'Pascal'}: "
            f"{', '.join(strange[:5])}{', ...' if len(strange) > 5 else ''}; name yours, in the order of the values "
            "from 1 and without the background, with data.classes"
        )
    if not object_names and not given:
        warnings.warn(
            f"{names.root}: no Annotations tell the classes; 1 to 20 are taken for Pascal's, aeroplane to tvmonitor; "
            "name others, without the background, with data.classes",
            stacklevel=2,
        )


def _read_tree(root: Path, name: str, faults: Faults) -> ElementTree.Element | None:
    try:
        return ElementTree.parse(root / "Annotations" / f"{name}.xml").getroot()
    except (OSError, ElementTree.ParseError, LookupError, ValueError, RecursionError):
        faults.add("damaged", f"Annotations/{name}.xml")
        return None


def _number(node: ElementTree.Element, key: str) -> float | None:
    """Return a finite number below a node, or None."""
    try:
        value = float(node.findtext(key))
    except (TypeError, ValueError):
        return None
    return value if is_number(value) else None


def _read_size(tree: ElementTree.Element, file: Path, faults: Faults, name: str) -> tuple[int, int] | None:
    texts = [(tree.findtext(f"size/{side}") or "0").strip() for side in ("height", "width")]
    if texts == ["0", "0"]:
        try:
            return read_size(file)[0]
        except DamagedImageError as error:
            faults.add("damaged", error)
            return None
    size = [_number(tree, f"size/{side}") for side in ("height", "width")]
    if not all(side is not None and is_count(side) for side in size):
        faults.add("field", f"{name}.xml: size {' x '.join(texts)}")
        return None
    return int(size[0]), int(size[1])


def _check_object(
    node: ElementTree.Element,
    size: tuple[int, int],
    numbers: np.ndarray | None,
    number: int,
    faults: Faults,
    place: str,
) -> tuple | None:
    """Return box, area, crowd and mask of an object; None with a fault noted."""
    box = [_number(node, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    if None in box:
        faults.add("flat", place)
        return None
    if min(box[:2]) < 0 or box[2] > size[1] + 1 or box[3] > size[0] + 1:
        faults.add("box", place)
        return None
    box = [max(box[0] - 1, 0), max(box[1] - 1, 0), min(box[2], size[1]), min(box[3], size[0])]
    if not has_area(np.array([box])):
        faults.add("flat", place)
        return None
    difficult = (node.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        faults.add("field", f"{place}: difficult {difficult!r:.40}")
        return None
    if numbers is None:
        return box, float((box[2] - box[0]) * (box[3] - box[1])), difficult == "1", None
    mask = numbers == number
    if not mask.any():
        faults.add("polygon", place)
        return None
    return box, float(mask.sum()), difficult == "1", encode_mask(mask)


def _read_numbers(path: Path, size: tuple[int, int], faults: Faults) -> np.ndarray | None:
    if not path.is_file():
        faults.add("image", path)
        return None
    try:
        numbers = read_values(path)
    except DamagedImageError as error:
        faults.add("damaged", error)
        return None
    if numbers.shape != size:
        faults.add("size", path)
        return None
    return numbers


def find_maps(root: Path, data: dict, split: str, faults: Faults) -> tuple[list, Sequence[str], np.ndarray]:
    """Return Pascal VOC's files: 0 is background, 255 the borders of objects."""
    classes = name_classes(data["classes"])
    names = Names(root)
    listed = names.listed("Segmentation", data[split]["split"])
    check_classes(names, listed, classes, data["classes"] is not None)
    files = []
    for name in listed:
        picture = names.picture(name, faults)
        if picture is not None:
            files.append((picture, root / "SegmentationClass" / f"{name}.png"))
    classes = ["background", *classes]
    return files, classes, class_of_values({255: IGNORE, **{label: label for label in range(len(classes))}})


def find_objects(
    root: Path, data: dict, split: str, with_masks: bool | None, skip_damaged: bool
) -> tuple[list[Record], list[str]]:
    """Return the images of a split with their objects, and the classes."""
    classes = name_classes(data["classes"])
    return read_voc(root, data[split]["split"], classes, bool(with_masks), data["broken"], skip_damaged), classes


def recognise(root: Path, part: str = "Main") -> dict | None:
    """Return the settings of ``data`` by which a folder is read, if it looks like Pascal VOC's; else None.

    Args:
        root: The folder.
        part: ``"Main"`` for objects, ``"Segmentation"`` for label maps.
    """
    lists = root / "ImageSets" / part
    labels = root / {"Main": "Annotations", "Segmentation": "SegmentationClass"}[part]
    if not (labels.is_dir() and (root / "JPEGImages").is_dir()):
        return None
    train = next((name for name in ("train", "trainval") if (lists / f"{name}.txt").is_file()), None)
    val = next((name for name in ("val", "test") if (lists / f"{name}.txt").is_file()), None)
    if train is None:
        if not any((root / "ImageSets").glob("[MS]*/train*.txt")):
            raise TaskError(f"{lists / 'train.txt'}: no such file; list the names of the images to train on there")
        return None
    settings: dict = {"train": {"split": train}, "val": val and {"split": val}}
    names = Names(root)
    listed = names.listed(part, train)[:_LOOKED_AT]
    classes: dict[str, None] = {}
    for tree in (_read_tree(root, name, Faults(root)) for name in listed):
        classes |= {} if tree is None else {(node.findtext("name") or "").strip(): None for node in tree.iter("object")}
    named = classes.keys() - {""}  # an object without a name is told as it is read
    if part == "Main" and not named <= {*CLASSES}:
        settings["classes"] = tuple(sorted(named))
    return settings
