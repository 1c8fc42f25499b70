"""Depthwise convolutions of maps."""

import torch
from torch import Tensor, nn

from ..kernels.backends import channels_come_last
from ..kernels.depthwise import NARROW, compiled_depthwise, depthwise_conv2d
from .plain import compiles_to_onednn, is_plain, is_plain_gelu


def apply_depthwise(layer: nn.Module, x: Tensor, act: nn.Module | None = None, residual: bool = False) -> Tensor:
    """Return ``act(x + layer(x))`` of ``x`` ``[B, C, H, W]``, by the fastest operator for a plain layer of stride 1.

    The map is added if ``residual`` says so, and there may be no activation.
    A layer that is hooked, adapted, quantized or otherwise more than `torch.nn.Conv2d` is called as it is; so is every
    layer in a traced graph, which keeps it as a layer, but where a compiler would do what follows apart.

    Example:
        >>> conv = torch.nn.Conv2d(16, 16, 7, padding=9, dilation=3, groups=16)
        >>> apply_depthwise(conv, torch.randn(1, 16, 5, 9)).shape
        torch.Size([1, 16, 5, 9])
    """
    if torch.compiler.is_compiling() and _compiles_fused(layer, x, act, residual):
        activation = None if act is None else "gelu"
        return compiled_depthwise(x, layer.weight, layer.bias, layer.padding, residual, activation)
    if torch.jit.is_tracing() or not is_plain(layer) or not _is_depthwise(layer):
        x = x + layer(x) if residual else layer(x)
        return x if act is None else act(x)
    activation = "gelu" if act is not None and is_plain_gelu(act) else None
    options = {"dilation": layer.dilation, "padding": layer.padding, "residual": residual, "activation": activation}
    x = depthwise_conv2d(x, layer.weight, layer.bias, **options)
    return x if act is None or activation else act(x)


def _compiles_fused(layer: nn.Module, x: Tensor, act: nn.Module | None, residual: bool) -> bool:
    """Return whether a compiled graph takes a convolution, which keeps the map's size, and what follows as one."""
    fused = residual if act is None else is_plain_gelu(act)
    if not fused or not compiles_to_onednn(layer, x) or not _is_depthwise(layer):
        return False
    height, width = layer.kernel_size
    centred = height % 2 and width % 2 and layer.padding == (height // 2, width // 2) and layer.dilation == (1, 1)
    return bool(centred) and max(height, width) <= NARROW and channels_come_last(x)


def _is_depthwise(layer: nn.Conv2d) -> bool:
    return (
        layer.groups == layer.in_channels == layer.out_channels
        and layer.stride == (1, 1)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )
