"""The operator in plain torch, a cache-sized chunk of parents at a time.

Siblings share their candidates, so keys and values are gathered once per parent, and the four children of a chosen
token lie side by side: a gather moves rows of ``4 * dim`` numbers. Nothing that was gathered outlives its chunk, not
even for the backward pass, which gathers again; memory beyond inputs and outputs is a constant.

Three products are closed under differentiation: scores (query x key), aggregation (weights x value) and its transpose,
which scatters. Each one's gradients are the other two, of any order.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends import is_exporting
from ..precision import full_precision
from .reference import accumulation_dtype

# Of what is gathered at a time. It bounds the memory; speed hardly depends on it (0.25 to 8 MiB: within 3% on a CPU).
CHUNK_BYTES = 2 * 2**20


def _by_chunks(product: Callable[..., Tensor], row_bytes: int, *operands: Tensor) -> Tensor:
    """Return ``product(*operands)``, computed for some of the operands' rows at a time."""
    rows = operands[0].shape[0]
    # An exported graph must not depend on the number of rows.
    whole = is_exporting() or torch.jit.is_tracing()
    step = rows if whole else max(1, CHUNK_BYTES // row_bytes)
    if step >= rows:
        return product(*operands)
    out = None
    for start in range(0, rows, step):
        part = product(*(operand[start : start + step] for operand in operands))
        if out is None:
            out = part.new_empty(rows, *part.shape[1:])
        out[start : start + step] = part
    return out


def _flat_index(token_index: Tensor, tokens: int) -> Tensor:
    """Return chosen tokens ``[B, heads, N, K]`` as rows ``[B * heads * N, K]`` of all images' and heads' tokens."""
    batch, heads = token_index.shape[:2]
    first = torch.arange(batch * heads, device=token_index.device, dtype=token_index.dtype) * tokens
    return (token_index + first.view(batch, heads, 1, 1)).flatten(0, 2)


def scores(query: Tensor, key: Tensor, token_index: Tensor) -> Tensor:
    """Return ``[B, heads, N, 4, 4 * K]``, products of queries ``[B, heads, N, 4, dim]`` with the children's keys."""
    dtype, dim = accumulation_dtype(query.dtype), query.shape[4]
    rows = key.reshape(-1, 4 * dim)

    def product(queries: Tensor, index: Tensor) -> Tensor:
        keys = rows.index_select(0, index.flatten()).view(queries.shape[0], 4 * index.shape[1], dim)
        return torch.bmm(queries.to(dtype), keys.to(dtype).transpose(1, 2))

    index = _flat_index(token_index, key.shape[2])
    out = _by_chunks(product, index.shape[1] * 4 * dim * dtype.itemsize, query.reshape(-1, 4, dim), index)
    return out.view(*query.shape[:4], 4 * token_index.shape[3])


def values(weights: Tensor, value: Tensor, token_index: Tensor) -> Tensor:
    """Return ``[B, heads, N, 4, dim]``, sums of the children's values by ``weights`` ``[B, heads, N, 4, 4 * K]``."""
    dtype, dim = accumulation_dtype(value.dtype), value.shape[4]
    rows = value.reshape(-1, 4 * dim)

    def product(weights: Tensor, index: Tensor) -> Tensor:
        gathered = rows.index_select(0, index.flatten()).view(weights.shape[0], 4 * index.shape[1], dim)
        return torch.bmm(weights.to(dtype), gathered.to(dtype)).to(value.dtype)

    index = _flat_index(token_index, value.shape[2])
    out = _by_chunks(product, index.shape[1] * 4 * dim * dtype.itemsize, weights.flatten(0, 2), index)
    return out.view(*weights.shape[:4], dim)


def scatter(weights: Tensor, query: Tensor, token_index: Tensor, tokens: int) -> Tensor:
    """Return ``[B, heads, tokens, 4, dim]``: every child's sum of ``query`` by the weights of those that chose it."""
    dtype, dim = accumulation_dtype(query.dtype), query.shape[4]
    total = torch.zeros(query.shape[0] * query.shape[1] * tokens, 4 * dim, dtype=dtype, device=query.device)
    index = _flat_index(token_index, tokens)
    step = max(1, CHUNK_BYTES // (index.shape[1] * 4 * dim * dtype.itemsize))
    operands = weights.flatten(0, 2), query.reshape(-1, 4, dim), index
    for part, tops, at in zip(*(operand.split(step) for operand in operands), strict=True):
        shares = torch.bmm(part.to(dtype).transpose(1, 2), tops.to(dtype))
        total.index_add_(0, at.flatten(), shares.view(-1, 4 * dim))
    return total.view(*query.shape[:2], tokens, 4, dim).to(query.dtype)


class _Product(Function):
    """A product whose images can be any number, so that what `torch.vmap` maps over is folded into them."""

    @classmethod
    def vmap(cls, info, in_dims, *arguments):
        folded = []
        for argument, dim in zip(arguments, in_dims, strict=True):
            if isinstance(argument, Tensor):
                mapped = argument.expand(info.batch_size, *argument.shape) if dim is None else argument.movedim(dim, 0)
                argument = mapped.flatten(0, 1)
            folded.append(argument)
        return cls.apply(*folded).unflatten(0, (info.batch_size, -1)), 0

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:3])


class _Scores(_Product):
    @staticmethod
    def forward(query: Tensor, key: Tensor, token_index: Tensor) -> Tensor:
        return scores(query, key, token_index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, token_index = ctx.saved_tensors
        with full_precision(grad):
            return (
                _Values.apply(grad, key, token_index).to(query.dtype) if ctx.needs_input_grad[0] else None,
                _Scatter.apply(grad, query, token_index, key.shape[2]).to(key.dtype)
                if ctx.needs_input_grad[1]
                else None,
                None,
            )


class _Values(_Product):
    @staticmethod
    def forward(weights: Tensor, value: Tensor, token_index: Tensor) -> Tensor:
        return values(weights, value, token_index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, value, token_index = ctx.saved_tensors
        with full_precision(grad):
            return (
                _Scores.apply(grad, value, token_index).to(weights.dtype) if ctx.needs_input_grad[0] else None,
                _Scatter.apply(weights, grad, token_index, value.shape[2]).to(value.dtype)
                if ctx.needs_input_grad[1]
                else None,
                None,
            )


class _Scatter(_Product):
    @staticmethod
    def forward(weights: Tensor, query: Tensor, token_index: Tensor, tokens: int) -> Tensor:
        return scatter(weights, query, token_index, tokens)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, query, token_index = ctx.saved_tensors
        with full_precision(grad):
            return (
                _Scores.apply(query, grad, token_index).to(weights.dtype) if ctx.needs_input_grad[0] else None,
                _Values.apply(weights, grad, token_index).to(query.dtype) if ctx.needs_input_grad[1] else None,
                None,
                None,
            )


def _differentiates(*tensors: Tensor) -> bool:
    # An exported graph holds plain operators only; they are differentiable as they are.
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors) and not is_exporting()


def scores_chunked(query: Tensor, key: Tensor, token_index: Tensor) -> Tensor:
    """Scores by chunks; see `foveate.kernels.quadtree_scores` for the arguments."""
    return _Scores.apply(query, key, token_index) if _differentiates(query, key) else scores(query, key, token_index)


def values_chunked(weights: Tensor, value: Tensor, token_index: Tensor) -> Tensor:
    """Aggregation by chunks; see `foveate.kernels.quadtree_values` for the arguments."""
    return (
        _Values.apply(weights, value, token_index)
        if _differentiates(weights, value)
        else values(weights, value, token_index)
    )
