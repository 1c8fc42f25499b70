"""Losses of predicted sets of masks: one prediction is matched to each object, and masks are compared at points.

Written anew after Mask2Former (arXiv 2112.01527, sections 3.2 and 4.1; github.com/facebookresearch/Mask2Former, MIT)
and PointRend (arXiv 1912.08193).
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..matching import match_cheapest, mean_count

Target = dict[str, Tensor]


def semantic_targets(labels: Tensor, ignore_index: int = 255) -> list[Target]:
    """Return label maps ``[B, H, W]`` as targets of sets: for each class in an image, all its pixels as one mask."""
    targets = []
    for label in labels:
        classes = label.unique()
        classes = classes[classes != ignore_index]
        targets.append({"labels": classes.long(), "masks": label == classes[:, None, None]})
    return targets


def sample_at(masks: Tensor, points: Tensor) -> Tensor:
    """Read masks ``[N, H, W]`` at ``points`` ``[N, P, 2]``, (x, y) from 0 to 1, bilinear: ``[N, P]``."""
    if masks.shape[0] == 0:
        return masks.new_zeros(points.shape[:2])
    return F.grid_sample(masks[:, None], (2.0 * points[:, None]).sub_(1.0), align_corners=False)[:, 0, 0]


def _sample_matched(masks: Tensor, matched: Tensor, points: Tensor) -> Tensor:
    """Read the masks of matched objects at their points, without copying all masks into the order of the matching."""
    order = matched.argsort()
    if len(matched) < len(masks):
        masks = masks[matched[order]]
    return sample_at(masks.float(), points[order])[order.argsort()]


class SetCriterion(nn.Module):
    """Matching, and the losses of classes and masks, of every prediction of a decoder.

    Args:
        num_classes: Classes, without the one for no object.
        class_weight: Weight of the class in the matching's cost and in the loss.
        mask_weight: Weight of the masks' binary cross entropy in both.
        dice_weight: Weight of the masks' Dice loss in both.
        no_object_weight: Weight of the class for no object in the cross entropy.
        num_points: Points at which masks are compared.
        oversample_ratio: How many times as many points are looked at, to find the uncertain ones.
        importance_sample_ratio: Fraction of the points that are the most uncertain; the others are uniform.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = (
        "class_weight",
        "mask_weight",
        "dice_weight",
        "no_object_weight",
        "num_points",
        "oversample_ratio",
        "importance_sample_ratio",
    )

    def __init__(
        self,
        num_classes: int,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        num_points: int = 112 * 112,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.weights = {"loss_ce": class_weight, "loss_mask": mask_weight, "loss_dice": dice_weight}
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = no_object_weight
        self.register_buffer("empty_weight", empty_weight, persistent=False)

    def forward(self, predictions: Sequence[tuple[Tensor, Tensor]], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return the losses before their weights.

        Args:
            predictions: Class logits ``[B, Q, K + 1]`` and mask logits ``[B, Q, h, w]`` of every layer; the last pair
                is the result.
            targets: For each image ``labels`` ``[N]``, below K, and ``masks`` ``[N, H, W]``; H and W are the same for
                all, and cover what the predictions cover.

        Returns:
            ``loss_ce``, ``loss_mask`` and ``loss_dice`` of the last layer, and with ``_0``, ``_1``, ... of the others.
        """
        *others, last = predictions
        objects = mean_count(sum(len(target["labels"]) for target in targets), last[0].device)
        losses = self._losses(last, targets, objects)
        for index, prediction in enumerate(others):
            losses |= {f"{name}_{index}": loss for name, loss in self._losses(prediction, targets, objects).items()}
        return losses

    def weighted(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses times their weights; the sum of them is what one minimises."""
        return {name: loss * self.weights["_".join(name.split("_")[:2])] for name, loss in losses.items()}

    @torch.no_grad()
    def match(self, prediction: tuple[Tensor, Tensor], targets: Sequence[Target]) -> list[tuple[Tensor, Tensor]]:
        """Return, for each image, the queries and the objects of the cheapest matching, in the order of the queries."""
        pairs = []
        for logits, masks, target in zip(*prediction, targets, strict=True):
            points = torch.rand(1, self.num_points, 2, device=masks.device)
            # Under autocast the costs of large masks would overflow.
            with torch.autocast(masks.device.type, enabled=False):
                truth = sample_at(target["masks"].float(), points.expand(len(target["labels"]), -1, -1))
                predicted = sample_at(masks.float(), points.expand(len(masks), -1, -1))
                # The cross entropy's two halves, log(1 + e^x) - x inside and log(1 + e^x) outside, in one product.
                mask_cost = (F.softplus(predicted).sum(-1, keepdim=True) - predicted @ truth.T) / predicted.shape[1]
                inside = predicted.sigmoid()
                overlap = 2 * inside @ truth.T
                dice_cost = 1 - (overlap + 1) / (inside.sum(-1)[:, None] + truth.sum(-1) + 1)
                class_cost = -logits.float().softmax(-1)[:, target["labels"].long()]
                cost = (
                    self.weights["loss_mask"] * mask_cost
                    + self.weights["loss_ce"] * class_cost
                    + self.weights["loss_dice"] * dice_cost
                )
            pairs.append(match_cheapest(cost))
        return pairs

    def _losses(
        self, prediction: tuple[Tensor, Tensor], targets: Sequence[Target], objects: Tensor
    ) -> dict[str, Tensor]:
        logits, masks = prediction[0].float(), prediction[1].float()
        pairs = self.match(prediction, targets)
        classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        for image, (queries, matched) in enumerate(pairs):
            classes[image, queries] = targets[image]["labels"].long()[matched]
        predicted = torch.cat([image[queries] for image, (queries, _) in zip(masks, pairs, strict=True)])
        with torch.no_grad():
            points = self._uncertain_points(predicted)
            pieces = points.split([len(queries) for queries, _ in pairs])
            truth = torch.cat(
                [
                    _sample_matched(target["masks"], matched, piece)
                    for target, (_, matched), piece in zip(targets, pairs, pieces, strict=True)
                ]
            )
        predicted = sample_at(predicted, points)
        inside = predicted.sigmoid()
        dice = 1 - (2 * (inside * truth).sum(-1) + 1) / (inside.sum(-1) + truth.sum(-1) + 1)
        cross_entropy = F.binary_cross_entropy_with_logits(predicted, truth, reduction="none")
        # The empty sum keeps the masks in the graph where there are no objects.
        return {
            "loss_ce": F.cross_entropy(logits.transpose(1, 2), classes, self.empty_weight.to(logits)),
            "loss_mask": cross_entropy.mean(1).sum() / objects + 0.0 * masks[:, :0].sum(),
            "loss_dice": dice.sum() / objects,
        }

    def _uncertain_points(self, masks: Tensor) -> Tensor:
        """Return points ``[N, P, 2]`` of masks ``[N, h, w]``, most of them where the logits are near to zero."""
        count, device = len(masks), masks.device
        uncertain = int(self.importance_sample_ratio * self.num_points)
        points = torch.rand(count, int(self.num_points * self.oversample_ratio), 2, device=device)
        nearest = sample_at(masks, points).abs().neg().topk(uncertain, dim=1, sorted=False).indices
        points = points.gather(1, nearest[..., None].expand(-1, -1, 2))
        return torch.cat([points, torch.rand(count, self.num_points - uncertain, 2, device=device)], dim=1)
