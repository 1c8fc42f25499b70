"""The Triton path as torch operators: opaque to the compiler, differentiable by each other to any order."""

import torch
from torch import Tensor

from ..triton_launch import launch


def _launch(
    kernel: str, first: Tensor, second: Tensor, token_index: Tensor, out: Tensor, tokens: int, dim: int
) -> Tensor:
    from . import triton_kernels

    parents, count = token_index.shape[2:]
    programs = token_index.shape[0] * token_index.shape[1] * parents
    if programs:
        tensors = (x.contiguous() for x in (first, second, token_index))
        options = triton_kernels.launch_options(dim, count)
        launch(getattr(triton_kernels, kernel), (programs,), out.device, *tensors, out, parents, tokens, **options)
    return out


@torch.library.custom_op("foveate::quadtree_scores", mutates_args=())
def scores_triton(query: Tensor, key: Tensor, token_index: Tensor) -> Tensor:
    """Scores by Triton; see `foveate.kernels.quadtree_scores` for the arguments."""
    return _launch(
        "scores_kernel", query, key, token_index, _empty_scores(query, token_index), key.shape[2], key.shape[4]
    )


@torch.library.custom_op("foveate::quadtree_values", mutates_args=())
def values_triton(weights: Tensor, value: Tensor, token_index: Tensor) -> Tensor:
    """Aggregation by Triton; see `foveate.kernels.quadtree_values` for the arguments."""
    out = _empty_values(weights, value)
    return _launch("values_kernel", weights, value, token_index, out, value.shape[2], value.shape[4])


@torch.library.custom_op("foveate::quadtree_scatter", mutates_args=())
def scatter_triton(weights: Tensor, query: Tensor, token_index: Tensor, tokens: int) -> Tensor:
    """The transpose of the aggregation by Triton; see `chunked.scatter` for the arguments."""
    total = torch.zeros(*query.shape[:2], tokens, *query.shape[3:], dtype=torch.float32, device=query.device)
    return _launch("scatter_kernel", weights, query, token_index, total, tokens, query.shape[4]).to(query.dtype)


def _empty_scores(query: Tensor, token_index: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:4], 4 * token_index.shape[3], dtype=torch.float32)


def _empty_values(weights: Tensor, value: Tensor) -> Tensor:
    return value.new_empty(*weights.shape[:4], value.shape[4])


@scores_triton.register_fake
def _(query: Tensor, key: Tensor, token_index: Tensor) -> Tensor:
    return _empty_scores(query, token_index)


@values_triton.register_fake
def _(weights: Tensor, value: Tensor, token_index: Tensor) -> Tensor:
    return _empty_values(weights, value)


@scatter_triton.register_fake
def _(weights: Tensor, query: Tensor, token_index: Tensor, tokens: int) -> Tensor:
    return query.new_empty(*query.shape[:2], tokens, *query.shape[3:])


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _scores_backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, token_index = ctx.saved_tensors
    return (
        values_triton(grad, key, token_index) if ctx.needs_input_grad[0] else None,
        scatter_triton(grad, query, token_index, key.shape[2]) if ctx.needs_input_grad[1] else None,
        None,
    )


def _values_backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, value, token_index = ctx.saved_tensors
    return (
        scores_triton(grad, value, token_index).to(weights.dtype) if ctx.needs_input_grad[0] else None,
        scatter_triton(weights, grad, token_index, value.shape[2]) if ctx.needs_input_grad[1] else None,
        None,
    )


def _scatter_backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, query, token_index = ctx.saved_tensors
    return (
        scores_triton(query, grad, token_index).to(weights.dtype) if ctx.needs_input_grad[0] else None,
        values_triton(weights, grad, token_index) if ctx.needs_input_grad[1] else None,
        None,
        None,
    )


scores_triton.register_autograd(_scores_backward, setup_context=_save)
values_triton.register_autograd(_values_backward, setup_context=_save)
scatter_triton.register_autograd(_scatter_backward, setup_context=_save)
