"""Neighborhood attention by torch's FlexAttention (arXiv 2412.05496): the windows as its mask, the bias on its scores.

Tokens are row-major; blocks of 128 queries and 128 keys that share no window are skipped, others computed whole. The
kernel is torch.compile's, one for every shape: uncompiled, FlexAttention would hold all scores in memory. Additional
keys are appended to the map's own, because on CPUs there is no log-sum-exp by which two attentions could be merged.
"""

import functools
import importlib.util
import math
import os
import shutil
import sys
import typing
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from ..backends import exporting, is_transforming
from .problem import Problem
from .window import Axis, Fields, axis_offsets, axis_ranges, flatten_axes, unflatten_axes

_BLOCK = 128
_MIN_DIM = 16  # of triton's matrix products
_MAX_KERNELS = 256  # torch.compile's own limit is 8 shapes
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# The tensors of a BlockMask.
_BLOCK_LISTS = (
    *("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),
    *("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"),
)


def obstacle(problem: Problem) -> str | None:
    """Return why FlexAttention cannot take a call, or None if it can."""
    query, device = problem.query, problem.query.device.type
    if device not in ("cpu", "cuda"):
        return f"it is for CPU and GPU tensors; query is on {query.device}"
    if query.dtype not in _DTYPES:
        return f"it takes float32, float16 and bfloat16; query is {query.dtype}"
    if exporting():
        return "an exported graph must consist of plain operators, and FlexAttention is one of higher order"
    return (_not_on_cpu(problem) if device == "cpu" else _not_on_gpu(query, problem.value)) or _missing(device)


def _not_on_cpu(problem: Problem) -> str | None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in problem):
        return "it has no gradients on CPUs; call it under torch.no_grad()"
    return "it returns no log-sum-exp on CPUs" if problem.with_lse else None


def _not_on_gpu(query: Tensor, value: Tensor) -> str | None:
    if min(query.shape[-1], value.shape[-1]) < _MIN_DIM:
        return f"on GPUs it takes a dim per head of at least {_MIN_DIM}; got {query.shape[-1]} and {value.shape[-1]}"
    if torch.compiler.is_compiling():
        return None
    if isinstance(query, FakeTensor):
        return "on GPUs it takes tensors with data; query is a FakeTensor"
    if is_transforming():
        return "on GPUs it runs under none of torch.func's transforms, such as vmap"
    return None


@torch.compiler.assume_constant_result
def _missing(device: str) -> str | None:
    """Return what torch, or torch.compile on this machine, lacks to make a kernel, or None."""
    from torch.nn.attention import flex_attention

    if not hasattr(flex_attention, "AuxRequest"):
        return f"it needs torch 2.9 or newer; this is {torch.__version__}"
    if device == "cuda":
        return None if importlib.util.find_spec("triton") else "torch.compile needs triton, which is not installed"
    capability = torch.backends.cpu.get_cpu_capability()
    if sys.platform == "darwin" or not capability.startswith("AVX"):
        return f"on CPUs it needs AVX2, on Linux or Windows; here is {capability} on {sys.platform}"
    compiler = os.environ.get("CXX", "cl" if sys.platform == "win32" else "g++")
    if shutil.which(compiler) is None:
        return f"torch.compile finds no C++ compiler {compiler!r}; install one or name it in the variable CXX"
    return None


def _positions(tokens: Tensor, axes: Sequence[Axis]) -> list[Tensor]:
    """Return where row-major tokens lie on each axis."""
    positions = []
    for axis in reversed(axes):
        positions.insert(0, tokens % axis.length)
        tokens = tokens // axis.length
    return positions


def _visible(axes: Sequence[Axis], tables: Sequence[Sequence[Tensor]]) -> Callable[..., Tensor]:
    """Return the ``mask_mod`` of the windows; keys after the map's own are visible to all queries."""
    tokens = math.prod([axis.length for axis in axes])

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key < tokens
        queries, keys = _positions(query, axes), _positions(key, axes)
        for axis, (first, count, _), q, k in zip(axes, tables, queries, keys, strict=True):
            step = k - first[q]
            seen = seen & (step >= 0) & (step < axis.dilation * count[q])
            if axis.dilation > 1:
                seen = seen & (step % axis.dilation == 0)
        return seen | (key >= tokens)

    return visible


def _biased(axes: Sequence[Axis], tables: Sequence[Sequence[Tensor]], rpb: Tensor) -> Callable[..., Tensor]:
    """Return the ``score_mod`` of the relative position bias, which keys after the map's own have not."""
    tokens = math.prod([axis.length for axis in axes])

    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        entries = []
        queries, keys = _positions(query, axes), _positions(key, axes)
        for axis, (first, _, offset), q, k in zip(axes, tables, queries, keys, strict=True):
            entry = offset[q] + (k - first[q]) // axis.dilation
            entries.append(entry.clamp(0, 2 * axis.kernel_size - 2))  # keys out of the window are masked afterwards
        return torch.where(key < tokens, score + rpb[(head, *entries)], score)

    return biased


def _block_lists(counts: Tensor) -> list[Tensor]:
    """Return `_BLOCK_LISTS` from the number of visible pairs in each block."""
    full = counts == _BLOCK**2
    some = (counts > 0) & ~full
    lists = []
    for blocks in (some, full, some.T, full.T):
        blocks = blocks.int()[None, None]
        lists += [blocks.sum(-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).int()]
    return lists


@functools.lru_cache(maxsize=64)
def _mask(axes: tuple[Axis, ...], more: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return `_BLOCK_LISTS` and then, for each axis, a table by query: first key, number of keys, offset.

    Torch's create_block_mask would hold a mask of all tokens by all keys, and integers of that shape.
    """
    tokens = math.prod(axis.length for axis in axes)
    with torch.inference_mode(False):  # what is made here serves training, too
        tables = [
            [torch.from_numpy(table).to(device, torch.int32) for table in (*axis_ranges(axis), axis_offsets(axis))]
            for axis in axes
        ]
        visible = _visible(axes, tables)
        key = torch.arange(tokens + more, device=device)
        counts = []
        for query in torch.arange(tokens, device=device).split(_BLOCK):
            seen = F.pad(visible(None, None, query[:, None], key), (0, -len(key) % _BLOCK))
            counts.append(seen.unflatten(1, (-1, _BLOCK)).sum((0, 2)))
        return *_block_lists(torch.stack(counts)), *(table for three in tables for table in three)


def clear_masks() -> None:
    """Forget the windows' masks; at most 64 are remembered."""
    _mask.cache_clear()


# In a compiled caller's graph the mask is a node: torch's own constants can be one of a function only.
@torch.library.custom_op("foveate::neighborhood_flex_mask", mutates_args=())
def _mask_operator(axes: Fields, more: int, device: torch.device) -> typing.List[Tensor]:  # noqa: UP006 (torch before 2.9)
    # Compiled code may write into what an operator returned.
    return [table.clone() for table in _mask(unflatten_axes(axes), more, device)]


@_mask_operator.register_fake
def _(axes, more, device):
    lengths = axes[::5]
    tokens = math.prod(lengths)
    queries, keys = -(-tokens // _BLOCK), -(-(tokens + more) // _BLOCK)
    shapes = [shape for n, m in ((queries, keys), (keys, queries)) for shape in [(1, 1, n), (1, 1, n, m)] * 2]
    shapes += [(length,) for length in lengths for _ in range(3)]
    return [torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes]


@functools.cache
def _compiled() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _attend(*args, **kwargs):
    from torch.nn.attention.flex_attention import flex_attention

    if torch.compiler.is_compiling():  # the kernel becomes part of the caller's graph
        return flex_attention(*args, **kwargs)
    with torch._dynamo.config.patch(recompile_limit=_MAX_KERNELS):
        return _compiled()(*args, **kwargs)


def _attention(problem: Problem) -> tuple[Tensor, Tensor | None]:
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask

    query, key, value, axes, scale, rpb, additional_keys, additional_values, with_lse = problem
    # Where a compiled caller has symbols, the length of a range is a plain number.
    axes = tuple(Axis(len(range(length)), *windows) for length, *windows in axes)
    more = 0 if additional_keys is None else len(range(additional_keys.shape[1]))
    if torch.compiler.is_compiling():
        tensors = _mask_operator(flatten_axes(axes), more, query.device)
    else:
        tensors = _mask(axes, more, query.device)
    lists, tables = tensors[: len(_BLOCK_LISTS)], tensors[len(_BLOCK_LISTS) :]
    tables = [tables[i : i + 3] for i in range(0, len(tables), 3)]

    spatial = query.shape[1:-2]
    query, key, value = (x.flatten(1, -3) for x in (query, key, value))
    if more:
        key, value = torch.cat([key, additional_keys], 1), torch.cat([value, additional_values], 1)
    result = _attend(
        *(x.transpose(1, 2) for x in (query, key, value)),
        score_mod=None if rpb is None else _biased(axes, tables, rpb),
        block_mask=BlockMask(
            (query.shape[1], key.shape[1]),
            **dict(zip(_BLOCK_LISTS, lists, strict=True)),
            BLOCK_SIZE=(_BLOCK, _BLOCK),
            mask_mod=_visible(axes, tables),
        ),
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
        return_aux=AuxRequest(lse=True) if with_lse else None,
    )
    output, lse = (result[0], result[1].lse.transpose(1, 2)) if with_lse else (result, None)
    return output.transpose(1, 2).unflatten(1, spatial), lse.unflatten(1, spatial) if with_lse else None


# Inductor's template for CPUs misreads views that it finds in a caller's graph, so that there it is a graph of its own.
@torch.library.custom_op("foveate::neighborhood_flex", mutates_args=(), device_types="cpu")
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    axes: Fields,
    scale: float,
) -> Tensor:
    tensors = (query, key, value, rpb, additional_keys, additional_values)
    # FlexAttention refuses tensors that could have gradients even where none are taken.
    query, key, value, *others = (x if x is None else x.detach() for x in tensors)
    with torch.autocast("cpu", enabled=False):
        return _attention(Problem(query, key, value, unflatten_axes(axes), scale, *others, False))[0].contiguous()


@_operator.register_fake
def _(query, key, value, rpb, additional_keys, additional_values, axes, scale):
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@_operator.register_vmap
def _(info, in_dims, *args):
    *tensors, axes, scale = args
    calls = []
    for i in range(info.batch_size):
        parts = [x if dim is None else x.select(dim, i) for x, dim in zip(tensors, in_dims, strict=False)]
        calls.append(_operator(*parts, axes, scale))
    return torch.stack(calls), 0


def neighborhood_flex(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Neighborhood attention by FlexAttention; see `api.na2d` for the arguments."""
    if problem.query.device.type != "cpu":
        return _attention(problem)
    query, key, value, axes, scale, *others, _ = problem
    return _operator(query, key, value, *others, flatten_axes(axes), scale), None
