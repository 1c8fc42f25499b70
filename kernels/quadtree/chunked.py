"""The operator in plain torch, a cache-sized chunk of parents at a time.

Siblings share their candidates, so keys and values are gathered once per parent, and the four children of a chosen
token lie side by side: a gather moves rows of ``4 * dim`` numbers. Nothing that was gathered outlives its chunk, not
even for the backward pass, which gathers again; memory beyond inputs and outputs is a constant.

Three products are closed under differentiation: scores (query x key), aggregation (weights x value) and its transpose,
which scatters. Each one's gradients are the other two, of any order.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from .reference import accumulation_dtype

# Of what is gathered at a time. About a core's second-level cache: larger chunks are slower, smaller ones call-bound.
CHUNK_BYTES = 2 * 2**20


def _rows_per_chunk(rows: int, row_bytes: int) -> int:
    # An exported graph must not depend on the number of rows.
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return rows
    return max(1, min(rows, CHUNK_BYTES // row_bytes))


def _flat_index(chosen: Tensor, tokens: int) -> Tensor:
    """Return chosen tokens ``[B, heads, N, K]`` as rows ``[B * heads * N, K]`` of all images' and heads' tokens."""
    batch, heads = chosen.shape[:2]
    first = torch.arange(batch * heads, device=chosen.device, dtype=chosen.dtype) * tokens
    return (chosen + first.view(batch, heads, 1, 1)).flatten(0, 2)


def scores(query: Tensor, key: Tensor, chosen: Tensor) -> Tensor:
    """Return ``[B, heads, N, 4, 4 * K]``, products of queries ``[B, heads, N, 4, dim]`` with the children's keys."""
    dtype = accumulation_dtype(query.dtype)
    batch, heads, count, _, dim = query.shape
    index, rows = _flat_index(chosen, key.shape[2]), key.reshape(-1, 4 * dim)
    queries = query.reshape(-1, 4, dim)
    step = _rows_per_chunk(index.shape[0], index.shape[1] * 4 * dim * dtype.itemsize)
    chunks = []
    for part, at in zip(queries.split(step), index.split(step), strict=True):
        keys = rows.index_select(0, at.flatten()).view(part.shape[0], -1, dim).to(dtype)
        chunks.append(torch.bmm(part.to(dtype), keys.transpose(1, 2)))
    return _join(chunks).view(batch, heads, count, 4, -1)


def values(weights: Tensor, value: Tensor, chosen: Tensor) -> Tensor:
    """Return ``[B, heads, N, 4, dim]``, sums of the children's values by ``weights`` ``[B, heads, N, 4, 4 * K]``."""
    dtype = accumulation_dtype(value.dtype)
    batch, heads, count = weights.shape[:3]
    dim = value.shape[-1]
    index, rows = _flat_index(chosen, value.shape[2]), value.reshape(-1, 4 * dim)
    all_weights = weights.reshape(-1, 4, weights.shape[-1])
    step = _rows_per_chunk(index.shape[0], index.shape[1] * 4 * dim * dtype.itemsize)
    chunks = []
    for part, at in zip(all_weights.split(step), index.split(step), strict=True):
        gathered = rows.index_select(0, at.flatten()).view(part.shape[0], -1, dim).to(dtype)
        chunks.append(torch.bmm(part.to(dtype), gathered).to(value.dtype))
    return _join(chunks).view(batch, heads, count, 4, dim)


def scatter(weights: Tensor, query: Tensor, chosen: Tensor, tokens: int) -> Tensor:
    """Return ``[B, heads, tokens, 4, dim]``: every child's sum of ``query`` by the weights of those that chose it."""
    dtype = accumulation_dtype(query.dtype)
    batch, heads, _, _, dim = query.shape
    index = _flat_index(chosen, tokens)
    all_weights, queries = weights.reshape(-1, 4, weights.shape[-1]), query.reshape(-1, 4, dim)
    total = torch.zeros(batch * heads * tokens, 4 * dim, dtype=dtype, device=query.device)
    step = _rows_per_chunk(index.shape[0], index.shape[1] * 4 * dim * dtype.itemsize)
    for part, tops, at in zip(all_weights.split(step), queries.split(step), index.split(step), strict=True):
        shares = torch.bmm(part.to(dtype).transpose(1, 2), tops.to(dtype))
        total.index_add_(0, at.flatten(), shares.view(-1, 4 * dim))
    return total.view(batch, heads, tokens, 4, dim).to(query.dtype)


def _join(chunks: list[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


class _Scores(Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, chosen)
        return scores(query, key, chosen)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, chosen = ctx.saved_tensors
        return (
            _Values.apply(grad, key, chosen).to(query.dtype) if ctx.needs_input_grad[0] else None,
            _Scatter.apply(grad, query, chosen, key.shape[2]).to(key.dtype) if ctx.needs_input_grad[1] else None,
            None,
        )


class _Values(Function):
    @staticmethod
    def forward(ctx, weights: Tensor, value: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(weights, value, chosen)
        return values(weights, value, chosen)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, value, chosen = ctx.saved_tensors
        return (
            _Scores.apply(grad, value, chosen).to(weights.dtype) if ctx.needs_input_grad[0] else None,
            _Scatter.apply(weights, grad, chosen, value.shape[2]).to(value.dtype) if ctx.needs_input_grad[1] else None,
            None,
        )


class _Scatter(Function):
    @staticmethod
    def forward(ctx, weights: Tensor, query: Tensor, chosen: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(weights, query, chosen)
        return scatter(weights, query, chosen, tokens)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, query, chosen = ctx.saved_tensors
        return (
            _Scores.apply(query, grad, chosen).to(weights.dtype) if ctx.needs_input_grad[0] else None,
            _Values.apply(weights, grad, chosen).to(query.dtype) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def _differentiates(*tensors: Tensor) -> bool:
    # An exported graph holds plain operators only; they are differentiable as they are.
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors) and not torch.compiler.is_exporting()


def scores_chunked(query: Tensor, key: Tensor, chosen: Tensor) -> Tensor:
    """Scores by chunks; see `foveate.kernels.quadtree_scores` for the arguments."""
    return _Scores.apply(query, key, chosen) if _differentiates(query, key) else scores(query, key, chosen)


def values_chunked(weights: Tensor, value: Tensor, chosen: Tensor) -> Tensor:
    """Aggregation by chunks; see `foveate.kernels.quadtree_values` for the arguments."""
    return _Values.apply(weights, value, chosen) if _differentiates(weights, value) else values(weights, value, chosen)
