"""Multi-scale deformable attention in C for CPUs: loads ``deformable.c``, and makes it an operator with gradients.

No sample is kept for the backward pass, and no pixel's gradient is sorted. See `neighborhood.native` for how such a
library is built and called.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .backends import export_obstacle, is_transforming
from .deformable_gathers import deformable_gathers
from .neighborhood.native import load_function
from .second_order import differentiate_gradients

# `call` in deformable.c.
_CALL = struct.Struct("=18q")

_library, _missing = load_function(Path(__file__).with_name("_deformable.c.so"), "foveate_deformable")


def obstacle(value: Tensor) -> str | None:
    """Return why the native path cannot take pixels like ``value``, or None if it can."""
    if value.device.type != "cpu":
        return f"it is for CPU tensors; value is on {value.device}"
    if value.dtype != torch.float32:
        return f"it computes in float32; got {value.dtype}"
    if is_transforming():
        return "torch.func and dual numbers transform no operator of torch.library"
    return export_obstacle() or _missing


def _call(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor, *others: Tensor) -> None:
    """Compute the first of the others, or from the second, a gradient, those of the three inputs."""
    if _library is None:
        raise RuntimeError(f"foveate's native path cannot run: {_missing}")
    sides = np.ascontiguousarray(shapes, dtype=np.int64)
    batch, pixels, heads, dim = value.shape
    _, queries, _, levels, points = weights.shape
    tensors = (value, locations, weights, *others)
    addresses = [x.data_ptr() for x in tensors] + [0] * (8 - len(tensors))
    numbers = (batch, pixels, heads, dim, queries, levels, points, sides.ctypes.data)
    if _library.call(_CALL.pack(torch.get_num_threads(), _library.parallel, *numbers, *addresses)):
        raise RuntimeError("foveate's native multi-scale deformable attention failed: out of memory")


@torch.library.custom_op("foveate::deformable_native", mutates_args=(), device_types="cpu")
def _operator(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    value, locations, weights = (x.contiguous() for x in (value, locations, weights))
    out = value.new_empty(len(value), locations.shape[1], value.shape[2] * value.shape[3])
    _call(value, shapes, locations, weights, out)
    return out


@_operator.register_fake
def _(value, shapes, locations, weights):
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op("foveate::deformable_native_backward", mutates_args=(), device_types="cpu")
def _operator_backward(
    grad_out: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, value, locations, weights = (x.contiguous() for x in (grad_out, value, locations, weights))
    grads = torch.zeros_like(value), torch.empty_like(locations), torch.empty_like(weights)
    _call(value, shapes, locations, weights, grad_out, grad_out, *grads)
    return grads


@_operator_backward.register_fake
def _(grad_out, value, shapes, locations, weights):
    return tuple(x.new_empty(x.shape) for x in (value, locations, weights))


def _save(ctx, inputs, output) -> None:
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _differentiate(ctx, grad_out: Tensor):
    value, locations, weights = ctx.saved_tensors
    grads = _operator_backward(grad_out, value, ctx.shapes, locations, weights)
    return grads[0], None, *grads[1:]


def _save_backward(ctx, inputs, output) -> None:
    grad_out, value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(grad_out, value, locations, weights)


def _differentiate_again(ctx, *grads: Tensor | None):
    """Differentiate the gradients by the gathers, as functions of the operands alone."""
    grad_out, *operands = ctx.saved_tensors
    shapes = list(zip(ctx.shapes[::2], ctx.shapes[1::2], strict=True))

    def compute(value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor]:
        return (deformable_gathers(value, shapes, locations, weights),)

    seconds = differentiate_gradients(compute, (grad_out,), operands, grads)
    return *seconds[:2], None, *seconds[2:]


_operator.register_autograd(_differentiate, setup_context=_save)
_operator_backward.register_autograd(_differentiate_again, setup_context=_save_backward)


def deformable_native(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Multi-scale deformable attention in C; see `deformable.multi_scale_deformable_attention` for the arguments."""
    return _operator(value, [side for shape in shapes for side in shape], locations, weights)
