"""Neighborhood attention in C for CPUs: loads ``native.c``, and makes it an operator of torch with gradients.

The library is built with the package where there is a C compiler, and is no Python module: it is called by ctypes,
which also releases the interpreter's lock. It takes the windows of every axis as tables, so that it knows nothing of
kernel sizes, strides or causality.
"""

import ctypes
import functools
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attention import attention, merge_attentions
from ..backends import contiguous_rows, export_obstacle, transform_obstacle
from ..second_order import differentiate_gradients
from .problem import Problem
from .tiled import neighborhood_tiled
from .window import Axis, Fields, axis_ranges, flatten_axes, unflatten_axes

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# `call` in native.c.
_CALL = struct.Struct("=25qd52q")
_ERRORS = {1: "out of memory", 2: "the windows of an axis do not advance", 3: "no such instruction set here"}


class _Library:
    """The compiled functions, and torch's OpenMP, in whose threads they run."""

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))
        self.forward = library.foveate_neighborhood_forward
        self.backward = library.foveate_neighborhood_backward
        self.scores = library.foveate_neighborhood_scores
        self.values = library.foveate_neighborhood_values
        self.scatter = library.foveate_neighborhood_scatter
        self.lanes = library.foveate_neighborhood_lanes()
        self.parallel = openmp()


def openmp() -> int:
    """Return the address of the function that starts a team in the OpenMP that torch has loaded, or 0 if there is none.

    A second OpenMP, or threads of our own, would compete with torch's spinning ones for the cores.
    """
    for path in (*sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")), None):
        try:
            return ctypes.cast(ctypes.CDLL(path and str(path)).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return 0


def load_library(path: Path, kind: Callable[[Path], Any]) -> tuple[Any, str | None]:
    """Return what ``kind`` makes of a compiled library, or None and why there is none."""
    if path.exists():
        try:
            return kind(path), None
        except (OSError, AttributeError) as error:
            return None, f"{path.name} does not load: {error}"
    return None, "no C compiler was found when foveate was installed; install one and then foveate again"


class Function:
    """One function of a compiled library, ``call``, and torch's OpenMP, in whose threads it runs.

    It is that for torch's instruction set, if there is one: ``NAME_avx512`` or ``NAME_avx2``.
    """

    def __init__(self, name: str, path: Path):
        library = ctypes.CDLL(str(path))
        isa = torch.backends.cpu.get_cpu_capability().lower()
        self.call = getattr(library, f"{name}_{isa}", None) or getattr(library, name)
        self.parallel = openmp()


def load_function(path: Path, name: str) -> tuple[Function | None, str | None]:
    """Return a function of a compiled library, or None and why there is none."""
    return load_library(path, functools.partial(Function, name))


_library, _missing = load_library(Path(__file__).with_name("_native.c.so"), _Library)


def obstacle(problem: Problem) -> str | None:
    """Return why the native path cannot take a call, or None if it can."""
    return tensor_obstacle(problem.query)


def tensor_obstacle(x: Tensor) -> str | None:
    """Return why the native path cannot take tensors like ``x``, or None if it can."""
    if x.device.type != "cpu":
        return f"it is for CPU tensors; they are on {x.device}"
    if x.dtype not in _DTYPES:
        return f"it takes float32, float16 and bfloat16; got {x.dtype}"
    return export_obstacle() or transform_obstacle() or _missing


@functools.lru_cache(maxsize=256)
def _tables(axes: tuple[int, ...]) -> tuple[tuple[int, ...], list[np.ndarray]]:
    """Return the axes' part of `call` for three axes, and the arrays that it points into."""
    axes = unflatten_axes(axes, 3)
    arrays = [np.ascontiguousarray(part, dtype=np.int32) for axis in axes for part in axis_ranges(axis)]
    numbers = (
        *(axis.length for axis in axes),
        *(axis.dilation for axis in axes),
        *(array.ctypes.data for array in (*arrays[::2], *arrays[1::2])),
        *(axis.kernel_size - 1 for axis in axes),
    )
    return numbers, arrays


def _layout(x: Tensor) -> tuple[int, ...]:
    """Return a tensor's address and strides: batch, three positions, head."""
    batch, *position, head, _ = x.stride()
    return (x.data_ptr(), batch, *(0,) * (3 - len(position)), *position, head)


def _call(
    function: str,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    axes: Fields,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
    *gradients: int,
    lanes: int | None = None,
    dims: tuple[int, int] | None = None,
) -> None:
    query, key, value, bias = inputs
    if _library is None:
        raise RuntimeError(f"foveate's native path cannot run: {_missing}")
    numbers, _ = _tables(tuple(axes))
    call = _CALL.pack(
        _library.lanes if lanes is None else lanes,
        torch.get_num_threads(),
        _library.parallel,
        _DTYPES[query.dtype],
        query.shape[0],
        query.shape[-2],
        key.shape[-2],
        *(dims or (query.shape[-1], value.shape[-1])),
        *numbers,
        0 if bias is None else bias.data_ptr(),
        scale,
        *_layout(query),
        *_layout(key),
        *_layout(value),
        *_layout(out),
        0 if lse is None else lse.data_ptr(),
        *(gradients or (0,) * 27),
    )
    if status := getattr(_library, function)(call):
        raise RuntimeError(f"foveate's native neighborhood attention failed: {_ERRORS[status]}")


def heads_first(x: Tensor) -> bool:
    """Return whether the heads of ``x`` ``[B, *spatial, heads, _]`` lie before its positions in memory."""
    return x.stride(-2) > x.stride(-3)


def empty_like(x: Tensor, last: int) -> Tensor:
    """Return an empty tensor like ``x`` ``[B, *spatial, heads, _]`` but for its last axis, stored in the same order."""
    if not heads_first(x):
        return x.new_empty(*x.shape[:-1], last)
    return x.new_empty(x.shape[0], x.shape[-2], *x.shape[1:-2], last).movedim(1, -2)


def native_scores(query: Tensor, key: Tensor, axes: Sequence[Axis], lanes: int | None = None) -> Tensor:
    """Return the products of each query with the keys of its window; see `products.neighborhood_scores`."""
    query, key = contiguous_rows(query), contiguous_rows(key)
    slots = math.prod(axis.kernel_size for axis in axes)
    out = empty_like(query, slots)
    if any(axis.is_causal for axis in axes):
        out.zero_()  # slots without a key are left alone
    if query.numel():
        _product("scores", key, out, query, query, axes, lanes)
    return out


def native_values(weights: Tensor, value: Tensor, axes: Sequence[Axis], lanes: int | None = None) -> Tensor:
    """Return the sums of each window's values by weights; see `products.neighborhood_values`."""
    weights, value = contiguous_rows(weights.to(value.dtype)), contiguous_rows(value)
    out = empty_like(value, value.shape[-1])
    if out.numel():
        _product("values", value, weights, out, out, axes, lanes)
    return out


def native_scatter(weights: Tensor, x: Tensor, axes: Sequence[Axis], lanes: int | None = None) -> Tensor:
    """Return what each key gets of the queries' ``x``; see `products.neighborhood_scatter`."""
    weights, x = contiguous_rows(weights.to(x.dtype)), contiguous_rows(x)
    out = empty_like(x, x.shape[-1])
    if out.numel():
        _product("scatter", x, weights, out, out, axes, lanes)
    return out


def _product(
    function: str, rows: Tensor, weights: Tensor, query: Tensor, out: Tensor, axes: Sequence[Axis], lanes: int | None
) -> None:
    numbers, dims = flatten_axes(axes), (rows.shape[-1], 0)
    _call(function, (query, rows, weights, None), numbers, 1.0, out, None, lanes=lanes, dims=dims)


def native_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    axes: Fields,
    scale: float,
    with_lse: bool,
    lanes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the operator.

    Args:
        query: ``[B, *spatial, heads, dim]``, float32, float16 or bfloat16, on the CPU; any strides.
        key: ``[B, *spatial, heads_kv, dim]``.
        value: ``[B, *spatial, heads_kv, dim_v]``.
        rpb: ``[heads, 2 * kernel_size - 1, ...]`` or None.
        axes: The fields of `window.Axis` of each spatial axis, one after another.
        scale: Factor on the scores.
        with_lse: Whether to compute the log-sum-exp.
        lanes: Vector length that chooses the instruction set: 16 (AVX-512), 8 (AVX2) or 4 (any); the longest by
            default.

    Returns:
        ``[B, *spatial, heads, dim_v]`` and the log-sum-exp ``[B, *spatial, heads]``, float32, or an empty tensor.
    """
    query, key, value = contiguous_rows(query), contiguous_rows(key), contiguous_rows(value)
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1] if with_lse else 0, dtype=torch.float32)
    if out.numel() and query.numel():
        bias = None if rpb is None else rpb.float().contiguous()
        _call("forward", (query, key, value, bias), axes, scale, out, lse if with_lse else None, lanes=lanes)
    return out, lse


def native_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    out: Tensor,
    lse: Tensor,
    axes: Fields,
    scale: float,
    lanes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``inputs``: query, key, value and rpb (empty without rpb); see `native_forward`."""
    *tensors, rpb = inputs
    query, key, value, grad_out = (contiguous_rows(x) for x in (*tensors, grad_out))
    heads, heads_kv = query.shape[-2], key.shape[-2]
    grad_query = query.new_empty(query.shape)
    # One gradient for each query head, because two threads must not add to the same one.
    grad_key = query.new_empty(query.shape)
    grad_value = query.new_empty(out.shape)
    bias = None if rpb is None else rpb.float().contiguous()
    grad_bias = query.new_empty(0) if bias is None else torch.empty_like(bias)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta = torch.empty_like(lse)
    _call(
        "backward",
        (query, key, value, bias),
        axes,
        scale,
        out,
        lse,
        *_layout(grad_out),
        *_layout(grad_query),
        *_layout(grad_key),
        *_layout(grad_value),
        0 if grad_lse is None else grad_lse.data_ptr(),
        delta.data_ptr(),
        0 if bias is None else grad_bias.data_ptr(),
        lanes=lanes,
    )
    if heads != heads_kv:
        grad_key, grad_value = (
            x.unflatten(-2, (heads_kv, -1)).sum(-2, dtype=torch.float32).to(x.dtype) for x in (grad_key, grad_value)
        )
    return grad_query, grad_key, grad_value, grad_bias if rpb is None else grad_bias.to(rpb.dtype)


@torch.library.custom_op("foveate::neighborhood_native", mutates_args=(), device_types="cpu")
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    axes: Fields,
    scale: float,
    with_lse: bool,
    differentiable_twice: bool = False,
) -> tuple[Tensor, Tensor]:
    return native_forward(query, key, value, rpb, axes, scale, with_lse)


@_operator.register_fake
def _(query, key, value, rpb, axes, scale, with_lse, differentiable_twice=False):
    lse = query.new_empty(query.shape[:-1] if with_lse else 0, dtype=torch.float32)
    return query.new_empty(*query.shape[:-1], value.shape[-1]), lse


@torch.library.custom_op("foveate::neighborhood_native_backward", mutates_args=(), device_types="cpu")
def _operator_backward(
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
    differentiable: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return native_backward(grad_out, grad_lse, (query, key, value, rpb), out, lse, axes, scale)


@_operator_backward.register_fake
def _(grad_out, grad_lse, query, key, value, rpb, *_):
    inputs = (query, key, value, query.new_empty(0) if rpb is None else rpb)
    return tuple(x.new_empty(x.shape) for x in inputs)


def _save(ctx, inputs, output) -> None:
    query, key, value, rpb, ctx.axes, ctx.scale, _, ctx.differentiable_twice = inputs
    ctx.save_for_backward(query, key, value, rpb, *output)


def _differentiate(ctx, grad_out: Tensor, grad_lse: Tensor):
    query, key, value, rpb, out, lse = ctx.saved_tensors
    if lse.shape != out.shape[:-1]:  # the call asked for none
        grad_lse, (_, lse) = None, _operator(query, key, value, rpb, ctx.axes, ctx.scale, True)
    call = query, key, value, rpb, out, lse, ctx.axes, ctx.scale, ctx.differentiable_twice
    grads = _operator_backward(grad_out, grad_lse, *call)
    return *grads[:3], None if rpb is None else grads[3], None, None, None, None


def _save_backward(ctx, inputs, output) -> None:
    grad_out, grad_lse, query, key, value, rpb, _, _, ctx.axes, ctx.scale, ctx.differentiable = inputs
    ctx.save_for_backward(grad_out, grad_lse, query, key, value, rpb)


def _differentiate_again(ctx, *grads: Tensor | None):
    """Differentiate the gradients by the tiled path, as functions of the operands alone."""
    if not ctx.differentiable:
        raise RuntimeError(
            "foveate's native neighborhood attention has first derivatives only where it was asked for; name no "
            "backend, or use backend='tiled' (FOVEATE_NEIGHBORHOOD_BACKEND=tiled, kernels.set_neighborhood_backend)"
        )
    grad_out, grad_lse, *operands = ctx.saved_tensors
    axes, with_lse = unflatten_axes(ctx.axes), grad_lse is not None

    def compute(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return neighborhood_tiled(Problem(query, key, value, axes, ctx.scale, rpb, None, None, with_lse))

    return *differentiate_gradients(compute, (grad_out, grad_lse), operands, grads), None, None, None, None, None


_operator.register_autograd(_differentiate, setup_context=_save)
_operator_backward.register_autograd(_differentiate_again, setup_context=_save_backward)


@torch.library.register_vmap(_operator)
def _(info, in_dims, query, key, value, rpb, *call):
    """Fold the mapped axis into the batch; a mapped bias is a call each."""
    tensors = []
    for x, dim in zip((query, key, value), in_dims, strict=False):
        tensors.append(x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0))
    if in_dims[3] is not None:
        biases = rpb.movedim(in_dims[3], 0)
        outputs = [_operator(*xs, *call) for xs in zip(*tensors, biases, strict=True)]
        return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True)), (0, 0)
    out, lse = _operator(*(x.flatten(0, 1) for x in tensors), rpb, *call)
    if not lse.numel():
        return (out.unflatten(0, (info.batch_size, -1)), lse), (0, None)
    return (out.unflatten(0, (info.batch_size, -1)), lse.unflatten(0, (info.batch_size, -1))), (0, 0)


def neighborhood_native(problem: Problem, differentiable_twice: bool = False) -> tuple[Tensor, Tensor | None]:
    """Neighborhood attention in C, whose gradients may have some by tiles; see `api.na2d` for the arguments."""
    query, key, value, axes, scale, rpb, additional_keys, additional_values, with_lse = problem
    tensors = (query, key, value, rpb)
    more = additional_keys is not None
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    with_sum = with_lse or more or differentiable
    out, lse = _operator(query, key, value, rpb, flatten_axes(axes), scale, with_sum, differentiable_twice)
    if more:
        others = attention(query.flatten(1, -3), additional_keys, additional_values, scale=scale, return_lse=True)
        others = [x.unflatten(1, query.shape[1:-2]) for x in others]
        out, lse = merge_attentions([out, others[0]], [lse, others[1]])
    return out, lse if with_lse else None
