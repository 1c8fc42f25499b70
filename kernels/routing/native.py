"""Routed attention in C for CPUs, forward and backward: loads ``native.c``.

See `neighborhood.native` for how such a library is built and called.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..backends import contiguous_rows, export_obstacle, is_transforming
from ..neighborhood.native import load_function
from .chunked import check_routes

# `call` in native.c.
_CALL = struct.Struct("=11qd45q")
_VECTOR = 16
# It computes in the first; of the others it takes copies in that.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_library, _missing = load_function(Path(__file__).with_name("_native.c.so"), "foveate_routed")


def obstacle(query: Tensor, value: Tensor) -> str | None:
    """Return why the native path cannot take such a call, or None if it can."""
    if query.device.type != "cpu":
        return f"it is for CPU tensors; query is on {query.device}"
    if query.dtype not in _DTYPES:
        return f"it computes in float32; got {query.dtype}"
    if query.shape[-1] % _VECTOR or value.shape[-1] % _VECTOR:
        return f"it needs dims of multiples of {_VECTOR}; got {query.shape[-1]} and {value.shape[-1]}"
    if is_transforming():
        return "torch.func and dual numbers transform no operator of torch.library"
    return export_obstacle() or _missing


def _layout(x: Tensor | None) -> tuple[int, ...]:
    return (0,) * 5 if x is None else (x.data_ptr(), *x.stride()[-5:-1])


def _call(
    maps: Sequence[Tensor],
    routes: Tensor,
    region_size: tuple[int, int],
    scale: float,
    lse: Tensor,
    gradients: Sequence[Tensor | None] = (None,) * 4,
) -> None:
    """Call the library on query, key, value and output, forward or for the gradients of the output and of the others.

    Those of key and value have one axis more in front, of the bands of rows, which have sums of their own.
    """
    if _library is None:
        raise RuntimeError(f"foveate's native path cannot run: {_missing}")
    check_routes(routes)
    routes = routes.to(torch.int64).contiguous()
    sums = [x for x in gradients[2:] if x is not None]
    call = _CALL.pack(
        torch.get_num_threads(),
        _library.parallel,
        *maps[0].shape,
        maps[2].shape[-1],
        *region_size,
        routes.shape[2],
        scale,
        *(number for x in maps for number in _layout(x)),
        routes.data_ptr(),
        lse.data_ptr(),
        len(sums[0]) if sums else 0,
        *(number for x in gradients for number in _layout(x)),
        *([x.stride(0) for x in sums] or [0, 0]),
    )
    if _library.call(call):
        raise RuntimeError("foveate's native routed attention failed: out of memory")


def native_forward(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, region_size: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """Return routed attention ``[B, H, W, heads, dim_v]``, and log2 of each softmax's sum ``[B, heads, H * W]``."""
    dtype = query.dtype
    query, key, value = (contiguous_rows(x.float()) for x in (query, key, value))
    batch, height, width, heads, _ = query.shape
    out = query.new_empty(batch, height, width, heads, value.shape[-1])
    lse = query.new_empty(batch, heads, height * width)
    _call((query, key, value, out), routes, region_size, scale, lse)
    return out.to(dtype), lse


def native_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    out: Tensor,
    lse: Tensor,
    region_size: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value for the gradient ``grad`` of the output."""
    dtype = query.dtype
    grad, query, key, value, out = (contiguous_rows(x.float()) for x in (grad, query, key, value, out))
    planes, rows = query.shape[0] * query.shape[3], query.shape[1] // region_size[0]
    # A band has sums of its own, which take memory.
    bands = min(rows, -(-torch.get_num_threads() // planes))
    gradients = [grad, query.new_zeros(query.shape), *(x.new_zeros(bands, *x.shape) for x in (key, value))]
    _call((query, key, value, out), routes, region_size, scale, lse, gradients)
    sums = (x[0] if bands == 1 else x.sum(0) for x in gradients[2:])
    return tuple(x.to(dtype) for x in (gradients[1], *sums))
