"""The three products of the unfused operators on GPUs; `products` says what they are. Needs no Triton to import."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import contiguous_rows
from ..triton_launch import launch, triton_obstacle
from .native import empty_like
from .reference import window_tables
from .window import Axis

_MAX_DIM = 512


def obstacle(x: Tensor) -> str | None:
    """Return why Triton cannot take maps like ``x``, or None if it can."""
    return triton_obstacle(x, x.shape[-1], _MAX_DIM, multiplies_matrices=False)


@functools.lru_cache(maxsize=64)
def _window_table(axes: tuple[Axis, ...], device: torch.device) -> Tensor:
    """Return the key of each token's slots, ``[tokens, slots]``; -1 for none."""
    return torch.from_numpy(window_tables(axes)[0].astype(np.int32)).to(device)


@functools.lru_cache(maxsize=64)
def _pair_table(axes: tuple[Axis, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the pairs ``query * slots + slot`` sorted by key, and where those of each key begin and end."""
    keys = window_tables(axes)[0].reshape(-1)
    order = np.argsort(keys, kind="stable")
    tokens = math.prod(axis.length for axis in axes)
    ends = np.searchsorted(keys[order], np.arange(tokens + 1))  # pairs without a key, -1, lie before the first
    return torch.from_numpy(order.astype(np.int64)).to(device), torch.from_numpy(ends.astype(np.int64)).to(device)


def clear_tables() -> None:
    """Forget the tables of windows."""
    _window_table.cache_clear()
    _pair_table.cache_clear()


def _flat(x: Tensor) -> Tensor:
    """Return a map as ``[B, tokens, heads, _]`` whose last axis lies without gaps."""
    return contiguous_rows(x.flatten(1, -3))


def _strides(*maps: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in maps for stride in x.stride()[:3])


def _launch(kernel: str, out: Tensor, dim: int, slots: int, first: Tensor, second: Tensor, *tables: Tensor) -> None:
    from . import triton_product_kernels

    flat = out.flatten(1, -3)  # a view: positions lie one after another, wherever the heads are
    batch, tokens, heads, _ = flat.shape
    options: dict[str, Any] = triton_product_kernels.launch_options(kernel, dim, slots)
    blocks = -(-tokens // options.get("BLOCK", 1))
    arguments = (first, second, flat, *tables, tokens, heads, *_strides(first, second, flat))
    launch(getattr(triton_product_kernels, kernel), (batch * heads * blocks,), out.device, *arguments, **options)


def _slots(axes: Sequence[Axis]) -> int:
    return math.prod(axis.kernel_size for axis in axes)


def scores(query: Tensor, key: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Return ``[B, *spatial, heads, slots]``; see `products.neighborhood_scores`."""
    out = empty_like(query, _slots(axes))
    if out.numel():
        table = _window_table(tuple(axes), out.device)
        _launch("scores_kernel", out, query.shape[-1], _slots(axes), _flat(query), _flat(key), table)
    return out


def values(weights: Tensor, value: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Return ``[B, *spatial, heads, dim]``; see `products.neighborhood_values`."""
    out = empty_like(value, value.shape[-1])
    if out.numel():
        table = _window_table(tuple(axes), out.device)
        _launch("values_kernel", out, value.shape[-1], _slots(axes), _flat(weights), _flat(value), table)
    return out


def scatter(weights: Tensor, x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Return ``[B, *spatial, heads, dim]``; see `products.neighborhood_scatter`."""
    out = empty_like(x, x.shape[-1])
    if out.numel():
        tables = _pair_table(tuple(axes), out.device)
        _launch("scatter_kernel", out, x.shape[-1], _slots(axes), _flat(weights), _flat(x), *tables)
    return out
