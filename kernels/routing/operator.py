"""Routed attention as one torch operator with its gradient, so that graphs are captured around it, not through it."""

import torch
from torch import Tensor

from ..precision import full_precision
from ..second_order import differentiate_gradients
from .chunked import chunked_backward, chunked_forward
from .native import native_backward, native_forward
from .reference import routed_attention_reference


@torch.library.custom_op("foveate::routed_attention", mutates_args=())
def routed_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    height: int,
    width: int,
    scale: float,
    backend: str,
    differentiable_twice: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log2 of each softmax's sum; chunked returns nothing of the latter."""
    if backend == "triton":
        from .triton_kernels import triton_forward

        return triton_forward(query, key, value, routes, (height, width), scale)
    if backend == "native":
        return native_forward(query, key, value, routes, (height, width), scale)
    out = chunked_forward(query, key, value, routes, (height, width), scale)
    return out, query.new_empty(0, dtype=torch.float32)


@routed_attention_op.register_fake
def _(query, key, value, routes, height, width, scale, backend, differentiable_twice=False):
    batch, rows, columns, heads = query.shape[:4]
    out = query.new_empty(batch, rows, columns, heads, value.shape[-1])
    shape = (0,) if backend == "chunked" else (batch, heads, rows * columns)
    return out, query.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("foveate::routed_attention_backward", mutates_args=())
def routed_attention_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    out: Tensor,
    lse: Tensor,
    height: int,
    width: int,
    scale: float,
    backend: str,
    differentiable: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    if backend == "triton":
        from .triton_kernels import triton_backward

        return triton_backward(grad, query, key, value, routes, out, lse, (height, width), scale)
    if backend == "native":
        return native_backward(grad, query, key, value, routes, out, lse, (height, width), scale)
    with full_precision(query):
        return chunked_backward(grad, query, key, value, routes, (height, width), scale)


@routed_attention_backward_op.register_fake
def _(grad, query, key, value, *_):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _setup_context(ctx, inputs, output):
    query, key, value, routes, ctx.height, ctx.width, ctx.scale, ctx.backend, ctx.differentiable_twice = inputs
    # The chunked backward pass computes all again.
    saved = (query.new_empty(0), output[1]) if ctx.backend == "chunked" else output
    ctx.save_for_backward(query, key, value, routes, *saved)


def _backward(ctx, grad, _):
    call = ctx.height, ctx.width, ctx.scale, ctx.backend, ctx.differentiable_twice
    gradients = routed_attention_backward_op(grad, *ctx.saved_tensors, *call)
    return *gradients, None, None, None, None, None, None


def _setup_backward(ctx, inputs, output):
    *tensors, _, _, ctx.height, ctx.width, ctx.scale, _, ctx.differentiable = inputs
    ctx.save_for_backward(*tensors)


def _backward_again(ctx, *grads):
    """Differentiate the gradients by the reference, as functions of the operands alone."""
    if not ctx.differentiable:
        raise RuntimeError(
            "routed attention has first derivatives only where a backend was asked for; name none, or "
            "backend='reference'"
        )
    grad, *operands, routes = ctx.saved_tensors
    exact = torch.promote_types(grad.dtype, torch.float32)

    def compute(*operands: Tensor) -> tuple[Tensor]:
        operands = (x.to(exact) for x in operands)
        return (routed_attention_reference(*operands, routes, (ctx.height, ctx.width), ctx.scale),)

    return *differentiate_gradients(compute, (grad,), operands, grads), *(None,) * 8


routed_attention_op.register_autograd(_backward, setup_context=_setup_context)
routed_attention_backward_op.register_autograd(_backward_again, setup_context=_setup_backward)
