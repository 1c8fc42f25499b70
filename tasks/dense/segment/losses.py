"""Losses of the heads that label every pixel."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import TaskError
from .inference import pad_to

MEANS = ("all", "valid")


def batch_labels(
    labels: Tensor | Sequence[Tensor], sizes: Sequence[Sequence[int]], canvas: Sequence[int], ignore_index: int = 255
) -> Tensor:
    """Return the label maps of a batch's images as one tensor ``[B, H, W]``, padded by ``ignore_index``.

    Args:
        labels: ``[B, H, W]``, or a list of ``[H_i, W_i]``; integers.
        sizes: ``(height, width)`` of each image.
        canvas: Height and width of the batch.
        ignore_index: Label of pixels that don't count.

    Raises:
        TaskError: If they are of another number, rank, size or type.
    """
    if len(labels) != len(sizes):
        raise TaskError(f"there are {len(sizes)} images and {len(labels)} label maps; each image needs one")
    for index, (label, size) in enumerate(zip(labels, sizes, strict=True)):
        if tuple(label.shape) != tuple(size):
            raise TaskError(
                f"the label map of image {index} has shape {tuple(label.shape)}; it must have that of the image, "
                f"{tuple(size)}"
            )
        if label.is_floating_point():
            raise TaskError(f"the label map of image {index} has dtype {label.dtype}; labels are integers")
    if isinstance(labels, Tensor):
        return labels
    return torch.stack([pad_to(label.long(), canvas, ignore_index) for label in labels])


def check_labels(labels: Tensor, classes: int, ignore_index: int | None = None, whose: str = "the label maps") -> None:
    """Raise a TaskError unless labels are from 0 to ``classes - 1`` or ``ignore_index``; those on a GPU pass unseen."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    counted = labels if ignore_index is None else labels[labels != ignore_index]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < classes:
        ignored = "" if ignore_index is None else f", or {ignore_index} for pixels that don't count"
        raise TaskError(
            f"{whose} have labels {int(counted.min())} to {int(counted.max())}; "
            f"they must be 0 to {classes - 1}{ignored}"
        )


def pixel_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = 255, mean: str = "all", weight: Tensor | None = None
) -> Tensor:
    """Return the cross entropy of a label map; the logits are brought to its size first (bilinear).

    Two means are in use. mmseg, with which the published models were trained, divides by the number of all pixels,
    ignored ones included (``"all"``): an image with much to ignore counts less. Elsewhere one divides by the number of
    pixels that count (``"valid"``). They agree where nothing is ignored.

    Args:
        logits: ``[B, K, h, w]``.
        labels: ``[B, H, W]``, integers below K, or ``ignore_index``.
        ignore_index: Label of pixels that don't count.
        mean: ``"all"`` or ``"valid"``.
        weight: Of each class ``[K]``, by which its pixels' losses are multiplied; the number of pixels stays.

    Raises:
        ValueError: If ``mean`` is unknown.
    """
    if mean not in MEANS:
        raise ValueError(f"the mean is over {' or '.join(map(repr, MEANS))} pixels; got {mean!r}")
    logits = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, labels.long(), weight, ignore_index=ignore_index, reduction="sum")
    count = labels.numel() if mean == "all" else (labels != ignore_index).sum().clamp(min=1)
    return total / count


def pixel_accuracy(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Return the fraction of right labels among the pixels that count; arguments as for `pixel_cross_entropy`."""
    logits = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    valid = labels != ignore_index
    return ((logits.argmax(1) == labels) & valid).sum() / valid.sum().clamp(min=1)
