"""Images that have any number of classes, none too: each class by itself is there or not."""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.classification import SEVERAL

# From this probability on a class is said to be there.
THRESHOLD = 0.5


def measure_classes(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return average precision and F1 of each class, ``[classes]``; NaN of those that don't occur.

    Args:
        logits: ``[B, classes]``.
        targets: The same, 1 for classes that are there, else 0.
    """
    from torchmetrics.functional.classification import multilabel_average_precision, multilabel_f1_score

    shares, truth, count = logits.sigmoid(), targets.long(), logits.shape[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No positive samples")
        precision = multilabel_average_precision(shares, truth, count, average=None)
    f1 = multilabel_f1_score(shares, truth, count, THRESHOLD, average=None)
    occurs = truth.any(dim=0)
    return {name: values.where(occurs, torch.nan) for name, values in (("ap", precision), ("f1", f1))}


def measure(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Return the loss, mean average precision, F1 and the share of images all of whose classes are right.

    Average precision and F1 are means over the classes that occur.

    Args:
        logits: ``[B, classes]``.
        targets: The same, 1 for classes that are there, else 0.
    """
    from torchmetrics.functional.classification import multilabel_exact_match

    metrics = {"loss": float(F.binary_cross_entropy_with_logits(logits, targets))}
    if targets.any():
        of_class = measure_classes(logits, targets)
        metrics |= {"map": float(of_class["ap"].nanmean()), "f1": float(of_class["f1"].nanmean())}
    exact = multilabel_exact_match(logits.sigmoid(), targets.long(), logits.shape[1], THRESHOLD)
    return metrics | {"exact": float(exact)}


def name(flags: Sequence[bool], classes: Sequence[str]) -> str:
    """Return the names of the classes that are there, as lists have them."""
    return SEVERAL.join(label for label, there in zip(classes, flags, strict=True) if there) or "none"


def draw(samples, shares: Tensor, targets: Tensor, indices: Sequence[int], folder, title: str, count: int) -> list:
    """Draw the images that fit their truth worst and best; return files and what they show.

    Args:
        samples: The held-out images.
        shares: Probability of every class, ``[B, classes]``.
        targets: The truth, ``[B, classes]``.
        indices: Which of the images they are.
        folder: Where pictures go.
        title: What is shown.
        count: How many images.
    """
    from ..pictures.classes import draw_gallery

    # How likely the whole truth is, as the geometric mean over the classes.
    fits = (-F.binary_cross_entropy(shares, targets, reduction="none").mean(1)).exp()
    order = fits.argsort(stable=True).tolist()
    pictures = []
    for kind, places in (("worst", order[:count]), ("best", order[::-1][:count])):
        draw_gallery(
            [samples.image(indices[place]) for place in places],
            [name(targets[place] > 0, samples.classes) for place in places],
            [[(name(shares[place] >= THRESHOLD, samples.classes), fits[place].item())] for place in places],
            folder / f"{kind}.png",
            f"held-out images whose classes fit {kind}, {title}",
        )
        pictures.append((f"{kind}.png", f"the {kind} predictions"))
    return pictures


def loss(logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean cross entropy of logits ``[B, classes]`` and truth, each class by itself, weighted."""
    weight = None if weight is None else weight.expand(logits.shape)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), weight)
