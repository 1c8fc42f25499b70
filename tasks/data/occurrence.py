"""Which classes a data set holds, said before training: what never occurs is neither learned nor measured."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import TaskError

# So many classes are named in a message.
_NAMED = 10


def check_classes(
    part: str,
    images: Iterable[Sequence[int]],
    classes: Sequence[str],
    source: object,
    what: str,
    needed: int = 1,
    hint: Callable[[], str] = str,
) -> list[str]:
    """Return a line that names the classes that never occur; none if all do.

    Args:
        part: ``"training"`` or ``"validation"``.
        images: Of each image the labels that count: not those of crowds, nor of unlabelled pixels.
        classes: Names of the classes, in the order of the labels.
        source: The data set's folder or name; a refusal begins with it.
        what: What has a label, such as ``"object"``.
        needed: How many classes must occur: 1, or 2 where one alone would always be labelled rightly.
        hint: What may be the cause; called after the images were looked at.

    Raises:
        TaskError: If fewer classes than ``needed`` occur, so that there is nothing to learn or to measure.
    """
    occurs, looked = np.zeros(len(classes), bool), 0
    for labels in images:
        occurs[np.asarray(labels, np.int64)] = True
        looked += 1
    aim = "learn from" if part == "training" else "measure by"
    if not occurs.any():
        raise TaskError(f"{source}: the {part} images have no {what} that counts, and so nothing to {aim}{hint()}")
    if occurs.sum() < needed:
        raise TaskError(
            f"{source}: the {part} images have no class but {classes[occurs.argmax()]!r}, and so nothing to {aim}: "
            f"whatever is predicted well there says nothing of other classes{hint()}"
        )
    absent = [classes[label] for label in np.flatnonzero(~occurs)]
    if not absent:
        return []
    listed = ", ".join(absent[:_NAMED]) + (", ..." if len(absent) > _NAMED else "")
    return [f"{len(absent)} of {len(classes)} classes have no {what} in {looked} {part} images: {listed}{hint()}"]


def draw_weights(images: Iterable[Sequence[int]], classes: int, balance: float, repeat: int = 1) -> Tensor:
    """Return how likely each image is to be drawn, ``[N * repeat]``, so that rare classes are seen more often.

    An image counts as its rarest class, which a share f of the images has, and weighs ``f ** -balance``: with 0.5 as
    in LVIS's sampling (arXiv 1908.03195), with 1 so that images of one class each are drawn evenly by class. One that
    holds nothing weighs as little as any.

    Args:
        images: Of each image the labels that count.
        classes: How many classes there are.
        balance: The exponent, 0 or more.
        repeat: How often the images follow one another.
    """
    labels = [np.unique(np.asarray(each, np.int64)) for each in images]
    counts = np.bincount(np.concatenate(labels), minlength=classes)
    weights = np.array([(counts[each].min() / len(labels)) ** -balance if len(each) else np.inf for each in labels])
    weights[np.isinf(weights)] = weights.min()
    return torch.from_numpy(weights).repeat(repeat)


def class_weights(given: str | Sequence[float] | None, counts: Tensor, classes: Sequence[str]) -> Tensor | None:
    """Return the weight of each class in the loss, ``[classes]``, as a config's ``loss.class_weights`` says.

    Args:
        given: ``"balanced"``, a number for each class, or None.
        counts: How often each class is there, ``[classes]``.
        classes: Their names.

    Raises:
        TaskError: If it isn't ``"balanced"``, nor a number for each class.
    """
    if given is None:
        return None
    if given == "balanced":
        counts = counts.double()
        # Classes that never occur weigh nothing; check_data names them.
        return torch.where(counts > 0, counts.sum() / ((counts > 0).sum() * counts), 0).float()
    fits = not isinstance(given, str) and all(isinstance(x, int | float) and 0 <= x < math.inf for x in given)
    if not fits or len(given) != len(classes) or not any(given):
        raise TaskError(
            f"loss.class_weights is {given!r}, but must be balanced or {len(classes)} numbers, one for each class, in "
            f"the order {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
        )
    return torch.tensor(given, dtype=torch.float32)
