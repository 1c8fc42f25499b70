"""Depthwise convolutions of maps."""

import torch
from torch import Tensor, nn

from ..kernels.depthwise import depthwise_conv2d
from .plain import is_plain, is_plain_gelu


def apply_depthwise(layer: nn.Module, x: Tensor, act: nn.Module | None = None, residual: bool = False) -> Tensor:
    """Return ``act(x + layer(x))`` of ``x`` ``[B, C, H, W]``, by the fastest operator for a plain layer of stride 1.

    The map is added if ``residual`` says so, and there may be no activation.
    A layer that is hooked, adapted, quantized or otherwise more than `torch.nn.Conv2d` is called as it is; so is every
    layer in a traced graph, which keeps it as a layer.

    Example:
        >>> conv = torch.nn.Conv2d(16, 16, 7, padding=9, dilation=3, groups=16)
        >>> apply_depthwise(conv, torch.randn(1, 16, 5, 9)).shape
        torch.Size([1, 16, 5, 9])
    """
    if torch.jit.is_tracing() or not is_plain(layer) or not _is_depthwise(layer):
        x = x + layer(x) if residual else layer(x)
        return x if act is None else act(x)
    activation = "gelu" if act is not None and is_plain_gelu(act) else None
    options = {"dilation": layer.dilation, "padding": layer.padding, "residual": residual, "activation": activation}
    x = depthwise_conv2d(x, layer.weight, layer.bias, **options)
    return x if act is None or activation else act(x)


def _is_depthwise(layer: nn.Conv2d) -> bool:
    return (
        layer.groups == layer.in_channels == layer.out_channels
        and layer.stride == (1, 1)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )
