"""Training images made of several: mosaics, and objects pasted from one image into another.

albumentations' Mosaic takes one label map, in which overlapping objects can't both be; these keep a mask an object.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..dense.detect.boxes import has_area
from .coco import mask_box

_GREY = 114  # where no image reaches, as in YOLO's mosaics
_VISIBLE = 0.1  # least share of an object's box that must be left of it


class Scene(NamedTuple):
    """An image ``[H, W, 3]``, uint8, with boxes ``[N, 4]``, labels ``[N]`` and masks ``[N, H, W]``, or None."""

    pixels: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None


def mosaic(scenes: Sequence[Scene]) -> Scene:
    """Return four scenes as one of the first one's size: each fills a quarter from a common corner on (YOLOv4).

    The corner, drawn from torch's generator, is in the middle half. Images aren't resized: what leaves the picture is
    cut off, and objects of which a tenth or less is left are dropped (arXiv 2004.10934).
    """
    height, width = scenes[0].pixels.shape[:2]
    y, x = (int(side * share) for side, share in zip((height, width), (torch.rand(2) / 2 + 0.25).tolist(), strict=True))
    pixels = np.full_like(scenes[0].pixels, _GREY)
    boxes, labels, masks = [], [], []
    for place, scene in enumerate(scenes):
        h, w = scene.pixels.shape[:2]
        # The image's corner that lies at the common one.
        top, left = (y - h, y)[place // 2], (x - w, x)[place % 2]
        rows, columns = (max(top, 0), min(top + h, height)), (max(left, 0), min(left + w, width))
        here = slice(*rows), slice(*columns)
        there = slice(rows[0] - top, rows[1] - top), slice(columns[0] - left, columns[1] - left)
        pixels[here] = scene.pixels[there]
        moved = scene.boxes + np.array([left, top, left, top])
        cut = np.stack([moved[:, i].clip(*(columns, rows)[i % 2]) for i in range(4)], axis=1)
        remains = _area(cut) > _VISIBLE * _area(moved)
        boxes.append(cut[remains])
        labels.append(scene.labels[remains])
        if scene.masks is not None:
            part = np.zeros((int(remains.sum()), height, width), np.uint8)
            part[(slice(None), *here)] = scene.masks[remains][(slice(None), *there)]
            masks.append(part)
    whole = Scene(pixels, np.concatenate(boxes), np.concatenate(labels), np.concatenate(masks) if masks else None)
    return _tightened(whole, [])


def copy_paste(target: Scene, source: Scene) -> Scene:
    """Return a scene with objects of another pasted into it, each with probability a half, at their place.

    What they hide is taken from the masks behind (arXiv 2012.07177). Objects that reach beyond the target are cut.
    """
    height, width = (min(sides) for sides in zip(target.pixels.shape[:2], source.pixels.shape[:2], strict=True))
    drawn = (torch.rand(len(source.labels)) < 0.5).numpy()
    pasted = np.zeros((int(drawn.sum()), *target.pixels.shape[:2]), np.uint8)
    pasted[:, :height, :width] = source.masks[drawn, :height, :width]
    covered = pasted.any(axis=0)
    pixels = target.pixels.copy()
    pixels[covered] = source.pixels[:height, :width][covered[:height, :width]]
    behind = target.masks * ~covered
    changed = (behind != target.masks).any(axis=(1, 2))
    return _tightened(
        Scene(
            pixels,
            np.concatenate([target.boxes, source.boxes[drawn]]),
            np.concatenate([target.labels, source.labels[drawn]]),
            np.concatenate([behind, pasted]),
        ),
        [*np.flatnonzero(changed), *range(len(behind), len(behind) + len(pasted))],
    )


def _tightened(scene: Scene, changed: Sequence[int]) -> Scene:
    """Return a scene without objects of which nothing is left; those that changed have the boxes of their masks."""
    boxes = scene.boxes.copy()
    for index in changed:
        boxes[index] = mask_box(scene.masks[index]) if scene.masks[index].any() else 0
    left = has_area(boxes, scene.masks).numpy()
    return Scene(scene.pixels, boxes[left], scene.labels[left], None if scene.masks is None else scene.masks[left])


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
