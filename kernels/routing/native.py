"""Routed attention in C for CPUs: loads ``native.c``.

Forward alone. See `neighborhood.native` for how such a library is built and called.
"""

import struct
from pathlib import Path

import torch
from torch import Tensor

from ..backends import contiguous_rows, export_obstacle, is_transforming
from ..neighborhood.native import load_function
from .chunked import check_routes

# `call` in native.c.
_CALL = struct.Struct("=11qd21q")
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
    if not torch.compiler.is_compiling() and is_transforming():
        return "torch.func and dual numbers transform no operator of torch.library"
    return export_obstacle() or _missing


def native_forward(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, region_size: tuple[int, int], scale: float
) -> Tensor:
    """Return routed attention ``[B, H, W, heads, dim_v]``; see `foveate.kernels.routed_attention`."""
    if _library is None:
        raise RuntimeError(f"foveate's native path cannot run: {_missing}")
    check_routes(routes)
    dtype = query.dtype
    query, key, value = (contiguous_rows(x.float()) for x in (query, key, value))
    routes = routes.to(torch.int64).contiguous()
    batch, height, width, heads, dim = query.shape
    out = query.new_empty(*query.shape[:4], value.shape[-1])
    numbers = (batch, height, width, heads, dim, value.shape[-1], *region_size, routes.shape[2])
    tensors = [number for x in (query, key, value, out) for number in (x.data_ptr(), *x.stride()[:4])]
    call = _CALL.pack(torch.get_num_threads(), _library.parallel, *numbers, scale, *tensors, routes.data_ptr())
    if _library.call(call):
        raise RuntimeError("foveate's native routed attention failed: out of memory")
    return out.to(dtype)
