"""From scores and boxes to detections: the best candidates, suppression of doubles, masks laid on the image."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

from .boxes import BoxCoder, clip, has_area

# From here on, groups are suppressed one by one.
_MANY = 10000
# Below this a single call is fastest, whatever the groups.
_FEW = 500

# Of each level of a pyramid its anchors ``[N, 4]``, logits ``[N, K]`` and offsets ``[N, 4]``.
Levels = Iterable[tuple[Tensor, Tensor, Tensor]]


class Limits(NamedTuple):
    """How many candidates of a dense head become detections."""

    per_level: int
    score_threshold: float
    nms_threshold: float
    max_detections: int


def top_k(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` highest of ``scores`` ``[N]`` in descending order, earlier ones first."""
    if len(scores) > count:
        # A stable sort of everything gives the same, but this sorts few.
        least = scores.topk(count).values[-1]
        candidates = (scores >= least).nonzero().squeeze(1)
        return candidates[scores[candidates].sort(descending=True, stable=True).indices[:count]]
    return scores.sort(descending=True, stable=True).indices


def grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Suppress, within each group, boxes that overlap a better one by more than ``threshold``.

    Groups are kept apart by an offset to their coordinates, as published detectors do it; its rounding decides close
    calls, so it is made here even where groups are treated one by one.

    Args:
        boxes: Boxes ``[N, 4]``, float32.
        scores: Their scores ``[N]``.
        groups: Their groups ``[N]``, such as classes or levels.
        threshold: Largest intersection over union of boxes that are kept.

    Returns:
        Indices of the boxes kept, by descending score.
    """
    if len(boxes) == 0:
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    shifted = boxes + (groups.to(boxes) * (boxes.max() + 1))[:, None]
    if len(boxes) < _MANY:
        # Groups of boxes inside an image can't meet, so that they may be treated one by one, which is faster.
        apart = boxes.device.type == "cpu" and len(boxes) > _FEW and boxes.min() >= 0
        if not apart:
            return nms(shifted, scores, threshold)
    survives = torch.zeros_like(scores, dtype=torch.bool)
    for group in groups.unique():
        members = (groups == group).nonzero().squeeze(1)
        survives[members[nms(shifted[members], scores[members], threshold)]] = True
    index = survives.nonzero().squeeze(1)
    return index[scores[index].sort(descending=True, stable=True).indices]


def multiclass_nms(
    boxes: Tensor, scores: Tensor, score_threshold: float, nms_threshold: float, max_detections: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose detections among regions: every class of a region is a candidate.

    Args:
        boxes: Boxes ``[N, 4]``, or ``[N, K, 4]`` with one for each class.
        scores: Scores ``[N, K]`` of the classes, without background.
        score_threshold: Candidates have higher scores.
        nms_threshold: Largest overlap of detections of a class.
        max_detections: Most detections, the best.

    Returns:
        Boxes ``[D, 4]``, scores ``[D]``, and the candidates' indices ``n * K + k`` ``[D]``, by descending score.
    """
    candidates = (scores > score_threshold).flatten().nonzero().squeeze(1)
    classes = scores.shape[1]
    regions, labels = candidates // classes, candidates % classes
    boxes = boxes[regions] if boxes.dim() == 2 else boxes[regions, labels]
    scores = scores.flatten()[candidates]
    index = grouped_nms(boxes, scores, labels, nms_threshold)[:max_detections]
    return boxes[index], scores[index], candidates[index]


def choose_pairs(
    levels: Levels, coder: BoxCoder, limits: Limits, scale: Tensor, image_size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes ``[D, 4]``, labels and scores of the best pairs of anchor and class, as mmdet does since 2.18.

    Args:
        levels: Of an image.
        coder: Makes boxes of anchors and offsets.
        limits: How many to take.
        scale: Divides boxes to make them those of the original image.
        image_size: To which boxes are clipped first.
    """
    boxes, labels, scores = _best_pairs(levels, coder, limits, scale, image_size)
    boxes = boxes / scale
    valid = has_area(boxes)
    boxes, labels, scores = boxes[valid], labels[valid], scores[valid]
    index = grouped_nms(boxes, scores, labels, limits.nms_threshold)[: limits.max_detections]
    return boxes[index], labels[index], scores[index]


def choose_clipped_last(
    levels: Levels, coder: BoxCoder, limits: Limits, scale: Tensor, original: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as `choose_pairs`, but clipped to the original image in the end, as detectron2 does."""
    boxes, labels, scores = _best_pairs(levels, coder, limits, scale, None)
    index = grouped_nms(boxes, scores, labels, limits.nms_threshold)[: limits.max_detections]
    boxes = clip(boxes[index] / scale, original)
    valid = has_area(boxes)
    return boxes[valid], labels[index][valid], scores[index][valid]


def _best_pairs(
    levels: Levels, coder: BoxCoder, limits: Limits, scale: Tensor, image_size: tuple[int, int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    boxes, labels, scores = [], [], []
    floor = torch.logit(scale.new_tensor(limits.score_threshold))
    for grid, logit, offset in levels:
        # Few pairs pass; those that may are found by their logits, and the test is made on their sigmoids alone.
        pairs = (logit.flatten() > floor - 1e-2).nonzero().squeeze(1)
        score = logit.flatten()[pairs].sigmoid()
        above = score > limits.score_threshold
        pairs, score = pairs[above], score[above]
        index = top_k(score, limits.per_level)
        pairs, score = pairs[index], score[index]
        cells = pairs // logit.shape[1]
        boxes.append(coder.decode(grid[cells], offset[cells], image_size))
        labels.append(pairs % logit.shape[1])
        scores.append(score)
    return torch.cat(boxes), torch.cat(labels), torch.cat(scores)


def choose_anchors(
    levels: Levels, coder: BoxCoder, limits: Limits, scale: Tensor, image_size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same of the anchors with the best class, all of whose classes are candidates, as mmdet did before."""
    boxes, scores = [], []
    for grid, logit, offset in levels:
        score = logit.sigmoid()
        if len(score) > limits.per_level:
            index = top_k(score.amax(dim=1), limits.per_level)
            grid, score, offset = grid[index], score[index], offset[index]
        boxes.append(coder.decode(grid, offset, image_size))
        scores.append(score)
    boxes, scores = torch.cat(boxes) / scale, torch.cat(scores)
    classes = scores.shape[1]
    boxes, scores, candidates = multiclass_nms(
        boxes, scores, limits.score_threshold, limits.nms_threshold, limits.max_detections
    )
    return boxes, candidates % classes, scores


def paste_masks(masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float | None = 0.5) -> Tensor:
    """Lay a mask head's maps into an image by bilinear interpolation at the pixels' centres.

    Args:
        masks: Probabilities ``[N, S, S]``.
        boxes: Boxes ``[N, 4]`` of the maps, in pixels of the image.
        image_size: ``(height, width)`` of the image.
        threshold: Least probability of a pixel of the mask; None returns the probabilities.

    Returns:
        Masks ``[N, height, width]``, bool, or float32 where there is no threshold.
    """
    height, width = image_size
    dtype = torch.float32 if threshold is None else torch.bool
    pasted = torch.zeros(len(masks), height, width, dtype=dtype, device=masks.device)
    # Interpolation against zeros reaches half a cell of the map beyond the box.
    reach = (boxes[:, 2:] - boxes[:, :2]) / (2 * masks.shape[-1])
    low = ((boxes[:, :2] - reach).floor() - 1).clamp(min=0).long().tolist()
    high = ((boxes[:, 2:] + reach).ceil() + 1).long().tolist()
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        (left, top), (right, bottom) = low[index], high[index]
        right, bottom = min(right, width), min(bottom, height)
        if right <= left or bottom <= top:
            continue
        x = _positions(left, right, x1, x2)
        y = _positions(top, bottom, y1, y2)
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
        values = F.grid_sample(masks[index, None, None].float(), grid[None], align_corners=False)[0, 0]
        pasted[index, top:bottom, left:right] = values if threshold is None else values >= threshold
    return pasted


def _positions(start: int, stop: int, low: Tensor, high: Tensor) -> Tensor:
    pixels = torch.arange(start, stop, dtype=torch.float32, device=low.device) + 0.5
    positions = (pixels - low) / (high - low) * 2 - 1
    # Of a box without extent, every pixel shows the middle.
    return torch.where(positions.isfinite(), positions, 0.0)
