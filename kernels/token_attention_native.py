"""Attention between tokens in C for CPUs, without gradients: loads ``token_attention.c``.

See `neighborhood.native` for how such a library is built and called.
"""

import struct
from pathlib import Path

import torch
from torch import Tensor

from .backends import contiguous_rows, export_obstacle, is_transforming
from .neighborhood.native import load_function

# `call` in token_attention.c.
_CALL = struct.Struct("=12qd35q")
# Of the values' channels it sums so many together.
_VECTOR = 8

_library, _missing = load_function(Path(__file__).with_name("_token_attention.c.so"), "foveate_token_attention")


def obstacle(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> str | None:
    """Return why the native path cannot take such a call, or None if it can."""
    given = (query, key, value) if bias is None else (query, key, value, bias)
    for x in given:
        if not x.is_cpu:
            return f"it is for CPU tensors; they are on {x.device}"
        if x.dtype != torch.float32:
            return f"it computes in float32; got {x.dtype}"
        if 0 in x.shape:
            return "it takes no empty tensors"
    if value.shape[-1] % _VECTOR:
        return f"it needs values of a multiple of {_VECTOR} channels; got {value.shape[-1]}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return "it has no derivatives"
    if is_transforming():
        return "torch.func and dual numbers transform no operator of torch.library"
    return export_obstacle() or _missing


def _layout(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), *x.stride()[:-1])


def _bias_layout(bias: Tensor | None) -> tuple[int, ...]:
    """Return where a bias ``[B or 1, heads or 1, N, M]`` lies; that of one image or head is for all."""
    if bias is None:
        return (0,) * 7
    batch, head = (0 if bias.shape[axis] == 1 else bias.stride(axis) for axis in range(2))
    return (bias.data_ptr(), batch, 0, 0, head, *bias.stride()[2:])


def _one_side_by_side(bias: Tensor, queries: int, keys: int) -> Tensor:
    """Return a bias for so many queries and keys, or a copy, of which queries or keys lie side by side."""
    bias = bias.expand(-1, -1, queries, keys)
    return bias if 1 in bias.stride()[2:] else bias.contiguous()


def _empty(query: Tensor, value: Tensor) -> Tensor:
    """Return room for the output ``[B, R, C, heads, h, w, dim_v]``, which lies in memory as a map would."""
    batch, rows, columns, heads, height, width, _ = query.shape
    out = query.new_empty(batch, rows, height, columns, width, heads, value.shape[-1])
    return out.permute(0, 1, 3, 5, 2, 4, 6)


@torch.library.custom_op("foveate::token_attention", mutates_args=(), device_types="cpu")
def token_attention_native(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attend from ``[B, R, C, heads, h, w, dim]`` to the keys of the same R, C and heads; see `token_attention`."""
    if _library is None:
        raise RuntimeError(f"foveate's native path cannot run: {_missing}")
    query, key, value = contiguous_rows(query), contiguous_rows(key), contiguous_rows(value)
    queries, keys = (x.shape[4] * x.shape[5] for x in (query, key))
    bias = None if bias is None else _one_side_by_side(bias, queries, keys)
    out = _empty(query, value)
    call = _CALL.pack(
        torch.get_num_threads(),
        _library.parallel,
        *query.shape[:4],
        queries,
        query.shape[5],
        keys,
        key.shape[5],
        query.shape[6],
        value.shape[6],
        scale,
        *_layout(query),
        *_layout(key),
        *_layout(value),
        *_layout(out),
        *_bias_layout(bias),
    )
    if _library.call(call):
        raise RuntimeError("foveate's native attention between tokens failed: out of memory")
    return out


@token_attention_native.register_fake
def _(query, key, value, bias, scale):
    return _empty(query, value)
