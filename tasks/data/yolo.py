"""YOLO's data sets: a ``data.yaml``, images, and beside them a text file each, a line an object.

The format: https://docs.ultralytics.com/datasets/detect/ and /datasets/segment/. A line is a class's number and then a
box, ``cx cy w h``, or a polygon, ``x1 y1 x2 y2 x3 y3 ...``, in units of the image's sides. A picture without a text
file has no objects.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...zoo.library_errors import first_line
from .. import TaskError, nearest
from ..extras import require
from .annotations import Faults, check_names, in_threads, is_number, read_lines, size_or_error
from .coco import Instances, Record, check_object
from .images import DamagedImageError, list_images

# Pixels are rounded to so many decimals: as a COCO file has them, so that both train to the same numbers.
DECIMALS = 6


def find_yaml(root: Path) -> Path:
    """Return the description of a data set: ``data.yaml``, or else the only file of that kind in the folder.

    Raises:
        TaskError: If there is none, or several.
    """
    for name in ("data.yaml", "dataset.yaml"):
        if (root / name).is_file():
            return root / name
    others = sorted(file for file in root.iterdir() if file.suffix in (".yaml", ".yml") and file.is_file())
    if len(others) == 1:
        return others[0]
    if others:
        raise TaskError(f"{root}: which is it, {' or '.join(file.name for file in others)}? call it data.yaml")
    raise TaskError(f"{root / 'data.yaml'}: no such file; it says where the images of each split are and names classes")


def read_yaml(root: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """Return the file that describes a data set, what it says, and the names of the classes.

    Raises:
        TaskError: If it can't be read, names no classes or not as many as it says, or is about keypoints.
    """
    path = find_yaml(root)
    yaml = require("yaml")
    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise TaskError(f"{path}: can't be read as YAML ({first_line(error)})") from error
    if not isinstance(content, dict) or not isinstance(content.get("names"), list | dict):
        raise TaskError(f"{path}: has no list of `names`, the classes in the order of their numbers")
    names = content["names"]
    if isinstance(names, dict):
        # PyYAML reads 0: as a number, and "0": as text.
        numbers = {str(key): name for key, name in names.items()}
        if set(numbers) != {str(number) for number in range(len(names))}:
            raise TaskError(f"{path}: `names` must number the classes 0 to {len(names) - 1}")
        names = [numbers[str(number)] for number in range(len(names))]
    # A class may be called 0, or yes, which YAML takes for other things.
    names = [str(name) if isinstance(name, bool | int | float) else name for name in names]
    check_names(names, f"{path}: `names`")
    if content.get("nc") not in (None, len(names)):
        raise TaskError(f"{path}: nc is {content['nc']!r}, but `names` has {len(names)}")
    if content.get("kpt_shape") is not None:
        raise TaskError(f"{path}: kpt_shape says that its lines hold keypoints, which aren't trained on")
    return path, content, names


def find_pictures(path: Path, content: dict[str, Any], split: str) -> tuple[list[Path], list[Path]]:
    """Return the images of a split, and the folders among its places, whose labels are all of this split.

    Places count from ``path`` in data.yaml where that is a folder, and else from data.yaml's own; ``../`` in front of
    them, as Roboflow writes, is left out where it leads nowhere.

    Args:
        path: The data.yaml.
        content: What it says, of `read_yaml`.
        split: Its key there.

    Raises:
        TaskError: If data.yaml has no such split, or a place isn't there or holds no image.
    """
    root, places = path.parent, content.get(split)
    places = [places] if isinstance(places, str) else places
    if not places or not isinstance(places, list) or not all(isinstance(place, str) and place for place in places):
        known = [key for key in ("train", "val", "test") if content.get(key)]
        raise TaskError(
            f"{path}: has no {split!r}, a folder or a list of images; it has {', '.join(known) or 'no split'}"
        )
    base = content.get("path")
    bases = [root / base, root] if isinstance(base, str) and (root / base).is_dir() else [root]
    pictures, folders = [], []
    for place in places:
        tried = [base / name for base in bases for name in dict.fromkeys((place, place.removeprefix("../")))]
        there = next((file for file in tried if file.exists()), None)
        if there is None:
            raise TaskError(
                f"{path}: {split} is {place}, but there is no {' or '.join(map(str, dict.fromkeys(tried)))}"
            )
        if there.is_dir():
            pictures += list_images(there)
            folders.append(there)
        else:
            if there.suffix != ".txt":  # else a data.yaml could have any file's lines shown
                raise TaskError(f"{path}: {split} is {place}, but a list of images ends with .txt")
            lines = [line for line in read_lines(there) if line]
            pictures += [Path(os.path.normpath(there.parent / line)) for line in lines]
    if not pictures:
        raise TaskError(f"{path}: {split} holds no image: {', '.join(places)}")
    return list(dict.fromkeys(pictures)), folders


def labels_of(picture: Path) -> Path:
    """Return where the objects of a picture are: the last ``images`` of its path is ``labels``, and its ending .txt."""
    parts = list(picture.parts)
    places = [index for index, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def read_yolo(
    root: str | Path, split: str, with_masks: bool | None = False, broken: str = "refuse", skip_damaged: bool = False
) -> tuple[list[Record], list[str]]:
    """Read a split of a YOLO data set.

    Args:
        root: Folder with ``data.yaml``.
        split: Its key there.
        with_masks: Whether every object must be a polygon; None: each may be.
        broken: ``"refuse"`` or ``"drop"``, as for `coco.read_instances`.
        skip_damaged: Whether images that can't be read are left to the loader; their objects, of which the size isn't
            known, are left out.

    Returns:
        Images in the order of their paths, or of the split's list, and the names of the classes.

    Raises:
        TaskError: If data.yaml is missing or wrong, or lines are malformed or of unknown classes; one error lists them.
    """
    root = Path(root)
    path, content, names = read_yaml(root)
    pictures, folders = find_pictures(path, content, split)
    faults = Faults(root)
    owners: dict[Path, Path] = {}
    for picture in pictures:
        other = owners.setdefault(labels_of(picture), picture)
        if not os.path.isfile(picture):
            faults.add("image", picture)
        elif other != picture:
            faults.add("id", f"{other} and {picture.name} share one file of labels")
    present = [picture for picture in owners.values() if os.path.isfile(picture)]
    _find_orphans(present, folders, faults)
    records = []
    for picture, read in zip(present, in_threads(size_or_error, present), strict=True):
        if isinstance(read, DamagedImageError):
            if not skip_damaged:
                faults.add("damaged", read)
                continue
            records.append(Record(picture, (1, 1), picture.stem, Instances.gather([], with_masks)))
            continue
        (size, _), objects = read, []
        for place, annotation in _objects(labels_of(picture), size, faults):
            label = annotation["category_id"]
            if not 0 <= label < len(names):
                faults.add("category", f"{place}: {label}, of {len(names)} classes")
            elif with_masks and "segmentation" not in annotation:
                faults.add("unmasked", place)
            else:
                image, before = {"height": size[0], "width": size[1]}, len(faults)
                checked = check_object(annotation, image, with_masks, faults, place)
                if checked is not None:
                    objects.append((*checked, label))
                elif len(faults) == before:
                    faults.add("flat", place)
        records.append(Record(picture, size, picture.stem, Instances.gather(objects, with_masks)))
    cure = "correct the files"
    if with_masks and "unmasked" in faults.places:
        cure += "; boxes alone train detectors without masks (detect/finetune, model.head=faster_rcnn)"
    faults.settle(broken, cure, len(records))
    if not any(labels_of(picture).is_file() for picture in present):
        raise TaskError(f"{root}: no image of {split} has a file of labels, such as {labels_of(pictures[0])}")
    return records, names


def _find_orphans(pictures: list[Path], folders: list[Path], faults: Faults) -> None:
    """Note the files of labels in the folders of a split that belong to no picture."""
    labels = {labels_of(picture) for picture in pictures}
    for folder in folders:
        # A picture's name in a folder tells where the labels of that folder are.
        beside = labels_of(folder / "picture.png").parent
        for file in sorted(beside.rglob("*.txt")) if beside.is_dir() else ():
            if file not in labels and file.name != "classes.txt":
                faults.add("owner", file)


def _objects(file: Path, size: tuple[int, int], faults: Faults) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file of labels as COCO's annotations in pixels, each with its place; note faults."""
    if not file.is_file():
        return
    try:
        lines = read_lines(file)
    except TaskError as error:
        faults.add("damaged", error)
        return
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        place = f"{file}, line {number}"
        numbers = [_number(word) for word in words]
        count = len(words)
        if not all(is_number(value) for value in numbers) or numbers[0] != int(numbers[0]):
            faults.add("field", f"{place}: {line[:40]!r}")
        elif count != 5 and (count < 7 or count % 2 == 0):
            faults.add("field", f"{place}: {count} numbers; a box has 5, a polygon 7, 9, 11, ...")
        else:
            annotation = {"category_id": int(numbers[0]), "iscrowd": 0}
            if count == 5:
                yield place, annotation | {"bbox": _to_pixels_box(numbers[1:], size)}
            else:
                polygon = [
                    round(value * side, DECIMALS)
                    for value, side in zip(numbers[1:], size[::-1] * (count // 2), strict=True)
                ]
                xs, ys = polygon[::2], polygon[1::2]
                box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
                yield place, annotation | {"bbox": [round(value, DECIMALS) for value in box], "segmentation": [polygon]}


def _to_pixels_box(box: list[float], size: tuple[int, int]) -> list[float]:
    """Return ``x y w h`` in pixels of a box ``cx cy w h`` in units of the sides."""
    (cx, cy, w, h), (height, width) = box, size
    sides = ((cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height)
    return [round(value, DECIMALS) for value in sides]


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


def _named(root: Path, data: dict, names: list[str]) -> list[str]:
    """Return the classes, by ``data.classes`` or else data.yaml; lines hold numbers, so that both must agree."""
    if data["classes"] is not None and list(data["classes"]) != names:
        odd = next((name for name in data["classes"] if name not in names), None)
        hint = nearest(str(odd), names) if odd is not None else "; leave it None"
        raise TaskError(f"data.classes is {list(data['classes'])}, but {find_yaml(root)} has {names}{hint}")
    return names


def find_objects(
    root: Path, data: dict, split: str, with_masks: bool | None, skip_damaged: bool
) -> tuple[list[Record], list[str]]:
    """Return the images of a split with their objects, and the classes."""
    records, names = read_yolo(root, data[split]["split"], with_masks, data["broken"], skip_damaged)
    return records, _named(root, data, names)


def find_instances(
    root: Path, data: dict, split: str, skip_damaged: bool
) -> tuple[list[Record], list[str], list[bool]]:
    """Return the images of a split with their objects, the classes, and that all are things."""
    records, names = find_objects(root, data, split, True, skip_damaged)
    return records, names, [True] * len(names)


def recognise(root: Path) -> dict[str, Any] | None:
    """Return the settings of ``data`` by which a folder is read, if it looks like a YOLO data set; else None."""
    if not any(file.suffix in (".yaml", ".yml") for file in root.iterdir()):
        places = [folder for folder in (root, root / "train") if (folder / "images").is_dir()]
        if any(next((folder / "labels").rglob("*.txt"), None) for folder in places):
            find_yaml(root)  # which says what is missing
        return None
    _, content, _ = read_yaml(root)
    return {split: {"split": split} if content.get(split) else None for split in ("train", "val")}
