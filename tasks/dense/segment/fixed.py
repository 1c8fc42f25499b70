"""`postprocess` on a batch of images, in tensors whose sizes don't depend on what is in them, for export.

Queries that are no segment stay in place, and a table says which are; loops over queries became comparisons of all with
all.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .postprocess import boxes_around


class Queries(NamedTuple):
    """What queries see.

    Attributes:
        classes: Logits ``[B, Q, K + 1]``.
        masks: Logits ``[B, Q, H, W]``, at the images' own size.
        things: Whether a class has objects, ``[K + 1]``, bool; the last, no object, has none.
    """

    classes: Tensor
    masks: Tensor
    things: Tensor


def semantic_labels(queries: Queries) -> Tensor:
    """Return the class ``[B, H, W]`` with the best `postprocess.semantic_scores`."""
    return torch.einsum("bqc,bqhw->bchw", queries.classes.softmax(-1)[..., :-1], queries.masks.sigmoid()).argmax(1)


def instances(queries: Queries, topk: int, numbers: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return what `postprocess.instance_masks` does.

    Args:
        queries: See `Queries`.
        topk: Pairs of query and class to look at.
        numbers: What classes are called, ``[K + 1]``; themselves by default.

    Returns:
        Boxes ``[B, T, 4]``, scores ``[B, T]``, labels ``[B, T]``, masks ``[B, T, H, W]``, bool, best first, and how
        many there are ``[B]``; beyond it 0, 0, -1 and False.
    """
    count, classes = queries.classes.shape[1], queries.classes.shape[2] - 1
    scores, pairs = queries.classes.softmax(-1)[..., :-1].flatten(1).topk(min(topk, count * classes))
    labels = pairs % classes
    query = torch.div(pairs, classes, rounding_mode="floor")
    size = queries.masks.shape[-2:]
    masks = queries.masks.gather(1, query[..., None, None].expand(-1, -1, *size))
    inside = masks > 0
    areas = inside.flatten(2).sum(2)
    scores = scores * (masks.sigmoid() * inside).flatten(2).sum(2) / (areas + 1e-6)
    scores, order = torch.where(queries.things[labels], scores, -1.0).topk(scores.shape[1])
    labels, valid = labels.gather(1, order), scores >= 0
    inside = inside.gather(1, order[..., None, None].expand(-1, -1, *size)) & valid[..., None, None]
    labels = labels if numbers is None else numbers[labels]
    boxes = boxes_around(inside.flatten(0, 1)).unflatten(0, order.shape)
    return boxes, torch.where(valid, scores, 0.0), torch.where(valid, labels, -1), inside, valid.sum(1)


def segments(queries: Queries, object_threshold: float, overlap_threshold: float, fusion: str) -> tuple[Tensor, ...]:
    """Return what `postprocess.panoptic_segments` does, or `fused_panoptic` where ``fusion`` is ``"mmdet"``.

    Args:
        queries: See `Queries`.
        object_threshold: Probability that a query must exceed.
        overlap_threshold: Fraction of its own mask that a segment must keep.
        fusion: Whose rules: ``"mask2former"`` or ``"mmdet"``.

    Returns:
        Segments ``[B, H, W]``, int32, 0 for none; of each, at its number less 1, its class, whether that has objects,
        its area and its score ``[B, Q]``; and how many there are ``[B]``.
    """
    theirs = fusion == "mmdet"
    scores, labels = queries.classes.softmax(-1).max(-1)
    sure = (labels != queries.classes.shape[2] - 1) & (scores > object_threshold)
    masks = queries.masks.sigmoid()
    winners = torch.where(sure[..., None, None], scores[..., None, None] * masks, -1.0).argmax(1)
    count = scores.shape[1]
    query = torch.arange(count, device=scores.device)
    own = masks >= 0.5
    won = (winners[:, None] == query[:, None, None]) & sure[..., None, None]
    area, full = won.flatten(2).sum(2), own.flatten(2).sum(2)
    pixels = won if theirs else won & own
    seen = pixels.flatten(2).sum(2)
    valid = (area > 0) & (full > 0) & (seen > 0) & (area / full.clamp(min=1) >= overlap_threshold)

    # Queries of the same stuff are one segment, the first one's.
    things = queries.things[labels]
    earlier = query[None, :] < query[:, None]
    same = (labels[:, :, None] == labels[:, None]) & ~things[:, :, None] & (valid[:, :, None] & valid[:, None])
    first = valid & ~(same & earlier).any(2)
    if theirs:
        # Segments are numbered by class and, of things, by which object of all it is.
        code = labels + 1000 * torch.where(things & valid, (things & valid).cumsum(1), 0)
        before = (code[:, None] < code[:, :, None]) & first[:, None]
        number = before.sum(2) + 1
    else:
        order = first.cumsum(1)
        number = torch.where(same & first[:, None], order[:, None], 0).amax(2)
        number = torch.where(things, order, number)
    number = torch.where(valid, number, 0)

    table = (number[:, :, None] == query + 1) & valid[:, :, None]
    head = table & first[:, :, None]
    count = first.sum(1)
    present = query < count[:, None]
    category = torch.where(present, (labels[:, :, None] * head).sum(1), -1)
    values = (scores[:, :, None] * head).sum(1)
    shown = (pixels * number[..., None, None].to(torch.int32)).sum(1, dtype=torch.int32)
    kinds = (things[:, :, None] & head).any(1)
    return shown, category, kinds, (seen[:, :, None] * table).sum(1), values, count
