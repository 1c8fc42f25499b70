"""The head of RetinaNet (Lin et al. 2017), with the post-processing of both eras of published models."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss
from torchvision.ops.misc import Conv2dNormActivation

from ... import TaskError
from . import fixed
from .anchors import AnchorGrid
from .assign import BACKGROUND, IGNORED, Matcher
from .boxes import BoxCoder, has_area, scale_of
from .postprocess import Limits, choose_anchors, choose_clipped_last, choose_pairs
from .rpn import EPS, flatten_map

SELECTIONS = ("pairs", "anchors")


class RetinaHead(nn.Module):
    """Classes and boxes of every anchor.

    Attributes:
        anchors: The anchors of the levels.
        score_threshold: Detections have higher scores.
        nms_threshold: Largest overlap of detections of a class.
        max_detections: Most detections of an image.
        per_level: How many of each level are considered.
        selection: How those are chosen. ``"pairs"``: pairs of anchor and class above the threshold, by score;
            ``"anchors"``: anchors by their best class, then all of their classes, as mmdet did it until 2.18.

    Args:
        channels: Channels of the pyramid.
        num_classes: Classes of objects; there is no background.
        rules: ``"mmdet"``, or ``"detectron2"``: boxes are clipped to the image only after the overlapping ones are
            gone, and may shrink freely.

    Raises:
        TaskError: If ``selection`` is none of those.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        anchors: AnchorGrid,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
        per_level: int = 1000,
        selection: str = "pairs",
        rules: str = "mmdet",
    ):
        super().__init__()
        if selection not in SELECTIONS:
            raise TaskError(f"selection is {selection!r}; it can be {' or '.join(map(repr, SELECTIONS))}")
        self.num_classes = num_classes
        self.anchors = anchors
        self.coder = BoxCoder(shrinks_freely=rules == "detectron2")
        self.clips_last = rules == "detectron2"
        self.matcher = Matcher(0.5, 0.4, minimum=0.0)
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections
        self.per_level = per_level
        self.selection = selection
        self.cls_tower = self._tower(channels)
        self.reg_tower = self._tower(channels)
        self.cls_logits = nn.Conv2d(channels, anchors.per_cell * num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, anchors.per_cell * 4, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        nn.init.constant_(self.cls_logits.bias, -math.log(99))

    @staticmethod
    def _tower(channels: int) -> nn.Sequential:
        return nn.Sequential(*(Conv2dNormActivation(channels, channels, norm_layer=None) for _ in range(4)))

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return, for every level, logits ``[B, A * K, H, W]`` and offsets ``[B, A * 4, H, W]``."""
        logits = [self.cls_logits(self.cls_tower(level)) for level in pyramid]
        return logits, [self.bbox_pred(self.reg_tower(level)) for level in pyramid]

    def loss(
        self,
        logits: Sequence[Tensor],
        offsets: Sequence[Tensor],
        objects: Sequence[Tensor],
        labels: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Return ``loss_cls`` and ``loss_bbox``, each with the values ``[levels]`` that are to be added.

        Args:
            logits: As `forward` returns them.
            offsets: As `forward` returns them.
            objects: Boxes ``[M, 4]`` of each image's objects.
            labels: Their classes ``[M]``.
        """
        grids = self.anchors(logits)
        anchors, counts = torch.cat(grids), [len(grid) for grid in grids]
        matches = torch.stack([self.matcher(anchors, boxes) for boxes in objects])
        divisor = sum((match >= 0).sum().clamp(min=1) for match in matches) + EPS
        cls, bbox = [], []
        for grid, logit, offset, match in zip(grids, logits, offsets, matches.split(counts, dim=1), strict=True):
            logit, offset = flatten_map(logit, self.num_classes), flatten_map(offset, 4)
            goals, references, truths = torch.zeros_like(logit), [], []
            for image, (boxes, label) in enumerate(zip(objects, labels, strict=True)):
                positive = (match[image] >= 0).nonzero().squeeze(1)
                taken = match[image, positive]
                goals[image, positive, label[taken]] = 1
                references.append(grid[positive])
                truths.append(boxes[taken])
            learns = match != IGNORED
            cls.append(sigmoid_focal_loss(logit[learns], goals[learns], alpha=0.25, gamma=2.0, reduction="sum"))
            encoded = self.coder.encode(torch.cat(references), torch.cat(truths))
            bbox.append(F.l1_loss(offset[match > BACKGROUND], encoded, reduction="sum"))
        return {"loss_cls": torch.stack(cls) / divisor, "loss_bbox": torch.stack(bbox) / divisor}

    @torch.no_grad()
    def detect(
        self,
        logits: Sequence[Tensor],
        offsets: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        original_sizes: Sequence[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Return the detections of each image, best first, in pixels of the original images.

        Args:
            logits: As `forward` returns them.
            offsets: As `forward` returns them.
            image_sizes: ``(height, width)`` of each image, without padding.
            original_sizes: ``(height, width)`` of each image before it was resized.

        Returns:
            For each image ``boxes`` ``[D, 4]``, ``labels`` ``[D]`` and ``scores`` ``[D]``.
        """
        anchors = self.anchors(logits)
        logits = [flatten_map(level, self.num_classes) for level in logits]
        offsets = [flatten_map(level, 4) for level in offsets]
        limits = Limits(self.per_level, self.score_threshold, self.nms_threshold, self.max_detections)
        detections = []
        for image, (image_size, original) in enumerate(zip(image_sizes, original_sizes, strict=True)):
            levels = zip(anchors, (level[image] for level in logits), (level[image] for level in offsets), strict=True)
            scale = scale_of(offsets[0], image_size, original)
            if self.clips_last:
                boxes, labels, scores = choose_clipped_last(levels, self.coder, limits, scale, original)
            elif self.selection == "pairs":
                boxes, labels, scores = choose_pairs(levels, self.coder, limits, scale, image_size)
            else:
                boxes, labels, scores = choose_anchors(levels, self.coder, limits, scale, image_size)
            detections.append({"boxes": boxes, "labels": labels, "scores": scores})
        return detections

    def find(
        self, logits: Sequence[Tensor], offsets: Sequence[Tensor], image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `detect` finds in images of one size, as `fixed.finished` does.

        Args:
            logits: As `forward` returns them.
            offsets: As `forward` returns them.
            image_size: ``(height, width)`` of the images, without padding.
        """
        boxes, scores, labels = [], [], []
        for grid, logit, offset in zip(self.anchors(logits), logits, offsets, strict=True):
            score, offset = flatten_map(logit, self.num_classes).sigmoid(), flatten_map(offset, 4)
            if self.selection == "anchors":
                _, index = fixed.best(score.amax(dim=2), self.per_level)
                grid, offset, score = grid[index], fixed.take(offset, index), fixed.take(score, index)
                boxes.append(self.coder.decode(grid, offset, image_size))
                scores.append(score)
                continue
            score, pairs = fixed.pairs_above(score, self.score_threshold, self.per_level)
            cells = torch.div(pairs, self.num_classes, rounding_mode="floor")
            size = None if self.clips_last else image_size
            boxes.append(self.coder.decode(grid[cells], fixed.take(offset, cells), size))
            scores.append(score)
            labels.append(pairs % self.num_classes)
        boxes, scores = torch.cat(boxes, 1), torch.cat(scores, 1)
        if self.selection == "anchors":
            most = fixed.most_pairs(scores.shape[1], self.num_classes, self.score_threshold, exclusive=False)
            scores, pairs = fixed.pairs_above(scores, self.score_threshold, most)
            boxes = fixed.take(boxes, torch.div(pairs, self.num_classes, rounding_mode="floor"))
            labels = pairs % self.num_classes
        else:
            labels = torch.cat(labels, 1)
            scores = torch.where(has_area(boxes), scores, fixed.NONE)
        detections = fixed.choose(boxes, scores, labels, self.nms_threshold, self.max_detections)
        if self.clips_last:
            detections = fixed.clipped_last(*detections, image_size)
        return fixed.finished(*detections)
