"""The formats of data sets, a row each, and the two sets that a config's ``data`` describes.

A new format is a file beside this one that reads it, and a row. The bundled digits and nuclei, which lie nowhere, have
no row.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import TaskError, nearest
from . import (
    ade20k,
    cityscapes,
    class_folder,
    class_list,
    coco,
    coco_layout,
    coco_stuff,
    huggingface,
    mask_folder,
    shards,
    voc,
    yolo,
)
from .annotations import Faults
from .augment import IGNORE, Augment
from .class_folder import LabelledFolder
from .class_list import LabelledList
from .classification import Digits, InputRule
from .detection import DetectionSet
from .detection import Nuclei as NucleiObjects
from .images import check_white, choose_white
from .segmentation import CocoMaps, InstanceMaps, LabelMaps, PanopticMaps, SegmentationSet
from .segmentation import InputRule as MapRule
from .segmentation import Nuclei as NucleiMaps

# Tells of a folder the settings of ``data`` by which it is read, or None: ``train``, and ``val`` if there is one.
Recognise = Callable[[Path], dict | None]


class ClassFormat(NamedTuple):
    """A format of labelled images: where its two parts are by default, what a root holds, and its set."""

    parts: tuple[str, str]
    layout: str
    samples: Callable[..., Any]
    recognise: Recognise


class ObjectFormat(NamedTuple):
    """A format of objects: ``find`` returns the images of a split with their objects, and the classes."""

    find: Callable[..., tuple[list[coco.Record], list[str]]]
    recognise: Recognise


class MapFormat(NamedTuple):
    """A format of labelled pixels: the set of what ``find`` returns of a root, the config's data and a split."""

    samples: type[SegmentationSet]
    find: Callable[..., tuple]
    outputs: tuple[str, ...]  # what a segmenter can learn from it
    recognise: Recognise


CLASSES: dict[str, ClassFormat] = {
    "csv": ClassFormat(("train.csv", "val.csv"), "train.csv and val.csv", LabelledList.of_root, class_list.recognise),
    "folder": ClassFormat(
        ("train", "val"),
        "train/CLASS/*.jpg and val/CLASS/*.jpg",
        LabelledFolder.of_root,
        class_folder.recognise,
    ),
    "huggingface": ClassFormat(
        ("train", "validation"), huggingface.LAYOUT, huggingface.LabelledTable.of_root, huggingface.recognise
    ),
    "webdataset": ClassFormat(
        ("train*.tar", "val*.tar"), shards.LAYOUT, shards.LabelledShards.of_root, shards.recognise
    ),
}
OBJECTS: dict[str, ObjectFormat] = {
    "coco": ObjectFormat(coco.find_objects, coco_layout.recognise),
    "huggingface": ObjectFormat(huggingface.find_objects, partial(huggingface.recognise, kind="objects")),
    "voc": ObjectFormat(voc.find_objects, voc.recognise),
    "yolo": ObjectFormat(yolo.find_objects, yolo.recognise),
}
MAPS: dict[str, MapFormat] = {
    "ade20k": MapFormat(LabelMaps, ade20k.find_maps, ("semantic",), ade20k.recognise),
    "cityscapes": MapFormat(LabelMaps, cityscapes.find_maps, ("semantic",), cityscapes.recognise),
    "cityscapes_instance": MapFormat(InstanceMaps, cityscapes.find_instances, ("instance",), cityscapes.recognise),
    "coco": MapFormat(InstanceMaps, coco.find_instances, ("instance", "semantic"), coco_layout.recognise),
    "coco_panoptic": MapFormat(
        PanopticMaps,
        coco.find_segments,
        ("panoptic", "semantic"),
        partial(coco_layout.recognise, kind="panoptic"),
    ),
    "coco_stuff": MapFormat(LabelMaps, coco_stuff.find_maps, ("semantic",), coco_stuff.recognise),
    "folder": MapFormat(LabelMaps, mask_folder.find_maps, ("semantic",), mask_folder.recognise),
    "huggingface": MapFormat(
        huggingface.TableMaps, huggingface.find_maps, ("semantic",), partial(huggingface.recognise, kind="maps")
    ),
    "voc": MapFormat(LabelMaps, voc.find_maps, ("semantic",), partial(voc.recognise, part="Segmentation")),
    "yolo": MapFormat(InstanceMaps, yolo.find_instances, ("instance", "semantic"), yolo.recognise),
}
TABLES: dict[str, dict[str, Any]] = {"objects": OBJECTS, "maps": MAPS, "classes": CLASSES}


def recognise(root: str | Path, kind: str) -> tuple[str, dict] | None:
    """Return the name of the format that a folder is in, and the settings of ``data`` by which it is read.

    Args:
        root: The folder.
        kind: ``"objects"``, ``"maps"`` or ``"classes"``.

    Raises:
        TaskError: If the folder is in a format of the kind, but it isn't told where its parts are.
    """
    candidates = ((name, row.recognise(Path(root))) for name, row in TABLES[kind].items())
    return next(((name, settings) for name, settings in candidates if settings is not None), None)


def resolve(data: dict, kind: str) -> tuple[dict, list[str]]:
    """Return a config's ``data``, of which ``auto`` becomes the format that its folder is in, and what is to be said.

    Held-out images that aren't there are None; the sets then hold out a share of the training images.

    Raises:
        TaskError: If the folder is missing, or in no format of the kind.
    """
    if data["name"] != "auto":
        return data, []
    root = _find_root(data)
    recognised = recognise(root, kind)
    if recognised is None:
        others = [other for other in TABLES if other != kind and recognise(root, other) is not None]
        raise TaskError(
            f"{root}: is in none of the formats of {kind}, {', '.join(TABLES[kind])}"
            + (f"; it holds {' and '.join(others)}" if others else "; name it by data.name, and its parts")
        )
    return as_recognised(data, *recognised, kind)


def as_recognised(data: dict, name: str, settings: dict, kind: str) -> tuple[dict, list[str]]:
    """Return a config's ``data`` with what `recognise` tells of its folder, and what is to be said.

    Raises:
        TaskError: If a share of the images is to be held out that is none.
    """
    settings = {key: value for key, value in settings.items() if key != "classes" or data["classes"] is None}
    parts = {
        key: data[key] | value if isinstance(value, dict) and isinstance(data[key], dict) else value
        for key, value in settings.items()
    }
    said = f"{Path(data['root'])} holds {kind} in the format {name}"
    if settings["val"] is None:
        said += (
            f"; no held-out images: {data['holdout']:.0%} of the training images are, drawn by "
            f"data.holdout_seed={data['holdout_seed']}"
        )
        if not 0 < data["holdout"] < 1:
            raise TaskError(f"data.holdout is {data['holdout']}, but must be a share between 0 and 1")
    return data | {"name": name} | parts, [said]


def hold_out(count: int, data: dict, groups: Sequence[Any] | None = None) -> tuple[list[int], list[int]]:
    """Return which of ``count`` images train and which validate, drawn by ``data.holdout_seed``.

    Args:
        count: How many there are.
        data: Has ``holdout`` and ``holdout_seed``.
        groups: A class for each, of which all with two images or more are in both parts.

    Raises:
        TaskError: If there is a single image.
    """
    order = np.random.default_rng(data["holdout_seed"]).permutation(count)
    places: dict[Any, list[int]] = {}
    for index in order.tolist():
        places.setdefault(None if groups is None else groups[index], []).append(index)
    val = [
        index
        for group in places.values()
        for index in group[: min(max(1, round(data["holdout"] * len(group))), len(group) - 1)]
    ]
    if not val:
        raise TaskError(f"{data['root']}: has too few images to hold one out of {count}; add some to validate by")
    return sorted({*range(count)} - {*val}), sorted(val)


def open_classes(data: dict, rule: InputRule, holds_out: bool = False) -> tuple[Any, Any]:
    """Return the training and the validation set of a classifier.

    Args:
        data: As in `Classify.DEFAULTS`.
        rule: How images become inputs.
        holds_out: Whether a share of the training images is held out, as there are no others.

    Raises:
        TaskError: If the format is unknown, its folders are missing or empty, or its classes aren't as many as
            ``data["num_classes"]``.
    """
    augment = dict(data["augment"])
    white = check_white(data.get("white"))
    transforms = rule.transform(augment), rule.transform()
    if data["name"] == "digits":
        if rule.channels != 1:
            raise TaskError(f"the digits are grey: data.channels must be 1, not {rule.channels}")
        train, val = (Digits(split, how) for split, how in zip(("train", "val"), transforms, strict=True))
    else:
        _check_name(data, {**CLASSES, "digits": None})
        usual, layout, samples, _ = CLASSES[data["name"]]
        if data["name"] == "webdataset" and data["root"] is None:
            data |= {"root": "."}  # shards may lie anywhere
        root = _find_root(data, f"name a folder with {layout}", f"; data.root needs {layout}")
        parts = [root / (data.get(split) or name) for split, name in zip(("train", "val"), usual, strict=True)]
        several = data.get("multi_label", False)
        if several:
            if samples != LabelledList.of_root:
                raise TaskError(f"data.multi_label: of {data['name']} an image has one label; list several in a csv")
            samples = partial(samples, several=True)
        if data["name"] == "huggingface":
            samples = partial(samples, columns=(data.get("image_column"), data.get("label_column")))
        elif data["name"] == "webdataset":
            samples = partial(samples, key=data.get("label_column"))
        train = samples(root, parts[0], transforms[0], rule.channels, layout=layout)
        if holds_out:
            val = samples(root, parts[0], transforms[1], rule.channels, train.classes, layout=layout)
            groups = None if several else train.targets
            for part, indices in zip((train, val), hold_out(len(train), data, groups), strict=True):
                part.samples = [part.samples[index] for index in indices]
                part.targets = [label for _, label in part.samples]
        else:
            val = samples(root, parts[1], transforms[1], rule.channels, train.classes, layout=layout)
        train.white = val.white = white or choose_white([path for path, _ in train.samples])
    _check_count(data, train.classes)
    return train, val


def open_objects(data: dict, with_masks: bool | None, skip_damaged: bool = False) -> tuple[DetectionSet, DetectionSet]:
    """Return the training and the validation set of a detector.

    Args:
        data: As in `Detect.DEFAULTS`.
        with_masks: Whether the objects need masks; None: they have them if all do.
        skip_damaged: Whether images that can't be read are left to the loader, which skips them.

    Raises:
        TaskError: If the format is unknown, its files are missing or its annotations broken, or training and validation
            have different classes.
    """
    augment = Augment(data["augment"], data["channels"])
    _check_settings(data)
    white = check_white(data.get("white"))
    if data["name"] == "nuclei":
        _check_grey(data)
        train, val = NucleiObjects("train", augment, data["repeat"]), NucleiObjects("val")
        if data["classes"] is not None and list(data["classes"]) != train.classes:
            raise TaskError(f"data.classes is {list(data['classes'])}, but nuclei has {train.classes}")
        train.white = val.white = white or train.white
    else:
        _check_name(data, {**OBJECTS, "nuclei": None})
        root = _find_root(data)
        find = OBJECTS[data["name"]].find
        records, classes = find(root, data, "train", with_masks, skip_damaged)
        if data["val"] is None:
            training, validation = hold_out(len(records), data)
            records, held_out, val_classes = [records[i] for i in training], [records[i] for i in validation], classes
        else:
            held_out, val_classes = find(root, data, "val", with_masks, skip_damaged)
        if not coco.order_by_name(held_out, val_classes, classes):
            raise TaskError(
                f"training and validation annotations have different classes: {_differing(classes, val_classes)}"
            )
        if with_masks is None:
            _masks_of_all_or_none([*records, *held_out])
        if not data["keep_empty"]:
            records = [record for record in records if not record.instances.crowd.all()]
        train = DetectionSet(records, classes, augment, data["repeat"])
        val = DetectionSet(held_out, classes)
        train.white = val.white = white or choose_white([record.file for record in records])
        train.channels = val.channels = data["channels"]
    _check_count(data, train.classes)
    return train, val


def open_maps(
    data: dict, rule: MapRule, output: str = "semantic", as_masks: bool = False, skip_damaged: bool = False
) -> tuple[SegmentationSet, SegmentationSet]:
    """Return the training and the validation set of a segmenter.

    Args:
        data: As in `Segment.DEFAULTS`.
        rule: How images become inputs.
        output: ``"semantic"``, ``"instance"`` or ``"panoptic"``.
        as_masks: Whether to train on masks.
        skip_damaged: Whether images that can't be read are left to the loader, which skips them.

    Raises:
        TaskError: If the format is unknown or doesn't hold what the task needs, or its files are missing or broken.
    """
    name = data["name"]
    if name != "nuclei":
        _check_name(data, {**MAPS, "nuclei": None})
        if output not in MAPS[name].outputs:
            raise TaskError(
                f"{name} has no annotations for {output} segmentation, only for {' or '.join(MAPS[name].outputs)}"
            )
    _check_settings(data)
    for key in ("values", "unlabelled"):
        if data[key] is not None and name not in ("folder", "huggingface"):
            raise TaskError(
                f"data.{key} is for label maps of data.name=folder; those of {name} have values of their own"
            )
    white = check_white(data.get("white"))
    crop = data["augment"].get("crop")
    pad = (crop, crop) if isinstance(crop, int) else None if crop is None else tuple(crop)
    shared = {"rule": rule, "output": output, "as_masks": as_masks}
    to_train = {"augment": Augment(data["augment"], rule.channels), "pad": pad, "repeat": data["repeat"]}
    if name == "nuclei":
        _check_grey(data)
        train, val = NucleiMaps("train", **shared, **to_train), NucleiMaps("val", tile=data["tile"], **shared)
        white = white or train.white
    else:
        root = _find_root(data)
        train = open_part(root, data, "train", skip_damaged, shared | to_train)
        if data["val"] is not None:
            val = open_part(root, data, "val", skip_damaged, shared)
        else:
            # Read and checked once: what is held out is the same images, neither augmented nor repeated.
            val = copy.copy(train)
            val.augment, val.pad, val.repeat = None, None, 1
            for part, indices in zip((train, val), hold_out(train.images, data), strict=True):
                part.keep(indices)
        white = white or choose_white(train.image_files)
    train.white = val.white = white
    _order_classes(train, val, data)
    _check_count(data, train.classes)
    if len(train.classes) >= IGNORE:
        raise TaskError(f"{name} has {len(train.classes)} classes; at most {IGNORE - 1} can be told from unlabelled")
    return train, val


def _check_name(data: dict, formats: dict[str, Any]) -> None:
    if data["name"] not in formats:
        raise TaskError(f"unknown data set {data['name']!r}{nearest(str(data['name']), formats)}")


def _check_grey(data: dict) -> None:
    if data["channels"] != 3:
        raise TaskError(
            f"the nuclei are grey, shown in three channels: data.channels must be 3, not {data['channels']}"
        )


def _check_settings(data: dict) -> None:
    if data["broken"] not in ("refuse", "drop"):
        raise TaskError(f"data.broken is {data['broken']!r}, but must be refuse or drop")
    if data["repeat"] < 1:
        raise TaskError(f"data.repeat is {data['repeat']}, but must be at least 1")


def _check_count(data: dict, classes: Sequence[str]) -> None:
    if data["num_classes"] not in (None, len(classes)):
        raise TaskError(
            f"data.num_classes is {data['num_classes']}, but {data['root'] or data['name']} has {len(classes)} "
            f"classes; leave it None to take what is there"
        )


def _find_root(
    data: dict, cure: str = "name the folder that holds images and annotations", hint: str = " (data.root)"
) -> Path:
    if data["root"] is None:
        raise TaskError(f"data.root is not set; {cure}")
    root = Path(data["root"]).expanduser()
    if not root.is_dir() and not (data["name"] == "huggingface" and len(root.parts) < 3 and not root.is_absolute()):
        raise TaskError(f"{root}: no such folder{hint}")
    return root


def open_part(root: Path, data: dict, split: str, skip_damaged: bool, settings: dict) -> SegmentationSet:
    """Return a split of a segmenter's data.

    Args:
        root: The folder.
        data: As in `Segment.DEFAULTS`.
        split: ``"train"`` or ``"val"``.
        skip_damaged: Whether images that can't be read are left to the loader.
        settings: Of the set.

    Raises:
        TaskError: If its files are missing or broken.
    """
    samples, find, _, _ = MAPS[data["name"]]
    if not issubclass(samples, LabelMaps):
        records, classes, things = find(root, data, split, skip_damaged)
        return samples(records, classes=classes, things=things, **settings)
    faults = Faults(root)
    files, classes, values = find(root, data, split, faults)
    if samples is huggingface.TableMaps:
        settings = settings | {"rows": files}
        names = [Path(f"{files.split}/{number}") for number in range(len(files.table))]
        files = list(zip(names, names, strict=True))
    pairs = []
    for image, path in files:
        if samples is huggingface.TableMaps:
            pairs.append((image, path))  # whatever a row lacks is found as it is read
        elif not image.is_file():
            faults.add("image", image)
        elif not path.is_file():
            faults.add("pair", f"{image}: no {path}")
        else:
            pairs.append((image, path))
    known = {"values": values, "skip_damaged": skip_damaged, "classes": classes, "things": [False] * len(classes)}
    maps = samples(files=pairs, **known, **settings)
    maps.check(faults)
    faults.settle(data["broken"], "correct or complete them", len(maps.files))
    if not maps.files:
        raise TaskError(f"{root}: holds no image to {'train on' if split == 'train' else 'validate by'}")
    return maps


def _masks_of_all_or_none(records: Sequence[coco.Record]) -> None:
    """Leave out all masks where an object that counts has none."""
    objects = [record.instances for record in records]
    counted = (mask for each in objects for mask, crowd in zip(each.masks or (), each.crowd, strict=False) if not crowd)
    if any(each.masks is None for each in objects) or any(mask is None for mask in counted):
        for each in objects:
            each.masks = None


def _differing(classes: Sequence[str], others: Sequence[str]) -> list[str] | str:
    return sorted({*classes} ^ {*others}) or "names that repeat, in another order"


def _order_classes(train: SegmentationSet, val: SegmentationSet, data: dict) -> None:
    """Give both sets the classes in one order: that of ``data.classes``, or else that of the training set.

    Raises:
        TaskError: If they have other classes, or a class whose objects are told apart in one of them only.
    """
    name = data["name"]
    # Of these the label maps' classes were named by it.
    given = None if data["classes"] is None or name in ("voc", "folder", "huggingface") else list(data["classes"])
    expected = list(train.classes) if given is None else given
    for part in (train, val):
        names = part.classes
        # Only files of COCO's formats number classes as they like.
        fits = part.order(expected) if isinstance(part, CocoMaps) else names == expected
        if not fits and given is not None:
            raise TaskError(f"data.classes is {given}, but {name} has {names}")
        if not fits:
            raise TaskError(
                f"training and validation annotations have different classes: {_differing(expected, names)}"
            )
        if names != expected:
            part.things = [part.things[names.index(label)] for label in expected]
            part.classes = list(expected)
    differing = [label for label, *kinds in zip(expected, train.things, val.things, strict=True) if len({*kinds}) > 1]
    if differing:
        raise TaskError(f"training and validation annotations differ in isthing of {', '.join(differing[:5])}")
