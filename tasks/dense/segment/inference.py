"""Inference of label maps: of whole images or in windows, at several scales, mirrored; mmseg's rules."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ....kernels.backends import is_exporting
from ... import TaskError

MODES = ("whole", "slide")


def resize_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps or logits ``[B, C, h, w]`` to ``size``, (height, width): bilinear, corners not aligned."""
    # In a graph of any size, sides that are equal in its example may differ elsewhere.
    whatever = is_exporting() and any(isinstance(side, torch.SymInt) for side in (*x.shape[-2:], *size))
    if not whatever and tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def pad_to(x: Tensor, size: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad maps ``[..., h, w]``, on the right and below, to ``size``, (height, width)."""
    return F.pad(x, (0, size[1] - x.shape[-1], 0, size[0] - x.shape[-2]), value=value)


def slide(model: Callable[[Tensor], Tensor], images: Tensor, crop_size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Return the mean of the logits of all windows that see a pixel.

    Args:
        model: Maps images ``[B, C, h, w]`` to logits ``[B, K, h, w]``.
        images: ``[B, C, H, W]``; where they are smaller than a window, the window is as small.
        crop_size: Height and width of a window. The last ones are shifted back into the image.
        stride: Step between windows, down and across.

    Returns:
        Logits ``[B, K, H, W]``.
    """
    height, width = images.shape[-2:]
    total, visits = None, images.new_zeros(1, 1, height, width)
    for top in _starts(height, crop_size[0], stride[0]):
        for left in _starts(width, crop_size[1], stride[1]):
            window = (..., slice(top, top + crop_size[0]), slice(left, left + crop_size[1]))
            logits = model(images[window])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[window] += logits
            visits[window] += 1
    return total / visits.to(total.dtype)


def _starts(length: int, crop: int, stride: int) -> list[int]:
    """Return where the windows start that cover ``length`` pixels."""
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride + crop, length) - crop, 0) for i in range(count)]


def check_windows(mode: str, crop_size: Sequence[int] | int | None, stride: Sequence[int] | int | None) -> tuple:
    """Return crop size and stride as pairs, or raise a TaskError that says what is wrong with them."""
    if mode not in MODES:
        raise TaskError(f"mode is {mode!r}, but must be {' or '.join(map(repr, MODES))}")
    if mode == "whole":
        return None, None
    crop_size = (512, 512) if crop_size is None else crop_size
    crop_size = (crop_size, crop_size) if isinstance(crop_size, int) else tuple(crop_size)
    # Two thirds of the window, as in the published evaluations (341 of 512).
    stride = tuple(max(side * 2 // 3, 1) for side in crop_size) if stride is None else stride
    stride = (stride, stride) if isinstance(stride, int) else tuple(stride)
    if any(side < 1 for side in crop_size) or any(not 1 <= s <= c for s, c in zip(stride, crop_size, strict=True)):
        raise TaskError(
            f"windows of {crop_size} every {stride} pixels leave gaps; a stride is at least 1 and at most the window"
        )
    return crop_size, stride


def check_scales(scales: Sequence[float]) -> None:
    """Raise a TaskError unless there are scales and all are positive."""
    if not scales or any(scale <= 0 for scale in scales):
        raise TaskError(f"scales are positive factors of the image's size; got {tuple(scales)}")


def views(images: Tensor, scales: Sequence[float], flip: bool) -> Iterator[tuple[Tensor, bool]]:
    """Yield images ``[B, C, H, W]`` at every scale (bilinear), with ``flip`` also mirrored; and whether they are."""
    for scale in scales:
        view = resize_to(images, [max(int(side * scale + 0.5), 1) for side in images.shape[-2:]])
        yield view, False
        if flip:
            yield view.flip(-1), True


def averaged_probabilities(
    logits_of: Callable[[Tensor], Tensor],
    images: Tensor,
    output_size: Sequence[int],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """Return the mean over scales and mirror images of the classes' probabilities.

    Each view is the images resized (bilinear) by a scale, and again mirrored; its logits are brought back to the output
    size before the softmax.

    Args:
        logits_of: Maps images ``[B, C, h, w]`` to logits ``[B, K, h, w]``.
        images: ``[B, C, H, W]``, normalised.
        output_size: Height and width of the result.
        scales: Factors of the images' size.
        flip: Whether to add the mirror image of each view.

    Returns:
        Probabilities ``[B, K, *output_size]``.
    """
    total, count = 0, 0
    for view, mirrored in views(images, scales, flip):
        logits = logits_of(view)
        logits = logits.flip(-1) if mirrored else logits
        total = total + resize_to(logits, output_size).float().softmax(1)
        count += 1
    return total / count


@torch.inference_mode()
def predict_labels(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    mode: str = "whole",
    crop_size: Sequence[int] | int | None = None,
    stride: Sequence[int] | int | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Return label maps ``[B, H, W]``; arguments as for `Segmenter.predict`."""
    crop_size, stride = check_windows(mode, crop_size, stride)
    check_scales(scales)

    def logits_of(view: Tensor) -> Tensor:
        return model(view) if crop_size is None else slide(model, view, crop_size, stride)

    size = images.shape[-2:] if output_size is None else output_size
    if tuple(scales) == (1.0,) and not flip:
        return resize_to(logits_of(images), size).argmax(1)
    return averaged_probabilities(logits_of, images, size, scales, flip).argmax(1)
