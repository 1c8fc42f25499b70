"""The gradients of a depthwise convolution in C for CPUs: loads ``depthwise.c``.

See `neighborhood.native` for how such a library is built and called.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .neighborhood.native import load_function

# `call` and `square_call` in depthwise.c.
_CALL, _SQUARE_CALL = struct.Struct("=24q"), struct.Struct("=21q")
# Channels of a task.
_STEP = 64

# Of which a map's channels are a multiple, where all gradients of a 3x3 kernel are made at once: the longest vector.
LANES = 16

_PATH = Path(__file__).with_name("_depthwise.c.so")
_weights, _ = load_function(_PATH, "foveate_depthwise_weights")
_square, _missing = load_function(_PATH, "foveate_depthwise_square")


def obstacle() -> str | None:
    """Return why these gradients cannot be computed in C, or None if they can."""
    return _missing


def weight_gradients(
    grad: Tensor, x: Tensor, kernel: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the weight ``[C, 1, h, w]`` and the bias of a depthwise convolution.

    Args:
        grad: The output's, ``[B, C, H', W']``, float32, of any strides; no copy is made where channels come last.
        x: The map ``[B, C, H, W]``, likewise.
        kernel: h and w.
        padding: Zeros on each side of the map, of rows and of columns.
        stride: Of rows and of columns.
    """
    if _weights is None:
        raise RuntimeError(f"foveate's native path cannot run: {_missing}")
    grad, x = _channels_side_by_side(grad), _channels_side_by_side(x)
    (batch, channels), rows, taps = x.shape[:2], grad.shape[2], kernel[0] * kernel[1]
    parts = _parts(batch * -(-channels // _STEP), rows)
    sums = x.new_empty(batch * parts, taps + 1, channels)
    call = _CALL.pack(
        torch.get_num_threads(),
        _weights.parallel,
        *x.shape,
        *grad.shape[2:],
        *kernel,
        *padding,
        *stride,
        *_layout(x),
        *_layout(grad),
        parts,
        sums.data_ptr(),
    )
    if _weights.call(call):
        raise RuntimeError("foveate's native gradients of a depthwise convolution failed: out of memory")
    total = sums.sum(0)
    return total[:taps].t().reshape(channels, 1, *kernel), total[taps]


def square_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the map, the weight and the bias of a 3x3 kernel that keeps the map's size.

    Args:
        grad: The output's, ``[B, C, H, W]``, float32, of any strides; no copy is made where channels come last.
        x: The map ``[B, C, H, W]``, likewise; C is a multiple of `LANES`.
        weight: ``[C, 1, 3, 3]``.
    """
    if _square is None:
        raise RuntimeError(f"foveate's native path cannot run: {_missing}")
    grad, x = _channels_side_by_side(grad), _channels_side_by_side(x)
    batch, channels, height, width = x.shape
    parts = _parts(batch, height)
    to = torch.empty_like(x, memory_format=torch.channels_last)
    sums = x.new_empty(batch * parts, 10, channels)
    by_place = weight.detach().reshape(channels, 9).t().contiguous()
    call = _SQUARE_CALL.pack(
        torch.get_num_threads(),
        _square.parallel,
        *(batch, channels, height, width),
        *_layout(x),
        *_layout(grad),
        *_layout(to),
        by_place.data_ptr(),
        parts,
        sums.data_ptr(),
    )
    if _square.call(call):
        raise RuntimeError("foveate's native gradients of a depthwise convolution failed: out of memory")
    total = sums.sum(0)
    return to, total[:9].t().reshape(weight.shape), total[9]


def _parts(tasks: int, rows: int) -> int:
    """Return into how many parts the rows of so many tasks are cut, for every thread to have two; none is empty."""
    parts = min(-(-2 * torch.get_num_threads() // tasks), rows)
    return -(-rows // -(-rows // parts))


def _channels_side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)


def _layout(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), x.stride(0), *x.stride()[2:])
