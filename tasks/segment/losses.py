"""Losses of the heads that label every pixel."""

import torch.nn.functional as F
from torch import Tensor

MEANS = ("all", "valid")


def pixel_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = 255, mean: str = "all") -> Tensor:
    """Return the cross entropy of a label map; the logits are brought to its size first (bilinear).

    Two means are in use. mmseg, with which the published models were trained, divides by the number of all pixels,
    ignored ones included (``"all"``): an image with much to ignore counts less. Elsewhere one divides by the number of
    pixels that count (``"valid"``). They agree where nothing is ignored.

    Args:
        logits: ``[B, K, h, w]``.
        labels: ``[B, H, W]``, integers below K, or ``ignore_index``.
        ignore_index: Label of pixels that don't count.
        mean: ``"all"`` or ``"valid"``.

    Raises:
        ValueError: If ``mean`` is unknown.
    """
    if mean not in MEANS:
        raise ValueError(f"the mean is over {' or '.join(map(repr, MEANS))} pixels; got {mean!r}")
    logits = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, labels.long(), ignore_index=ignore_index, reduction="sum")
    count = labels.numel() if mean == "all" else (labels != ignore_index).sum().clamp(min=1)
    return total / count


def pixel_accuracy(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Return the fraction of right labels among the pixels that count; arguments as for `pixel_cross_entropy`."""
    logits = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    valid = labels != ignore_index
    return ((logits.argmax(1) == labels) & valid).sum() / valid.sum().clamp(min=1)
