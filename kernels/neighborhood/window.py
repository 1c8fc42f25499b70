"""Which keys a query sees on one axis. The axes are independent: a neighborhood is the product of its axis windows.

Positions with the same residue modulo the dilation form a group, and a query sees only keys of its own group. Inside
its group the window is centred on the query and shifts at the borders: it never shrinks and nothing is padded. With a
stride, ``stride`` consecutive queries share the window of their middle one. A causal axis shows a query its own
position and up to ``kernel_size - 1`` before it. Sources: NAT (arXiv 2204.07143, eq. 3), DiNAT (arXiv 2209.15001,
eq. 4) and GNA (arXiv 2504.16922), as implemented by NATTEN 0.21.
"""

import typing
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# The fields of axes one after another; of all spellings, operators of torch before 2.9 know only this one.
Fields = typing.Sequence[int]


class Axis(NamedTuple):
    """One axis of a neighborhood: its length and how windows are laid on it."""

    length: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False


def flatten_axes(axes: Sequence[Axis]) -> list[int]:
    """Return the fields of axes one after another, as torch's operators take them."""
    return [int(field) for axis in axes for field in axis]


def unflatten_axes(fields: Fields, least: int = 1) -> tuple[Axis, ...]:
    """Return the axes of `flatten_axes`, after as many axes of length one as make ``least``."""
    axes = [Axis(*fields[i : i + 4], bool(fields[i + 4])) for i in range(0, len(fields), 5)]
    return (*(Axis(1, 1),) * (least - len(axes)), *axes)


def axis_ranges(axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Return the first key and the number of keys of every query, both ``[length]``, int64.

    A query's keys are ``first + dilation * t`` for ``t < count``.
    """
    query = np.arange(axis.length)
    group, rank = query % axis.dilation, query // axis.dilation
    last = (axis.length - group + axis.dilation - 1) // axis.dilation - 1
    leader = rank // axis.stride * axis.stride
    if axis.is_causal:
        leader = np.minimum(leader + axis.stride - 1, last)
        first = np.maximum(leader - axis.kernel_size + 1, 0)
        count = rank - first + 1
    else:
        leader = np.minimum(leader + axis.stride // 2, last)
        first = np.clip(leader - axis.kernel_size // 2, 0, last + 1 - axis.kernel_size)
        count = np.full_like(first, axis.kernel_size)
    return group + axis.dilation * first, count


def axis_windows(
    length: int, kernel_size: int, dilation: int = 1, stride: int = 1, is_causal: bool = False
) -> np.ndarray:
    """Return the key positions that each query of an axis attends to.

    Args:
        length: Positions on the axis; at least ``kernel_size * dilation``.
        kernel_size: Keys per query. An even window has one key more to the left than to the right.
        dilation: Distance between neighboring keys.
        stride: Queries of a group that share a window.
        is_causal: Whether keys after the query are hidden.

    Returns:
        ``[length, kernel_size]`` int64 array of ascending key positions; -1 where a causal window holds fewer.
    """
    first, count = axis_ranges(Axis(length, kernel_size, stride, dilation, is_causal))
    step = np.arange(kernel_size)
    return np.where(step < count[:, None], first[:, None] + dilation * step, -1)


def axis_offsets(axis: Axis) -> np.ndarray:
    """Return the relative-position index of the first key of every query, ``[length]``; the next ones count up.

    The index is the distance from query to key in steps of the dilation, plus ``kernel_size - 1``, so that it runs
    from 0 to ``2 * kernel_size - 2`` and the query's own position has the middle one.
    """
    first, _ = axis_ranges(axis)
    return (first - np.arange(axis.length)) // axis.dilation + axis.kernel_size - 1


def neighbors(axes: Sequence[Axis], queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the keys of some queries, and what their entries in a flattened bias table are.

    Args:
        axes: The map's axes.
        queries: Positions on the map, row-major, ``[Q]``.

    Returns:
        Key positions ``[Q, neighbors]``, row-major in both senses, -1 for none, and entries of the same shape.
    """
    tokens, entries = np.zeros((len(queries), 1), np.int64), np.zeros((len(queries), 1), np.int64)
    places = []
    for axis in reversed(axes):  # as np.unravel_index, which torch.compile doesn't know
        places.append(queries % axis.length)
        queries = queries // axis.length
    for axis, place in zip(axes, reversed(places), strict=True):
        keys = axis_windows(axis.length, axis.kernel_size, axis.dilation, axis.stride, axis.is_causal)[place]
        offsets = axis_offsets(axis)[place, None] + np.arange(axis.kernel_size)
        none = (tokens[:, :, None] < 0) | (keys[:, None] < 0)
        tokens = np.where(none, -1, tokens[:, :, None] * axis.length + keys[:, None]).reshape(len(queries), -1)
        width = 2 * axis.kernel_size - 1
        entries = (entries[:, :, None] * width + offsets[:, None]).reshape(len(queries), -1)
    return tokens, entries
