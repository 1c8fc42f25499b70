"""Aggregated attention in C for CPUs, from the projections to the sums of values: loads ``aggregated.c``.

Forward alone, in float32, to which halves are copied. See `neighborhood.native` for how such a library is built and
called.
"""

import math
import struct
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import export_obstacle, is_transforming
from .neighborhood.native import load_function

# `call` in aggregated.c.
_CALL = struct.Struct("=29q")

_library, _missing = load_function(Path(__file__).with_name("_aggregated.c.so"), "foveate_aggregated")


class Projected(NamedTuple):
    """A call of aggregated attention on what the layers project.

    Attributes:
        query: Queries ``[B, H, W, dim]`` as projected.
        kv: Keys and values ``[B, H, W, 2 * dim]`` as projected.
        pooled_kv: Those of the pooled map, ``[B, M, 2 * dim]``.
        temperature: Of each head, before its softplus, ``[heads, 1, 1]``.
        query_embedding: Added to unit queries, ``[heads, 1, head_dim]``.
        local_bias: Of the window's scores, ``[heads, slots]``.
        tokens: What queries make weights of the window's values with, ``[heads, head_dim, slots]``.
        token_bias: Added to these weights, ``[heads, 1, slots]``.
        bias_table: The pooled scores' bias by distance along each axis, ``[heads, Sy, Sx]``.
    """

    query: Tensor
    kv: Tensor
    pooled_kv: Tensor
    temperature: Tensor
    query_embedding: Tensor
    local_bias: Tensor
    tokens: Tensor
    token_bias: Tensor
    bias_table: Tensor


def obstacle(problem: Projected) -> str | None:
    """Return why the native path cannot take a call, or None if it can."""
    if any(x.device.type != "cpu" for x in problem):
        return f"it is for CPU tensors; query is on {problem.query.device}"
    if torch.float64 in (dtypes := {x.dtype for x in problem}):
        return f"it computes in float32; got {', '.join(sorted(map(str, dtypes)))}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in problem):
        return "it has no derivatives"
    if torch.compiler.is_compiling():
        return "a compiler traces the plain one"
    if is_transforming():
        return "torch.func and dual numbers transform no operator of torch.library"
    return export_obstacle() or _missing


@torch.library.custom_op("foveate::aggregated_native", mutates_args=(), device_types="cpu")
def _operator(
    query: Tensor,
    kv: Tensor,
    pooled_kv: Tensor,
    temperature: Tensor,
    query_embedding: Tensor,
    local_bias: Tensor,
    tokens: Tensor,
    token_bias: Tensor,
    bias_table: Tensor,
    scale: Tensor,
    row_index: Tensor,
    row_weight: Tensor,
    column_index: Tensor,
    column_weight: Tensor,
) -> Tensor:
    if _library is None:
        raise RuntimeError(f"foveate's native path cannot run: {_missing}")
    tensors = [x.float().contiguous() for x in (query, kv, pooled_kv, F.softplus(temperature), query_embedding)]
    tensors += [scale.contiguous(), *(x.float().contiguous() for x in (local_bias, tokens, token_bias, bias_table))]
    axes = [x.contiguous() for x in (row_index, row_weight, column_index, column_weight)]
    batch, height, width, dim = query.shape
    heads, distances = len(temperature), bias_table.shape[1:]
    out = query.new_empty(query.shape, dtype=torch.float32)
    numbers = [batch, height, width, heads, dim // heads, math.isqrt(local_bias.shape[1])]
    for index, weight, count in (*zip(axes[::2], axes[1::2], distances, strict=True),):
        numbers += [*index.shape[1:], count, index.data_ptr(), weight.data_ptr()]
    addresses = [x.data_ptr() for x in (*tensors, out)]
    if out.numel() and _library.call(_CALL.pack(torch.get_num_threads(), _library.parallel, *numbers, *addresses)):
        raise RuntimeError("foveate's native aggregated attention failed: out of memory")
    return out.to(query.dtype)


@_operator.register_fake
def _(query, *others):
    return query.new_empty(query.shape)


def aggregated_native(problem: Projected, scale: Tensor, axes: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
    """Attend as `blocks.AggregatedAttention2d` does before its projection, ``[B, H, W, dim]``.

    Args:
        problem: The call.
        scale: Factor on each position's scores beside the temperature, float64 ``[H, W]``.
        axes: Of rows and of columns, which distances in ``bias_table`` each position has from each pooled one, int64
            ``[n, m, terms]``, and their weights, float64.
    """
    problem = Projected(*(x.detach() for x in problem))
    return _operator(*problem, scale, *axes[0], *axes[1])
