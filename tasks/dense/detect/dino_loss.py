"""DINO's losses: one query of each layer is matched to each object; those of the denoising know theirs.

Written anew after mmdet 3.3 (Apache-2.0).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert, sigmoid_focal_loss

from ..matching import match_cheapest, mean_count
from .boxes import giou_loss, pairwise_giou
from .dino import Predictions

Size = tuple[int, int]
# Per image, queries and the objects that they are to find.
Pairs = list[tuple[Tensor, Tensor]]

_ALPHA = 0.25
_EPS = 1e-12


class DinoCriterion:
    """The losses of DINO's predictions.

    Args:
        cls_weight: Weight of the focal loss; in the matching it is 2, whatever it is here.
        box_weight: Weight of the boxes' L1 distance, in units of the image's sides, in both.
        iou_weight: Weight of the boxes' GIoU in both.
    """

    def __init__(self, cls_weight: float = 1.0, box_weight: float = 5.0, iou_weight: float = 2.0):
        self.cls_weight = cls_weight
        self.box_weight = box_weight
        self.iou_weight = iou_weight

    def __call__(
        self,
        predictions: Predictions,
        labels: Sequence[Tensor],
        boxes: Sequence[Tensor],
        image_sizes: Sequence[Size],
    ) -> dict[str, Tensor]:
        """Return the weighted losses under mmdet's names; their sum is to be minimised.

        Args:
            predictions: With denoising.
            labels: Classes ``[N]`` of each image's objects.
            boxes: Their boxes ``[N, 4]``, xyxy in units of the image's sides.
            image_sizes: ``(height, width)`` of each image.
        """
        device = predictions.boxes[0].device
        sides = torch.tensor([[w, h, w, h] for h, w in image_sizes], device=device, dtype=torch.float32)
        goals = [box_convert(image, "xyxy", "cxcywh") for image in boxes]
        noisy, losses = predictions.noisy, {}
        start = noisy.boxes.shape[1]

        def of(prefix: str, logits: Tensor, predicted: Tensor, pairs: Pairs | None = None) -> None:
            logits, predicted = logits.float(), predicted.float()
            if pairs is None:
                pairs = self.match(logits, predicted, labels, goals, sides)
            terms = self._losses(logits, predicted, pairs, labels, goals, sides)
            losses.update({f"{prefix}loss_{name}": value for name, value in terms.items()})

        proposals = predictions.proposals
        of("enc_", proposals.logits, proposals.boxes.sigmoid())
        known = _known_pairs(labels, noisy.groups, noisy.most)
        last = len(predictions.logits) - 1
        for layer, (logits, predicted) in enumerate(zip(predictions.logits, predictions.boxes, strict=True)):
            prefix = "" if layer == last else f"d{layer}."
            of(prefix, logits[:, start:], predicted[:, start:])
            of(f"{prefix}dn_", logits[:, :start], predicted[:, :start], known)
        return losses

    @torch.no_grad()
    def match(
        self,
        logits: Tensor,
        boxes: Tensor,
        labels: Sequence[Tensor],
        goals: Sequence[Tensor],
        sides: Tensor,
    ) -> Pairs:
        """Return, for each image, the queries and the objects of the cheapest matching.

        Args:
            logits: Of the queries, ``[B, Q, K]``.
            boxes: Their boxes ``[B, Q, 4]``, cx, cy, w, h in units of the image's sides.
            labels: Classes ``[N]`` of each image's objects.
            goals: Their boxes ``[N, 4]``, likewise.
            sides: Width, height, width, height of each image, ``[B, 4]``.
        """
        pairs = []
        for logit, box, label, goal, side in zip(logits, boxes, labels, goals, sides, strict=True):
            scores = logit.sigmoid()
            positive = -(scores + _EPS).log() * _ALPHA * (1 - scores) ** 2
            negative = -(1 - scores + _EPS).log() * (1 - _ALPHA) * scores**2
            cost = (
                2.0 * (positive - negative)[:, label]
                + self.box_weight * torch.cdist(box, goal, p=1)
                - self.iou_weight * pairwise_giou(_in_pixels(box, side), _in_pixels(goal, side))
            )
            pairs.append(match_cheapest(cost))
        return pairs

    def _losses(
        self,
        logits: Tensor,
        boxes: Tensor,
        pairs: Pairs,
        labels: Sequence[Tensor],
        goals: Sequence[Tensor],
        sides: Tensor,
    ) -> dict[str, Tensor]:
        count = mean_count(sum(len(queries) for queries, _ in pairs), logits.device)
        truth = torch.zeros_like(logits)
        matched, matched_goals, scale = [], [], []
        for image, (queries, objects) in enumerate(pairs):
            truth[image, queries, labels[image][objects]] = 1.0
            matched.append(boxes[image, queries])
            matched_goals.append(goals[image][objects])
            scale.append(sides[image].expand(len(queries), 4))
        matched, matched_goals, scale = (torch.cat(parts) for parts in (matched, matched_goals, scale))
        cls = sigmoid_focal_loss(logits, truth, alpha=_ALPHA, gamma=2.0, reduction="sum")
        iou = giou_loss(_in_pixels(matched, scale), _in_pixels(matched_goals, scale)).sum()
        return {
            "cls": self.cls_weight * cls / count,
            "bbox": self.box_weight * (matched - matched_goals).abs().sum() / count,
            "iou": self.iou_weight * iou / count,
        }


def _in_pixels(boxes: Tensor, sides: Tensor) -> Tensor:
    return box_convert(boxes * sides, "cxcywh", "xyxy")


def _known_pairs(labels: Sequence[Tensor], groups: int, most: int) -> Pairs:
    """Return the places of the positives of each group, and their objects."""
    pairs = []
    for label in labels:
        objects = torch.arange(len(label), device=label.device)
        starts = torch.arange(groups, device=label.device)[:, None] * 2 * most
        pairs.append(((starts + objects).flatten(), objects.repeat(groups)))
    return pairs
