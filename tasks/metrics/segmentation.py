"""How well pixels and segments are labelled: IoU, accuracy and Dice over a data set, and panoptic quality."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix
from torchmetrics.detection import PanopticQuality

from ..data.augment import IGNORE


def count_labels(pairs: Iterable[tuple[Tensor, Tensor]], classes: int) -> Tensor:
    """Return how many pixels of each class (row) were given each label (column), ``[classes, classes]``, int64.

    Args:
        pairs: Predicted and true labels ``[H, W]`` of every image; pixels whose truth is ``IGNORE`` don't count.
        classes: Number of classes.
    """
    # Of several processes only the first measures.
    metric = MulticlassConfusionMatrix(classes, ignore_index=IGNORE, validate_args=False, sync_on_compute=False)
    metric.set_dtype(torch.int64)
    for predicted, truth in pairs:
        metric.update(predicted.long()[None], truth.long()[None])
    return metric.compute()


def measure_labels(counts: Tensor) -> dict[str, Tensor | float]:
    """Return mmseg's measures of a matrix of `count_labels`, as fractions.

    Areas are summed over the data set. Classes that neither truth nor prediction has are left out of the means.

    Returns:
        ``iou``, ``acc`` and ``dice`` of each class, ``[classes]``, NaN where there is nothing to measure; their means
        ``miou``, ``macc`` and ``mdice``; and ``aacc``, the share of pixels that are right.
    """
    counts = counts.double()
    right, truth, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    of_class = {
        "iou": right / (truth + predicted - right),
        "acc": right / truth,
        "dice": 2 * right / (truth + predicted),
    }
    means = {f"m{name}": float(values.nanmean()) for name, values in of_class.items()}
    return of_class | means | {"aacc": float(right.sum() / truth.sum())}


def measure_panoptic(pairs: Iterable[tuple[Tensor, Tensor]], things: Sequence[bool]) -> dict[str, float | Tensor]:
    """Return the panoptic quality (arXiv 1801.00868), as fractions, by the rules of COCO's panopticapi.

    One difference: crowds are taken as void.

    Args:
        pairs: Prediction and truth ``[H, W, 2]`` of every image: class and number of every pixel's segment. Void has
            the class after the last.
        things: For each class whether its objects are told apart.

    Returns:
        ``pq``, ``sq`` and ``rq``; the same of things and of stuff, such as ``pq_things``; and ``class_pq``
        ``[classes]``; NaN where there is nothing to measure.
    """
    void = len(things)
    of_things = [label for label in range(void) if things[label]]
    of_stuff = [label for label in range(void) if not things[label]]
    # torchmetrics doesn't count what a prediction leaves void; panopticapi does. So predicted void is a class of stuff
    # of its own, and true void the class after it, which torchmetrics takes for void.
    options = dict(return_sq_and_rq=True, return_per_class=True, sync_on_compute=False)
    metric = PanopticQuality(of_things, [*of_stuff, void], **options)
    for predicted, truth in pairs:
        truth = truth.long()
        truth = torch.where(truth[..., :1] == void, truth.new_tensor([void + 1, 0]), truth)
        metric.update(predicted.long()[None], truth[None])
    values = torch.full((void, 3), torch.nan, dtype=torch.float64)
    # Its order of classes is things, then stuff.
    order = torch.tensor([*of_things, *of_stuff])
    occurs = (metric.true_positives + metric.false_positives + metric.false_negatives)[:-1] > 0
    values[order[occurs]] = metric.compute()[:-1][occurs].double()
    result: dict[str, float | Tensor] = {"class_pq": values[:, 0]}
    for suffix, labels in (("", order), ("_things", of_things), ("_stuff", of_stuff)):
        for name, column in zip(("pq", "sq", "rq"), values[labels].unbind(1), strict=True):
            result[name + suffix] = float(column.nanmean()) if len(labels) else math.nan
    return result
