"""The triton path as torch operators, and how its kernels are launched: tiles, boxes, warps."""

import functools
import importlib.util
import itertools
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import attention, merge_attentions
from .window import Axis

_LOG2E = 1.4426950408889634
_MAX_DIM = 512
_INSTALLED = importlib.util.find_spec("triton") is not None


def can_run(query: Tensor, value: Tensor) -> str | None:
    """Return why the triton path cannot take a call with these tensors, or None if it can."""
    if not _INSTALLED:
        return "triton is not installed"
    if query.device.type not in ("cuda", "meta") and not _interpreted():
        return f"it needs tensors on a GPU (or TRITON_INTERPRET=1, to debug); query is on {query.device}"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes in float16, bfloat16 and float32; query is {query.dtype}"
    if query.dtype == torch.bfloat16 and _interpreted():
        return "triton's interpreter multiplies bfloat16 as if it were integers"
    if max(query.shape[-1], value.shape[-1]) > _MAX_DIM:
        return f"it takes a dim per head of at most {_MAX_DIM}; got {query.shape[-1]} and {value.shape[-1]}"
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "an exported graph must consist of torch's own operators"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class Shape(NamedTuple):
    """How a kernel cuts its problem. All lengths are powers of two."""

    tile: tuple[int, int, int]  # positions of a program
    box: tuple[int, int, int]  # positions of the other side that are loaded at a time
    warps: int
    stages: int


class Launch(NamedTuple):
    """A kernel by name, and what it is called with."""

    kernel: str
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]


# (positions of a tile, positions of a box, warps, stages) by the bytes of a padded vector; the first that fits counts.
# No GPU chose these: they keep accumulators in registers and boxes in half the shared memory of the smallest chip.
_SIZES: dict[str, tuple[tuple[int, tuple[tuple[int, int, int, int], ...]], ...]] = {
    "forward": (
        (128, ((64, 32, 4, 3), (64, 64, 4, 3), (128, 32, 8, 3), (128, 64, 8, 3))),
        (256, ((64, 32, 4, 3), (64, 32, 8, 3), (128, 32, 8, 2), (128, 64, 8, 2))),
        (512, ((64, 32, 8, 2),)),
        (2048, ((16, 16, 4, 1),)),
    ),
    "backward": (
        (64, ((64, 32, 4, 2),)),
        (128, ((64, 32, 8, 2),)),
        (256, ((64, 32, 8, 2),)),
        (512, ((32, 16, 4, 1),)),
        (2048, ((16, 16, 4, 1),)),
    ),
}
# IEEE float32 products run on the plain cores, whose operands take registers.
_SIZES_FLOAT32 = {
    "forward": (
        (128, ((32, 32, 4, 2), (64, 32, 8, 2))),
        (256, ((32, 32, 4, 2),)),
        (512, ((32, 16, 4, 2),)),
        (2048, ((16, 16, 4, 1),)),
    ),
    "backward": (
        (128, ((32, 16, 4, 2),)),
        (256, ((32, 16, 8, 2),)),
        (512, ((32, 16, 8, 1),)),
        (2048, ((16, 16, 4, 1),)),
    ),
}
# Other chips hold the operands of matrix products in registers, too.
_OPERANDS_IN_SHARED_MEMORY = (9, 10, 11)
_SIZES_INTERPRETED = dict.fromkeys(_SIZES, ((2048, ((64, 32, 1, 1),)),))


def _factorings(size: int, longest: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Return how a power of two factors into three powers of two, none longer than needed."""
    powers = [[1 << i for i in range(size.bit_length()) if 1 << i < 2 * length] for length in longest]
    exact = [sizes for sizes in itertools.product(*powers) if math.prod(sizes) == size]
    # A small map does not fill a tile; its last axis is padded.
    return exact or [(*sizes[:2], size // (sizes[0] * sizes[1])) for sizes in itertools.product(*powers[:2], [1])]


@functools.lru_cache(maxsize=1024)
def kernel_shape(
    pass_name: str, axes: tuple[Axis, ...], row_bytes: int, biased: bool, target: str, major: int
) -> Shape:
    """Choose the tile and the box that cost least, by a count of pairs and loads.

    Args:
        pass_name: "forward" or "backward".
        axes: Three axes.
        row_bytes: Bytes of a key or value vector, the longer one, padded to a power of two.
        biased: Whether a bias is read for every pair; its addresses take registers.
        target: "float32", "half" or "interpreted".
        major: Of the GPU's compute capability; 0 for GPUs of other makers.
    """
    sizes = {"half": _SIZES, "float32": _SIZES_FLOAT32, "interpreted": _SIZES_INTERPRETED}[target][pass_name]
    choices = next(choices for most, choices in sizes if row_bytes <= most)
    lengths = tuple(-(-axis.length // axis.dilation) for axis in axes)

    def cost(shape: Shape) -> tuple:
        boxes = tiles = 1
        for n, axis, tile, box in zip(lengths, axes, shape.tile, shape.box, strict=True):
            seen = min(n, -(-tile // axis.stride) * axis.stride + axis.kernel_size - 1)
            tiles *= -(-n // tile)
            boxes *= -(-seen // box)
        positions, keys = math.prod(shape.tile), math.prod(shape.box)
        pairs = positions * keys
        if biased and pass_name == "backward":  # the rows of a box are skewed to the columns of the bias
            pairs += positions * shape.box[0] * shape.box[1] * _power_of_two(2 * axes[2].kernel_size - 1)
        # In units of a pair's softmax: a key and its value move as slowly as 20 of them for 64 bytes.
        work = tiles * (boxes * (pairs + 20 * keys * row_bytes // 64 + 512) + 2048)
        return work, -shape.box[2], -shape.tile[2], shape

    shapes = [
        Shape(tile, box, warps, stages)
        for m, n, warps, stages in choices
        if target == "interpreted"
        or m * n <= (512 if biased or major not in _OPERANDS_IN_SHARED_MEMORY else 1024) * warps
        for tile in _factorings(m, lengths)
        for box in _factorings(n, lengths)
    ]
    shape = min(shapes, key=cost)
    if major == 10 and not biased and row_bytes <= 64:
        # For narrow heads without bias on sm_100, ptxas spills to reach an occupancy that a further stage rules out.
        shape = shape._replace(stages=shape.stages + 1)
    return shape


def _three(values: Sequence[int]) -> tuple[int, ...]:
    return (*(1,) * (3 - len(values)), *values)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of batch, three axes and head of ``[B, *spatial, heads, ...]``."""
    batch, *spatial, head = x.stride()[: len(x.stride()) - 1]
    return (batch, *(0,) * (3 - len(spatial)), *spatial, head)


def _major(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip:
        return 0
    return torch.cuda.get_device_capability(device)[0]


def _power_of_two(x: int) -> int:
    return max(16, 1 << (x - 1).bit_length())


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _axes(fields: Sequence[int]) -> tuple[Axis, ...]:
    axes = [Axis(*fields[i : i + 4], bool(fields[i + 4])) for i in range(0, len(fields), 5)]
    return (*(Axis(1, 1),) * (3 - len(axes)), *axes)


def _common(
    pass_name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    axes: tuple[Axis, ...],
    scale: float,
) -> tuple[dict[str, Any], dict[str, Any], Shape]:
    """Return the arguments and the options that all kernels take."""
    dim, dim_v = query.shape[-1], value.shape[-1]
    row_bytes = _power_of_two(max(dim, dim_v)) * query.element_size()
    target = "float32" if query.dtype == torch.float32 else "half"
    target = "interpreted" if _interpreted() else target
    shape = kernel_shape(pass_name, axes, row_bytes, rpb is not None, target, _major(query.device))
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "rpb": query if rpb is None else (rpb.float() * _LOG2E).contiguous(),
        "query_strides": _strides(query),
        "key_strides": _strides(key),
        "value_strides": _strides(value),
        "length": tuple(axis.length for axis in axes),
        "dilation": tuple(axis.dilation for axis in axes),
        "heads": query.shape[-2],
        "heads_per_key": query.shape[-2] // key.shape[-2],
        "scale_log2": scale * _LOG2E,
    }
    options = {
        "KERNEL": tuple(axis.kernel_size for axis in axes),
        "STRIDE": tuple(axis.stride for axis in axes),
        "CAUSAL": tuple(axis.is_causal for axis in axes),
        "TILE": shape.tile,
        "BOX": shape.box,
        "DIM": dim,
        "DIM_V": dim_v,
        "BLOCK_DIM": _power_of_two(dim),
        "BLOCK_DIM_V": _power_of_two(dim_v),
        "BIAS": rpb is not None,
        "PRECISION": _precision(),
        "num_warps": shape.warps,
        "num_stages": shape.stages,
        "enable_fp_fusion": True,  # Triton 3.10 no longer does so by default
    }
    return arguments, options, shape


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
    arguments, options, shape = _common("forward", query, key, value, rpb, axes, scale)
    arguments |= {
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
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
    arguments, options, shape = _common("backward", query, key, value, rpb, axes, scale)
    arguments |= {
        "lse": lse,
        "grad_out": grad_out,
        "delta": torch.empty_like(lse),
        "scale": scale,
        "lse_strides": _strides(lse[..., None]),
        "grad_out_strides": _strides(grad_out),
    }
    batch, heads, tiles = query.shape[0], query.shape[-2], _tiles(axes, shape.tile)
    rows = math.prod(2 * axis.kernel_size - 1 for axis in axes[:2])
    rows, columns = _power_of_two(rows) if rows > 1 else 1, _power_of_two(2 * axes[2].kernel_size - 1)
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
        options | {"BIAS_GRAD": bias_grad, "LSE_GRAD": grad_lse is not None, "ROWS": rows, "COLUMNS": columns},
    )
    key_value_launch = Launch(
        "backward_key_value_kernel",
        batch * key.shape[-2] * tiles,
        arguments
        | {
            "grad_key": grads[1],
            "grad_key_strides": _strides(grads[1]),
            "grad_value": grads[2],
            "grad_value_strides": _strides(grads[2]),
        },
        options,
    )
    return query_launch, key_value_launch, tables


def _run(launch: Launch, device: torch.device) -> None:
    from . import triton_kernels

    # A kernel is launched on the current device, whatever its tensors' is.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        getattr(triton_kernels, launch.kernel)[(launch.programs,)](**launch.arguments, **launch.options)


@torch.library.custom_op("foveate::neighborhood_triton", mutates_args=())
def neighborhood_triton_op(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, axes: Sequence[int], scale: float
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
    query, key, value = _contiguous_rows(query), _contiguous_rows(key), _contiguous_rows(value)
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if out.numel():
        _run(forward_launch(query, key, value, rpb, out, lse, _axes(axes), scale), query.device)
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
    axes: Sequence[int],
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and, with ``bias_grad``, rpb (else an empty tensor)."""
    query, key, value, grad_out = map(_contiguous_rows, (query, key, value, grad_out))
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    three = _axes(axes)
    *launches, tables = backward_launches(
        grad_out, grad_lse, query, key, value, rpb, out, lse, grads, bias_grad, three, scale
    )
    if not out.numel():
        return *grads, query.new_zeros(rpb.shape if bias_grad else 0, dtype=rpb.dtype if bias_grad else None)
    for launch in launches:
        _run(launch, query.device)
    if tables is None:
        return *grads, query.new_empty(0)
    # Rows are the entries of the first two axes, columns those of the last; both are padded.
    entries = [2 * axis.kernel_size - 1 for axis in three]
    grad_rpb = tables.sum((0, 2))[:, : entries[0] * entries[1], : entries[2]]
    return *grads, grad_rpb.reshape(rpb.shape).to(rpb.dtype)


@neighborhood_triton_backward_op.register_fake
def _(grad_out, grad_lse, query, key, value, rpb, out, lse, axes, scale, bias_grad):
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


def neighborhood_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: tuple[tuple, ...],
    scale: float,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Neighborhood attention by triton; see `api.na2d` for the arguments."""
    fields = [int(field) for axis in axes for field in axis]
    out, lse = neighborhood_triton_op(query, key, value, rpb, fields, scale)
    if additional_keys is not None and additional_keys.shape[1]:
        more, more_lse = attention(
            query.flatten(1, -3), additional_keys, additional_values, scale=scale, return_lse=True
        )
        spatial = query.shape[1:-2]
        parts = [out, more.unflatten(1, spatial)], [lse, more_lse.unflatten(1, spatial)]
        out, lse = merge_attentions(*parts)
    return out, lse if with_lse else None
