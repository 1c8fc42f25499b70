"""What images a dense model takes, and how they become what its backbone was trained on."""

from collections.abc import Mapping, Sequence

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from .. import TaskError

# Resampling and noise overshoot 0 and 1 a little; normalised photographs and those of 0 to 255 by far more.
_LEAST, _GREATEST = -0.5, 1.5
ORDERS = ("rgb", "bgr")


def check_order(channel_order: str) -> None:
    """Raise a TaskError unless it is one of `ORDERS`."""
    if channel_order not in ORDERS:
        raise TaskError(f"channel_order is {channel_order!r}; it can be {' or '.join(map(repr, ORDERS))}")


def normalize(image: Tensor, mean: Sequence[float], std: Sequence[float], channel_order: str = "rgb") -> Tensor:
    """Return images ``[..., C, H, W]``, uint8 or of 0 to 1, less their mean and divided by their standard deviation.

    Args:
        image: Pixels.
        mean: For each channel, of pixels of 0 to 1.
        std: For each channel, of pixels of 0 to 1.
        channel_order: ``"bgr"`` turns the channels round first, so that ``mean`` and ``std`` are in that order.

    Returns:
        float32.
    """
    if channel_order == "bgr":
        image = image.flip(-3)
    scale = 255 if image.dtype == torch.uint8 else 1
    image = image.float()
    mean, std = (image.new_tensor(values)[:, None, None] * scale for values in (mean, std))
    return (image - mean) / std


def check_images(image: Tensor, channels: int, normalized: bool = False, look: bool = True) -> None:
    """Raise a TaskError unless images ``[..., C, H, W]`` are uint8, or floating point of 0 to 1.

    Args:
        image: Pixels.
        channels: How many the model takes.
        normalized: Whether the caller has normalised them, so that they are floating point of any values.
        look: Whether to look at the values, for which the host waits for a GPU.
    """
    if image.shape[-3] != channels or 0 in image.shape:
        raise TaskError(f"an image has shape {tuple(image.shape[-3:])}; the model takes [{channels}, height, width]")
    if normalized and not image.is_floating_point():
        raise TaskError(f"images of {image.dtype} can't be normalised already; leave normalized=True out")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TaskError(f"an image has dtype {image.dtype}; it can be uint8, or floating point of 0 to 1")
    if normalized or not look or image.dtype == torch.uint8 or torch.compiler.is_compiling():
        return
    low, high = (value.item() for value in image.detach().aminmax())
    # Not the opposite, which would pass over NaN.
    if not (low >= _LEAST and high <= _GREATEST):
        raise TaskError(
            f"an image has values of {low:.4g} to {high:.4g}; floating point is of 0 to 1, bytes are torch.uint8, and "
            "what is normalised already goes with normalized=True"
        )


def check_evaluation(model: nn.Module) -> None:
    """Raise a TaskError if a model is in training mode, in which it would predict by the batch and at random."""
    if model.training:
        raise TaskError("the model is in training mode; to predict, put it into evaluation mode: model.eval()")


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's parameters, in which its images must be; float32 of one without."""
    return next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)


def statistics_of(backbone: nn.Module) -> Mapping[str, tuple[float, ...]]:
    """Return the ``mean`` and ``std`` of the images that a backbone was published for; ImageNet's if it doesn't say."""
    cfg = getattr(getattr(backbone, "features", backbone), "pretrained_cfg", None) or {}
    usual = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return {key: tuple(cfg.get(key) or value) for key, value in usual.items()}
