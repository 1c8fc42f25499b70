"""Attention to points in C for CPUs: loads ``point_attention.c``.

In float32, to which halves are copied. The backward pass computes the scores again, and none is kept. See
`neighborhood.native` for how such a library is built and called.
"""

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .backends import default_scale, export_obstacle, is_transforming
from .neighborhood.native import load_function
from .second_order import gradients_by

# `call` in point_attention.c.
_CALL = struct.Struct("=12qd15q")

_library, _missing = load_function(Path(__file__).with_name("_point_attention.c.so"), "foveate_point_attention")


def obstacle(tensors: Sequence[Tensor]) -> str | None:
    """Return why the native path cannot take these tensors, or None if it can."""
    if any(x.device.type != "cpu" for x in tensors):
        return f"it is for CPU tensors; query is on {tensors[0].device}"
    if any(x.dtype == torch.float64 for x in tensors):
        return f"it computes in float32; got {', '.join(sorted({str(x.dtype) for x in tensors}))}"
    if torch.compiler.is_compiling() and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "a compiler differentiates the plain one"
    if is_transforming():
        return "torch.func and dual numbers transform no operator of torch.library"
    return export_obstacle() or _missing


def _call(tensors: Sequence[Tensor], lse: Tensor | None, bands: int = 0, gradients: Sequence[Tensor] = ()) -> None:
    """Call the library with query, key, value, table, places, step and out, which is read where there are gradients."""
    if _library is None:
        raise RuntimeError(f"foveate's native path cannot run: {_missing}")
    query, _, value, table, at = tensors[:5]
    batch, height, width, heads, dim = query.shape
    points, dim_v = value.shape[2:]
    numbers = (batch, height, width, heads, at.shape[1], points, dim, dim_v, *table.shape[1:])
    addresses = [x.data_ptr() for x in tensors] + [0 if lse is None else lse.data_ptr(), bands]
    addresses += [x.data_ptr() for x in gradients] or [0] * 6
    call = _CALL.pack(torch.get_num_threads(), _library.parallel, *numbers, default_scale(query), *addresses)
    if _library.call(call):
        raise RuntimeError("foveate's native attention to points failed: out of memory")


@torch.library.custom_op("foveate::point_attention_native", mutates_args=(), device_types="cpu")
def _operator(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, at: Tensor, step: Tensor, differentiable: bool
) -> tuple[Tensor, Tensor]:
    tensors = [x.contiguous() for x in (query, key, value, table, at, step)]
    batch, height, width, heads, _ = query.shape
    out = query.new_empty(batch, height, width, heads, value.shape[-1])
    lse = query.new_empty(batch, heads, height, width) if differentiable else query.new_empty(0)
    _call((*tensors, out), lse if differentiable else None)
    return out, lse


@_operator.register_fake
def _(query, key, value, table, at, step, differentiable):
    batch, height, width, heads, _ = query.shape
    lse = query.new_empty(batch, heads, height, width) if differentiable else query.new_empty(0)
    return query.new_empty(*query.shape[:-1], value.shape[-1]), lse


def _where(table: Tensor, points: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """Return where the first query reads the table for each point, how much further the next one does, the scale."""
    half = [(length - 1) / 4 for length in table.shape[1:]]  # of the table, for a displacement of 1
    at = (torch.stack([rows[0], columns[0]]) - points + 2) * points.new_tensor(half)
    step = [(x[-1] - x[0]) / max(len(x) - 1, 1) * side for x, side in zip((rows, columns), half, strict=True)]
    return at, torch.stack(step), half


class _Differentiable(torch.autograd.Function):
    """The operator with its first derivatives; those of higher order are taken of another path."""

    @staticmethod
    def forward(ctx, again: Callable, *problem: Tensor) -> Tensor:
        query, key, value, table, *places = problem
        at, step, _ = _where(table, *places)
        out, lse = _operator(query, key.transpose(1, 2), value.transpose(1, 2), table, at, step, True)
        ctx.again = again
        ctx.save_for_backward(*problem, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        *problem, out, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # to be differentiated again
            return None, *gradients_by(ctx.again, grad_out, problem, needs)
        grads = _differentiate(problem, out, lse, grad_out)
        return None, *(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


def _differentiate(problem: Sequence[Tensor], out: Tensor, lse: Tensor, grad_out: Tensor) -> list[Tensor | None]:
    query, key, value, table, points, rows, columns = problem
    at, step, half = _where(table, points, rows, columns)
    tensors = (query, key.transpose(1, 2), value.transpose(1, 2), table, at, step, out)
    tensors = [x.contiguous() for x in tensors]
    batch, height, _, heads, _ = query.shape
    planes = batch * heads
    bands = min(height, -(-torch.get_num_threads() // planes))  # each has gradients of its own, which take memory
    sums = [x.new_zeros(bands, *x.shape) for x in tensors[1:3]]
    sums += [table.new_zeros(bands, batch, *table.shape), at.new_zeros(bands, batch, heads, at.shape[2], 2)]
    grad_query = torch.empty_like(tensors[0])
    _call(tensors, lse, bands, (grad_out.contiguous(), grad_query, *sums))
    grad_key, grad_value, grad_table, grad_at = (x.sum(0) for x in sums)
    grad_points = grad_at.unflatten(1, (at.shape[1], -1)).sum(2) * -points.new_tensor(half)
    return [
        grad_query,
        grad_key.transpose(1, 2),
        grad_value.transpose(1, 2),
        grad_table.sum(0),
        grad_points,
        None,
        None,
    ]


def point_attention_native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    points: Tensor,
    rows: Tensor,
    columns: Tensor,
    again: Callable,
) -> Tensor:
    """Attend to points in C; see `point_attention.point_attention` for the arguments.

    ``again`` is a path that does the same, and whose gradients can be differentiated.
    """
    dtype = value.dtype
    problem = [x.float() for x in (query, key, value, table, points, rows, columns)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in problem):
        return _Differentiable.apply(again, *problem).to(dtype)
    query, key, value, table, *places = problem
    at, step, _ = _where(table, *places)
    return _operator(query, key.transpose(1, 2), value.transpose(1, 2), table, at, step, False)[0].to(dtype)
