"""Segmentation as the engine sees it: data, model, losses, predictions and metrics."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from .. import TaskError
from ..data.augment import IGNORE
from ..data.formats import open_maps, resolve
from ..data.images import LOOKED_AT, Bands, as_picture
from ..data.occurrence import check_classes, class_weights, draw_weights
from ..data.segmentation import InputRule, LabelMaps, SegmentationSet
from ..data.statistics import describe_normalization, measure_normalization
from ..dense.build import (
    build_described,
    describe_model,
    freeze_stages,
    freeze_statistics,
    normalization_of,
    with_told,
)
from ..dense.segment.postprocess import OUTPUTS
from ..dense.segment.segmenter import HEADS, MASK_HEADS, create_segmenter
from ..detections import to_plain

# Up to so many classes get a metric of their own.
NAMED_CLASSES = 20


class Segment:
    """Segmentation, described by a config.

    Attributes:
        train_set: Training images with their truth.
        val_set: Held-out images with their truth.
        metric: The metric by which the best checkpoint is chosen.
        shown: The metrics that a line of progress names.
    """

    # Every key a config may have, with its default; `engine.keys` says what they mean.
    DEFAULTS: ClassVar[dict] = {
        "model": {
            "head": "upernet",
            "backbone": None,
            "output": "semantic",
            "setting": "auto",
            "pretrained": False,
            "backbone_checkpoint": None,
            "checkpoint": None,
            "norm_eval": False,
            "frozen_stages": 0,
            "backbone_kwargs": {},
            "kwargs": {},
        },
        "data": {
            "name": "ade20k",
            "root": None,
            "train": {"annotations": "", "images": "", "maps": None, "split": "train"},
            "val": {"annotations": "", "images": "", "maps": None, "split": "val"},
            "classes": None,
            "values": None,
            "unlabelled": None,
            "image_column": None,
            "mask_column": None,
            "num_classes": None,
            "broken": "refuse",
            "repeat": 1,
            "holdout": 0.2,
            "holdout_seed": 0,
            "balance": 0.0,
            "normalization": None,
            "tile": None,
            "short": 512,
            "long": 2048,
            "divisor": 1,
            "channels": 3,
            "white": None,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "augment": {},
        },
        "loss": {"class_weights": None},
        "test": {
            "mode": "whole",
            "crop_size": None,
            "stride": None,
            "scales": (1.0,),
            "flip": False,
        },
    }
    FREE = ("model.backbone_kwargs", "model.kwargs", "data.augment")  # dicts with keys of their own
    OPTIONAL: ClassVar[dict] = {
        "model.backbone": str,
        "model.setting": str,
        "model.backbone_checkpoint": str,
        "model.checkpoint": str,
        "data.root": str,
        "data.train.maps": str,
        "data.val.maps": str,
        "data.classes": tuple,
        "data.values": tuple,
        "data.unlabelled": tuple,
        "data.num_classes": int,
        "data.tile": int,
        "data.short": int,
        "data.white": int,
        "data.normalization": str,
        "data.image_column": str,
        "data.mask_column": str,
        "loss.class_weights": object,
        "test.crop_size": int,
        "test.stride": int,
    }

    def __init__(self, config: dict):
        data, self._said = resolve(dict(config["data"]), "maps")
        self.model, self.test = dict(config["model"]), dict(config["test"])
        head, self.output = self.model["head"], self.model["output"]
        self._frozen: list[nn.Module] = []
        if self.model["backbone"] is None:
            raise TaskError("model.backbone is not set; `foveate list` shows what there is")
        if head not in HEADS:
            raise TaskError(f"model.head is {head!r}, but must be one of {', '.join(HEADS)}")
        if self.output not in OUTPUTS:
            raise TaskError(f"model.output is {self.output!r}, but must be one of {', '.join(OUTPUTS)}")
        self.as_masks = head in MASK_HEADS
        if self.output != "semantic" and not self.as_masks:
            raise TaskError(f"{head} labels pixels; {self.output} segmentation needs {' or '.join(MASK_HEADS)}")
        measures = data["normalization"] == "data"
        if data["channels"] != 3:
            # Published numbers are of colours; others' are set, or measured.
            usual = data["normalization"] == "backbone" or data["mean"] == self.DEFAULTS["data"]["mean"]
            measures, data["normalization"] = measures or usual, None
            self.model["backbone_kwargs"] = {**self.model["backbone_kwargs"], "in_chans": data["channels"]}
        data |= normalization_of(data["normalization"], self.model["backbone"])
        if measures:
            data |= {"mean": (0.5,) * data["channels"], "std": (0.25,) * data["channels"]}
        self.rule = InputRule(**{key: data[key] for key in ("short", "long", "divisor", "mean", "std")})
        if self.rule.channels != data["channels"]:
            raise TaskError(f"data.mean and data.std need one number for each of the {data['channels']} channels")
        skip_damaged = config["damaged_images"] == "skip"
        self.train_set, self.val_set = open_maps(data, self.rule, self.output, self.as_masks, skip_damaged)
        if measures:
            measured = measure_normalization(self.train_set.image, self.train_set.images)
            self._said.append(describe_normalization(measured))
            self.rule = dataclasses.replace(self.rule, **measured)
            self.train_set.rule = self.val_set.rule = self.rule
        if data["balance"]:
            shown, classes = self.train_set.occurring(), len(self.train_set.classes)
            self.train_set.weights = draw_weights(shown, classes, data["balance"], data["repeat"])
        self._source, self._by_values = (
            data["root"] or data["name"],
            data["name"] in ("folder", "huggingface") and data["unlabelled"] is None,
        )
        self.classes, self.things = list(self.train_set.classes), list(self.train_set.things)
        self.class_weights = self._weigh(config["loss"]["class_weights"])
        named = [f"iou_{name}" for name in self.classes] if len(self.classes) <= 2 else []
        self.shown = {
            "semantic": ["miou", "aacc", *named],
            "instance": ["mask_ap", "mask_ap50"],
            "panoptic": ["pq", "sq", "rq"],
        }[self.output]
        self.metric = self.shown[0]

    def _weigh(self, given: str | Sequence[float] | None) -> Tensor | None:
        """Return the weight of each class in the loss, by the pixels of up to 100 training images."""
        if given is not None and self.as_masks:
            raise TaskError(f"loss.class_weights is for heads that label pixels; {self.model['head']} finds masks")
        counts = np.zeros(len(self.classes) + 1, np.int64)
        images = self.train_set.images if given == "balanced" else 0
        for index in sorted({place * images // LOOKED_AT for place in range(LOOKED_AT)} if images else ()):
            labels = self.train_set.labels(index)
            counts += np.bincount(np.minimum(labels.ravel(), len(self.classes)), minlength=len(counts))
        return class_weights(given, torch.from_numpy(counts[:-1]), self.classes)

    def build_model(self) -> nn.Module:
        """Return the segmenter, initialised or with the weights the config starts from."""
        model = build_segmenter(self.model, self.things, self.rule)
        self.model = with_told(self.model, model)
        self._frozen = freeze_stages(model.backbone, self.model["frozen_stages"])
        if self.class_weights is not None:
            model.class_weights = self.class_weights
        return model

    def check_data(self, training: bool = True) -> list[str]:
        """Return what is to be said of the data before they are measured by, and with ``training`` trained on.

        Raises:
            TaskError: If nothing is labelled, for label maps held-out pixels are all of one class, or nothing gives
                images to train on one size.
        """
        if training and self.train_set.pad is None:
            raise TaskError("data.augment.crop is not set; images of a batch need one size")
        what = {"semantic": "labelled pixel", "instance": "object", "panoptic": "segment"}[self.output]
        lines = list(self._said)
        for part, samples in (("training", self.train_set), ("validation", self.val_set))[not training :]:
            needed = 2 if self.output == "semantic" and part == "validation" else 1
            hint = partial(self._hint, samples)
            lines += check_classes(part, samples.occurring(), self.classes, self._source, what, needed, hint)
        return lines

    def _hint(self, samples: SegmentationSet) -> str:
        """Say which values of label maps count as unlabelled: they may stand for the class that never occurs."""
        unlabelled = samples.unlabelled() if isinstance(samples, LabelMaps) else {}
        if not unlabelled:
            return ""
        most = sorted(unlabelled, key=unlabelled.get, reverse=True)[:5]
        shares = ", ".join(f"{value} ({unlabelled[value]:.1%} of the pixels)" for value in most)
        cure = ""
        if self._by_values:
            values = sorted({value for counts in samples.value_counts for value in counts})
            example = f"={values}".replace(" ", "") if len(values) == len(self.classes) else ""
            cure = f"; if one stands for a class, set data.values{example}"
        return f"; counted as unlabelled: {shares}{cure}"

    def loss(self, model: nn.Module, images: Tensor, targets: Any) -> dict[str, Tensor]:
        """Return the losses of a batch; the engine adds them."""
        for module in [model.backbone] if self.model["norm_eval"] else self._frozen:
            freeze_statistics(module)
        if self.as_masks:
            # Of these, a file may have made Mask2Former a OneFormer, which needs to know.
            return model.loss(images, targets, prompt=self.output, normalized=True)
        return model.loss(images, targets, normalized=True)

    def predict(self, model: nn.Module, images: list[dict[str, Any]]) -> list[Any]:
        """Return for every image what `segment_image` does."""
        return [
            segment_image(model, entry["image"], entry["size"], self.output, self.test, len(self.classes))
            for entry in images
        ]

    def measure(self, predictions: list, targets: list) -> dict[str, float]:
        """Return metrics as fractions: of labels mIoU, accuracies and Dice; of instances AP; of segments PQ."""
        from ..metrics.segmentation import count_labels, measure_labels, measure_panoptic

        pairs = zip(predictions, targets, strict=True)
        if self.output == "semantic":
            measured = measure_labels(count_labels(pairs, len(self.classes)))
            metrics = {key: value for key, value in measured.items() if isinstance(value, float)}
            if len(self.classes) <= NAMED_CLASSES:
                of_class = dict(zip(self.classes, measured["iou"].tolist(), strict=True))
                metrics |= {f"iou_{name}": value for name, value in of_class.items()}
        elif self.output == "panoptic":
            measured = measure_panoptic(pairs, self.things)
            metrics = {key: value for key, value in measured.items() if isinstance(value, float)}
        else:
            from ..metrics.average_precision import NUMBERS, measure_ap

            measured = measure_ap(predictions, targets, "mask")
            metrics = {f"mask_{name}": measured[name] for name in NUMBERS if measured[name] >= 0}
        return {key: value for key, value in metrics.items() if value == value}

    def measure_classes(self, predictions: list, targets: list) -> list[dict[str, Any]]:
        """Return a row for each class: of labels IoU, accuracy and share, of segments PQ, of instances AP."""
        from ..metrics.classes import measure_objects
        from ..metrics.segmentation import count_labels, measure_labels, measure_panoptic

        pairs = zip(predictions, targets, strict=True)
        if self.output == "instance":
            return measure_objects(predictions, targets, self.classes, ("mask",))
        if self.output == "panoptic":
            values = measure_panoptic(pairs, self.things)["class_pq"].tolist()
            return [{"class": name, "pq": value} for name, value in zip(self.classes, values, strict=True)]
        counts = count_labels(pairs, len(self.classes))
        measured, share = measure_labels(counts), (counts.sum(1) / counts.sum()).tolist()
        columns = (measured["iou"].tolist(), measured["acc"].tolist(), share)
        return [
            dict(zip(("class", "iou", "accuracy", "share of pixels"), row, strict=True))
            for row in zip(self.classes, *columns, strict=True)
        ]

    def draw(
        self, predictions: list, targets: list, folder: Path, epoch: int, indices: list[int]
    ) -> list[tuple[str, str]]:
        """Draw truths beside predictions; return files and what they show.

        Args:
            predictions: Of held-out images.
            targets: Their truths.
            folder: Where pictures go.
            epoch: After which the predictions were made.
            indices: Which of the held-out images they are.
        """
        from ..metrics.confusion import worst_of
        from ..pictures.classes import draw_confusion

        taken, scores = self._confuse(predictions, targets)
        shown = [(indices[place], targets[place], predictions[place]) for place in worst_of(scores)]
        rows = [(self.val_set.image(index), target, prediction) for index, target, prediction in shown]
        title = f"held-out images with the lowest {'F1' if self.output == 'instance' else 'share right'}, epoch {epoch}"
        if self.output == "instance":
            from ..pictures.objects import draw_comparison

            draw_comparison(rows, self.classes, folder / "predictions.png", title)
        else:
            from ..pictures.regions import draw_comparison

            draw_comparison(rows, self.classes, folder / "predictions.png", title, self.things)
        names = self.classes if self.output == "semantic" else [*self.classes, "nothing"]
        of = "found and missed objects" if self.output == "instance" else "pixels"
        draw_confusion(taken, names, folder / "confusion.png", of)
        return [
            ("predictions.png", "the worst predictions beside the truth"),
            ("confusion.png", "which classes are taken for which"),
        ]

    def _confuse(self, predictions: list, targets: list) -> tuple[np.ndarray, list[float]]:
        """Return which classes are taken for which, objects or pixels, and how well each image was answered."""
        from ..metrics.confusion import confuse_objects
        from ..metrics.segmentation import count_labels

        count = len(self.classes)
        if self.output == "instance":
            return confuse_objects(predictions, targets, count, "mask")
        if self.output == "panoptic":
            # Void is the class after the last, predicted or true; true void doesn't count.
            count += 1
            predictions, targets = ([part[..., 0] for part in parts] for parts in (predictions, targets))
            targets = [torch.where(target == count - 1, IGNORE, target) for target in targets]
        of_image = [count_labels([pair], count) for pair in zip(predictions, targets, strict=True)]
        right = [float(counts.diagonal().sum() / counts.sum().clamp(min=1)) for counts in of_image]
        return sum(of_image).numpy(), right

    def draw_inputs(self, items: list[Any], path: Path, title: str, train: bool) -> None:
        """Draw items of a data set, of training or not, under their classes or segments; ``title`` says what it is."""
        from ..pictures.regions import draw_inputs

        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (self.rule.mean, self.rule.std))
        images, truths = [], []
        for inputs, truth in items:
            pixels = (inputs if train else inputs["image"]) * std + mean
            image = as_picture(Bands((255 * pixels).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()))
            # Truth to be measured by has the size that the image had.
            images.append(image if train else image.resize(inputs["size"][::-1]))
            truths.append(truth)
        draw_inputs(images, truths, self.classes, path, title)

    def card(self) -> dict:
        """Return, in plain types, what prediction needs besides the weights."""
        card = segmenter_card(self.model, self.classes, self.things, self.output, self.rule, self.test)
        return card | {"white": self.train_set.white}


def segmenter_card(
    model: Mapping[str, Any],
    classes: Sequence[str],
    things: Sequence[bool],
    output: str,
    rule: InputRule,
    test: Mapping[str, Any],
) -> dict[str, Any]:
    """Return, in plain types, what prediction needs of a segmenter besides the weights."""
    return {
        "task": "segment",
        "classes": list(classes),
        "things": list(things),
        "output": output,
        "input": dataclasses.asdict(rule),
        "test": dict(test),
        **describe_model(model),
    }


def build_segmenter(model: dict[str, Any], things: list[bool], rule: InputRule) -> nn.Module:
    """Return the segmenter that ``model`` describes, as in `Segment.DEFAULTS`.

    Args:
        model: Its settings.
        things: For each class whether its objects are told apart.
        rule: How images become inputs.

    Raises:
        TaskError: If there is no such head or option, or no weights to start from.
        UnknownModelError: If the backbone or its setting is unknown.
        CheckpointError: If a checkpoint can't be read or isn't one of this model.
    """
    kwargs = dict(model["kwargs"])
    wrong = next((key for key in ("mean", "std") if key in kwargs), None)
    if wrong is not None:
        raise TaskError(f"model.kwargs.{wrong}: the data are normalised by data.{wrong}; set that")
    kwargs |= {"mean": rule.mean, "std": rule.std}
    if model["head"] in MASK_HEADS:
        kwargs.setdefault("things", [label for label, is_thing in enumerate(things) if is_thing])
    if rule.channel_order != "rgb":
        kwargs["channel_order"] = rule.channel_order
    built = build_described(create_segmenter, model, len(things), kwargs)
    if built.channel_order != rule.channel_order:
        raise TaskError(
            f"{model['checkpoint']}: sees channels as {built.channel_order}, but the data give {rule.channel_order}"
        )
    return built


def build_again(model: Mapping[str, Any], card: Mapping[str, Any]) -> nn.Module:
    """Return the model that a run started from, as in `Segment.DEFAULTS`, with what its card tells of it."""
    told = {key: card[key] for key in ("head", "kwargs")}
    return build_segmenter({**model, **told}, card["things"], InputRule(**card["input"]))


def segment_image(
    model: nn.Module, image: Tensor, size: tuple[int, int], output: str, test: dict[str, Any], classes: int
) -> Any:
    """Segment one image.

    Args:
        model: A segmenter in evaluation mode.
        image: Normalised, ``[3, h, w]``.
        size: Height and width of the result.
        output: ``"semantic"``, ``"instance"`` or ``"panoptic"``.
        test: As in `Segment.DEFAULTS`.
        classes: Number of classes.

    Returns:
        On the CPU: classes ``[H, W]``, uint8; or a dict of ``boxes``, ``labels``, ``scores`` and ``masks`` (run
        lengths); or class and number of every pixel's segment ``[H, W, 2]``, int32; void has the class after the last.
    """
    views = {"scales": tuple(test["scales"]), "flip": test["flip"], "normalized": True}
    if not hasattr(model, "things"):
        windows = {key: test[key] for key in ("mode", "crop_size", "stride")}
        return model.predict([image], **windows, **views, output_size=size)[0].to(torch.uint8).cpu()
    answer = model.predict([image], output=output, **views, output_size=size)[0]
    if output == "semantic":
        return answer.to(torch.uint8).cpu()
    if output == "instance":
        return to_plain(answer)
    numbers = answer["segments"].cpu()
    label_of = torch.full((len(answer["segments_info"]) + 1,), classes, dtype=torch.int32)
    for info in answer["segments_info"]:
        label_of[info["id"]] = info["category_id"]
    return torch.stack([label_of[numbers.long()], numbers.int()], -1)
