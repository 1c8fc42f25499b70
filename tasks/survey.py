"""What a folder of data holds: its format, counts, faults and pictures, without a config."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import TaskError
from .classify.task import Classify
from .data import class_list
from .data.annotations import in_threads
from .data.coco import Record, order_by_name, read_picture, to_run_lengths
from .data.formats import CLASSES, OBJECTS, TABLES, as_recognised, open_part, recognise
from .data.images import as_picture, channels_beyond
from .data.segmentation import InputRule as MapRule
from .detect.task import Detect
from .segment.task import Segment

_KINDS = {"objects": Detect, "maps": Segment, "classes": Classify}
_COUNTED = {"objects": "objects", "maps": "images with a class", "classes": "labels"}
# Pictures are drawn at this size at most.
_SIDE = 640


@dataclasses.dataclass
class Part:
    """A split: its images, how often each class is there, what is wrong, and which images can't be decoded."""

    split: str
    images: int
    counts: list[int]
    faults: list[str]
    damaged: list[str]


@dataclasses.dataclass
class Survey:
    """What a folder holds.

    Attributes:
        kind: ``"objects"``, ``"maps"`` or ``"classes"``.
        format: As in ``data.name``.
        classes: Names.
        parts: The splits, that to train on first.
        counted: What the numbers of the classes count.
        draw: Draws so many samples of the first split into a PNG, as far as there are some; returns how many.
        note: What else is to be said.
    """

    kind: str
    format: str
    classes: list[str]
    parts: list[Part]
    counted: str
    draw: Callable[[Path, int], int]
    note: str | None = None


def survey(root: str | Path) -> Survey:
    """Look at a data set in a folder.

    Raises:
        TaskError: If the folder is missing, in no known format, or nothing of it can be read.
    """
    kind, data = _settings(Path(root))
    splits = [split for split in ("train", "val") if data[split] is not None]
    return {"objects": _objects, "maps": _maps, "classes": _classes}[kind](Path(root), data, splits)


def _channels_of(files: Sequence[Any]) -> tuple[int, str | None]:
    """Return how many channels the first image is read with, and what is to be said if they aren't those of colours."""
    channels = None
    if files and isinstance(files[0], str | Path):
        with contextlib.suppress(TaskError):  # a damaged one is a fault, told elsewhere
            channels = channels_beyond(files[0])
    if channels is None:
        return 3, None
    return channels, f"images have {channels} channels: train with data.channels={channels}; drawn are the first three"


def read_objects(root: str | Path, broken: str) -> tuple[str, dict[str, list[Record]], list[str]]:
    """Return the format of a folder's objects, the images of each split with the masks that there are, and the classes.

    Args:
        root: The folder.
        broken: ``"refuse"`` or ``"drop"``, as for `coco.read_instances`.

    Raises:
        TaskError: If it holds no objects, or broken ones.
    """
    kind, data = _settings(Path(root))
    if kind != "objects":
        raise TaskError(f"{root}: holds {kind}; only objects are converted")
    data |= {"broken": broken}
    splits, classes = {}, None
    for split in ("train", "val"):
        if data[split] is not None:
            splits[split], names = OBJECTS[data["name"]].find(Path(root), data, split, None, False)
            classes = names if classes is None else classes
            if not order_by_name(splits[split], names, classes):
                raise TaskError(f"{root}: training and validation annotations have different classes")
    return data["name"], splits, classes


def _settings(root: Path) -> tuple[str, dict]:
    """Return what a folder holds, and the settings by which it is read."""
    if not root.is_dir():
        raise TaskError(f"{root}: no such folder")
    for kind, task in _KINDS.items():
        if (recognised := recognise(root, kind)) is not None:
            return kind, as_recognised(task.DEFAULTS["data"] | {"root": str(root)}, *recognised, kind)[0]
    known = "; ".join(f"{kind}: {', '.join(rows)}" for kind, rows in TABLES.items())
    raise TaskError(f"{root}: is in no known format ({known})")


def _listed(read: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return what a reader returns that leaves out what is broken, and what it says is."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = read()
    return result, [str(each.message).removesuffix("; left out") for each in caught]


def _damage(read: Callable[[int], Any], count: int) -> list[str | None]:
    """Return for each of so many images why it can't be decoded, if it can't; headers don't tell."""

    def reason(index: int) -> str | None:
        try:
            read(index)
        except TaskError as error:
            return str(error)

    return in_threads(reason, range(count))


def _objects(root: Path, data: dict, splits: Sequence[str]) -> Survey:
    find, parts, first, classes = OBJECTS[data["name"]].find, [], None, []
    for split in splits:
        (records, names), faults = _listed(
            lambda split=split: find(root, data | {"broken": "drop"}, split, None, False)
        )
        classes = classes or names
        if not order_by_name(records, names, classes):
            faults.append(f"{split}: has the classes {names}, train {classes}")
            classes = [*classes, *(name for name in names if name not in classes)]
            for part in parts:
                part.counts += [0] * (len(classes) - len(part.counts))
            order = np.array([classes.index(name) for name in names], np.int64)
            for record in records:
                record.instances.labels = order[record.instances.labels]
        labels = np.concatenate([np.zeros(0, np.int64), *(record.instances.labels for record in records)])
        channels, beyond = _channels_of([record.file for record in records if record.picture is None][:1])
        damage = _damage(partial(_picture, records, channels), len(records))
        counts = np.bincount(labels, minlength=len(classes)).tolist()
        parts.append(Part(split, len(records), counts, faults, list(filter(None, damage))))
        if first is None:
            first = [record for record, reason in zip(records, damage, strict=True) if reason is None]
            seen, note = channels, beyond

    def draw(path: Path, count: int) -> int:
        from .pictures.objects import draw_inputs

        drawn = [_drawn(record, seen) for record in _spread(first, count)]
        if drawn:
            draw_inputs(drawn, classes, path, f"{root}, {splits[0]}")
        return len(drawn)

    return Survey("objects", data["name"], list(classes), parts, _COUNTED["objects"], draw, note)


def _picture(records: Sequence[Record], channels: int, index: int) -> Any:
    return read_picture(records[index], channels=channels)


def _drawn(record: Record, channels: int) -> tuple[Tensor, dict[str, Any]]:
    objects = record.instances
    target = {"boxes": torch.from_numpy(objects.boxes), "labels": torch.from_numpy(objects.labels)}
    if objects.masks is not None and len(objects) and all(mask is not None for mask in objects.masks):
        target["masks"] = [to_run_lengths(mask, *record.size) for mask in objects.masks]
    picture = as_picture(read_picture(record, channels=channels))
    return torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy()), target


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """Return so many of a list's items, evenly spread."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def _maps(root: Path, data: dict, splits: Sequence[str]) -> Survey:
    rule = MapRule(None, 1, 1, (0.0,) * 3, (1.0,) * 3)
    parts, opened = [], []
    for split in splits:
        part, faults = _listed(
            lambda split=split: open_part(
                root, data | {"broken": "drop"}, split, False, {"rule": rule, "output": "semantic", "as_masks": False}
            )
        )
        counts = np.zeros(len(part.classes), np.int64)
        for labels in part.occurring():
            counts[np.unique(labels)] += 1
        channels, beyond = _channels_of([path for path, _ in part.inventory()[:1]])
        part.rule = dataclasses.replace(rule, mean=(0.0,) * channels, std=(1.0,) * channels)
        damage = _damage(part.image, part.images)
        parts.append(Part(split, part.images, counts.tolist(), faults, list(filter(None, damage))))
        opened.append((part, [index for index, reason in enumerate(damage) if reason is None], beyond))
    part, sound, note = opened[0]

    def draw(path: Path, count: int) -> int:
        from .pictures.regions import draw_inputs

        indices = _spread(sound, count)
        images, truths = [as_picture(part.image(i)) for i in indices], [part.labels(index) for index in indices]
        if images:
            draw_inputs(images, list(map(torch.from_numpy, truths)), part.classes, path, f"{root}, {splits[0]}")
        return len(images)

    return Survey("maps", data["name"], list(part.classes), parts, _COUNTED["maps"], draw, note)


def _classes(root: Path, data: dict, splits: Sequence[str]) -> Survey:
    _, layout, samples, _ = CLASSES[data["name"]]
    parts, opened = [], []
    several = data["name"] == "csv" and any(class_list.holds_several(root / data[split], root) for split in splits)
    if several:
        samples = partial(samples, several=True)
    for split in splits:
        classes = opened[0][0].classes if opened else None
        part = samples(root, root / data[split], None, 3, classes, layout=layout)
        labels = [label for own in part.targets for label in own] if several else part.targets
        counts = np.bincount(np.array(labels, np.int64), minlength=len(part.classes)).tolist()
        part.channels, beyond = _channels_of([path for path, _ in part.samples[:1]])
        damage = _damage(part.image, len(part.samples))
        parts.append(Part(split, len(part.samples), counts, [], list(filter(None, damage))))
        opened.append((part, [index for index, reason in enumerate(damage) if reason is None], beyond))
    first, sound, beyond = opened[0]

    def draw(path: Path, count: int) -> int:
        from .pictures.classes import draw_inputs

        images, names = [], []
        for index in _spread(sound, count):
            image = as_picture(first.image(index))
            image.thumbnail((_SIDE, _SIDE))
            images.append(np.asarray(image) / 255)
            own = first.targets[index]
            names.append(", ".join(first.classes[label] for label in (own if several else (own,))) or "none")
        if images:
            draw_inputs(images, names, path, f"{root}, {splits[0]}")
        return len(images)

    needed = "images have several labels, or none: train with data.multi_label=True loss.label_smoothing=0"
    note = "; ".join(line for line in (needed if several else None, beyond) if line) or None
    return Survey("classes", data["name"], list(first.classes), parts, _COUNTED["classes"], draw, note)
