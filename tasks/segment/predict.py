"""From images to classes of pixels, objects or segments, with a trained checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ...zoo.checkpoint import Checkpoint, open_checkpoint
from ..checkpoints import read_checkpoint, rebuilt_from, write_whole
from ..data.images import FULL_WHITE, to_pixels
from ..data.segmentation import InputRule
from ..detections import count_objects, describe_objects
from ..pictures.objects import draw_detections
from ..pictures.regions import draw_segmentation
from ..tiles import TiledMap, write_png
from .task import build_segmenter, segment_image


class Predictor:
    """A segmenter with all it needs to label an image.

    Attributes:
        threshold: Least score of an instance that is named.
        channels: Channels of the images.
        card: What a file of this model has to say of it, to be read again; None if the model isn't known.
        white: See below.

    Args:
        model: A segmenter.
        rule: How an image becomes its input.
        classes: Names of the classes, in the order of the labels.
        things: For each class whether its objects are told apart.
        output: ``"semantic"``, ``"instance"`` or ``"panoptic"``.
        test: As in `Segment.DEFAULTS`.
        device: Where to run.
        white: Value of 16-bit pixels that is white; see `read_image`.
    """

    threshold = 0.5
    card: dict[str, Any] | None = None

    def __init__(
        self,
        model: nn.Module,
        rule: InputRule,
        classes: Sequence[str],
        things: Sequence[bool],
        output: str,
        test: dict[str, Any],
        device: str | torch.device = "cpu",
        white: int = FULL_WHITE,
    ):
        self.model = model.eval().to(device)
        self.rule, self.output, self.test = rule, output, dict(test)
        self.channels = rule.channels
        self.classes, self.things = list(classes), list(things)
        self.device = device
        self.white = white

    @classmethod
    def from_checkpoint(cls, path: str | Path | Checkpoint, device: str | torch.device = "cpu") -> "Predictor":
        """Read a checkpoint of `foveate train`.

        Raises:
            CheckpointError: If the file can't be read or is no such checkpoint.
        """
        checkpoint = open_checkpoint(path)
        card = read_checkpoint(checkpoint, "segment")["card"]
        rule = InputRule(**card["input"])
        model = build_segmenter(rebuilt_from(card, checkpoint), card["things"], rule)
        how = (card["classes"], card["things"], card["output"], card["test"], device, card["white"])
        predictor = cls(model, rule, *how)
        predictor.card = card
        return predictor

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[Any]:
        """Return for every image what `segment_image` does, in the upright image's own size."""
        pixels = (to_pixels(image, self.channels, self.white) for image in images)
        return [
            segment_image(
                self.model,
                self.rule(image).to(self.device),
                (image.height, image.width),
                self.output,
                self.test,
                len(self.classes),
            )
            for image in pixels
        ]

    def describe(self, answer: Any) -> dict[str, Any]:
        """Return, in plain types, the share of the image of every class, or its objects, or its segments."""
        if self.output == "instance":
            return describe_objects(answer, self.classes, self.threshold)
        if self.output == "semantic":
            return {"classes": [{"class": name, "share": round(share, 6)} for name, share in self._shares(answer)]}
        segments = [
            {"id": number, "class": self.classes[label], "thing": self.things[label], "area": area}
            for (label, number), area in count_areas(answer).items()
            if label < len(self.classes)
        ]
        return {"segments": sorted(segments, key=lambda segment: segment["id"])}

    def headline(self, answer: Any) -> str:
        """Return the largest classes and how many objects there are, in a few words."""
        if self.output == "instance":
            return count_objects(answer, self.classes, self.threshold)
        text = ", ".join(f"{name} {share:.1%}" for name, share in self._shares(answer)[:3]) or "nothing"
        if self.output == "panoptic":
            count = sum(segment["thing"] for segment in self.describe(answer)["segments"])
            text += f"; {count} objects"
        return text

    def draw(self, image: Image.Image, answer: Any, path: Path) -> dict[str, str]:
        """Draw the result on the image; return what was written beside the picture.

        That is, but for instances, a PNG of the size of the image: of labels, 255 for none, or of the segments' ids in
        COCO's panoptic code.
        """
        self.draw_picture(to_pixels(image, self.channels, self.white), answer, path)
        return self.write_map(answer, path)

    def draw_picture(self, image: Image.Image, answer: Any, path: Path) -> None:
        """Draw the result on the image, or a picture of its size."""
        if self.output == "instance":
            draw_detections(image, answer, self.classes, path, self.threshold)
        else:
            draw_segmentation(image, answer, self.classes, path, self.things)

    def write_map(self, answer: Any, path: Path) -> dict[str, str]:
        """Write, but for instances, the PNG that `draw` says, beside ``path``; return what it is, and its name."""
        if self.output == "instance":
            return {}
        name = "labels" if self.output == "semantic" else "map"
        beside = path.with_name(f"{path.stem}_{name}.png")
        if isinstance(answer, TiledMap):
            write_png(beside, map(self._to_plain, answer.bands()), answer.height, answer.width)
        else:
            write_whole(beside, Image.fromarray(self._to_plain(answer.numpy())).save)
        return {name: str(beside)}

    def _to_plain(self, answer: np.ndarray) -> np.ndarray:
        """Return labels as they are, or the panoptic code of segments ``[H, W, 3]``."""
        if self.output == "semantic":
            return answer
        numbers = np.where(answer[..., 0] < len(self.classes), answer[..., 1], 0)
        return np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], -1).astype(np.uint8)

    def _shares(self, answer: Any) -> list[tuple[str, float]]:
        areas: dict[int, int] = {}
        for (label, _), area in count_areas(answer).items():
            areas[label] = areas.get(label, 0) + area
        total = sum(areas.values())
        known = [(self.classes[label], area / total) for label, area in areas.items() if label < len(self.classes)]
        return sorted(known, key=lambda pair: -pair[1])


def count_areas(answer: Any) -> dict[tuple[int, int], int]:
    """Return how many pixels each class and number has; the number is 0 where there are no segments."""
    if isinstance(answer, TiledMap):
        return answer.areas
    codes = answer.reshape(-1, 2) if answer.ndim == 3 else answer.flatten()
    there, counts = torch.unique(codes, dim=0, return_counts=True)
    pairs = there.tolist() if answer.ndim == 3 else [(label, 0) for label in there.tolist()]
    return {(label, number): count for (label, number), count in zip(pairs, counts.tolist(), strict=True)}
