"""The three products of the unfused operators by tiles, in plain torch; `products` says what they are.

A row of tiles is one dense product, as in `tiled`; a table by query and slot says which of its entries are of windows.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .tiled import _by_group, _plan, _RowOfTiles, _Rows, all_finite, product_of_seen
from .window import Axis


def _slots(entries: np.ndarray, kernel_size: int) -> np.ndarray:
    """Return where a tile's keys hold the slots of each query's window ``[..., T, kernel_size]``; -1 for none."""
    seen = entries == 0
    slot = np.arange(kernel_size)
    return np.where(slot < seen.sum(-1, keepdims=True), seen.argmax(-1)[..., None] + slot, -1)


@functools.lru_cache(maxsize=256)
def _tables(axes: tuple[Axis, ...]) -> list[Tensor]:
    """Return, for each distinct mask of the plan, where keys of a tile lie by slot: ``[tiles, queries, slots]``.

    What a causal window lacks lies after all the keys.
    """
    plan = _plan(axes, False)
    *leading, last = axes
    tables = []
    for entries in plan.masks:
        table, keys = np.zeros((1, 1, 1), np.int64), 1
        parts = [*(x[None] for x in entries), plan.column_entries]
        for part, axis in zip(parts, (*leading, last), strict=True):
            slots = _slots(part, axis.kernel_size)[:, None, :, None]
            none = (table[:, :, None, :, None] < 0) | (slots < 0)
            table = np.where(none, -1, table[:, :, None, :, None] * part.shape[-1] + slots)
            table = table.reshape(table.shape[0], table.shape[1] * table.shape[2], -1)
            keys *= part.shape[-1]
        tables.append(torch.from_numpy(np.where(table < 0, keys, table)))
    return tables


class _Tiles:
    """The rows of tiles of a map ``[B, *spatial, heads, _]`` like ``x``, and the tables of their windows."""

    def __init__(self, axes: tuple[Axis, ...], x: Tensor):
        self.plan, self._tables = _plan(axes, False), _tables(axes)
        self._batch, self._heads, self._device = x.shape[0], x.shape[-2], x.device
        self.queries, self.keys = (_Rows(self.plan, columns, self._heads, x.device) for columns in self.plan.columns)
        repeated = self.plan.repeated
        self.repeated = None if repeated is None else torch.from_numpy(repeated).to(x.device)

    def __iter__(self) -> Iterator[tuple[_RowOfTiles, Tensor]]:
        """Yield rows, and for each which entries of its products are of windows: ``[B, tiles * heads, T, slots]``."""
        tables = [
            table.to(self._device).repeat_interleave(self._heads, 0).expand(self._batch, -1, -1, -1)
            for table in self._tables
        ]
        for row in self.plan.rows:
            yield row, tables[row.mask]


def _as_map(axes: Sequence[Axis], *tensors: Tensor) -> tuple[tuple[Axis, ...], list[Tensor]]:
    """Return a line as a map of one row."""
    if len(axes) > 1:
        return tuple(axes), list(tensors)
    return (Axis(1, 1), *axes), [x.unsqueeze(1) for x in tensors]


def _with_none(x: Tensor) -> Tensor:
    """Append a column for what no window holds."""
    return torch.nn.functional.pad(x, (0, 1))


def scores(query: Tensor, key: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Return ``[B, *spatial, heads, slots]``; see `products.neighborhood_scores`."""
    shape = (*query.shape[:-1], np.prod([axis.kernel_size for axis in axes]))
    axes, (query, key) = _as_map(axes, query, key)
    query, key = (_by_group(x, axes) for x in (query, key))
    tiles = _Tiles(axes, query)
    out = query.new_zeros(*query.shape[:-1], shape[-1])
    for row, table in tiles:
        products = tiles.queries.take(query, row.queries) @ tiles.keys.take(key, row.keys).transpose(-1, -2)
        part = _with_none(products).gather(-1, table)
        if tiles.repeated is not None:
            part = part.masked_fill(_unseen(tiles, part), 0)
        tiles.queries.add(out, row.queries, part)
    return _by_group(out, axes, back=True).reshape(shape)


def _unseen(tiles: _Tiles, x: Tensor) -> Tensor:
    """Return which tokens of a row of tiles ``[B, tiles * heads, tokens, _]`` are there a second time."""
    count = tiles.plan.tiles
    repeated = tiles.repeated.view(-1, count).T.repeat_interleave(x.shape[1] // count, 0)
    return repeated.repeat(1, x.shape[2] // repeated.shape[1])[None, :, :, None]


def _dense(weights: Tensor, table: Tensor, keys: int) -> Tensor:
    """Spread weights by slot over a row's keys."""
    return weights.new_zeros(*weights.shape[:-1], keys + 1).scatter_(-1, table, weights)[..., :keys]


def _product(weights: Tensor, x: Tensor, table: Tensor, keys: int, of_keys: bool, finite: bool) -> Tensor:
    """Return each query's sum of keys by weights by slot, or each key's of queries; see `tiled` for what is finite."""
    dense = _dense(weights, table, keys)
    seen = None if finite else _dense(torch.ones_like(weights), table, keys) > 0
    dense, seen = (p if of_keys or p is None else p.transpose(-1, -2) for p in (dense, seen))
    return dense @ x if finite else product_of_seen(dense, x, seen)


def values(weights: Tensor, value: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Return ``[B, *spatial, heads, dim]``; see `products.neighborhood_values`."""
    shape = (*weights.shape[:-1], value.shape[-1])
    axes, (weights, value) = _as_map(axes, weights, value)
    weights, value = (_by_group(x, axes) for x in (weights, value))
    tiles = _Tiles(axes, value)
    out, finite = value.new_zeros(value.shape), all_finite(weights, value)
    for row, table in tiles:
        value_part = tiles.keys.take(value, row.keys)
        own = tiles.queries.take(weights, row.queries, tiles.repeated)
        x = _product(own, value_part, table, value_part.shape[2], of_keys=True, finite=finite)
        if tiles.repeated is not None and not finite:
            x = x.masked_fill(_unseen(tiles, x), 0)
        tiles.queries.add(out, row.queries, x)
    return _by_group(out, axes, back=True).reshape(shape)


def scatter(weights: Tensor, x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Return ``[B, *spatial, heads, dim]``; see `products.neighborhood_scatter`."""
    shape = x.shape
    axes, (weights, x) = _as_map(axes, weights, x)
    weights, x = (_by_group(part, axes) for part in (weights, x))
    tiles = _Tiles(axes, x)
    out, finite = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32)), all_finite(weights, x)
    for row, table in tiles:
        keys = len(tiles.plan.columns[1]) // tiles.plan.tiles
        for part in row.keys:
            keys *= part.stop - part.start
        own, queries = (tiles.queries.take(part, row.queries, tiles.repeated) for part in (weights, x))
        tiles.keys.add(out, row.keys, _product(own, queries, table, keys, of_keys=False, finite=finite))
    return _by_group(out, axes, back=True).reshape(shape).to(x.dtype)
