"""From the class and mask logits of queries to label maps, objects and panoptic segments, by the published rules.

All functions take the logits of one image: classes ``[Q, K + 1]``, of which the last is for no object, and masks
``[Q, H, W]``. Written anew after Mask2Former (arXiv 2112.01527) and, where it says so, mmdet (Apache-2.0).
"""

from collections.abc import Collection

import torch
from torch import Tensor

from ... import TaskError, nearest
from .inference import resize_to

OUTPUTS = ("semantic", "instance", "panoptic")
FUSIONS = ("mask2former", "mmdet")


def semantic_scores(classes: Tensor, masks: Tensor) -> Tensor:
    """Return how much each pixel is of each class, ``[K, H, W]``: probabilities of queries times those of masks."""
    return torch.einsum("qc,qhw->chw", classes.softmax(-1)[:, :-1], masks.sigmoid())


def instance_masks(
    classes: Tensor, masks: Tensor, topk: int = 100, things: Collection[int] | None = None
) -> dict[str, Tensor]:
    """Return the objects of the best pairs of a query and a class.

    Args:
        classes: ``[Q, K + 1]``.
        masks: ``[Q, H, W]``.
        topk: Pairs to look at.
        things: Classes that have objects; others are dropped. All by default.

    Returns:
        ``labels`` ``[N]``, ``scores`` ``[N]``, ``masks`` ``[N, H, W]``, bool, and ``boxes`` ``[N, 4]``, x1 y1 x2 y2
        around the masks (zeros for an empty one), the best first. A score is the pair's probability times the mean
        probability inside of the mask.
    """
    num_classes = classes.shape[1] - 1
    scores, pairs = classes.softmax(-1)[:, :-1].flatten().topk(min(topk, classes.shape[0] * num_classes), sorted=False)
    labels = pairs % num_classes
    if things is not None:
        is_thing = torch.isin(labels, torch.as_tensor(sorted(things), device=labels.device))
        scores, labels, pairs = scores[is_thing], labels[is_thing], pairs[is_thing]
    masks = masks[pairs // num_classes]
    inside = masks > 0
    scores = scores * (masks.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    order = scores.argsort(descending=True)
    return {
        "labels": labels[order],
        "scores": scores[order],
        "masks": inside[order],
        "boxes": boxes_around(inside[order]),
    }


def boxes_around(masks: Tensor) -> Tensor:
    """Return the boxes ``[N, 4]``, x1 y1 x2 y2 at the pixels' outer edges, of masks ``[N, H, W]``; empty: zeros."""
    boxes = masks.new_zeros(len(masks), 4, dtype=torch.float32)
    for offset, any_along in ((0, masks.any(1)), (1, masks.any(2))):
        some = any_along.any(1)
        first = any_along.int().argmax(1)
        last = any_along.shape[1] - any_along.flip(1).int().argmax(1)
        boxes[:, offset] = torch.where(some, first, 0).float()
        boxes[:, offset + 2] = torch.where(some, last, 0).float()
    return boxes


def panoptic_segments(
    classes: Tensor,
    masks: Tensor,
    things: Collection[int],
    object_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
) -> tuple[Tensor, list[dict]]:
    """Return a map of segments, by Mask2Former's rules.

    Each pixel goes to the confident query with the highest probability there. A segment is dropped if too much of its
    mask went to others; segments of the same stuff are one.

    Args:
        classes: ``[Q, K + 1]``.
        masks: ``[Q, H, W]``.
        things: Classes whose objects are counted; the others are stuff.
        object_threshold: Probability that a query must exceed.
        overlap_threshold: Fraction of its own mask that a segment must keep.

    Returns:
        The segments' numbers ``[H, W]``, int32 from 1, 0 for none; and for each a dict of ``id``, ``category_id``,
        ``isthing``, ``area`` in pixels, and the query's ``score``.
    """
    scores, labels = classes.softmax(-1).max(-1)
    is_likely = (labels != classes.shape[1] - 1) & (scores > object_threshold)
    segments = torch.zeros(masks.shape[-2:], dtype=torch.int32, device=masks.device)
    if not is_likely.any():
        return segments, []
    scores, labels, masks = scores[is_likely], labels[is_likely], masks[is_likely].sigmoid()
    winners = (scores[:, None, None] * masks).argmax(0)
    infos, stuff = [], {}
    for query, (score, label) in enumerate(zip(scores.tolist(), labels.tolist(), strict=True)):
        own = masks[query] >= 0.5
        won = winners == query
        area, full = int(won.sum()), int(own.sum())
        segment = won & own
        if area == 0 or full == 0 or not segment.any() or area / full < overlap_threshold:
            continue
        if label in stuff:
            info = stuff[label]
            info["area"] += int(segment.sum())
        else:
            info = {
                "id": len(infos) + 1,
                "category_id": label,
                "isthing": label in things,
                "area": int(segment.sum()),
                "score": score,
            }
            infos.append(info)
            if not info["isthing"]:
                stuff[label] = info
        segments[segment] = info["id"]
    return segments, infos


def fused_panoptic(
    classes: Tensor,
    masks: Tensor,
    things: Collection[int],
    object_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
    filter_low_score: bool = False,
) -> Tensor:
    """Return a panoptic map by the rules of mmdet's fusion head.

    Unlike `panoptic_segments` it keeps a segment whose winning pixels are all uncertain, and its numbers hold the
    class.

    Args:
        classes: ``[Q, K + 1]``.
        masks: ``[Q, H, W]``.
        things: Classes whose objects are counted.
        object_threshold: Probability that a query must exceed.
        overlap_threshold: Fraction of its own mask that a segment must keep.
        filter_low_score: Whether a segment loses the pixels where its mask is below one half.

    Returns:
        ``[H, W]``, int32: the class, plus 1000 times the object's number, from 1, for things; K where there is none.
    """
    num_classes = classes.shape[1] - 1
    scores, labels = classes.softmax(-1).max(-1)
    is_likely = (labels != num_classes) & (scores > object_threshold)
    fused = torch.full(masks.shape[-2:], num_classes, dtype=torch.int32, device=masks.device)
    if not is_likely.any():
        return fused
    scores, labels, masks = scores[is_likely], labels[is_likely], masks[is_likely].sigmoid()
    winners = (scores[:, None, None] * masks).argmax(0)
    number = 1
    for query, label in enumerate(labels.tolist()):
        own = masks[query] >= 0.5
        segment = winners == query
        area, full = int(segment.sum()), int(own.sum())
        if area == 0 or full == 0 or area / full < overlap_threshold:
            continue
        if filter_low_score:
            segment = segment & own
        if label in things:
            fused[segment] = label + 1000 * number
            number += 1
        else:
            fused[segment] = label
    return fused


def postprocess(
    classes: Tensor,
    masks: Tensor,
    output: str,
    image_size: tuple[int, int] | None = None,
    output_size: tuple[int, int] | None = None,
    things: Collection[int] | None = None,
    object_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
    topk: int = 100,
    resize_first: bool = True,
    fusion: str = "mask2former",
) -> Tensor | dict:
    """Turn the logits of one image into a result at its own size.

    Args:
        classes: ``[Q, K + 1]``.
        masks: ``[Q, h, w]`` at the network's input size.
        output: ``"semantic"``, ``"instance"`` or ``"panoptic"``.
        image_size: Height and width of the image within the padded input; the whole input by default.
        output_size: Height and width of the result; ``image_size`` by default.
        things: Classes with objects; all by default.
        object_threshold: As for `panoptic_segments`.
        overlap_threshold: As for `panoptic_segments`.
        topk: As for `instance_masks`.
        resize_first: Whether masks are resized before they are turned into scores; the published semantic models
            resize the scores instead.
        fusion: Whose rules make panoptic segments: ``"mask2former"``, `panoptic_segments`, or ``"mmdet"``,
            `fused_panoptic`.

    Returns:
        semantic: scores ``[K, H, W]``; instance: as `instance_masks`; panoptic: a dict of ``segments`` ``[H, W]`` and
        ``segments_info``, as `panoptic_segments` returns them (mmdet's have no ``score``).
    """
    if output not in OUTPUTS:
        raise TaskError(f"there is no output {output!r}{nearest(output, OUTPUTS)}")
    if fusion not in FUSIONS:
        raise TaskError(f"there is no fusion {fusion!r}{nearest(fusion, FUSIONS)}")
    height, width = masks.shape[-2:] if image_size is None else image_size
    size = (height, width) if output_size is None else tuple(output_size)
    masks = masks[:, :height, :width]
    if output == "semantic" and not resize_first:
        return resize_to(semantic_scores(classes, masks)[None], size)[0]
    masks = resize_to(masks[None], size)[0]
    if output == "semantic":
        return semantic_scores(classes, masks)
    if output == "instance":
        return instance_masks(classes, masks, topk, things)
    things = range(classes.shape[1] - 1) if things is None else things
    if fusion == "mmdet":
        fused = fused_panoptic(classes, masks, things, object_threshold, overlap_threshold)
        segments, info = _numbered(fused, classes.shape[1] - 1)
    else:
        segments, info = panoptic_segments(classes, masks, things, object_threshold, overlap_threshold)
    return {"segments": segments, "segments_info": info}


def _numbered(fused: Tensor, num_classes: int) -> tuple[Tensor, list[dict]]:
    """Return the segments of `fused_panoptic`, numbered as those of `panoptic_segments`."""
    segments, info = torch.zeros_like(fused), []
    for code in fused.unique().tolist():
        if code == num_classes:
            continue
        inside = fused == code
        segments[inside] = len(info) + 1
        area = int(inside.sum())
        info.append({"id": len(info) + 1, "category_id": code % 1000, "isthing": code >= 1000, "area": area})
    return segments, info
