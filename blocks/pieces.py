"""Feed-forward networks in pieces.

The hidden map is the largest tensor of most models. No position's hidden channels depend on another's, and with a
depthwise convolution between the layers no hidden channel depends on another. Inference on a CPU may therefore compute
a piece at a time: fresh memory for the whole costs more than the products. In training what follows the hidden map may
be made again in the backward pass, likewise.
"""

import torch
from torch import Tensor, nn

from ..kernels.backends import exporting
from ..kernels.depthwise import depthwise_conv2d
from ..kernels.gelu_linear import gelu_linear, is_recomputed
from ..kernels.pointwise import pointwise
from .plain import is_plain, is_plain_gelu


def may_take_pieces(x: Tensor, *layers: nn.Module) -> bool:
    """Return whether a network of these layers may be computed in pieces of its hidden map.

    A graph is traced whole, gradients need everything anyway, and who looks at a layer wants the whole map.
    """
    traced = torch.compiler.is_compiling() or exporting()
    # The device last: what stands for a map in a traced graph has none, and there layers are not plain.
    return not traced and not torch.is_grad_enabled() and is_plain(*layers) and x.is_cpu


def finish_by_pieces(
    hidden: Tensor,
    act: nn.Module,
    drop: nn.Module,
    fc2: nn.Module,
    conv: nn.Conv2d | None = None,
    residual: bool = False,
) -> Tensor | None:
    """Return what an MLP makes of its hidden map, by `kernels.gelu_linear`; None if its layers have to be called.

    Args:
        hidden: ``[B, H, W, hidden]``, or without a convolution ``[B, N, hidden]`` too.
        act: Activation.
        drop: Dropout behind it.
        fc2: Linear layer, or 1x1 convolution.
        conv: Depthwise convolution before the activation, which keeps the map's size.
        residual: Whether the map is added to its convolution.

    Returns:
        The same with the channels of ``fc2``.
    """
    if torch.compiler.is_compiling() or exporting():
        return None
    dropping = isinstance(drop, nn.Dropout) and drop.training and drop.p > 0
    layers = (drop, fc2) if conv is None else (drop, fc2, conv)
    # The map last, as above.
    if dropping or not is_plain_gelu(act) or not is_plain(*layers) or not is_recomputed(hidden):
        return None
    convolution = (None, None) if conv is None else (conv.weight, conv.bias)
    return gelu_linear(hidden, fc2.weight.flatten(1), fc2.bias, *convolution, residual=residual)


def sum_over_channels(
    x: Tensor, fc1: nn.Module, conv: nn.Conv2d, act: nn.Module, fc2: nn.Module, channels: int, gated: bool = False
) -> Tensor:
    """Return ``fc2(act(conv(fc1(x))))``, so many hidden channels at a time.

    Args:
        x: Maps ``[B, H, W, C]``.
        fc1: Linear layer, or 1x1 convolution.
        conv: Depthwise 3x3 convolution.
        act: Activation.
        fc2: Linear layer, or 1x1 convolution.
        channels: How many.
        gated: Whether ``fc1`` has twice as many channels, of which the second half is multiplied by the convolved and
            activated first.

    Returns:
        Maps ``[B, H, W, C]``.
    """
    height, width = x.shape[1], x.shape[2]
    tokens = x.flatten(0, 2)
    inputs, outputs = fc1.weight.flatten(1), fc2.weight.flatten(1)
    hidden, activation = outputs.shape[1], "gelu" if is_plain_gelu(act) else None
    total = fc2.bias.expand(tokens.shape[0], -1)
    for start in range(0, hidden, channels):
        end = min(start + channels, hidden)
        part = slice(start, end)
        piece = pointwise(tokens, inputs[part], fc1.bias[part])
        piece = piece.view(-1, height, width, end - start).permute(0, 3, 1, 2)
        piece = depthwise_conv2d(piece, conv.weight[part], conv.bias[part], activation=activation)
        piece = piece.permute(0, 2, 3, 1).flatten(0, 2)
        piece = piece if activation else act(piece)
        if gated:
            other = slice(hidden + start, hidden + end)
            piece = piece.mul_(pointwise(tokens, inputs[other], fc1.bias[other]))
        total = torch.addmm(total, piece, outputs[:, part].t())
    return total.view(x.shape)
