"""Instances and segments as COCO annotates them: reading and checking the JSON, polygons and run lengths.

The formats: https://cocodataset.org/#format-data. Masks are encoded and decoded by faster-coco-eval.
"""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import mask_api_new_cpp
from faster_coco_eval.core import mask as rle_codec
from PIL import Image

from .. import TaskError
from ..dense.detect.boxes import has_area
from .annotations import Faults, distinct, in_threads, is_count, is_number, lies_in
from .images import FULL_WHITE, DamagedImageError, read_image

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
        masks: For each object a list of polygons, or run lengths; None if the data set has no masks, or was asked for
            none.
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
    def gather(cls, objects: Sequence[tuple], with_masks: bool | None) -> "Instances":
        """Return objects, each given as ``(box, area, crowd, mask, label)``, as one."""
        boxes, areas, crowd, masks, labels = zip(*objects, strict=True) if objects else ((),) * 5
        return cls(
            np.array(boxes, dtype=np.float64).reshape(-1, 4),
            np.array(labels, dtype=np.int64),
            np.array(areas, dtype=np.float64),
            np.array(crowd, dtype=bool),
            None if with_masks is False else list(masks),
        )


@dataclasses.dataclass
class Record:
    """An image of a data set.

    Attributes:
        file: The image.
        size: Its height and width.
        id: Its number, or name, in the annotations.
        instances: Its objects.
        picture: Reads it, with so many channels and such a white, where it isn't a file of its own.
    """

    file: Path
    size: tuple[int, int]
    id: int | str
    instances: Instances
    picture: Callable[[int, int], Image.Image] | None = None


def read_picture(record: "Record | PanopticRecord", white: int = FULL_WHITE, channels: int = 3) -> Image.Image:
    """Return a record's image, RGB or of other channels.

    Args:
        record: Which.
        white: As for `read_image`.
        channels: As there.

    Raises:
        DamagedImageError: If it can't be read.
        TaskError: If it no longer has the size that it had when the annotations were checked.
    """
    read = getattr(record, "picture", None)
    image = read_image(record.file, channels, white) if read is None else read(channels, white)
    if (image.height, image.width) != tuple(record.size):
        raise TaskError(
            f"{record.file}: has {image.height}x{image.width} pixels, but its annotations say "
            f"{record.size[0]}x{record.size[1]}"
        )
    return image


def order_by_name(records: "Sequence[Record | PanopticRecord]", names: Sequence[str], expected: Sequence[str]) -> bool:
    """Number the classes of records as ``expected`` does, by their names; return whether both name the same ones.

    Args:
        records: Changed in place, if so.
        names: Names of their classes, in the order of the labels.
        expected: Names in the order that they shall have.
    """
    if list(names) == list(expected):
        return True
    if sorted(names) != sorted(expected) or len(set(names)) < len(names):
        return False
    labels = np.array([list(expected).index(name) for name in names], np.int64)
    for record in records:
        objects = record.instances if isinstance(record, Record) else record
        objects.labels = labels[objects.labels]
    return True


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


def mask_area(mask: dict[str, Any]) -> int:
    """Return how many pixels a mask's run lengths cover."""
    return int(rle_codec.area(mask))


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
    except (ValueError, OSError, RecursionError) as error:
        raise TaskError(f"{path}: can't be read as JSON ({str(error).splitlines()[0]})") from error
    lacking = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if lacking:
        raise TaskError(f"{path}: no COCO annotations: it has no list of {' or '.join(lacking)}")
    return content


def read_instances(
    path: str | Path,
    folder: str | Path,
    with_masks: bool | None = True,
    broken: str = "refuse",
    skip_damaged: bool = False,
) -> tuple[list[Record], list[str], list[int]]:
    """Read a COCO file of instances.

    Boxes without area are left out, as mmdet does; those that leave the image by less than a pixel are clipped. Where
    ``area`` isn't given, it is that of the mask, and of the box where there is no mask. Exports of CVAT, Label Studio
    and Roboflow are read as they are; Roboflow's first category, which only heads the others, is no class.

    Args:
        path: JSON file.
        folder: Where the images lie; their headers are read.
        with_masks: Whether every object needs a mask; None: those have one that do.
        broken: ``"refuse"``: faults raise one error that lists them. ``"drop"``: they are listed in a warning, and the
            objects and images that have them are left out.
        skip_damaged: Whether images that can't be read are no fault here.

    Returns:
        Images in the order of the file; names of the classes, in the order of the labels; their category ids.

    Raises:
        TaskError: If the file can't be read, or holds no image or no category that is in order; or ``broken`` is
            ``"refuse"`` and images are missing or of another size, ids are repeated, entries are missing or of another
            type, boxes or polygons lie outside, masks are malformed or empty, or categories or images are unknown.
    """
    path, folder, faults = Path(path), Path(folder), Faults(path)
    content = read_json(path, ("images", "annotations", "categories"))
    categories, images = _read_categories(content, faults), _read_images(content, faults)
    _leave_out_umbrella(categories, content["annotations"])
    _refuse_nothing(images, categories, faults)
    label_of = {category: label for label, category in enumerate(categories)}
    present = _check_images(images, folder, faults, skip_damaged)
    objects: dict[Any, list[tuple]] = {key: [] for key in present}
    for annotation, place in _entries(content["annotations"], "annotation", faults, needs_id=False):
        key, category = annotation.get("image_id"), annotation.get("category_id")
        if not _is_key(key) or key not in images:
            faults.add("owner", place)
        elif not _is_key(category) or category not in label_of:
            faults.add("category", f"{place}: {_short(category)}")
        elif key in present:
            checked = check_object(annotation, present[key], with_masks, faults, place)
            if checked is not None:
                objects[key].append((*checked, label_of[category]))
    faults.settle(broken, "correct the file", len(present))
    records = [
        Record(image["file"], _size(image), key, Instances.gather(objects[key], with_masks))
        for key, image in present.items()
    ]
    return records, [category["name"] for category in categories.values()], list(categories)


def _short(value: Any) -> str:
    """Return a value of JSON for a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _is_key(value: Any) -> bool:
    return isinstance(value, str) or is_number(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, int | float) and value in (0, 1)


def _entries(
    entries: list[Any], what: str, faults: Faults, needs_id: bool = True
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the entries of a list that are dicts with an id that none before had, each with what to call it."""
    seen = set()
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            faults.add("field", f"{what} {number} of the list: {_short(entry)}")
            continue
        key = entry.get("id")
        if not (_is_key(key) or (key is None and not needs_id)):
            faults.add("field", f"{what} {number} of the list: id {_short(key)}")
        elif key is not None and key in seen:
            faults.add("id", f"{what} {key}")
        else:
            seen.add(key)
            yield entry, f"{what} {number} of the list" if key is None else f"{what} {key}"


def _has(entry: dict, key: str, fits: Callable[[Any], bool], faults: Faults, place: str) -> bool:
    """Return whether an entry has a fitting value; else note the fault."""
    if fits(entry.get(key)):
        return True
    faults.add("field", f"{place}: {key} {_short(entry[key])}" if key in entry else f"{place}: no {key}")
    return False


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _read_categories(content: dict, faults: Faults) -> dict[Any, dict]:
    return {
        entry["id"]: entry
        for entry, place in _entries(content["categories"], "category", faults)
        if _has(entry, "name", _is_name, faults, place)
    }


def _leave_out_umbrella(categories: dict[Any, dict], annotations: list[Any]) -> None:
    """Leave out the category that Roboflow lists first and names as that of all others: it has no objects."""
    first = next(iter(categories.values()), {})
    others = list(categories.values())[1:]
    used = (entry.get("category_id") for entry in annotations if isinstance(entry, dict))
    if (
        others
        and first.get("supercategory") == "none"
        and all(entry.get("supercategory") == first["name"] for entry in others)
        and first["id"] not in [key for key in used if _is_key(key)]
    ):
        del categories[first["id"]]


def _read_images(content: dict, faults: Faults) -> dict[Any, dict | None]:
    """Return the images by their ids; None for those whose entries are wrong, so that their objects are known."""
    images: dict[Any, dict | None] = {}
    for entry, place in _entries(content["images"], "image", faults):
        checks = [_has(entry, "file_name", _is_name, faults, place)]
        checks += [_has(entry, side, is_count, faults, place) for side in ("height", "width")]
        images[entry["id"]] = entry if all(checks) else None
    return images


def _refuse_nothing(images: dict, categories: dict, faults: Faults) -> None:
    for what, entries in (("images", images), ("categories", categories)):
        if not any(entries.values()):
            faults.settle("refuse", "correct the file", 0)
            raise TaskError(f"{faults.source}: holds no {what}")


def _size(image: dict) -> tuple[int, int]:
    return int(image["height"]), int(image["width"])


def _check_images(images: dict[Any, dict | None], folder: Path, faults: Faults, skip_damaged: bool) -> dict[Any, dict]:
    """Return the images whose files are there and as large as annotated, each with its ``file``.

    Label Studio's names hold folders of its own, or of Windows: without them they count where they are of one image.
    """
    lasts = Counter(_last(image["file_name"]) for image in images.values() if image is not None)
    there = {}
    for key, image in images.items():
        if image is None:
            continue
        name = image["file_name"]
        places = [folder / name, folder / name.replace("\\", "/")]
        places += [folder / _last(name)] if lasts[_last(name)] == 1 else []
        inside = [place for place in places if lies_in(folder, place)]
        # Unlike Path's, it takes names that no file can have.
        file = next((place for place in inside if os.path.isfile(place)), None)
        if file is None and len(inside) < len(places):
            faults.add("elsewhere", _short(name))
        elif file is None:
            faults.add("image", folder / _short(name).strip("'\""))
        else:
            there[key] = image | {"file": file}
    fits = faults.check_pictures([(image["file"], _size(image)) for image in there.values()], skip_damaged)
    return {key: image for (key, image), good in zip(there.items(), fits, strict=True) if good}


def _last(name: str) -> str:
    """Return a file's name without folders, of Windows' paths too."""
    return name.replace("\\", "/").rpartition("/")[2]


def check_object(annotation: dict, image: dict, with_masks: bool | None, faults: Faults, place: str) -> tuple | None:
    """Return box, area, crowd and mask of an object; None if it is wrong, with a fault noted, or without area.

    Args:
        annotation: As a COCO file has it.
        image: Has ``height`` and ``width``.
        with_masks: Whether it needs a mask; None: it may have one.
        faults: Takes what is wrong.
        place: What to call it there.
    """
    height, width = _size(image)
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(value) for value in box):
        faults.add("flat", place)
        return None
    x, y, w, h = map(float, box)
    if min(x, y) < -BOX_TOLERANCE or x + w > width + BOX_TOLERANCE or y + h > height + BOX_TOLERANCE:
        faults.add("box", place)
        return None
    if w < 0 or h < 0:
        faults.add("flat", place)
        return None
    for key, fits in (("area", lambda value: is_number(value) and value >= 0), ("iscrowd", _is_flag)):
        if key in annotation and not _has(annotation, key, fits, faults, place):
            return None
    mask, fault = _read_mask(annotation.get("segmentation"), height, width)
    if fault is not None and (with_masks or (with_masks is None and annotation.get("segmentation"))):
        faults.add(fault[0], f"{place}{fault[1]}")
        return None
    clipped = (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))
    if not has_area(np.array([clipped])):
        # COCO's own training file has two of them, which mmdet leaves out too.
        return None
    if "area" in annotation:
        area = float(annotation["area"])
    else:
        area = w * h if mask is None else float(rle_codec.area(to_run_lengths(mask, height, width)))
    return clipped, area, bool(annotation.get("iscrowd", 0)), None if with_masks is False else mask


def _read_mask(mask: Any, height: int, width: int) -> tuple[Any, tuple[str, str] | None]:
    """Return a COCO ``segmentation``, or None with the kind of its fault and what is wrong."""
    if isinstance(mask, dict):
        fault = _check_run_lengths(mask, height, width)
        return (mask, None) if fault is None else (None, fault)
    if mask is not None and not isinstance(mask, list):
        return None, ("mask", f": {_short(mask)}")
    polygons = []
    for polygon in mask or ():
        try:
            points = np.asarray(polygon if isinstance(polygon, list) else None)
        except ValueError:
            points = np.asarray(None)
        if points.ndim != 1 or points.dtype.kind not in "iuf" or len(points) % 2 or not np.isfinite(points).all():
            return None, ("mask", ": a polygon is a list of numbers x1, y1, x2, y2, ...")
        # Points and lines have no area.
        if len(points) >= 6:
            polygons.append(points.astype(np.float64))
    if not polygons:
        return None, ("polygon", "")
    for points in polygons:
        low, high = (side(points.reshape(-1, 2), 0) for side in (np.min, np.max))
        sides = np.array([width, height])
        # A polygon that is cut by the border is clipped, but not one of another scale.
        if (
            (high < -BOX_TOLERANCE).any()
            or (low > sides + BOX_TOLERANCE).any()
            or (abs(points.reshape(-1, 2)) > 2 * sides + BOX_TOLERANCE).any()
        ):
            return None, ("outside", "")
    return polygons, None


def _check_run_lengths(mask: dict, height: int, width: int) -> tuple[str, str] | None:
    if mask.get("size") != [height, width]:
        return "size", ""
    counts = mask.get("counts")
    if isinstance(counts, str):
        try:
            # The codec adds without looking where a character stands for no six bits.
            if not all("0" <= character <= "o" for character in counts):
                raise ValueError
            (plain,) = mask_api_new_cpp.toUncompressedRLE([mask])
            counts = plain["counts"]
        except (ValueError, RuntimeError):
            return "mask", ": its run lengths can't be read"
    runs = np.asarray(counts) if isinstance(counts, list) and all(map(is_number, counts)) else np.asarray(None)
    if runs.dtype.kind not in "iu" or (runs < 0).any() or (runs > height * width).any():
        return "mask", ": its run lengths aren't whole numbers"
    if runs.sum() != height * width:
        return "mask", f": its run lengths add up to {runs.sum()}, not {height * width}"
    return None


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
        left_out: Ids of segments whose entries are broken; their pixels belong to none.
    """

    file: Path
    size: tuple[int, int]
    map: Path
    ids: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    left_out: np.ndarray


def read_panoptic(
    path: str | Path,
    folder: str | Path,
    maps: str | Path | None = None,
    broken: str = "refuse",
    skip_damaged: bool = False,
) -> tuple[list[PanopticRecord], list[str], list[bool]]:
    """Read a COCO panoptic file, and all its pictures of segment ids to compare them.

    Args:
        path: JSON file.
        folder: Where the images lie; their headers are read.
        maps: Where the pictures of segment ids lie; beside the JSON, in a folder of its name, if None.
        broken: As for `read_instances`; pixels of a segment that is left out belong to none.
        skip_damaged: Whether images that can't be read are no fault here.

    Returns:
        Images in the order of the file; names of the classes; for each class whether it is of things.

    Raises:
        TaskError: As for `read_instances`; also if segments differ from their picture.
    """
    content = read_json(path, ("images", "annotations", "categories"))
    path, folder, faults = Path(path), Path(folder), Faults(path)
    maps = path.with_suffix("") if maps is None else Path(maps)
    categories = {
        key: category
        for key, category in _read_categories(content, faults).items()
        if _has({"isthing": 1} | category, "isthing", _is_flag, faults, f"category {key}")
    }
    images = _read_images(content, faults)
    _refuse_nothing(images, categories, faults)
    label_of = {category: label for label, category in enumerate(categories)}
    present = _check_images(images, folder, faults, skip_damaged)
    records, seen = [], set()
    for number, annotation in enumerate(content["annotations"], start=1):
        place = f"annotation {number} of the list"
        if not isinstance(annotation, dict):
            faults.add("field", f"{place}: {_short(annotation)}")
            continue
        key = annotation.get("image_id")
        if not _is_key(key) or key not in images:
            faults.add("owner", f"annotation of image {_short(key)}")
            continue
        place = f"annotation of image {key}"
        if key in seen:
            faults.add("id", place)
            continue
        seen.add(key)
        named = _has(annotation, "file_name", _is_name, faults, place)
        if not _has(annotation, "segments_info", lambda value: isinstance(value, list), faults, place) or not named:
            continue
        segments = _read_segments(annotation["segments_info"], label_of, faults, place)
        picture = maps / annotation["file_name"]
        if not lies_in(maps, picture):
            faults.add("elsewhere", _short(annotation["file_name"]))
        elif not os.path.isfile(picture):
            faults.add("image", maps / _short(annotation["file_name"]).strip("'\""))
        elif key in present:
            image = present[key]
            records.append(PanopticRecord(image["file"], _size(image), picture, *segments))
    for key in images.keys() - seen:
        if images[key] is not None:
            faults.add("pair", images[key]["file_name"])
    checked = []
    for record, fault in zip(records, in_threads(_compare_segments, records), strict=True):
        kind, detail = fault
        if kind == "segment":
            picture_ids = detail
            for number in np.setdiff1d(picture_ids, [*record.ids, *record.left_out, 0]):
                faults.add("segment", f"{record.map}: {number} isn't in the file")
            for number in np.setdiff1d(record.ids, picture_ids):
                faults.add("segment", f"{record.map}: {number} has no pixel")
            there = np.isin(record.ids, picture_ids)
            arrays = {key: getattr(record, key)[there] for key in ("ids", "labels", "crowd")}
            checked.append(dataclasses.replace(record, **arrays))
        else:
            faults.add(kind, detail)
    faults.settle(broken, "correct the file or the pictures", len(checked))
    things = [bool(category.get("isthing", 1)) for category in categories.values()]
    return checked, [category["name"] for category in categories.values()], things


def _read_segments(
    segments: list[Any], label_of: dict[Any, int], faults: Faults, place: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the ids, labels and crowds of an image's segments, and the ids of those that are left out for a fault."""
    ids, labels, crowd, left_out = [], [], [], []
    for number, segment in enumerate(segments, start=1):
        if not isinstance(segment, dict) or not is_count(segment.get("id")) or segment["id"] >= 1 << 24:
            wrong = f"id {_short(segment.get('id'))}" if isinstance(segment, dict) else _short(segment)
            faults.add("field", f"segment {number} of {place}: {wrong}")
            continue
        key, category = int(segment["id"]), segment.get("category_id")
        where = f"segment {key} of {place.removeprefix('annotation of ')}"
        if not _is_key(category) or category not in label_of:
            faults.add("category", f"{where}: {_short(category)}")
            left_out.append(key)
        elif key in ids:
            faults.add("id", where)
        elif "iscrowd" in segment and not _has(segment, "iscrowd", _is_flag, faults, where):
            left_out.append(key)
        else:
            ids.append(key)
            labels.append(label_of[category])
            crowd.append(bool(segment.get("iscrowd", 0)))
    return np.array(ids, np.int64), np.array(labels, np.int64), np.array(crowd, bool), np.array(left_out, np.int64)


def _compare_segments(record: PanopticRecord) -> tuple[str, Any]:
    """Return ``"segment"`` and the ids in a record's picture, or the kind of its fault and what is wrong."""
    try:
        numbers = read_segment_ids(np.asarray(read_image(record.map)))
    except DamagedImageError as error:
        return "damaged", error
    if numbers.shape != tuple(record.size):
        return "size", f"{record.map} is {numbers.shape[0]}x{numbers.shape[1]}, not {record.size[0]}x{record.size[1]}"
    return "segment", distinct(numbers)


def read_segment_ids(picture: np.ndarray) -> np.ndarray:
    """Return the segment ids ``[H, W]``, int64, of a panoptic picture ``[H, W, 3]`` of RGB."""
    red, green, blue = np.moveaxis(picture.astype(np.int64), -1, 0)
    return red + 256 * green + 65536 * blue


def _place(root: Path, data: dict, split: str) -> tuple[Path, Path]:
    """Return the file of annotations and the folder of images of a split."""
    part = data[split]
    images = root / part["images"]
    if not images.is_dir():
        raise TaskError(f"{images}: no such folder (data.root and data.{split}.images)")
    return root / part["annotations"], images


def find_objects(
    root: Path, data: dict, split: str, with_masks: bool | None, skip_damaged: bool
) -> tuple[list[Record], list[str]]:
    """Return the images of a split with their objects, and the classes."""
    path, images = _place(root, data, split)
    records, names, _ = read_instances(path, images, with_masks, data["broken"], skip_damaged)
    classes = names if data["classes"] is None else list(data["classes"])
    if not order_by_name(records, names, classes):
        raise TaskError(f"data.classes is {classes}, but {path} has {names}")
    return records, classes


def find_instances(
    root: Path, data: dict, split: str, skip_damaged: bool
) -> tuple[list[Record], list[str], list[bool]]:
    """Return the images of a split with their objects, the classes, and that all are things."""
    path, images = _place(root, data, split)
    records, classes, _ = read_instances(path, images, True, data["broken"], skip_damaged)
    return records, classes, [True] * len(classes)


def find_segments(
    root: Path, data: dict, split: str, skip_damaged: bool
) -> tuple[list[PanopticRecord], list[str], list[bool]]:
    """Return the images of a split with their segments, the classes, and which of them are things."""
    path, images = _place(root, data, split)
    maps = data[split]["maps"]
    return read_panoptic(path, images, None if maps is None else root / maps, data["broken"], skip_damaged)
