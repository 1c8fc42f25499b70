"""The products that the unfused operators consist of, as torch operators: opaque to the compiler.

Three products are closed under differentiation, as QuadTree's are: scores (query x key), values (weights x value) and
the transpose of the latter, which scatters. Each one's gradients are the other two, of any order. Weights and scores
are ``[B, *spatial, heads, slots]``; a slot is a key of a query's window, row-major, and a causal window lacks the last
ones of an axis: there scores are 0, and weights are not read. Where the heads of a tensor lie before its positions in
memory, as in NATTEN's layout, those of the result do too.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import native, tiled_products, triton_products
from .window import Axis, Fields, unflatten_axes


class Products(NamedTuple):
    """A backend's way to compute the products, of tensors and axes."""

    scores: Callable[[Tensor, Tensor, Sequence[Axis]], Tensor]
    values: Callable[[Tensor, Tensor, Sequence[Axis]], Tensor]
    scatter: Callable[[Tensor, Tensor, Sequence[Axis]], Tensor]


_PRODUCTS = {
    "native": Products(native.native_scores, native.native_values, native.native_scatter),
    "triton": Products(triton_products.scores, triton_products.values, triton_products.scatter),
    "tiled": Products(tiled_products.scores, tiled_products.values, tiled_products.scatter),
}


def _slots(axes: Fields) -> int:
    return math.prod(axes[1::5])


def _stored_like(x: Tensor, out: Tensor) -> Tensor:
    """Return ``out`` stored in the order of ``x``: heads last, or before the positions."""
    return out.movedim(-2, 1).contiguous().movedim(1, -2) if native.heads_first(x) else out


@torch.library.custom_op("foveate::neighborhood_scores", mutates_args=())
def neighborhood_scores(query: Tensor, key: Tensor, axes: Fields, backend: str) -> Tensor:
    """Return the products of each query with the keys of its window, ``[B, *spatial, heads, slots]``.

    Args:
        query: ``[B, *spatial, heads, dim]``.
        key: Same shape.
        axes: The fields of `window.Axis` of each spatial axis, one after another.
        backend: A name of `unfused`'s table.
    """
    return _stored_like(query, _PRODUCTS[backend].scores(query, key, unflatten_axes(axes)))


@torch.library.custom_op("foveate::neighborhood_values", mutates_args=())
def neighborhood_values(weights: Tensor, value: Tensor, axes: Fields, backend: str) -> Tensor:
    """Return the sums of each window's values ``[B, *spatial, heads, dim]`` by weights; in the value's dtype."""
    return _stored_like(value, _PRODUCTS[backend].values(weights, value, unflatten_axes(axes)))


@torch.library.custom_op("foveate::neighborhood_scatter", mutates_args=())
def neighborhood_scatter(weights: Tensor, x: Tensor, axes: Fields, backend: str) -> Tensor:
    """Return what each key gets of the queries' ``x`` ``[B, *spatial, heads, dim]`` by the weights of those it has."""
    return _stored_like(x, _PRODUCTS[backend].scatter(weights, x, unflatten_axes(axes)))


@neighborhood_scores.register_fake
def _(query, key, axes, backend):
    return native.empty_like(query, _slots(axes))


@neighborhood_values.register_fake
def _(weights, value, axes, backend):
    return native.empty_like(value, value.shape[-1])


@neighborhood_scatter.register_fake
def _(weights, x, axes, backend):
    return native.empty_like(x, x.shape[-1])


def _save(ctx, inputs, output) -> None:
    first, second, ctx.axes, ctx.backend = inputs
    ctx.save_for_backward(first, second)


def _scores_backward(ctx, grad: Tensor):
    (query, key), call = ctx.saved_tensors, (ctx.axes, ctx.backend)
    return (
        neighborhood_values(grad, key, *call) if ctx.needs_input_grad[0] else None,
        neighborhood_scatter(grad, query, *call) if ctx.needs_input_grad[1] else None,
        None,
        None,
    )


def _values_backward(ctx, grad: Tensor):
    (weights, value), call = ctx.saved_tensors, (ctx.axes, ctx.backend)
    return (
        neighborhood_scores(grad, value, *call) if ctx.needs_input_grad[0] else None,
        neighborhood_scatter(weights, grad, *call) if ctx.needs_input_grad[1] else None,
        None,
        None,
    )


def _scatter_backward(ctx, grad: Tensor):
    (weights, x), call = ctx.saved_tensors, (ctx.axes, ctx.backend)
    return (
        neighborhood_scores(x, grad, *call) if ctx.needs_input_grad[0] else None,
        neighborhood_values(weights, grad, *call) if ctx.needs_input_grad[1] else None,
        None,
        None,
    )


neighborhood_scores.register_autograd(_scores_backward, setup_context=_save)
neighborhood_values.register_autograd(_values_backward, setup_context=_save)
neighborhood_scatter.register_autograd(_scatter_backward, setup_context=_save)


def _fold_batch(operator: Callable) -> Callable:
    """Return the rule by which vmap runs an operator: the mapped axis becomes part of the batch."""

    def rule(info, in_dims, first, second, axes, backend):
        first, second = (
            (x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
            for x, dim in zip((first, second), in_dims, strict=False)
        )
        return operator(first, second, axes, backend).unflatten(0, (info.batch_size, -1)), 0

    return rule


for _operator in (neighborhood_scores, neighborhood_values, neighborhood_scatter):
    _operator.register_vmap(_fold_batch(_operator))
