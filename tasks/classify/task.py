"""Classification as the engine sees it: data, model, loss, predictions and metrics of a config."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from ...blocks.losses import collect_losses
from ...zoo.backbone import check_name
from ...zoo.checkpoint import Checkpoint, CheckpointError
from ...zoo.library_errors import call_fault, first_line, unknown_option
from ...zoo.loading import create_model
from ...zoo.maps import cfg_of
from .. import TaskError
from ..checkpoints import without_start
from ..data.classification import InputRule
from ..data.occurrence import check_classes, class_weights, draw_weights
from ..data.statistics import describe_normalization, measure_normalization
from ..dense.build import normalization_of
from . import multi_label
from .attentive_mixing import AttentiveMixing

# Images of a gallery.
SHOWN = 30
MIXING = ("mixup", "cutmix", "smmix", "attentive_cutmix")  # of the keys of loss


def create_classifier(
    name: str,
    num_classes: int | None = None,
    rule: InputRule | None = None,
    pretrained: bool = False,
    checkpoint: str | Path | Checkpoint | None = None,
    **kwargs,
) -> nn.Module:
    """Create a timm model, ours or theirs, as a classifier.

    Args:
        name: Registered name, with an optional tag.
        num_classes: Classes; the model's own if None.
        rule: Input; gives the channels, and the size to models that need to know it. The model's own if None.
        pretrained: Whether to start from published weights.
        checkpoint: Weights to start from instead: a path, an address, a ``model.tag`` of published ones, or what
            `open_checkpoint` read.
        **kwargs: Options of the model.

    Raises:
        UnknownModelError: If the model is unknown.
        TaskError: If it has no such option, or there are no weights to start from.
        CheckpointError: If ``checkpoint`` can't be read or isn't one of this model.
    """
    check_name(name)
    kwargs["pretrained"] = pretrained and checkpoint is None
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if rule is not None:
        kwargs["in_chans"] = rule.channels
        if cfg_of(name).fixed_input_size:
            kwargs.setdefault("img_size", rule.size)
    try:
        return create_model(name, checkpoint, **kwargs)
    except CheckpointError:
        raise
    except TypeError as error:
        if unknown_option(error) is None:
            raise
        raise TaskError(f"{name}: {call_fault(error)}; model.kwargs must be options of the model") from error
    except (RuntimeError, OSError, ValueError) as error:
        if not pretrained and checkpoint is None:
            raise
        raise TaskError(f"{name}: its published weights can't be loaded: {first_line(error)}") from error


def build_again(model: Mapping[str, Any], card: Mapping[str, Any]) -> nn.Module:
    """Return the model that a run started from, as in `Classify.DEFAULTS`, with the classes that its card names."""
    options = {key: model[key] for key in ("pretrained", "checkpoint")}
    rule = InputRule(**card["input"])
    return create_classifier(model["name"], len(card["classes"]), rule, **options, **dict(model["kwargs"]))


class Classify:
    """Image classification, described by a config.

    Attributes:
        train_set: Training images with labels.
        val_set: Held-out images with labels.
        metric: The metric by which the best checkpoint is chosen.
        shown: The metrics that a line of progress names.
    """

    # Every key a config may have, with its default; `engine.keys` says what they mean.
    DEFAULTS: ClassVar[dict] = {
        "model": {
            "name": None,
            "pretrained": False,
            "checkpoint": None,
            "kwargs": {},
        },
        "data": {
            "name": "folder",
            "root": None,
            "train": None,
            "val": None,
            "num_classes": None,
            "multi_label": False,
            "image_column": None,
            "label_column": None,
            "holdout": 0.2,
            "holdout_seed": 0,
            "balance": 0.0,
            "normalization": None,
            "size": 224,
            "channels": 3,
            "white": None,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "augment": {},
        },
        "loss": {
            "label_smoothing": 0.0,
            "class_weights": None,
            "mixup": 0.0,
            "cutmix": 0.0,
            "smmix": 0.0,
            "attentive_cutmix": 0.0,
        },
    }
    FREE = ("model.kwargs", "data.augment")  # dicts with keys of their own
    OPTIONAL: ClassVar[dict] = {
        "model.name": str,
        "model.checkpoint": str,
        "data.root": str,
        "data.train": str,
        "data.val": str,
        "data.num_classes": int,
        "data.white": int,
        "data.normalization": str,
        "data.image_column": str,
        "data.label_column": str,
        "loss.class_weights": object,
    }
    metric = "accuracy"
    shown = ("accuracy", "f1", "loss", "accuracy_top5")

    def __init__(self, config: dict):
        from ..data.formats import open_classes, resolve

        loss = config["loss"]
        data, self._said = resolve(dict(config["data"]), "classes")
        if config["model"]["name"] is None:
            raise TaskError("model.name is not set; `foveate list` shows what there is")
        measures = data["normalization"] == "data"
        if data["channels"] not in (1, 3) and data["normalization"] != "data":
            # Published numbers are of colours; others' are set, or measured.
            measures = data["normalization"] == "backbone" or data["mean"] == self.DEFAULTS["data"]["mean"]
        data |= normalization_of(data["normalization"], config["model"]["name"])
        if measures:
            data |= {"mean": (0.5,) * data["channels"], "std": (0.25,) * data["channels"]}
        self.rule = InputRule(
            **{key: data[key] for key in ("size", "channels", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
        )
        try:
            holds_out = config["data"]["name"] == "auto" and data["val"] is None
            self.train_set, self.val_set = open_classes(data, self.rule, holds_out)
        except (TypeError, ValueError, LookupError, AssertionError) as error:
            if isinstance(error, TaskError) or not data["augment"]:
                raise
            fault = call_fault(error)
            raise TaskError(f"data.augment: {fault}; it takes what timm's create_transform does") from error
        if measures:
            measured = measure_normalization(self.train_set.image, len(self.train_set))
            self._said.append(describe_normalization(measured))
            self.rule = dataclasses.replace(self.rule, **measured)
            self.train_set.transform = self.rule.transform(dict(data["augment"]))
            self.val_set.transform = self.rule.transform()
        self.classes = list(self.train_set.classes)
        self._source = data["root"] or data["name"]
        self.model = dict(config["model"])
        self.label_smoothing = loss["label_smoothing"]
        self.several = data["multi_label"]
        if self.several:
            self.metric, self.shown = "map", ("map", "f1", "exact", "loss")
            if mixing := [key for key in ("label_smoothing", *MIXING) if loss[key]]:
                raise TaskError(f"loss.{mixing[0]} is for one class an image; set it to 0 with data.multi_label")
        labels = [label for labels in self._labels(self.train_set) for label in labels]
        counts = torch.bincount(torch.as_tensor(labels, dtype=torch.int64), minlength=len(self.classes))
        self.class_weights = class_weights(loss["class_weights"], counts, self.classes)
        if data["balance"]:
            self.train_set.weights = draw_weights(self._labels(self.train_set), len(self.classes), data["balance"])
        self.mixup = None
        if loss["mixup"] > 0 or loss["cutmix"] > 0:
            batch = min(config["batch_size"], len(self.train_set))
            if batch % 2:
                raise TaskError(f"mixup mixes pairs, but a batch has {batch} images; choose an even batch_size")
            self.mixup = Mixup(
                loss["mixup"], loss["cutmix"], label_smoothing=self.label_smoothing, num_classes=len(self.classes)
            )
        self.attentive = None
        if loss["smmix"] > 0 or loss["attentive_cutmix"] > 0:
            if loss["smmix"] + loss["attentive_cutmix"] > 1:
                raise TaskError("loss.smmix and loss.attentive_cutmix are probabilities; together they are at most 1")
            self.attentive = AttentiveMixing(loss["smmix"], loss["attentive_cutmix"], self.label_smoothing)

    def _labels(self, samples: Any) -> list[Sequence[int]]:
        """Return the labels of every image."""
        return samples.targets if self.several else [(target,) for target in samples.targets]

    def check_data(self, training: bool = True) -> list[str]:
        """Return what is to be said of the data before they are measured by, and with ``training`` trained on.

        Raises:
            TaskError: If there is a single class.
        """
        if len(self.classes) < 2 and not self.several:
            raise TaskError(
                f"{self._source}: has one class, {self.classes[0]!r}; a classifier tells at least two apart"
            )
        lines = list(self._said)
        for part, samples in (("training", self.train_set), ("validation", self.val_set))[not training :]:
            lines += check_classes(part, self._labels(samples), self.classes, self._source, "image")
        return lines

    def build_model(self) -> nn.Module:
        """Return the model, initialised or with the weights the config starts from."""
        options = {key: value for key, value in self.model.items() if key not in ("name", "kwargs")}
        model = create_classifier(
            self.model["name"], len(self.classes), self.rule, **options, **dict(self.model["kwargs"])
        )
        if self.attentive is not None:
            self.attentive.prepare(model, torch.zeros(1, self.rule.channels, self.rule.size, self.rule.size))
        return model

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the loss of ``images`` ``[B, C, H, W]`` with their targets, and those that the model reports.

        Targets are ``[B]``, or of several labels ``[B, classes]``.
        """
        weight = None if self.class_weights is None else self.class_weights.to(images.device)
        if self.attentive is not None and (way := self.attentive.draw()) is not None:
            mixed = self.attentive.mix(model, images, way)
            return self.attentive.loss(model, mixed, targets, partial(F.cross_entropy, weight=weight), way)
        smoothing = self.label_smoothing
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
            smoothing = 0.0  # the mixed targets are smooth already
        criterion = partial(F.cross_entropy, target=targets, weight=weight, label_smoothing=smoothing)
        if self.several:
            criterion = partial(multi_label.loss, targets=targets, weight=weight)
        with collect_losses(criterion) as own:
            logits = model(images)
        losses = {"loss": criterion(logits)} | {f"loss_{name}": value for name, value in own.items()}
        # Processes average what they have measured: each must have the same.
        extras = () if self.attentive is None else self.attentive.extras
        return losses | {name: torch.zeros_like(losses["loss"]) for name in extras}

    def predict(self, model: nn.Module, images: Tensor) -> list[Tensor]:
        """Return the logits ``[classes]``, in float32, of every image."""
        return list(model(images).float())

    def measure(self, predictions: list[Tensor], targets: list[Tensor]) -> dict[str, float]:
        """Return loss, accuracy, macro F1 and top-5 accuracy, as fractions; of several labels `multi_label`'s."""
        from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

        if self.several:
            return multi_label.measure(torch.stack(predictions), torch.stack(targets))
        logits, labels = torch.stack(predictions), torch.as_tensor(targets)
        count = len(self.classes)
        metrics = {
            "accuracy": multiclass_accuracy(logits, labels, count, average="micro"),
            "f1": multiclass_f1_score(logits, labels, count, average="macro"),
            "loss": F.cross_entropy(logits, labels),
        }
        if count > 5:
            metrics["accuracy_top5"] = multiclass_accuracy(logits, labels, count, average="micro", top_k=5)
        return {name: float(value) for name, value in metrics.items()}

    def measure_classes(self, predictions: list[Tensor], targets: list) -> list[dict[str, Any]]:
        """Return precision, recall, F1 and images of each class; of several labels average precision instead."""
        from torchmetrics.functional.classification import multiclass_f1_score, multiclass_precision, multiclass_recall

        logits = torch.stack(predictions)
        if self.several:
            columns, images = multi_label.measure_classes(logits, torch.stack(targets)), torch.stack(targets).sum(0)
        else:
            labels, count = torch.as_tensor(targets), len(self.classes)
            named = {"precision": multiclass_precision, "recall": multiclass_recall, "f1": multiclass_f1_score}
            columns = {name: of(logits, labels, count, average="none") for name, of in named.items()}
            images = torch.bincount(labels, minlength=count)
        values = {name: column.tolist() for name, column in columns.items()}
        return [
            {"class": label, **{name: value[index] for name, value in values.items()}, "images": int(images[index])}
            for index, label in enumerate(self.classes)
        ]

    def draw_inputs(self, items: list[tuple[Tensor, int]], path: Path, title: str, train: bool) -> None:
        """Draw items of a data set as the model sees them.

        Args:
            items: Normalised images ``[C, H, W]`` with their classes.
            path: PNG to write.
            title: What is shown.
            train: Whether they are to train on; then they are mixed as the config says, if they are even in number.
        """
        from ..pictures.classes import draw_inputs

        images = torch.stack([image for image, _ in items])
        labels = None if self.several else torch.tensor([label for _, label in items])
        if labels is None:
            names = [multi_label.name(flags > 0, self.classes) for _, flags in items]
        elif train and self.mixup is not None and len(items) % 2 == 0:
            images, shares = self.mixup(images, labels)
            # Smoothing gives every class a little.
            names = [
                " + ".join(
                    f"{self.classes[label]} {value:.0%}" for value, label in zip(*row, strict=True) if value > 0.05
                )
                for row in zip(*(part.tolist() for part in shares.topk(2)), strict=True)
            ]
        else:
            names = [self.classes[label] for label in labels.tolist()]
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (self.rule.mean, self.rule.std))
        pixels = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        draw_inputs(pixels, [name if len(name) < 30 else f"{name[:28]}…" for name in names], path, title)

    def draw(
        self, predictions: list[Tensor], targets: list[int], folder: Path, epoch: int, indices: list[int]
    ) -> list[tuple[str, str]]:
        """Draw the best and the worst predictions and what is taken for what; return files and what they show.

        Args:
            predictions: Logits ``[classes]`` of held-out images.
            targets: Their classes.
            folder: Where pictures go.
            epoch: After which the predictions were made.
            indices: Which of the held-out images they are.
        """
        from ..metrics.confusion import confuse_labels
        from ..pictures.classes import draw_confusion, draw_gallery

        if self.several:
            how = (torch.stack(predictions).sigmoid(), torch.stack(targets), indices, folder, f"epoch {epoch}", SHOWN)
            return multi_label.draw(self.val_set, *how)
        shares = torch.stack(predictions).softmax(-1)
        labels = torch.as_tensor(targets)
        order = shares[torch.arange(len(labels)), labels].argsort(stable=True).tolist()
        pictures = []
        for name, share, positions in (("worst", "least", order[:SHOWN]), ("best", "greatest", order[::-1][:SHOWN])):
            ranked = [shares[i].topk(1) for i in positions]
            draw_gallery(
                [self.val_set.image(indices[i]) for i in positions],
                [self.classes[targets[i]] for i in positions],
                [[(self.classes[top.indices.item()], top.values.item())] for top in ranked],
                folder / f"{name}.png",
                f"held-out images whose class got the {share} probability, epoch {epoch}",
            )
            pictures.append((f"{name}.png", f"the {name} predictions"))
        taken = confuse_labels(targets, shares.argmax(-1).tolist(), len(self.classes))
        draw_confusion(taken, self.classes, folder / "confusion.png")
        return [*pictures, ("confusion.png", "which classes are taken for which")]

    def card(self) -> dict:
        """Return, in plain types, what prediction needs besides the weights."""
        card = classifier_card(self.model["name"], self.model["kwargs"], self.classes, self.rule)
        return card | {"white": self.train_set.white} | ({"multi_label": True} if self.several else {})


def classifier_card(name: str, kwargs: Mapping[str, Any], classes: Sequence[str], rule: InputRule) -> dict[str, Any]:
    """Return, in plain types, what prediction needs of a classifier besides the weights."""
    return {
        "task": "classify",
        "model": name,
        "kwargs": without_start(kwargs),
        "classes": list(classes),
        "input": dataclasses.asdict(rule),
    }
