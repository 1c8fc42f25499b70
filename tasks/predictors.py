"""The predictor that a checkpoint of any task, or a published model's name, asks for."""

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..configs.published import read_published
from ..zoo.backbone import head_options_of
from ..zoo.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from ..zoo.weights import read, table
from . import TASKS, TaskError
from .checkpoints import read_checkpoint, taken_as_said
from .data.class_names import class_names
from .dense.build import with_told

_TRANSFORMERS = ("mask2former", "oneformer")
# Whose classes there are so many of; the panoptic ones of COCO are 133.
_DATA = {80: "coco", 133: "coco", 150: "ade20k", 171: "coco_stuff", 19: "cityscapes"}
# Short and long side to which the published evaluations of Mask2Former and OneFormer resize images.
_SIDES = {"coco": (800, 1333), "ade20k": (640, 2560), "cityscapes": (1024, 2048), "mapillary": (2048, 2048)}


def load_predictor(path: str | Path | Checkpoint, device: str | torch.device = "cpu") -> Any:
    """Return the predictor of a file that `foveate train`, ``export`` or ``weights convert`` wrote.

    It maps a list of images to their results, and for a result has ``describe`` (plain types), ``headline`` (a few
    words) and ``draw``; its ``card`` is what the file says of its model.

    Raises:
        CheckpointError: If the file can't be read or is no such file.
    """
    checkpoint = open_checkpoint(path)
    task = read_checkpoint(checkpoint)["card"].get("task")
    if task == "backbone":
        raise CheckpointError(
            f"{path}: holds a backbone alone, which has no answer; train a model from it: "
            f"model.backbone_checkpoint={path}"
        )
    if task not in TASKS:
        raise CheckpointError(f"{path}: holds a model to {task}; this version predicts to {', '.join(TASKS)}")
    with taken_as_said(path):
        return importlib.import_module(f".{task}", __package__).Predictor.from_checkpoint(checkpoint, device)


def load_classifier(path: str | Path, what: str, device: str | torch.device = "cpu") -> Any:
    """Return the predictor of a classifier's file; ``what`` begins the reason why it must be one, "features are".

    Raises:
        TaskError: If the file holds a model of another task.
        CheckpointError: If it can't be read.
    """
    predictor = load_predictor(path, device)
    if predictor.card["task"] != "classify":
        raise TaskError(f"{path}: holds a model to {predictor.card['task']}; {what} of classifiers")
    return predictor


def dense_head_of(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """Return the task and the name of a dense model's head; None for classifiers and backbones alone."""
    from .dense.detect.checkpoint import held_detector
    from .dense.segment.checkpoint import held_segmenter

    if not any(key.startswith("backbone.") for key in checkpoint.state):
        return None
    heads = (("detect", held_detector(checkpoint)), ("segment", held_segmenter(checkpoint)))
    return next(((task, head) for task, head in heads if head is not None), None)


def is_file(source: str) -> bool:
    """Return whether ``source`` means a file, there or not, and no model's name."""
    return Path(source).is_file() or Path(source).suffix in (".pth", ".pt", ".pkl", ".safetensors", ".onnx", ".pt2")


def is_published(name: str) -> bool:
    """Return whether a published detector or segmenter is called ``name``."""
    return any(row["name"] == name for task in ("detect", "segment") for row in read_published(task))


def load_published(
    name: str, device: str | torch.device = "cpu", weights: str | Path | Checkpoint | None = None
) -> Any:
    """Return the predictor of a published detector or segmenter, such as ``"nat_tiny.shi_mask_rcnn_coco_3x"``.

    Args:
        name: As `foveate list --detectors` and ``--segmenters`` show it.
        device: Where to run.
        weights: File of its weights, or what `open_checkpoint` read of it; they are fetched if None.

    Raises:
        TaskError: If there is no such model, or none of its weights were published.
        CheckpointError: If the weights can't be had, or don't fit.
    """
    rows = {row["name"]: row for task in ("detect", "segment") for row in read_published(task)}
    if name not in rows:
        raise TaskError(f"no published model is called {name!r}; `foveate list --detectors` and --segmenters show them")
    row = rows[name]
    if row["state"] == "none" and weights is None:
        raise TaskError(f"{name}: no weights were published; train it: foveate train {row['config']}")
    weights = name if weights is None else weights
    if row["state"] == "shipped":
        return load_predictor(read(weights), device)
    if row["head"] not in _TRANSFORMERS:
        options = table()[name].options if name in table() else None
        return load_dense(row["head"], row["backbone"], weights, device, data=row["data"], options=options)
    from .dense.segment.mask2former import SETTINGS

    # What follows the head in the name: the data set, and the output or the training's size.
    variant = name.partition(f"{row['head']}_")[2]
    setting = next(known for known in sorted(SETTINGS[row["head"]], key=len, reverse=True) if variant.startswith(known))
    output = next((output for output in ("semantic", "instance") if output in variant), "panoptic")
    return load_dense(row["head"], row["backbone"], weights, device, setting, output, row["data"])


def open_predictor(source: str | Path | Checkpoint, device: str | torch.device = "cpu") -> Any:
    """Return the predictor of a file of ours, of a published detector or segmenter, or of a classifier's name.

    Raises:
        TaskError: If there is no such model, or its weights can't be had.
        CheckpointError: If the file can't be read or isn't one of these.
    """
    if not isinstance(source, str) or is_file(source):
        return load_predictor(source, device)
    if is_published(source):
        return load_published(source, device)
    from .classify import Predictor

    return Predictor.from_name(source, device)


def load_dense(
    head: str,
    backbone: str,
    weights: str | Path | Checkpoint,
    device: str | torch.device = "cpu",
    setting: str = "auto",
    output: str | None = None,
    data: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Return the predictor of a detector's or segmenter's file, whoever wrote it, with the published settings.

    Args:
        head: As in `create_detector` and `create_segmenter`.
        backbone: A timm name.
        weights: A path, an address, the name of published weights, or what `open_checkpoint` read.
        device: Where to run.
        setting: As there.
        output: What a Mask2Former or OneFormer is asked for; ``"panoptic"`` if None.
        data: Whose classes it has, for their names; told by their number if None.
        options: Of a segmenter's head, what its file doesn't tell.

    Raises:
        CheckpointError: If the weights can't be had, or don't fit.
    """
    options = dict(options or {})
    described = {"head": head, "backbone": backbone, "setting": setting, "backbone_kwargs": {}, "kwargs": options}
    from .dense.detect.detector import DETECTORS, create_detector

    if head in DETECTORS:
        from .detect import Predictor
        from .detect.task import detector_card

        model = create_detector(head, backbone, setting=setting, checkpoint=weights)
        predictor = Predictor(model, _classes_of(model, data or _DATA.get(model.num_classes, "")), device)
        predictor.card = detector_card(with_told(described, model), predictor.classes)
        return predictor
    from .data.segmentation import InputRule
    from .dense.segment import create_segmenter
    from .segment import Predictor
    from .segment.task import segmenter_card

    test = {"mode": "whole", "crop_size": None, "stride": None, "scales": (1.0,), "flip": False}
    model = create_segmenter(head, backbone, setting=setting, checkpoint=weights, **options)
    count = model.num_classes
    data = data or _DATA.get(count, "")
    things = [False] * count
    if head in _TRANSFORMERS:
        sides = head_options_of(backbone, head).get("sides") or _SIDES.get(data, _SIDES["coco"])
        output, rule = output or "panoptic", InputRule(*sides, 1, model.mean, model.std)
        things = [label in model.things for label in range(count)]
    else:
        divisor = 1 if data == "cityscapes" else head_options_of(backbone, "images").get("divisor", 1)
        short = 512
        if data == "cityscapes":
            short, test = 1024, test | {"mode": "slide", "crop_size": 1024, "stride": 768}
        output, rule = "semantic", InputRule(short, 2048, divisor, model.mean, model.std)
    told = getattr(model, "tests", None)
    if told is not None:
        rule = dataclasses.replace(rule, channel_order=model.channel_order)
        if head not in _TRANSFORMERS:
            rule = dataclasses.replace(rule, short=told["short"], long=told["long"])
            test |= {name: value for name, value in told.items() if name in test}
    classes = _classes_of(model, data)
    predictor = Predictor(model, rule, classes, things, output, test, device)
    predictor.card = segmenter_card(with_told(described, model), classes, things, output, rule, test)
    return predictor


def _classes_of(model: nn.Module, data: str) -> list[str]:
    """Return the names of a dense model's classes: those of its file, if it has them, else those of the data."""
    count, names = model.num_classes, list(getattr(model, "classes", ()))
    return names if len(names) == count else class_names(data, count)
