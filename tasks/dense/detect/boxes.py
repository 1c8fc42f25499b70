"""Boxes of published detectors: their coder, overlaps, and rules of non-maximum suppression.

Boxes are xyxy in pixels, with continuous coordinates: a width is ``x2 - x1``.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Sizes change by a factor of 62.5 at most, up or down.
_MAX_LOG_RATIO = abs(math.log(16 / 1000))


class BoxCoder:
    """Offsets of a box from a reference box, in units of ``stds`` (Girshick et al. 2014).

    Other than torchvision's, offsets of sizes are limited both ways, and boxes are clipped on decoding.

    Args:
        stds: Standard deviations of the offsets of centre and logarithmic size.
        shrinks_freely: Whether offsets that make boxes smaller have no limit, as in detectron2.
    """

    def __init__(self, stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0), shrinks_freely: bool = False):
        self.stds = tuple(stds)
        self._least = None if shrinks_freely else -_MAX_LOG_RATIO

    def encode(self, references: Tensor, boxes: Tensor) -> Tensor:
        """Return the offsets ``[N, 4]`` from ``references`` ``[N, 4]`` to ``boxes`` ``[N, 4]``."""
        centre, size = _centre_and_size(references)
        goal, goal_size = _centre_and_size(boxes)
        offsets = torch.cat([(goal - centre) / size, (goal_size / size).log()], dim=-1)
        return offsets / offsets.new_tensor(self.stds)

    def decode(self, references: Tensor, offsets: Tensor, image_size: tuple[int, int] | None = None) -> Tensor:
        """Return the boxes ``[..., 4]`` at ``offsets`` from ``references``, clipped to ``(height, width)`` if given."""
        offsets = offsets * offsets.new_tensor(self.stds)
        centre, size = _centre_and_size(references)
        centre = centre + size * offsets[..., :2]
        half = size * offsets[..., 2:].clamp(self._least, _MAX_LOG_RATIO).exp() * 0.5
        boxes = torch.cat([centre - half, centre + half], dim=-1)
        return boxes if image_size is None else clip(boxes, image_size)


def _centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) * 0.5, high - low


def clip(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Clip boxes ``[..., 4]`` to an image of ``(height, width)``."""
    height, width = image_size
    return torch.stack(
        [
            boxes[..., 0].clamp(0, width),
            boxes[..., 1].clamp(0, height),
            boxes[..., 2].clamp(0, width),
            boxes[..., 3].clamp(0, height),
        ],
        dim=-1,
    )


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _overlap(first: Tensor, second: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return intersections and unions of boxes; coordinate by coordinate, since there may be many pairs."""
    width = torch.minimum(first[..., 2], second[..., 2]) - torch.maximum(first[..., 0], second[..., 0])
    height = torch.minimum(first[..., 3], second[..., 3]) - torch.maximum(first[..., 1], second[..., 1])
    overlap = width.clamp(min=0) * height.clamp(min=0)
    return overlap, (_area(first) + _area(second) - overlap).clamp(min=eps)


def scale_of(like: Tensor, image_size: tuple[int, int], original_size: tuple[int, int]) -> Tensor:
    """Return by how much an image's boxes grew when it was resized, ``[4]``, with the dtype and device of ``like``."""
    scale = [image_size[1] / original_size[1], image_size[0] / original_size[0]]
    return like.new_tensor(scale * 2)


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the overlaps ``[N, M]`` of boxes ``[N, 4]`` with ``[M, 4]``; 0 for boxes without area."""
    overlap, union = _overlap(first[:, None], second[None], 1e-6)
    return overlap / union


def _giou(first: Tensor, second: Tensor) -> Tensor:
    overlap, union = _overlap(first, second, 1e-6)
    sides = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    hull = sides.clamp(min=0).prod(dim=-1).clamp(min=1e-6)
    return overlap / union - (hull - union) / hull


def pairwise_giou(first: Tensor, second: Tensor) -> Tensor:
    """Return the generalised overlaps ``[N, M]`` (Rezatofighi et al. 2019) of boxes ``[N, 4]`` with ``[M, 4]``."""
    return _giou(first[:, None], second[None])


def giou_loss(boxes: Tensor, goals: Tensor) -> Tensor:
    """Return ``1 - GIoU`` ``[N]`` (Rezatofighi et al. 2019) of boxes ``[N, 4]`` and their goals ``[N, 4]``."""
    return 1 - _giou(boxes, goals)


def has_area(boxes: np.ndarray | Tensor, masks: np.ndarray | Tensor | None = None) -> Tensor:
    """Return which objects have an area, as models see them: their boxes in float32.

    Args:
        boxes: ``[..., 4]``, ``x1, y1, x2, y2``.
        masks: Of boxes ``[N, 4]``, ``[N, H, W]``, in which a pixel must be set; or None.

    Returns:
        ``[...]``, bool.
    """
    boxes = torch.as_tensor(boxes).float()
    left = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    return left if masks is None else left & torch.as_tensor(masks.any((1, 2))).bool()
