"""How much work a neighborhood is when it is cut into tiles: the question of GNA's simulator (arXiv 2504.16922).

A tile of queries visits the tiles of keys that hold its windows, and computes all their pairs, seen or not. Where the
queries of a tile share their windows, which is what a stride is for, nothing is computed in vain.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .problem import make_axes
from .window import Axis, axis_ranges


@functools.lru_cache(maxsize=1024)
def axis_visits(axis: Axis, query_tile: int, key_tile: int) -> np.ndarray:
    """Return how many tiles of keys each tile of queries visits on an axis ``[tiles]``, over all dilation groups.

    Tiles lie within a dilation group. Those of keys begin at the first key that a tile of queries sees.
    """
    first, count = axis_ranges(axis)
    end = first // axis.dilation + count
    visits = []
    for group in range(axis.dilation):
        starts = np.arange(0, len(first[group :: axis.dilation]), query_tile)
        low = np.minimum.reduceat(first[group :: axis.dilation] // axis.dilation, starts)
        high = np.maximum.reduceat(end[group :: axis.dilation], starts)
        visits.append(-(-(high - low) // key_tile))
    return np.concatenate(visits)


class NeighborhoodCost(NamedTuple):
    """What `neighborhood_cost` finds."""

    query_tile: tuple[int, ...]
    key_tile: tuple[int, ...]
    visits: np.ndarray  # of each tile of queries, [tiles of each axis]
    useful_share: float  # of the pairs that are computed, those that are in windows
    speedup: float  # over dense attention cut into the same tiles
    speedup_bound: float  # what it would be if only pairs in windows were computed
    speedup_over_stride_1: float
    free_strides: tuple[tuple[int, ...], ...]  # of each axis: no tile visits more than its window alone takes


def neighborhood_cost(
    shape: Sequence[int],
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    query_tile: tuple[int, ...] | None = None,
    key_tile: tuple[int, ...] | None = None,
    is_causal: bool | tuple[bool, ...] = False,
) -> NeighborhoodCost:
    """Count the tiles of keys that tiles of queries visit, and compare with dense attention and with stride 1.

    Args:
        shape: Lengths of the map's axes, one to three.
        kernel_size: Window length on each axis, as for `na2d`; so are stride, dilation and is_causal.
        stride: Consecutive queries that share a window.
        dilation: Distance between neighbors.
        query_tile: Queries of a tile on each axis; by default those of the Triton path for heads of 64 in 16 bits.
        key_tile: Keys of a tile on each axis; by default likewise.
        is_causal: Whether a query sees only its own position and the ones before it.

    Raises:
        ValueError: If the windows or the tiles don't fit the map.

    Example:
        >>> cost = neighborhood_cost((256, 256), 80, stride=16, query_tile=(16, 16), key_tile=(16, 8))
        >>> round(cost.speedup, 1), round(cost.speedup_bound, 1), cost.useful_share
        (10.2, 10.2, 1.0)
    """
    from .triton_tiles import kernel_shape

    rank = len(shape)
    if rank not in (1, 2, 3):
        raise ValueError(f"neighborhood_cost takes a shape of one to three axes; got {list(shape)}")
    axes = make_axes("neighborhood_cost", rank, shape, kernel_size, stride, dilation, is_causal)
    if query_tile is None or key_tile is None:
        tiles = kernel_shape("forward", (*(Axis(1, 1),) * (3 - rank), *axes), 128, False, "half", 9)
        query_tile = tiles.tile[3 - rank :] if query_tile is None else query_tile
        key_tile = tiles.box[3 - rank :] if key_tile is None else key_tile
    for name, tile in (("query_tile", query_tile), ("key_tile", key_tile)):
        if len(tile) != rank or not all(type(length) is int and length > 0 for length in tile):
            raise ValueError(f"neighborhood_cost takes {name} as {rank} positive integers; got {tile!r}")

    def total(axes: Sequence[Axis]) -> int:
        return math.prod(int(axis_visits(*part).sum()) for part in zip(axes, query_tile, key_tile, strict=True))

    visits = functools.reduce(np.multiply.outer, map(axis_visits, axes, query_tile, key_tile))
    useful = math.prod(int(axis_ranges(axis)[1].sum()) for axis in axes)
    # Dense attention has one tile's groups neither dilated nor cut.
    dense = math.prod(-(-n // q) * -(-n // k) for n, q, k in zip(shape, query_tile, key_tile, strict=True))
    return NeighborhoodCost(
        query_tile=tuple(query_tile),
        key_tile=tuple(key_tile),
        visits=visits,
        useful_share=useful / (total(axes) * math.prod(query_tile) * math.prod(key_tile)),
        speedup=dense / total(axes),
        speedup_bound=math.prod(shape) ** 2 / useful,
        speedup_over_stride_1=total([axis._replace(stride=1) for axis in axes]) / total(axes),
        free_strides=tuple(
            tuple(
                candidate
                for candidate in range(1, axis.kernel_size + 1)
                if axis_visits(axis._replace(stride=candidate), query, key).max() <= -(-axis.kernel_size // key)
            )
            for axis, query, key in zip(axes, query_tile, key_tile, strict=True)
        ),
    )
