"""Neighborhood attention by tiles, in plain torch: a few dense attentions instead of one window per query.

The map is cut into tiles of queries, and a tile attends to the smallest rectangle of keys that holds its windows.
What a query must not see is masked, and the relative position bias rides in the same tensor as the mask, so that a
tile is one scaled_dot_product_attention. Two choices keep the rest cheap:

* Columns are cut by one gather into ``[rows, column in tile, tile]``. A row of tiles is then a plain slice, and its
  tiles are extra heads of one attention call, whose mask broadcasts over the batch.
* Tiles are small: work grows with the rectangle of keys, not with the window.

A dilation is a permutation of rows and columns by group; tiles are cut within the groups.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .window import axis_windows


class _Tile(NamedTuple):
    """One tile on one axis; positions are in the axis's order by dilation group."""

    queries: np.ndarray  # [T]
    keys: np.ndarray  # [S], consecutive
    offsets: np.ndarray  # [T, S], the relative-position index, or 2 * kernel_size - 1 for a key out of the window


class _RowOfTiles(NamedTuple):
    """Rows of one call: queries and keys are slices, ``mask`` picks one of the plan's few distinct masks."""

    queries: slice
    keys: slice
    mask: int


class _Plan(NamedTuple):
    """How a map is cut. Token indices are flat, row-major."""

    rows: list[_RowOfTiles]
    query_index: np.ndarray  # tokens in the order [H, T, tiles]
    key_index: np.ndarray  # tokens in the order [H, S, tiles]
    output_index: np.ndarray  # [H * W], where each token lies in the order [H, T, tiles]
    tiles: int  # column tiles, the dilation groups counted in
    row_offsets: list[np.ndarray]  # the distinct masks' row parts, each [Ty, Sy]
    column_offsets: np.ndarray  # [tiles, Tx, Sx]


def _axis_order(length: int, dilation: int) -> np.ndarray:
    """Return the positions of an axis, ordered by dilation group."""
    return np.concatenate([np.arange(group, length, dilation) for group in range(dilation)])


def _axis_tiles(length: int, kernel_size: int, dilation: int, tile_length: int) -> list[_Tile]:
    """Cut an axis into tiles of at most ``tile_length`` queries that stay within a dilation group."""
    tiles, start = [], 0
    for group in range(dilation):
        group_length = len(range(group, length, dilation))
        windows = axis_windows(group_length, kernel_size)
        for queries in np.array_split(np.arange(group_length), -(-group_length // tile_length)):
            keys = np.arange(windows[queries[0], 0], windows[queries[-1], -1] + 1)
            seen = (keys >= windows[queries, :1]) & (keys <= windows[queries, -1:])
            offsets = np.where(seen, keys - queries[:, None] + kernel_size - 1, 2 * kernel_size - 1)
            tiles.append(_Tile(start + queries, start + keys, offsets))
        start += group_length
    return tiles


def _level(tiles: list[_Tile], kernel_size: int) -> _Tile:
    """Stack tiles of different sizes: the last query is repeated, the last key too but out of every window."""
    query_count = max(len(tile.queries) for tile in tiles)
    key_count = max(len(tile.keys) for tile in tiles)
    levelled = []
    for queries, keys, offsets in tiles:
        more_queries, more_keys = query_count - len(queries), key_count - len(keys)
        offsets = np.pad(offsets, ((0, 0), (0, more_keys)), constant_values=2 * kernel_size - 1)
        levelled.append(
            _Tile(
                np.pad(queries, (0, more_queries), mode="edge"),
                np.pad(keys, (0, more_keys), mode="edge"),
                np.pad(offsets, ((0, more_queries), (0, 0)), mode="edge"),
            )
        )
    return _Tile(*(np.stack(part) for part in zip(*levelled, strict=True)))


def _tile_length(length: int, kernel_size: int, dilation: int) -> int:
    """Return the tile length of an axis that computes the fewest query-key pairs.

    Shorter tiles than four queries would compute fewer pairs, but not faster: calls and gathers begin to dominate.
    """

    def pairs(tile_length: int) -> int:
        tiles = _axis_tiles(length, kernel_size, dilation, tile_length)
        return len(tiles) * max(len(tile.queries) for tile in tiles) * max(len(tile.keys) for tile in tiles)

    longest = -(-length // dilation)
    return min(range(min(4, longest), min(16, longest) + 1), key=pairs)


@functools.lru_cache(maxsize=256)
def _plan(size: tuple[int, int], kernel_size: tuple[int, int], dilation: tuple[int, int]) -> _Plan:
    height, width = size
    tile_height, tile_width = map(_tile_length, size, kernel_size, dilation)
    row_order, column_order = (_axis_order(length, step) for length, step in zip(size, dilation, strict=True))

    rows, masks = [], {}
    for tile in _axis_tiles(height, kernel_size[0], dilation[0], tile_height):
        mask = masks.setdefault((tile.offsets.shape, tile.offsets.tobytes()), (len(masks), tile.offsets))[0]
        queries, keys = (slice(int(part[0]), int(part[-1]) + 1) for part in (tile.queries, tile.keys))
        rows.append(_RowOfTiles(queries, keys, mask))

    columns = _level(_axis_tiles(width, kernel_size[1], dilation[1], tile_width), kernel_size[1])
    query_columns, key_columns = column_order[columns.queries.T], column_order[columns.keys.T]
    query_index = row_order[:, None, None] * width + query_columns
    output_index = np.empty(height * width, dtype=np.int64)
    output_index[query_index.ravel()] = np.arange(query_index.size)
    return _Plan(
        rows=rows,
        query_index=query_index.ravel(),
        key_index=(row_order[:, None, None] * width + key_columns).ravel(),
        output_index=output_index,
        tiles=len(columns.queries),
        row_offsets=[offsets for _, offsets in masks.values()],
        column_offsets=columns.offsets,
    )


def _mask(plan: _Plan, row_offsets: np.ndarray, rpb: Tensor) -> Tensor:
    """Return bias and mask of a row of tiles, ``[tiles * heads, Ty * Tx, Sy * Sx]``."""
    rows = torch.from_numpy(row_offsets).to(rpb.device)
    columns = torch.from_numpy(plan.column_offsets).to(rpb.device)
    mask = rpb.index_select(1, rows.flatten()).index_select(2, columns.flatten())
    mask = mask.unflatten(2, columns.shape).unflatten(1, rows.shape)
    return mask.permute(3, 0, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).flatten(0, 1)


# The plan is made in numpy; torch.compile takes the whole function as it is and compiles the tensor part.
@torch.compiler.allow_in_graph
def na2d_tiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
    rpb: Tensor | None,
) -> Tensor:
    """Neighborhood attention by tiles; see `foveate.kernels.na2d` for the arguments."""
    height, width, heads = query.shape[1:4]
    plan = _plan((height, width), kernel_size, dilation)
    query_index, key_index, output_index = (
        torch.from_numpy(index).to(query.device) for index in (plan.query_index, plan.key_index, plan.output_index)
    )

    def cut(x: Tensor, index: Tensor) -> Tensor:  # to [B, H, column in tile, tiles * heads, dim]
        x = x.flatten(3).flatten(1, 2).index_select(1, index)
        return x.unflatten(2, (heads, -1)).unflatten(1, (height, -1, plan.tiles)).flatten(3, 4)

    query, key, value = cut(query, query_index), cut(key, key_index), cut(value, key_index)

    if rpb is None:
        rpb = query.new_zeros(heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1)
    # One more row and column, which the index of a key out of the window points to.
    rpb = F.pad(rpb.to(query.dtype), (0, 1, 0, 1), value=float("-inf"))
    masks = [_mask(plan, offsets, rpb) for offsets in plan.row_offsets]

    outputs = []
    for row in plan.rows:
        tokens = (
            x.flatten(1, 2).transpose(1, 2) for x in (query[:, row.queries], key[:, row.keys], value[:, row.keys])
        )
        output = F.scaled_dot_product_attention(*tokens, attn_mask=masks[row.mask][None], scale=scale)
        outputs.append(output.transpose(1, 2))
    output = (
        torch.cat(outputs, 1).unflatten(2, (plan.tiles, heads)).flatten(1, 2).flatten(2).index_select(1, output_index)
    )
    return output.unflatten(2, (heads, -1)).unflatten(1, (height, width))
