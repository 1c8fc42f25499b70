"""Images with objects written as COCO's or YOLO's data sets, and what either of them can't hold."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import TaskError
from ..checkpoints import write_whole
from .coco import Record, decode_masks
from .polygons import join_polygons, trace_mask
from .yolo import DECIMALS, labels_of

Splits = Mapping[str, Sequence[Record]]


def count_lost(splits: Splits, to: str) -> list[str]:
    """Return, a line each, what a format can't hold of the images' objects.

    Args:
        splits: The images of each split.
        to: ``"coco"``, which holds all, or ``"yolo"``.
    """
    if to == "coco":
        return []
    counts: Counter[str] = Counter()
    for record in (record for records in splits.values() for record in records):
        objects = record.instances
        counts["crowds, which are left out"] += int(objects.crowd.sum())
        counts["ids of images, which become names"] += isinstance(record.id, int)
        for index in np.flatnonzero(~objects.crowd):
            mask = None if objects.masks is None else objects.masks[index]
            if mask is None:
                continue
            parts, holes = _parts_of(mask, record.size)
            counts["objects in several parts, which are joined by lines"] += len(parts) > 1
            counts["holes in objects, which are filled"] += holes
            if not parts:
                counts["objects without a pixel, which are left out"] += 1
                continue
            points = np.concatenate(parts).reshape(-1, 2)
            around = np.concatenate([points.min(0), points.max(0)])
            counts["boxes that aren't those around their masks, which are left out"] += bool(
                (abs(around - objects.boxes[index]) > 1).any()
            )
    return [f"{count} {what}" for what, count in counts.items() if count]


def _parts_of(mask: Any, size: tuple[int, int]) -> tuple[list[np.ndarray], int]:
    """Return the polygons of an object's mask, and the number of holes that they don't tell."""
    return (list(mask), 0) if not isinstance(mask, dict) else trace_mask(decode_masks([mask], *size)[0])


def convert(splits: Splits, classes: Sequence[str], output: str | Path, to: str, link: bool = False) -> None:
    """Write a data set: images in ``images/SPLIT``, and annotations beside them as the format has it.

    Args:
        splits: The images of each split; their masks may be None, for an object or for all.
        classes: Names of the classes, in the order of the labels.
        output: Folder, which must not hold anything yet.
        to: ``"coco"`` or ``"yolo"``.
        link: Whether to link to the images rather than to copy them.

    Raises:
        TaskError: If the folder isn't empty or can't be written to.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise TaskError(f"{output}: is there already, and not empty; choose another folder")
    write = {"coco": _write_coco, "yolo": _write_yolo}[to]
    for split, records in splits.items():
        names = _names_of(records)
        for record, name in zip(records, names, strict=True):
            write_whole(output / "images" / split / name, lambda file, record=record: _place(record.file, file, link))
        write(records, names, classes, output, split)
    if to == "yolo":
        lines = [f"{split}: {_listing(output, split)}" for split in splits]
        # JSON's strings are YAML's too.
        lines += ["names:", *(f"  {label}: {json.dumps(name)}" for label, name in enumerate(classes))]
        _write_text(output / "data.yaml", "\n".join(lines) + "\n")


def _place(source: Path, file: str, link: bool) -> None:
    if link:
        os.unlink(file)
        os.symlink(source.resolve(), file)
    else:
        shutil.copyfile(source, file)


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: Path(file).write_text(text, encoding="utf-8"))


def _names_of(records: Sequence[Record]) -> list[str]:
    """Return the images' names below the folder that they share, no two of which differ by their ending alone."""
    files = [os.path.abspath(record.file) for record in records]
    common = os.path.commonpath([os.path.dirname(file) for file in files]) if files else ""
    names, taken = [], set()
    for file in files:
        # A folder called images would be taken for the one whose neighbour holds the labels.
        parts = ["images_" if part == "images" else part for part in Path(os.path.relpath(file, common)).parts]
        name, number = Path(*parts), 2
        stem = name.stem
        while name.with_suffix("") in taken:
            name, number = name.with_stem(f"{stem}-{number}"), number + 1
        taken.add(name.with_suffix(""))
        names.append(name.as_posix())
    return names


def _write_coco(records: Sequence[Record], names: list[str], classes: Sequence[str], output: Path, split: str) -> None:
    ids = [record.id for record in records]
    if not all(isinstance(key, int) for key in ids) or len({*ids}) < len(ids):
        ids = list(range(1, len(records) + 1))
    images = [
        {"id": key, "file_name": name, "height": int(record.size[0]), "width": int(record.size[1])}
        for key, name, record in zip(ids, names, records, strict=True)
    ]
    annotations = []
    for key, record in zip(ids, records, strict=True):
        objects = record.instances
        for index, (x1, y1, x2, y2) in enumerate(objects.boxes.tolist()):
            annotation = {
                "id": len(annotations) + 1,
                "image_id": key,
                "category_id": int(objects.labels[index]) + 1,
                "bbox": [x1, y1, round(x2 - x1, DECIMALS), round(y2 - y1, DECIMALS)],
                "area": float(objects.areas[index]),
                "iscrowd": int(objects.crowd[index]),
            }
            mask = None if objects.masks is None else objects.masks[index]
            annotations.append(annotation | {"segmentation": [] if mask is None else _plain_mask(mask)})
    categories = [{"id": label, "name": name} for label, name in enumerate(classes, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    _write_text(output / "annotations" / f"instances_{split}.json", json.dumps(content))


def _plain_mask(mask: Any) -> Any:
    """Return a COCO ``segmentation`` in JSON's types."""
    if not isinstance(mask, dict):
        return [np.asarray(polygon).tolist() for polygon in mask]
    counts = mask["counts"]
    return {"size": list(mask["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}


def _write_yolo(records: Sequence[Record], names: list[str], classes: Sequence[str], output: Path, split: str) -> None:
    for record, name in zip(records, names, strict=True):
        lines = yolo_lines(record.instances, record.size)
        _write_text(labels_of(output / "images" / split / name), "".join(f"{line}\n" for line in lines))
    if sorted(map(Path, names)) != list(map(Path, names)):
        _write_text(output / f"{split}.txt", "".join(f"images/{split}/{name}\n" for name in names))


def _listing(output: Path, split: str) -> str:
    """Return what data.yaml says of a split: its folder, or the list of images in an order of their own."""
    return f"{split}.txt" if (output / f"{split}.txt").is_file() else f"images/{split}"


def yolo_lines(instances: Any, size: tuple[int, int]) -> list[str]:
    """Return the lines of YOLO's files for an image's objects but crowds: polygons where there are masks, else boxes.

    Numbers have all their digits, so that reading them gives the same pixels.
    """
    height, width = map(int, size)
    lines = []
    for index in np.flatnonzero(~instances.crowd):
        mask = None if instances.masks is None else instances.masks[index]
        if mask is None:
            x1, y1, x2, y2 = map(float, instances.boxes[index])
            numbers = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
        else:
            parts, _ = _parts_of(mask, size)
            if not parts:
                continue
            points = join_polygons(parts).reshape(-1, 2)
            # A polygon may leave the image by a rounding.
            numbers = (np.clip(points, 0, (width, height)) / (width, height)).ravel().tolist()
        lines.append(" ".join([str(int(instances.labels[index])), *map(repr, map(float, numbers))]))
    return lines
