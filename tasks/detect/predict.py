"""From images to objects, with a trained checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ...zoo.checkpoint import Checkpoint, open_checkpoint
from ..checkpoints import read_checkpoint, rebuilt_from
from ..data.images import FULL_WHITE, to_pixels
from ..detections import count_objects, describe_objects
from ..pictures.objects import draw_detections
from .task import build_detector, detect_image


class Predictor:
    """A detector with all it needs to name what is in an image.

    Attributes:
        threshold: Least score of an object that is named.
        channels: Channels of the images.
        card: What a file of this model has to say of it, to be read again; None if the model isn't known.
        white: See below.

    Args:
        model: Maps a list of images ``[C, H, W]``, uint8, to dicts of ``boxes``, ``labels``, ``scores`` and perhaps
            ``masks``.
        classes: Names of the classes, in the order of the labels.
        device: Where to run.
        white: Value of 16-bit pixels that is white; see `read_image`.
    """

    threshold = 0.5
    card: dict[str, Any] | None = None

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        device: str | torch.device = "cpu",
        white: int = FULL_WHITE,
    ):
        self.model = model.eval().to(device)
        self.channels = len(model.transform.mean) if hasattr(model, "transform") else 3
        self.classes = list(classes)
        self.device = device
        self.white = white

    @classmethod
    def from_checkpoint(cls, path: str | Path | Checkpoint, device: str | torch.device = "cpu") -> "Predictor":
        """Read a checkpoint of `foveate train`.

        Raises:
            CheckpointError: If the file can't be read or is no such checkpoint.
        """
        checkpoint = open_checkpoint(path)
        card = read_checkpoint(checkpoint, "detect")["card"]
        model = build_detector(rebuilt_from(card, checkpoint), len(card["classes"]))
        predictor = cls(model, card["classes"], device, card["white"])
        predictor.card = card
        return predictor

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Return ``boxes`` ``[N, 4]``, ``labels``, ``scores`` and perhaps ``masks`` (run lengths) of every image."""
        pixels = (np.array(to_pixels(image, self.channels, self.white)) for image in images)
        batch = [torch.from_numpy(image).permute(2, 0, 1).to(self.device) for image in pixels]
        return [detect_image(self.model, image) for image in batch]

    def describe(self, detections: dict[str, Any]) -> dict[str, Any]:
        """Return, in plain types, the objects whose score is at least ``threshold``: masks as COCO's run lengths."""
        return describe_objects(detections, self.classes, self.threshold)

    def headline(self, detections: dict[str, Any]) -> str:
        """Return how many objects of which classes there are, in a few words."""
        return count_objects(detections, self.classes, self.threshold)

    def draw(self, image: Image.Image, detections: dict[str, Any], path: Path) -> dict[str, str]:
        """Draw the objects on the image; return what was written beside the picture: nothing."""
        self.draw_picture(to_pixels(image, self.channels, self.white), detections, path)
        return {}

    def draw_picture(self, image: Image.Image, detections: dict[str, Any], path: Path) -> None:
        """Draw the objects on the image, or a picture of its size."""
        draw_detections(image, detections, self.classes, path, self.threshold)

    def write_map(self, detections: dict[str, Any], path: Path) -> dict[str, str]:
        """Write nothing: objects have no picture of their own."""
        return {}
