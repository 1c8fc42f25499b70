"""The triton path as torch operators, and how its kernels are launched."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import attention, merge_attentions
from ..backends import contiguous_rows
from ..triton_launch import LOG2E, interpreted, launch, power_of_two, triton_obstacle
from .problem import Problem
from .triton_tiles import Shape, kernel_shape
from .window import Axis, Fields, flatten_axes, unflatten_axes

_MAX_DIM = 512


def obstacle(problem: Problem) -> str | None:
    """Return why the triton path cannot take a call, or None if it can."""
    dim = max(problem.query.shape[-1], problem.value.shape[-1])
    return triton_obstacle(problem.query, dim, _MAX_DIM)


class Launch(NamedTuple):
    """A kernel by name, and what it is called with."""

    kernel: str
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]


def _strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of batch, three axes and head of ``[B, *spatial, heads, ...]``."""
    batch, *spatial, head = x.stride()[: len(x.stride()) - 1]
    return (batch, *(0,) * (3 - len(spatial)), *spatial, head)


def _major(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip:
        return 0
    return torch.cuda.get_device_capability(device)[0]


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, axes: tuple[Axis, ...], scale: float
) -> dict[str, Any]:
    """Return the arguments that all kernels take."""
    return {
        "query": query,
        "key": key,
        "value": value,
        "rpb": query if rpb is None else (rpb.float() * LOG2E).contiguous(),
        "query_strides": _strides(query),
        "key_strides": _strides(key),
        "value_strides": _strides(value),
        "length": tuple(axis.length for axis in axes),
        "dilation": tuple(axis.dilation for axis in axes),
        "heads": query.shape[-2],
        "heads_per_key": query.shape[-2] // key.shape[-2],
        "scale_log2": scale * LOG2E,
    }


def _options(
    kernel: str, query: Tensor, value: Tensor, biased: bool, axes: tuple[Axis, ...]
) -> tuple[dict[str, Any], Shape]:
    """Return the options that all kernels take, and how this one cuts its problem."""
    dim, dim_v = query.shape[-1], value.shape[-1]
    row_bytes = power_of_two(max(dim, dim_v)) * query.element_size()
    target = "float32" if query.dtype == torch.float32 else "half"
    target = "interpreted" if interpreted() else target
    shape = kernel_shape(kernel, axes, row_bytes, biased, target, _major(query.device))
    options = {
        "KERNEL": tuple(axis.kernel_size for axis in axes),
        "STRIDE": tuple(axis.stride for axis in axes),
        "CAUSAL": tuple(axis.is_causal for axis in axes),
        "TILE": shape.tile,
        "BOX": shape.box,
        "DIM": dim,
        "DIM_V": dim_v,
        "BLOCK_DIM": power_of_two(dim),
        "BLOCK_DIM_V": power_of_two(dim_v),
        "BIAS": biased,
        "PRECISION": _precision(),
        "num_warps": shape.warps,
        "num_stages": shape.stages,
    }
    return options, shape


def _tiles(axes: tuple[Axis, ...], tile: tuple[int, ...]) -> int:
    groups = (math.ceil(axis.length / axis.dilation) for axis in axes)
    return math.prod(-(-n // size) * axis.dilation for n, size, axis in zip(groups, tile, axes, strict=True))


def forward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    axes: tuple[Axis, ...],
    scale: float,
) -> Launch:
    """Return the launch that writes ``out`` and ``lse``."""
    options, shape = _options("forward", query, value, rpb is not None, axes)
    arguments = _arguments(query, key, value, rpb, axes, scale) | {
        "out": out,
        "lse": lse,
        "out_strides": _strides(out),
        "lse_strides": _strides(lse[..., None]),
    }
    programs = query.shape[0] * query.shape[-2] * _tiles(axes, shape.tile)
    return Launch("forward_kernel", programs, arguments, options)


def backward_launches(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    bias_grad: bool,
    axes: tuple[Axis, ...],
    scale: float,
) -> tuple[Launch, Launch, Tensor | None]:
    """Return the launches that write the gradients of query, then of key and value.

    With ``bias_grad`` the first fills the tensor that comes third, ``[B, heads, tiles, rows, columns]``: what each tile
    adds to the gradient of the bias.
    """
    query, key, value, rpb = inputs
    query_options, query_shape = _options("backward_query", query, value, rpb is not None, axes)
    key_options, key_shape = _options("backward_key_value", query, value, rpb is not None, axes)
    arguments = _arguments(query, key, value, rpb, axes, scale) | {
        "lse": lse,
        "grad_out": grad_out,
        "delta": torch.empty_like(lse),
        "scale": scale,
        "lse_strides": _strides(lse[..., None]),
        "grad_out_strides": _strides(grad_out),
    }
    batch, heads, tiles = query.shape[0], query.shape[-2], _tiles(axes, query_shape.tile)
    rows = math.prod(2 * axis.kernel_size - 1 for axis in axes[:2])
    rows, columns = power_of_two(rows) if rows > 1 else 1, power_of_two(2 * axes[2].kernel_size - 1)
    tables = lse.new_empty(batch, heads, tiles, rows, columns) if bias_grad else None
    query_launch = Launch(
        "backward_query_kernel",
        batch * heads * tiles,
        arguments
        | {
            "out": out,
            "out_strides": _strides(out),
            "grad_lse": lse if grad_lse is None else grad_lse,
            "grad_query": grads[0],
            "grad_query_strides": _strides(grads[0]),
            "grad_rpb": lse if tables is None else tables,
        },
        query_options | {"BIAS_GRAD": bias_grad, "LSE_GRAD": grad_lse is not None, "ROWS": rows, "COLUMNS": columns},
    )
    key_value_launch = Launch(
        "backward_key_value_kernel",
        batch * key.shape[-2] * _tiles(axes, key_shape.tile),
        arguments
        | {
            "grad_key": grads[1],
            "grad_key_strides": _strides(grads[1]),
            "grad_value": grads[2],
            "grad_value_strides": _strides(grads[2]),
        },
        key_options,
    )
    return query_launch, key_value_launch, tables


def _run(step: Launch, device: torch.device) -> None:
    from . import triton_kernels

    launch(getattr(triton_kernels, step.kernel), (step.programs,), device, **step.arguments, **step.options)


@torch.library.custom_op("foveate::neighborhood_triton", mutates_args=())
def neighborhood_triton_op(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, axes: Fields, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp ``[B, *spatial, heads]``, float32.

    Args:
        query: ``[B, *spatial, heads, dim]``.
        key: ``[B, *spatial, heads_kv, dim]``.
        value: ``[B, *spatial, heads_kv, dim_v]``.
        rpb: ``[heads, 2 * kernel_size - 1, ...]`` or None.
        axes: The fields of `window.Axis` of each spatial axis, one after another.
        scale: Factor on the scores.
    """
    query, key, value = contiguous_rows(query), contiguous_rows(key), contiguous_rows(value)
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if out.numel():
        _run(forward_launch(query, key, value, rpb, out, lse, unflatten_axes(axes, 3), scale), query.device)
    return out, lse


@neighborhood_triton_op.register_fake
def _(query, key, value, rpb, axes, scale):
    return query.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("foveate::neighborhood_triton_backward", mutates_args=())
def neighborhood_triton_backward_op(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    axes: Fields,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and, with ``bias_grad``, rpb (else an empty tensor)."""
    query, key, value, grad_out = map(contiguous_rows, (query, key, value, grad_out))
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    three = unflatten_axes(axes, 3)
    *launches, tables = backward_launches(
        grad_out, grad_lse, (query, key, value, rpb), out, lse, grads, bias_grad, three, scale
    )
    if not out.numel():
        return *grads, query.new_zeros(rpb.shape if bias_grad else 0, dtype=rpb.dtype if bias_grad else None)
    for step in launches:
        _run(step, query.device)
    if tables is None:
        return *grads, query.new_empty(0)
    # Rows are the entries of the first two axes, columns those of the last; both are padded.
    entries = [2 * axis.kernel_size - 1 for axis in three]
    grad_rpb = tables.sum((0, 2))[:, : entries[0] * entries[1], : entries[2]]
    return *grads, grad_rpb.reshape(rpb.shape).to(rpb.dtype)


@neighborhood_triton_backward_op.register_fake
def _(grad_out, grad_lse, query, key, value, rpb, *others):
    *_, bias_grad = others
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    if not bias_grad:
        return *grads, query.new_empty(0)
    return *grads, torch.empty_like(rpb, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    query, key, value, rpb, ctx.axes, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, rpb, *output)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, rpb, out, lse = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 6
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    bias_grad = rpb is not None and ctx.needs_input_grad[3]
    *grads, grad_rpb = neighborhood_triton_backward_op(
        grad_out, grad_lse, query, key, value, rpb, out, lse, ctx.axes, ctx.scale, bias_grad
    )
    return *grads, grad_rpb if bias_grad else None, None, None


neighborhood_triton_op.register_autograd(_backward, setup_context=_setup_context)


@neighborhood_triton_op.register_vmap
def _(info, in_dims, query, key, value, rpb, axes, scale):
    if in_dims[3] is not None:
        results = [
            neighborhood_triton_op(
                *(x if d is None else x.select(d, i) for x, d in zip((query, key, value, rpb), in_dims, strict=False)),
                axes,
                scale,
            )
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0, 0)
    query, key, value = (
        (x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)).flatten(0, 1)
        for x, d in zip((query, key, value), in_dims, strict=False)
    )
    results = neighborhood_triton_op(query, key, value, rpb, axes, scale)
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in results), (0, 0)


def neighborhood_triton(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Neighborhood attention by triton; see `api.na2d` for the arguments."""
    query, key, value, axes, scale, rpb, additional_keys, additional_values, with_lse = problem
    out, lse = neighborhood_triton_op(query, key, value, rpb, flatten_axes(axes), scale)
    if additional_keys is not None and additional_keys.shape[1]:
        more, more_lse = attention(
            query.flatten(1, -3), additional_keys, additional_values, scale=scale, return_lse=True
        )
        spatial = query.shape[1:-2]
        parts = [out, more.unflatten(1, spatial)], [lse, more_lse.unflatten(1, spatial)]
        out, lse = merge_attentions(*parts)
    return out, lse if with_lse else None
