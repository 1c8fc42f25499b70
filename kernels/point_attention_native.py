"""Attention to points in C for CPUs: loads ``point_attention.c``.

Forward alone, in float32. See `neighborhood.native` for how such a library is built and called.
"""

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .backends import default_scale, export_obstacle
from .neighborhood.native import load_library, openmp

# `call` in point_attention.c.
_CALL = struct.Struct("=12qd7q")


class _Library:
    def __init__(self, path: Path):
        self.call = ctypes.CDLL(str(path)).foveate_point_attention
        self.parallel = openmp()


_library, _missing = load_library(Path(__file__).with_name("_point_attention.c.so"), _Library)


def obstacle(tensors: Sequence[Tensor]) -> str | None:
    """Return why the native path cannot take these tensors, or None if it can."""
    if any(x.device.type != "cpu" for x in tensors):
        return f"it is for CPU tensors; query is on {tensors[0].device}"
    if any(x.dtype != torch.float32 for x in tensors):
        return f"it computes in float32; query is {tensors[0].dtype}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "it has no derivatives"
    if torch.compiler.is_compiling():
        return "a compiler traces the plain one"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms no operator of torch.library"
    return export_obstacle() or _missing


@torch.library.custom_op("foveate::point_attention_native", mutates_args=(), device_types="cpu")
def _operator(query: Tensor, key: Tensor, value: Tensor, table: Tensor, at: Tensor, step: Tensor) -> Tensor:
    if _library is None:
        raise RuntimeError(f"foveate's native path cannot run: {_missing}")
    batch, height, width, heads, dim = query.shape
    points, dim_v = value.shape[2:]
    out = query.new_empty(batch, height, width, heads, dim_v)
    tensors = [x.contiguous() for x in (query, key, value, table, at, step)]
    numbers = (batch, height, width, heads, at.shape[1], points, dim, dim_v, *table.shape[1:])
    addresses = [x.data_ptr() for x in (*tensors, out)]
    call = _CALL.pack(torch.get_num_threads(), _library.parallel, *numbers, default_scale(query), *addresses)
    if _library.call(call):
        raise RuntimeError("foveate's native attention to points failed: out of memory")
    return out


@_operator.register_fake
def _(query, key, value, table, at, step):
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def point_attention_native(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, points: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    """Attend to points in C; see `point_attention.point_attention` for the arguments."""
    tensors = query, key.transpose(1, 2), value.transpose(1, 2), table
    half = [(length - 1) / 4 for length in table.shape[1:]]  # of the table, for a displacement of 1
    first = torch.stack([rows[0], columns[0]])
    at = (first - points + 2) * points.new_tensor(half)
    step = [(x[-1] - x[0]) / max(len(x) - 1, 1) * side for x, side in zip((rows, columns), half, strict=True)]
    return _operator(*(x.detach() for x in (*tensors, at, torch.stack(step))))
