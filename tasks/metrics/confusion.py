"""What is taken for what, object by object, and how well each image was answered."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle_codec

from ..data.coco import to_run_lengths
from ..dense.detect.boxes import pairwise_iou
from ..detections import keep_likely

_AGREEMENT = 0.5
_SHOWN = 4


def worst_of(scores: Sequence[float], count: int = _SHOWN) -> list[int]:
    """Return the places of so many of the lowest scores, the lowest first."""
    return np.argsort(np.asarray(scores), kind="stable")[:count].tolist()


def confuse_labels(truths: Sequence[int], guesses: Sequence[int], classes: int) -> np.ndarray:
    """Return how often images of each class (row) were taken for each class (column), ``[classes, classes]``."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (np.asarray(truths), np.asarray(guesses)), 1)
    return counts


def confuse_objects(
    predictions: Sequence[dict[str, Any]],
    targets: Sequence[dict[str, Any]],
    classes: int,
    kind: str,
    threshold: float = 0.5,
) -> tuple[np.ndarray, list[float]]:
    """Return how often objects of each class (row) were found as each class (column), and a score of each image.

    The likeliest prediction takes the free object that it overlaps most, if that is by an IoU of half or more, whatever
    its class. The row and the column after the last class count what was found where nothing is, and what wasn't
    found. Crowds, and what lies on them, don't count.

    Args:
        predictions: As for `measure_ap`.
        targets: As there.
        classes: Number of classes.
        kind: ``"box"`` or ``"mask"``: what overlaps.
        threshold: Least score of what is found.

    Returns:
        Counts ``[classes + 1, classes + 1]``; and of each image twice what is right over all that is there and all that
        was found (F1), 1 where both are nothing.
    """
    counts, scores = np.zeros((classes + 1, classes + 1), np.int64), []
    for everything, truth in zip(predictions, targets, strict=True):
        detections = keep_likely(everything, threshold)
        overlaps = _overlaps(detections, truth, kind)
        crowds = np.asarray(truth["iscrowd"]).astype(bool)
        true_labels, labels = np.asarray(truth["labels"]), np.asarray(detections["labels"])
        free, right, of_crowds = ~crowds, 0, 0
        for place in np.argsort(-np.asarray(detections["scores"]), kind="stable"):
            candidates = np.where(free, overlaps[place], -1.0)
            best = int(candidates.argmax()) if len(candidates) else -1
            if best >= 0 and candidates[best] >= _AGREEMENT:
                free[best] = False
                counts[true_labels[best], labels[place]] += 1
                right += true_labels[best] == labels[place]
            elif (overlaps[place][crowds] >= _AGREEMENT).any():
                of_crowds += 1
            else:
                counts[classes, labels[place]] += 1
        np.add.at(counts, (true_labels[free], classes), 1)
        total = len(labels) - of_crowds + int((~crowds).sum())
        scores.append(2 * right / total if total else 1.0)
    return counts, scores


def _overlaps(detections: dict[str, Any], truth: dict[str, Any], kind: str) -> np.ndarray:
    """Return the IoU of all that was found with all that is there, ``[N, M]``."""
    size = (len(detections["labels"]), len(truth["labels"]))
    if 0 in size:
        return np.zeros(size)
    if kind == "box":
        return pairwise_iou(detections["boxes"].reshape(-1, 4), truth["boxes"].reshape(-1, 4)).numpy()
    one, other = ([to_run_lengths(mask, *truth["size"]) for mask in part["masks"]] for part in (detections, truth))
    return np.asarray(rle_codec.iou(one, other, [0] * len(other))).reshape(size)
