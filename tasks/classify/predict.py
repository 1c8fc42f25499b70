"""From images to class names, with a trained checkpoint or a published model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ...zoo.checkpoint import Checkpoint, load
from .. import TaskError
from ..checkpoints import read_checkpoint, without_start
from ..data.annotations import in_threads
from ..data.class_names import class_names
from ..data.classification import InputRule
from ..data.images import FULL_WHITE, to_pixels
from .multi_label import THRESHOLD
from .task import classifier_card, create_classifier

_TOGETHER = 32  # images of a batch


class Predictor:
    """A classifier with all it needs to name what is in an image.

    Attributes:
        top: Classes that are named, unless a call says how many.
        channels: Channels of the images.
        card: What a file of this model has to say of it, to be read again; None if the model isn't known.
        white: See below.
        transform: Makes an image the model's input, by the rule.
        together: Whether images share batches; then rounding depends on how many there are.

    Args:
        model: Maps ``[B, C, H, W]`` to logits ``[B, classes]``.
        rule: How an image becomes its input.
        classes: Names of the classes, in the order of the logits.
        device: Where to run.
        white: Value of 16-bit pixels that is white; see `read_image`.
        multi_label: Whether an image may have several classes, each with a probability of its own, or none.
    """

    top = 5
    card: dict[str, Any] | None = None
    together = True

    def __init__(
        self,
        model: nn.Module,
        rule: InputRule,
        classes: Sequence[str],
        device: str | torch.device = "cpu",
        white: int = FULL_WHITE,
        multi_label: bool = False,
    ):
        self.multi_label = multi_label
        self.model = model.eval().to(device)
        self.rule = rule
        self.classes = list(classes)
        self.device = device
        self.white = white
        self.channels = rule.channels
        self.transform = rule.transform()

    @classmethod
    def from_checkpoint(cls, path: str | Path | Checkpoint, device: str | torch.device = "cpu") -> "Predictor":
        """Read a checkpoint of `foveate train`.

        Raises:
            CheckpointError: If the file can't be read or is no such checkpoint.
        """
        checkpoint = read_checkpoint(path, "classify")
        card = checkpoint["card"]
        rule = InputRule(**card["input"])
        model = create_classifier(card["model"], len(card["classes"]), rule, **without_start(card["kwargs"]))
        load(model, checkpoint["state_dict"], path)
        predictor = cls(model, rule, card["classes"], device, card["white"], card.get("multi_label", False))
        predictor.card = card
        return predictor

    @classmethod
    def from_name(cls, name: str, device: str | torch.device = "cpu") -> "Predictor":
        """Take a timm model, ours or theirs, with its published weights.

        Raises:
            TaskError: If the model is unknown or its weights don't exist or can't be had.
        """
        return cls.from_model(name, create_classifier(name, pretrained=True), device)

    @classmethod
    def from_model(cls, name: str, model: nn.Module, device: str | torch.device = "cpu") -> "Predictor":
        """Take a timm model as it is, with the input and the classes that timm knows of it.

        Args:
            name: Its registered name.
            model: The model.
            device: Where to run.

        Raises:
            TaskError: If its images are not square.
        """
        cfg = model.pretrained_cfg
        channels, height, width = cfg["input_size"]
        if height != width:
            raise TaskError(f"{name}: takes {height}x{width} images; only square inputs are predicted from")
        how = {key: cfg[key] for key in ("mean", "std", "interpolation", "crop_pct")}
        rule = InputRule(height, channels, **how, crop_mode=cfg.get("crop_mode") or "center")
        classes = cfg.get("label_names") or ()
        if len(classes) != model.num_classes:  # those of the published weights, and these are others
            classes = class_names("imagenet-1k", model.num_classes)
        predictor = cls(model, rule, classes, device)
        predictor.card = classifier_card(name, {}, classes, rule)
        return predictor

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], top: int | None = None) -> list[list[tuple[str, float]]]:
        """Return, for every image of any mode, its ``top`` classes with their probabilities, the likeliest first."""
        # Sharing a batch moves the last bits, and takes little more than half the time.
        count = _TOGETHER if self.together else 1
        parts = (images[start : start + count] for start in range(0, len(images), count))
        # Threads only resize: of an image that is there twice, the pixels are decoded once.
        batches = (
            torch.stack(in_threads(self.transform, [to_pixels(each, self.channels, self.white) for each in part]))
            for part in parts
        )
        whole = torch.cat([self.model(batch.to(self.device)) for batch in batches]).float()
        shares = whole.sigmoid() if self.multi_label else whole.softmax(-1)
        best = shares.topk(min(top or self.top, len(self.classes)))
        return [
            [(self.classes[index], probability) for index, probability in zip(*row, strict=True)]
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def describe(self, ranking: list[tuple[str, float]]) -> dict[str, Any]:
        """Return the classes of an image in plain types."""
        return {"classes": [{"class": name, "probability": round(probability, 6)} for name, probability in ranking]}

    def headline(self, ranking: list[tuple[str, float]]) -> str:
        """Return the likeliest class, or all that are likely, in a few words."""
        if self.multi_label:
            return ", ".join(f"{name} ({share:.1%})" for name, share in ranking if share >= THRESHOLD) or "nothing"
        return f"{ranking[0][0]} ({ranking[0][1]:.1%})"

    def draw(self, image: Image.Image, ranking: list[tuple[str, float]], path: Path) -> dict[str, str]:
        """Draw the image beside its classes; return what was written beside the picture: nothing."""
        from ..pictures.classes import draw_prediction

        draw_prediction(to_pixels(image, self.channels, self.white), ranking, path)
        return {}

    def write_map(self, ranking: list[tuple[str, float]], path: Path) -> dict[str, str]:
        """Write nothing: classes of an image have no map."""
        return {}
