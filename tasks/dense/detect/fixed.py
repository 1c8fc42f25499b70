"""Detections in tensors whose sizes don't depend on what is in an image, for graphs that must hold for all images.

The rules are those of `postprocess`, on a batch at once: candidates are as many as there can be, and those that are
none have a score of -1. Ties are resolved as there, by the earlier candidate.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

from ....kernels.backends import exporting, graph
from .boxes import BoxCoder, clip, has_area

# The score of what is no candidate.
NONE = -1.0
# Most pairs of a row and a class that go on to be suppressed.
_MOST_PAIRS = 20000

Size = tuple[int, int]


@torch.library.custom_op("foveate::suppress", mutates_args=())
def _suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Return which boxes ``[B, N, 4]`` of scores ``[B, N]`` survive, ``[B, N]``, as ONNX's NonMaxSuppression does."""
    survives = torch.zeros_like(scores, dtype=torch.bool)
    for image, (box, score) in enumerate(zip(boxes, scores, strict=True)):
        survives[image, nms(box, score, threshold)] = True
    return survives & (scores > NONE)


@_suppress.register_fake
def _(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def suppress(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Return which candidates survive, ``[B, N]``, as `postprocess.grouped_nms` does.

    Args:
        boxes: ``[B, N, 4]``.
        scores: ``[B, N]``; those of -1 are no candidates.
        groups: Their groups ``[B, N]``, such as classes.
        threshold: Largest intersection over union of boxes that survive.
    """
    valid = scores > NONE
    boxes = boxes * valid[..., None]
    apart = boxes.flatten(1).amax(1)[:, None] + 1
    boxes = boxes + (groups.to(boxes) * apart * valid)[..., None]
    if not exporting() or graph().onnx:
        return _suppress(boxes, scores, threshold)
    # Of torch's and torchvision's operators alone: images lie apart, in numbers that add without rounding.
    far = torch.arange(boxes.shape[0], device=boxes.device, dtype=torch.float64)[:, None, None] * 2.0**26
    best = nms((boxes.double() + far).flatten(0, 1), scores.flatten().double(), threshold)
    survives = torch.zeros_like(scores).flatten().index_fill(0, best, 1.0)
    return (survives > 0).unflatten(0, scores.shape) & valid


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` best of scores ``[B, N]`` and their indices, best first; fewer if there are fewer.

    Where N is known only when the graph is run, there are always ``count``; those that aren't there have score -1.
    """
    if isinstance(scores.shape[1], int):
        return top_k(scores, min(count, scores.shape[1]))
    values, index = top_k(F.pad(scores, (0, count), value=NONE), count)
    return values, torch.minimum(index, torch.full_like(index, 1) * (scores.shape[1] - 1))


def top_k(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` best of scores ``[B, N]`` and their indices; of equal ones the first, as ONNX's TopK."""
    if exporting() and graph().onnx:
        return scores.topk(count)
    values, index = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :count], index[:, :count]


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return rows ``[B, M, ...]`` of ``x`` ``[B, N, ...]`` at ``index`` ``[B, M]``."""
    if x.ndim == 2:
        return x.gather(1, index)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def propose(
    anchors: Sequence[Tensor],
    scores: Sequence[Tensor],
    offsets: Sequence[Tensor],
    coder: BoxCoder,
    image_size: Size,
    per_level: int,
    most: int,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """Return proposals ``[B, P, 4]`` and their scores ``[B, P]``, as `RegionProposalNetwork.propose` does.

    Args:
        anchors: Of each level ``[N, 4]``.
        scores: Of each level ``[B, N]``.
        offsets: Of each level ``[B, N, 4]``.
        coder: Makes boxes of them.
        image_size: To which they are clipped.
        per_level: Best of each level.
        most: Best of all.
        threshold: Largest overlap within a level.
    """
    boxes, values, levels = [], [], []
    for level, (grid, score, offset) in enumerate(zip(anchors, scores, offsets, strict=True)):
        value, index = best(score, per_level)
        boxes.append(coder.decode(grid[index], take(offset, index), image_size))
        values.append(value)
        levels.append(torch.full_like(value, level))
    boxes, values, levels = torch.cat(boxes, 1), torch.cat(values, 1), torch.cat(levels, 1)
    values = torch.where(has_area(boxes), values, NONE)
    values = torch.where(suppress(boxes, values, levels, threshold), values, NONE)
    values, index = best(values, most)
    return take(boxes, index) * (values > NONE)[..., None], values


def pairs_above(scores: Tensor, threshold: float, most: int) -> tuple[Tensor, Tensor]:
    """Return the best pairs of a row and a class above a threshold: scores ``[B, M]`` and indices ``n * K + k``."""
    flat = scores.flatten(1)
    return best(torch.where(flat > threshold, flat, NONE), most)


def most_pairs(rows: int, classes: int, threshold: float, exclusive: bool) -> int:
    """Return how many pairs of a row and a class can have a score above a threshold.

    Args:
        rows: Rows.
        classes: Classes.
        threshold: Pairs have higher scores.
        exclusive: Whether the scores of a row add up to 1 at most.
    """
    if exclusive and threshold > 0:
        classes = min(classes, int(1 / threshold))
    return min(rows * classes, _MOST_PAIRS)


def choose(
    boxes: Tensor, scores: Tensor, labels: Tensor, nms_threshold: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best ``most`` candidates that survive: boxes ``[B, D, 4]``, scores and labels ``[B, D]``."""
    scores = torch.where(suppress(boxes, scores, labels, nms_threshold), scores, NONE)
    scores, index = best(scores, most)
    return take(boxes, index), scores, take(labels, index)


def clipped_last(boxes: Tensor, scores: Tensor, labels: Tensor, image_size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Clip detections to the image, and let those that have no area left come last, with a score of -1."""
    boxes = clip(boxes, image_size)
    scores, index = best(torch.where(has_area(boxes), scores, NONE), scores.shape[1])
    return take(boxes, index), scores, take(labels, index)


def finished(boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return boxes, scores and labels of what was found, and its number ``[B]``; beyond it 0, 0 and -1."""
    valid = scores > NONE
    labels = torch.where(valid, labels, -1)
    return boxes * valid[..., None], torch.where(valid, scores, 0.0), labels, valid.sum(1)


def laid_masks(masks: Tensor, boxes: Tensor, image_size: Size) -> Tensor:
    """Return probabilities ``[B, D, height, width]`` of the pixels of masks ``[B, D, S, S]`` in their boxes.

    The same as `postprocess.paste_masks`, as two products with the shares of rows and columns.
    """
    height, width = image_size
    rows = _shares(boxes[..., 1], boxes[..., 3], height, masks.shape[-2])
    columns = _shares(boxes[..., 0], boxes[..., 2], width, masks.shape[-1])
    return rows @ masks @ columns.transpose(-1, -2)


def _shares(low: Tensor, high: Tensor, length: int, cells: int) -> Tensor:
    """Return the share of each cell of a mask's side in each pixel, ``[B, D, length, cells]``."""
    pixels = torch.arange(length, dtype=torch.float32, device=low.device) + 0.5
    extent = (high - low)[..., None]
    position = (pixels - low[..., None]) / torch.where(extent > 0, extent, 1.0)
    # Of a box without extent, every pixel shows the middle.
    position = torch.where(extent > 0, position, 0.5) * cells - 0.5
    cell = torch.arange(cells, dtype=torch.float32, device=low.device)
    return (1 - (position[..., None] - cell).abs()).clamp(min=0)
