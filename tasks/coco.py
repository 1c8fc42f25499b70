"""Instances and segments as COCO annotates them: reading and checking the JSON, polygons and run lengths.

The formats: https://cocodataset.org/#format-data. Masks are encoded and decoded by faster-coco-eval.
"""

import dataclasses
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle_codec

from . import TaskError
from .annotations import Faults

# COCO's own boxes leave their image by rounding, by less than this many pixels.
BOX_TOLERANCE = 1.0


@dataclasses.dataclass
class Instances:
    """The objects of one image.

    Attributes:
        boxes: ``[N, 4]``, float64, ``x1, y1, x2, y2`` in pixels; width is ``x2 - x1``.
        labels: ``[N]``, int64, from 0.
        areas: ``[N]``, float64, in pixels; of the mask where there is one.
        crowd: ``[N]``, bool: regions of several objects, which training leaves out and evaluation doesn't count.
        masks: For each object a list of polygons, or run lengths; None if the data set has no masks.
    """

    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    masks: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, keep: np.ndarray) -> "Instances":
        """Return those objects that a boolean array ``[N]`` keeps."""
        masks = None if self.masks is None else [self.masks[index] for index in np.flatnonzero(keep)]
        return Instances(self.boxes[keep], self.labels[keep], self.areas[keep], self.crowd[keep], masks)

    @classmethod
    def gather(cls, objects: Sequence[tuple], with_masks: bool) -> "Instances":
        """Return objects, each given as ``(box, area, crowd, mask, label)``, as one."""
        boxes, areas, crowd, masks, labels = zip(*objects, strict=True) if objects else ((),) * 5
        return cls(
            np.array(boxes, dtype=np.float64).reshape(-1, 4),
            np.array(labels, dtype=np.int64),
            np.array(areas, dtype=np.float64),
            np.array(crowd, dtype=bool),
            list(masks) if with_masks else None,
        )


@dataclasses.dataclass
class Record:
    """An image of a data set.

    Attributes:
        file: The image.
        size: Its height and width.
        id: Its number, or name, in the annotations.
        instances: Its objects.
    """

    file: Path
    size: tuple[int, int]
    id: int | str
    instances: Instances


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Return the run lengths ``{"size": [H, W], "counts": bytes}`` of a mask ``[H, W]``."""
    return rle_codec.encode(np.asfortranarray(mask, dtype=np.uint8))


def to_run_lengths(mask: Any, height: int, width: int) -> dict[str, Any]:
    """Return the compressed run lengths of a COCO ``segmentation``: polygons or run lengths of either form."""
    if isinstance(mask, dict):
        return rle_codec.frPyObjects(mask, height, width) if isinstance(mask["counts"], list) else mask
    return rle_codec.merge(rle_codec.frPyObjects([list(polygon) for polygon in mask], height, width))


def decode_masks(masks: Sequence[Any], height: int, width: int) -> np.ndarray:
    """Return the masks ``[N, height, width]``, uint8 of 0 and 1, of COCO segmentations."""
    if not masks:
        return np.zeros((0, height, width), np.uint8)
    return np.ascontiguousarray(
        np.stack([rle_codec.decode(to_run_lengths(mask, height, width)) for mask in masks]), dtype=np.uint8
    )


def mask_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Return the box ``x1, y1, x2, y2`` around a mask ``[H, W]`` that isn't empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def read_json(path: str | Path, keys: Sequence[str]) -> dict:
    """Read an annotation file and check that it has lists under ``keys``.

    Raises:
        TaskError: If the file is missing, isn't JSON, or lacks a key.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise TaskError(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise TaskError(f"{path}: can't be read as JSON ({str(error).splitlines()[0]})") from error
    lacking = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if lacking:
        raise TaskError(f"{path}: no COCO annotations: it has no list of {' or '.join(lacking)}")
    return content


def read_instances(
    path: str | Path, folder: str | Path, with_masks: bool = True, broken: str = "refuse"
) -> tuple[list[Record], list[str], list[int]]:
    """Read a COCO file of instances.

    Boxes without area are left out, as mmdet does; those that leave the image by less than a pixel are clipped.

    Args:
        path: JSON file.
        folder: Where the images lie.
        with_masks: Whether every object needs a mask.
        broken: ``"refuse"``: faults raise one error that lists them. ``"drop"``: they are listed in a warning, and the
            objects and images that have them are left out.

    Returns:
        Images in the order of the file; names of the classes, in the order of the labels; their category ids.

    Raises:
        TaskError: If the file can't be read, holds no image or no category, or ``broken`` is ``"refuse"`` and images
            are missing, ids are repeated, boxes lie outside, polygons are empty, or categories or images are unknown.
    """
    content = read_json(path, ("images", "annotations", "categories"))
    folder, faults = Path(folder), Faults(path)
    categories = _by_id(content["categories"], faults, "category")
    images = _by_id(content["images"], faults, "image")
    if not images or not categories:
        raise TaskError(f"{path}: holds no {'categories' if images else 'images'}")
    label_of = {category: label for label, category in enumerate(categories)}
    present = {}
    for key, image in images.items():
        if (folder / image["file_name"]).is_file():
            present[key] = image
        else:
            faults.add("image", folder / image["file_name"])
    objects: dict[Any, list[tuple]] = {key: [] for key in present}
    seen = set()
    for annotation in content["annotations"]:
        place = f"annotation {annotation.get('id')}"
        if annotation.get("id") is not None:
            if annotation["id"] in seen:
                faults.add("id", place)
                continue
            seen.add(annotation["id"])
        image = images.get(annotation.get("image_id"))
        if image is None:
            faults.add("owner", place)
        elif annotation.get("category_id") not in label_of:
            faults.add("category", f"{place}: {annotation.get('category_id')}")
        elif annotation["image_id"] in present:
            checked = _check_object(annotation, image, with_masks, faults, place)
            if checked is not None:
                objects[annotation["image_id"]].append((*checked, label_of[annotation["category_id"]]))
    if broken == "drop" and faults:
        warnings.warn(f"{faults}; left out", stacklevel=2)
    else:
        faults.refuse("correct the file, or leave them out with data.broken=drop")
    records = [
        Record(
            folder / image["file_name"],
            (image["height"], image["width"]),
            key,
            Instances.gather(objects[key], with_masks),
        )
        for key, image in present.items()
    ]
    return records, [category["name"] for category in categories.values()], list(categories)


def _by_id(entries: list[dict], faults: Faults, what: str) -> dict[Any, dict]:
    found: dict[Any, dict] = {}
    for entry in entries:
        if entry.get("id") in found:
            faults.add("id", f"{what} {entry.get('id')}")
        else:
            found[entry.get("id")] = entry
    return found


def _check_object(annotation: dict, image: dict, with_masks: bool, faults: Faults, place: str) -> tuple | None:
    """Return box, area, crowd and mask of an annotation, or None with a fault noted."""
    height, width = image["height"], image["width"]
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        faults.add("flat", place)
        return None
    x, y, w, h = map(float, box)
    if min(x, y) < -BOX_TOLERANCE or x + w > width + BOX_TOLERANCE or y + h > height + BOX_TOLERANCE:
        faults.add("box", place)
        return None
    if w < 0 or h < 0:
        faults.add("flat", place)
        return None
    clipped = (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))
    if clipped[2] - clipped[0] <= 0 or clipped[3] - clipped[1] <= 0:
        # COCO's own training file has two of them, which mmdet leaves out too.
        return None
    mask = annotation.get("segmentation") if with_masks else None
    if with_masks:
        if isinstance(mask, dict):
            if list(mask.get("size", ())) != [height, width]:
                faults.add("size", place)
                return None
        else:
            mask = [polygon for polygon in mask or () if len(polygon) >= 6 and len(polygon) % 2 == 0]
            if not mask:
                faults.add("polygon", place)
                return None
            mask = [np.asarray(polygon, dtype=np.float64) for polygon in mask]
    area = float(annotation.get("area", w * h))
    return clipped, area, bool(annotation.get("iscrowd", 0)), mask


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass
class PanopticRecord:
    """An image with its segments.

    Attributes:
        file: The image.
        size: Its height and width.
        map: Picture of segment ids: red + 256 green + 65536 blue.
        ids: The segments' ids.
        labels: Their classes, from 0.
        crowd: Whether each is a region of several objects.
    """

    file: Path
    size: tuple[int, int]
    map: Path
    ids: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray


def read_panoptic(
    path: str | Path, folder: str | Path, maps: str | Path | None = None, broken: str = "refuse"
) -> tuple[list[PanopticRecord], list[str], list[bool]]:
    """Read a COCO panoptic file.

    Args:
        path: JSON file.
        folder: Where the images lie.
        maps: Where the pictures of segment ids lie; beside the JSON, in a folder of its name, if None.
        broken: As for `read_instances`.

    Returns:
        Images in the order of the file; names of the classes; for each class whether it is of things.

    Raises:
        TaskError: As for `read_instances`.
    """
    content = read_json(path, ("images", "annotations", "categories"))
    path, folder, faults = Path(path), Path(folder), Faults(path)
    maps = path.with_suffix("") if maps is None else Path(maps)
    categories = _by_id(content["categories"], faults, "category")
    images = _by_id(content["images"], faults, "image")
    if not images or not categories:
        raise TaskError(f"{path}: holds no {'categories' if images else 'images'}")
    label_of = {category: label for label, category in enumerate(categories)}
    records, seen = [], set()
    for annotation in content["annotations"]:
        key = annotation.get("image_id")
        image = images.get(key)
        if image is None:
            faults.add("owner", f"annotation of image {key}")
            continue
        if key in seen:
            faults.add("id", f"annotation of image {key}")
            continue
        seen.add(key)
        file, segments = folder / image["file_name"], maps / annotation["file_name"]
        absent = [name for name in (file, segments) if not name.is_file()]
        for name in absent:
            faults.add("image", name)
        ids, labels, crowd = [], [], []
        for segment in annotation.get("segments_info", ()):
            if segment.get("category_id") not in label_of:
                faults.add("category", f"segment {segment.get('id')} of image {key}: {segment.get('category_id')}")
            elif segment.get("id") in ids:
                faults.add("id", f"segment {segment.get('id')} of image {key}")
            else:
                ids.append(segment["id"])
                labels.append(label_of[segment["category_id"]])
                crowd.append(bool(segment.get("iscrowd", 0)))
        if not absent:
            arrays = (np.array(ids, np.int64), np.array(labels, np.int64), np.array(crowd, bool))
            records.append(PanopticRecord(file, (image["height"], image["width"]), segments, *arrays))
    for key in images.keys() - seen:
        faults.add("pair", images[key]["file_name"])
    if broken == "drop" and faults:
        warnings.warn(f"{faults}; left out", stacklevel=2)
    else:
        faults.refuse("correct the file, or leave them out with data.broken=drop")
    things = [bool(category.get("isthing", 1)) for category in categories.values()]
    return records, [category["name"] for category in categories.values()], things


def read_segment_ids(picture: np.ndarray) -> np.ndarray:
    """Return the segment ids ``[H, W]``, int64, of a panoptic picture ``[H, W, 3]`` of RGB."""
    red, green, blue = np.moveaxis(picture.astype(np.int64), -1, 0)
    return red + 256 * green + 65536 * blue
