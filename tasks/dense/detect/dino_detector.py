"""DINO as a detector: a backbone, mmdet's neck, the transformer and its losses."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..neck import channel_mapper
from .base import Detector, Size
from .dino import DinoHead, in_pixels
from .dino_loss import DinoCriterion
from .transform import DetectorTransform


class DINO(Detector):
    """DINO (arXiv 2203.03605): a transformer of the DETR line, whose detections need no suppression.

    Images are padded to the batch alone, and no pixel of the padding counts. Denoising draws from torch's global
    generator in mmdet's order, so that `torch.manual_seed` before the loss reproduces it.

    Attributes:
        head: From the neck's maps to classes and boxes, a `DinoHead`.
        criterion: The losses, a `DinoCriterion`.

    Args:
        backbone: Maps a batch to maps; has ``channels`` and, unless they are four of 1/4 to 1/32, ``reductions``.
        num_classes: Classes of objects.
        transform: Makes the batch of images.
        channels: Channels of the neck and the transformer.
        num_levels: Maps of the neck: 4, of strides 8 to 64, or 5, of strides 4 to 64.
        num_queries: Queries.
        encoder_layers: Layers of the encoder.
        decoder_layers: Layers of the decoder.
        hidden: Channels inside the transformer's MLPs.
        num_heads: Heads of each attention.
        num_points: Points of each head on each map.
        temperature: Of the encoder's position embedding: 20, or 10000 in mmdet's "improved" form.
        offset: Of the encoder's position embedding: 0, or -0.5 in the improved form.
        denoising_queries: Objects of the denoising: 100, or 300 in the improved form.
        cls_weight: Weight of the loss of the classes: 1, or 2 in the improved form.
        max_detections: Most detections of an image.
    """

    TRANSFORM: ClassVar[dict] = {"divisor": 1}
    OPTIONS: ClassVar[tuple[str, ...]] = (
        "channels",
        "num_levels",
        "num_queries",
        "encoder_layers",
        "decoder_layers",
        "hidden",
        "num_heads",
        "num_points",
        "temperature",
        "offset",
        "denoising_queries",
        "cls_weight",
        "max_detections",
    )

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int = 80,
        transform: DetectorTransform | None = None,
        channels: int = 256,
        num_levels: int = 4,
        num_queries: int = 900,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        hidden: int = 2048,
        num_heads: int = 8,
        num_points: int = 4,
        temperature: float = 20.0,
        offset: float = 0.0,
        denoising_queries: int = 100,
        cls_weight: float = 1.0,
        max_detections: int = 300,
    ):
        neck = channel_mapper(backbone, channels, num_levels)
        super().__init__(backbone, neck, transform or DetectorTransform(**self.TRANSFORM), num_classes)
        self.head = DinoHead(
            channels,
            num_classes,
            num_levels=num_levels,
            num_queries=num_queries,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            hidden=hidden,
            num_heads=num_heads,
            num_points=num_points,
            temperature=temperature,
            offset=offset,
            denoising_queries=denoising_queries,
            max_detections=max_detections,
        )
        self.criterion = DinoCriterion(cls_weight)

    @torch.no_grad()
    def predict_from_features(
        self,
        features: Sequence[Tensor],
        image_sizes: Sequence[Size],
        original_sizes: Sequence[Size] | None = None,
        soft_masks: bool = False,
    ) -> list[dict[str, Tensor]]:
        predictions = self.head(self.neck(features), image_sizes, self.transform.canvas(image_sizes))
        return self.head.detect(
            predictions.logits[-1], predictions.boxes[-1], image_sizes, original_sizes or image_sizes
        )

    @torch.no_grad()
    def find(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the detections of a batch of images of one size, in tensors, as for export.

        Args:
            batch: Normalised images ``[B, C, H, W]``, as the transform makes them.

        Returns:
            Boxes ``[B, D, 4]`` in pixels of the batch, scores ``[B, D]`` and labels ``[B, D]``, best first.
        """
        size = tuple(batch.shape[-2:])
        predictions = self.head(self.neck(self.backbone(batch)), [size], size)
        boxes, labels, scores = self.head.best(predictions.logits[-1], predictions.boxes[-1])
        return in_pixels(boxes, size), scores, labels

    def losses_from_features(
        self, features: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], image_sizes: Sequence[Size]
    ) -> dict[str, Tensor]:
        self._check(targets)
        labels = [target["labels"].long() for target in targets]
        boxes = [
            target["boxes"].float() / target["boxes"].new_tensor([width, height, width, height]).float()
            for target, (height, width) in zip(targets, image_sizes, strict=True)
        ]
        canvas = self.transform.canvas(image_sizes)
        predictions = self.head(self.neck(features), image_sizes, canvas, (labels, boxes))
        return self.criterion(predictions, labels, boxes, image_sizes)
