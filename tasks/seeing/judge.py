"""What a map of an image is worth: insertion and deletion, the pointing game, MaxBoxAccV2, pixel AP."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import TaskError
from .cam import Target, evaluating, target_indices, target_logits

# wsolevaluation's: where maps are cut for boxes, from which IoU a box is right, and the bins of pixels' values.
_BOX_CUTS = np.arange(0, 1, 0.01)
_IOUS = (0.3, 0.5, 0.7)
_PIXEL_BINS = np.append(np.arange(0, 1, 0.001), (1.0, 2.0, 3.0))


def deletion(
    model: nn.Module, x: Tensor, saliency: Tensor, target: Target = None, step: int = 1792
) -> tuple[Tensor, Tensor]:
    """Take the most salient pixels away first, and watch the class go (RISE, Petsiuk et al., BMVC 2018, section 3.2).

    Pixels of all channels become 0, which in normalised images is the mean colour.

    Args:
        model: A classifier on images; run in evaluation mode and left as it was.
        x: Images ``[B, C, H, W]``, normalised.
        saliency: Maps ``[B, H, W]``; of equal pixels the first in rows goes first.
        target: Class, one for all images or one for each; the likeliest of the whole image if None.
        step: Pixels that go at a time; 1792 of an image of 224x224 make 28 steps.

    Returns:
        The softmax probability of the class ``[B, n + 1]`` before and after each of ``n = ceil(H * W / step)`` steps,
        and the area under it ``[B]``, by trapezoids over 0..1. Smaller areas are better.

    Raises:
        TaskError: If the maps don't fit the images or aren't numbers, or the step isn't positive.
    """
    return _run(model, x, saliency, target, step, lambda x: (x, torch.zeros_like(x)))


def insertion(
    model: nn.Module, x: Tensor, saliency: Tensor, target: Target = None, step: int = 1792
) -> tuple[Tensor, Tensor]:
    """Put the most salient pixels back into a blurred image first, and watch the class come (RISE, section 3.2).

    The blur is RISE's, a Gaussian of sigma 5 on 11x11 pixels with zeros around the normalised image. All else is as for
    `deletion`, but larger areas are better.
    """
    return _run(model, x, saliency, target, step, lambda x: (_blur(x), x))


@torch.no_grad()
def _run(
    model: nn.Module,
    x: Tensor,
    saliency: Tensor,
    target: Target,
    step: int,
    ends: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    if x.ndim != 4 or saliency.shape != (len(x), *x.shape[2:]):
        raise TaskError(
            f"maps are [B, H, W] of images [B, C, H, W]; got {list(saliency.shape)} for {list(x.shape)}; resize them"
        )
    if not saliency.isfinite().all():
        raise TaskError("a map holds values that are no numbers, so that its pixels have no order")
    if step < 1:
        raise TaskError(f"step is {step}, but must be at least 1 pixel")
    count = math.ceil(saliency[0].numel() / step)
    order = saliency.flatten(1).to(x.device).argsort(stable=True, dim=1, descending=True)
    # The step at which a pixel changes.
    turn = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=x.device).expand_as(order))
    turn = (turn // step).view(len(x), 1, *x.shape[2:])
    start, end = ends(x)
    scores = []
    with evaluating(model):
        logits = model(x)
        target_logits(model, logits, target)  # refuses what gives no logits
        classes = target_indices(model, logits, target)[:, None]
        for done in range(count + 1):
            logits = model(torch.where(turn < done, end, start))
            scores.append(logits.float().softmax(1).gather(1, classes)[:, 0])
    scores = torch.stack(scores, 1)
    return scores, (scores.sum(1) - (scores[:, 0] + scores[:, -1]) / 2) / count


def _blur(x: Tensor) -> Tensor:
    kernel = blur_kernel().to(x).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=x.shape[1])


def blur_kernel(side: int = 11, sigma: float = 5.0) -> Tensor:
    """Return RISE's kernel ``[side, side]``: a Gaussian that is mirrored at the kernel's borders, so that it sums to 1.

    It is what scipy's ``gaussian_filter`` makes of a single one in the middle, cut off at four sigma.
    """
    reach = int(4 * sigma + 0.5)
    offsets = torch.arange(-reach, reach + 1)
    weights = (-0.5 * (offsets.double() / sigma) ** 2).exp()
    places = (side // 2 + offsets) % (2 * side)
    places = torch.where(places < side, places, 2 * side - 1 - places)
    line = torch.zeros(side, dtype=torch.float64).index_add_(0, places, weights / weights.sum())
    return torch.outer(line, line).float()


def pointing_game(maps: Tensor, boxes: Sequence[Tensor], tolerance: float = 15) -> float:
    """Return the share of images whose map is greatest in a box, or near one (Zhang et al., IJCV 2018).

    Args:
        maps: ``[B, H, W]``; of equal values the first in rows counts.
        boxes: For each image ``[k, 4]``: left, top, right, bottom, in pixels of the map, both ends included.
        tolerance: Pixels that the place may be away from a box.

    Raises:
        TaskError: If there aren't as many lists of boxes as maps, or none for a map.
    """
    maps, boxes = _checked(maps, boxes)
    places = maps.flatten(1).argmax(1)
    hits = 0
    for place, objects in zip(places.tolist(), boxes, strict=True):
        point = torch.tensor([place % maps.shape[2], place // maps.shape[2]], dtype=torch.float64)
        away = torch.maximum(objects[:, :2] - point, point - objects[:, 2:]).clamp(min=0)
        hits += bool((away.norm(dim=1) <= tolerance).any())
    return hits / len(maps)


def max_box_acc_v2(maps: Tensor, boxes: Sequence[Tensor]) -> float:
    """Return how well boxes around what a map marks fit the objects: MaxBoxAccV2 (Choe et al., 2020, section 4).

    A map, scaled to 0..1 and then to 256 levels, is cut at 0, .01, ... .99 of its greatest value. An image is right at
    a cut if the box of any contour, outer or of a hole, as OpenCV draws them, has the IoU with any of its objects. The
    result is the mean over IoUs of .3, .5 and .7 of the best share of right images over the cuts, each IoU having its
    own: read it as an upper bound, since the cut is chosen on the images that it is measured on.

    Args:
        maps: ``[B, H, W]``.
        boxes: As for `pointing_game`.

    Raises:
        TaskError: As `pointing_game`.
    """
    return float(np.mean([curve.max() for curve in box_curves(maps, boxes)]))


def box_curves(maps: Tensor, boxes: Sequence[Tensor]) -> np.ndarray:
    """Return the share of images right at each cut ``[3, 100]``, for the IoUs .3, .5 and .7; see `max_box_acc_v2`."""
    maps, boxes = _checked(maps, boxes)
    right = np.zeros((len(_IOUS), len(_BOX_CUTS)))
    for scores, objects in zip(maps, boxes, strict=True):
        levels = (_scaled(scores).numpy() * 255).astype(np.uint8)
        cuts = (_BOX_CUTS * levels.max()).astype(int)
        # Many cuts are the same level.
        distinct, place = np.unique(cuts, return_inverse=True)
        of_cut, contours = _contour_boxes(torch.from_numpy(levels[None] > distinct[:, None, None]))
        best = torch.zeros(len(distinct), dtype=torch.float64)
        best.scatter_reduce_(0, of_cut, _iou(contours, objects).amax(1), "amax")
        # Without a contour, the box is the first pixel.
        empty = torch.bincount(of_cut, minlength=len(distinct)) == 0
        best[empty] = _iou(torch.zeros(1, 4, dtype=torch.float64), objects).max()
        right += best.numpy()[place] >= np.array(_IOUS)[:, None]
    return right / len(maps)


def pixel_ap(maps: Tensor, masks: Tensor, ignores: Tensor | None = None) -> float:
    """Return the average precision of pixels over all images, PxAP (Choe et al., 2020, section 4).

    Values are counted in bins of .001 from 0 to 1; the area is the sum of each bin's step of recall times precision.

    Args:
        maps: ``[B, H, W]``, of 0 to 1.
        masks: ``[B, H, W]``, whether a pixel is the object.
        ignores: ``[B, H, W]``, pixels that are left out unless they are the object.

    Raises:
        TaskError: If shapes differ, a map isn't of 0 to 1, or no pixel is of an object.
    """
    for other in (masks, ignores):
        if other is not None and other.shape != maps.shape:
            raise TaskError(
                f"maps and masks are [B, H, W] of one shape; got {list(maps.shape)} and {list(other.shape)}"
            )
    if not len(maps) or not (maps.amin() >= 0 and maps.amax() <= 1):
        raise TaskError("maps must hold values of 0 to 1; scale them, each by itself or all alike as you compare them")
    values, objects = maps.detach().cpu().numpy(), masks.cpu().numpy().astype(bool)
    others = ~objects if ignores is None else ~objects & ~ignores.cpu().numpy().astype(bool)
    if not objects.any():
        raise TaskError("the masks hold no object, so that there is nothing to be found")
    positive, negative = (np.histogram(values[part], _PIXEL_BINS)[0][::-1].cumsum() for part in (objects, others))
    precision = positive / np.maximum(positive + negative, 1)
    return float((precision * np.diff(positive, prepend=0)).sum() / positive[-1])


def boxes_of_masks(masks: Tensor) -> list[Tensor]:
    """Return, for each of masks ``[B, H, W]``, the boxes ``[k, 4]`` of its objects, which touch by corners."""
    which, boxes = _components(masks.cpu().bool(), corners=True)
    return [boxes[which == i].double() for i in range(len(masks))]


def _checked(maps: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    if maps.ndim != 3 or not len(maps) or len(boxes) != len(maps):
        raise TaskError(f"maps are [B, H, W] with a list of boxes for each; got {list(maps.shape)} and {len(boxes)}")
    boxes = [torch.as_tensor(objects, dtype=torch.float64).reshape(-1, 4) for objects in boxes]
    for i, objects in enumerate(boxes):
        if not len(objects):
            raise TaskError(f"image {i} has no box; leave out images without objects")
    return maps.detach().cpu(), boxes


def _scaled(scores: Tensor) -> Tensor:
    if not scores.isfinite().all() or scores.min() == scores.max():
        return torch.zeros_like(scores)
    scores = scores - scores.min()
    return scores / scores.max()


def _iou(boxes: Tensor, objects: Tensor) -> Tensor:
    """Return the IoU ``[n, k]`` of boxes whose ends are included."""
    least, most = (torch.maximum, torch.minimum)
    sides = most(boxes[:, None, 2:], objects[:, 2:]) - least(boxes[:, None, :2], objects[:, :2]) + 1
    shared = sides.clamp(min=0).prod(-1)
    areas = [(part[:, 2:] - part[:, :2] + 1).prod(-1) for part in (boxes, objects)]
    return shared / (areas[0][:, None] + areas[1] - shared)


def _contour_boxes(cuts: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for binary maps ``[n, H, W]``, the boxes of all contours: of which map ``[k]``, and ends ``[k, 4]``.

    They are the boxes of OpenCV's contours as wsolevaluation takes them, which lie a pixel further right and down than
    the last pixel, but within the map. Objects touch by corners, holes by sides; a hole's contour runs around it.
    """
    height, width = cuts.shape[1:]
    of_object, objects = _components(cuts, corners=True)
    of_hole, holes = _components(~F.pad(cuts, (1, 1, 1, 1)), corners=False)
    # Without what surrounds all, and back from the frame to the map, one pixel around each hole.
    inner = (holes[:, :2] > 0).all(1)
    of_hole, holes = of_hole[inner], holes[inner] + torch.tensor([-2, -2, 0, 0])
    boxes = torch.cat([objects, holes])
    boxes[:, 2:] = torch.minimum(boxes[:, 2:] + 1, torch.tensor([width - 1, height - 1]))
    return torch.cat([of_object, of_hole]), boxes.double()


def _components(cuts: Tensor, corners: bool) -> tuple[Tensor, Tensor]:
    """Return the connected components of binary maps ``[n, H, W]``: of which map ``[k]``, and boxes ``[k, 4]``.

    Runs of pixels in a row are the nodes, and the least label spreads along runs that touch.
    """
    _, height, width = cuts.shape
    framed = F.pad(cuts, (1, 1))
    before, after = framed[..., :-1], framed[..., 1:]
    which, row, left = (after & ~before).nonzero(as_tuple=True)
    right = (before & ~after).nonzero(as_tuple=True)[2] - 1
    # A run's place on one long line, on which rows, and maps, are too far apart to touch.
    line = (which * (height + 1) + row) * (width + 4)
    below, reach = line + width + 4, int(corners)
    first = torch.searchsorted(line + right, below + left - reach)
    count = (torch.searchsorted(line + left, below + right + reach, right=True) - first).clamp(min=0)
    upper = torch.repeat_interleave(torch.arange(len(row)), count)
    lower = torch.arange(len(upper)) - torch.repeat_interleave(count.cumsum(0) - count, count) + first[upper]
    labels = torch.arange(len(row))
    while True:
        least = torch.minimum(labels[upper], labels[lower])
        spread = labels.scatter_reduce(0, labels[upper], least, "amin").scatter_reduce(0, labels[lower], least, "amin")
        spread = spread[spread]
        if torch.equal(spread, labels):
            break
        labels = spread
    roots, label = labels.unique(return_inverse=True)
    boxes = torch.empty(len(roots), 4, dtype=torch.int64)
    for i, (value, kind) in enumerate(((left, "amin"), (row, "amin"), (right, "amax"), (row, "amax"))):
        boxes[:, i] = torch.empty(len(roots), dtype=torch.int64).scatter_reduce_(
            0, label, value, kind, include_self=False
        )
    return which[roots], boxes
