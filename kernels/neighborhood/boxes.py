"""Neighborhood attention for exported graphs: all tiles in one batch, cut and masked by arithmetic on positions.

As in `tiled`, a tile of queries attends to the smallest box of keys that holds their windows. Here all boxes are of one
size, a tile's number says where it lies, and the relative position bias is gathered by row and column; so a graph has
as many nodes for a map of any size, no tables but of an axis's length, and the map's sides may be unknown until it is
run. Numbers aren't looked at: a key or value that is NaN or infinite makes NaN of every query whose box holds it,
whether its window does or not.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Problem
from .window import Axis, axis_ranges

# Tiles of axes whose length isn't known.
_TILE = 7

_LEAST = 60.0


class _Cut:
    """How an axis is cut: ``tiles`` tiles of ``tile`` queries in each dilation group, with boxes of ``box`` keys.

    A position is ``rank * dilation + group``; tiles, boxes and windows are ranges of ranks.
    """

    def __init__(self, axis: Axis, device: torch.device):
        self.axis, self._device = axis, device
        self.ranks = (axis.length + axis.dilation - 1) // axis.dilation
        self._known = isinstance(axis.length, int)
        choices = range(min(4, self.ranks), min(max(16, axis.stride), self.ranks) + 1) if self._known else [_TILE]
        # Pairs of query and key, and keys at the price of 2.5 queries.
        self.tile = min(choices, key=lambda tile: -(-self.ranks // tile) * (tile + 2.5) * self._box(tile))
        self.tiles = (self.ranks + self.tile - 1) // self.tile
        self.box = self._box(self.tile)

    @property
    def _slack(self) -> int:
        """How much further a shared window may reach than a query's own."""
        return self.axis.stride if self.axis.stride > 1 else 0

    def _box(self, tile: int) -> int:
        # The last ranks of some groups are one less, which moves their last windows.
        most = max(tile + self.axis.kernel_size - 1, self.axis.kernel_size + 1) + 2 * self._slack
        # Of an unknown length, the least of both would stand in every size of the graph, which sympy is slow at.
        return min(most, self.ranks) if self._known else most

    def _starts(self) -> Tensor:
        """Return the first key of every tile's box, ``[tiles]``."""
        before = self.axis.kernel_size - 1 if self.axis.is_causal else self.axis.kernel_size // 2
        first = torch.arange(self.tiles, device=self._device) * self.tile - (before + self._slack)
        return first.clamp(max=self.ranks - self.box).clamp(min=0)

    def _boxes(self) -> Tensor:
        """Return the ranks of all boxes' keys, ``[tiles, box]``; of axes shorter than a box some beyond the end."""
        return self._starts()[:, None] + torch.arange(self.box, device=self._device)

    def keys(self) -> Tensor:
        """Return the ranks of all boxes' keys, ``[tiles * box]``; in place of those beyond the end the last."""
        if self._known:
            return torch.from_numpy(self._known_keys().ravel()).to(self._device)
        return self._boxes().flatten().clamp(max=self.ranks - 1)

    def entries(self) -> Tensor:
        """Return the entry of the bias table, from query to key, ``[groups * tiles, tile, box]``; the last: unseen."""
        axis = self.axis
        if self._known:
            return torch.from_numpy(self._known_entries()).to(self._device)
        query = torch.arange(self.tiles * self.tile, device=self._device).view(self.tiles, self.tile)
        key = self._boxes()[:, None]
        # How many ranks each group has.
        group = torch.arange(axis.dilation, device=self._device)[:, None, None]
        last = torch.div(axis.length - group + axis.dilation - 1, axis.dilation, rounding_mode="floor") - 1
        query = torch.minimum(query, last)
        leader = torch.div(query, axis.stride, rounding_mode="floor") * axis.stride
        if axis.is_causal:
            leader = torch.minimum(leader + axis.stride - 1, last)
            first = (leader - axis.kernel_size + 1).clamp(min=0)
            end = query
        else:
            leader = torch.minimum(leader + axis.stride // 2, last)
            first = torch.minimum((leader - axis.kernel_size // 2).clamp(min=0), last + 1 - axis.kernel_size)
            end = first + axis.kernel_size - 1
        first, end, query = first[..., None], end[..., None], query[..., None]
        entry = key - query + axis.kernel_size - 1
        return torch.where((key >= first) & (key <= end), entry, 2 * axis.kernel_size - 1).flatten(0, 1)

    def _known_keys(self) -> np.ndarray:
        """Return the ranks of all boxes' keys, ``[tiles, box]``, where the axis's length is known."""
        before = self.axis.kernel_size - 1 if self.axis.is_causal else self.axis.kernel_size // 2
        starts = np.clip(np.arange(self.tiles) * self.tile - (before + self._slack), 0, self.ranks - self.box)
        return starts[:, None] + np.arange(self.box)

    def _known_entries(self) -> np.ndarray:
        """Return what `entries` does, where the axis's length is known."""
        axis = self.axis
        first, count = axis_ranges(axis)
        group = np.arange(axis.dilation)[:, None]
        last = (axis.length - group - 1) // axis.dilation
        rank = np.minimum(np.arange(self.tiles * self.tile), last)
        position = (rank * axis.dilation + group).reshape(-1, self.tiles, self.tile, 1)
        rank = rank.reshape(position.shape)
        step = self._known_keys()[:, None] - first[position] // axis.dilation
        entry = self._known_keys()[:, None] - rank + axis.kernel_size - 1
        seen = (step >= 0) & (step < count[position])
        return np.where(seen, entry, 2 * axis.kernel_size - 1).reshape(-1, self.tile, self.box)


def _arranged(x: Tensor, shape: Sequence[tuple[int, int, int]]) -> Tensor:
    """Return ``[B, cells, heads, tokens, dim]`` of a map whose axes are each (tiles, tokens in tile, groups)."""
    rank, heads, dim = len(shape), x.shape[-2], x.shape[-1]
    x = x.reshape(x.shape[0], *(side for axis in shape for side in axis), heads, dim)
    places = range(1, 3 * rank + 1, 3)
    order = [0, *(i for place in places for i in (place + 2, place)), 3 * rank + 1]
    x = x.permute(*order, *(place + 1 for place in places), 3 * rank + 2)
    cells = math.prod(axis[0] * axis[2] for axis in shape)
    return x.reshape(x.shape[0], cells, heads, math.prod(axis[1] for axis in shape), dim)


def _restored(x: Tensor, shape: Sequence[tuple[int, int, int]]) -> Tensor:
    """Return the map ``[B, *spatial, heads, dim]`` of which `_arranged` made ``x``."""
    rank, heads, dim = len(shape), x.shape[2], x.shape[-1]
    cells, tokens = (side for axis in shape for side in (axis[2], axis[0])), (axis[1] for axis in shape)
    x = x.reshape(x.shape[0], *cells, heads, *tokens, dim)
    order = [0, *(i for place in range(rank) for i in (2 * place + 2, 2 * rank + 2 + place, 2 * place + 1))]
    x = x.permute(*order, 2 * rank + 1, 3 * rank + 2)
    return x.reshape(x.shape[0], *(math.prod(axis) for axis in shape), heads, dim)


def _padded(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Pad the spatial axes of ``[B, *spatial, heads, dim]`` with zeros to ``lengths``."""
    more = [length - have for length, have in zip(lengths, x.shape[1:-2], strict=True)]
    if all(isinstance(n, int) and n == 0 for n in more):
        return x
    return F.pad(x, [0, 0, 0, 0, *(n for axis in reversed(more) for n in (0, axis))])


def _mask(rpb: Tensor | None, cuts: Sequence[_Cut], like: Tensor) -> Tensor:
    """Return bias and mask ``[cells, heads or 1, queries, keys]``."""
    sides = [2 * cut.axis.kernel_size - 1 for cut in cuts]
    table = like.new_zeros(1, *sides) if rpb is None else rpb.to(like.dtype)
    table = F.pad(table, (0, 1) * len(cuts), value=float("-inf"))
    entries = [cut.entries() for cut in cuts]
    # The last axis first: the others then move whole rows.
    for place in reversed(range(len(cuts))):
        table = table.index_select(place + 1, entries[place].flatten())
    table = table.reshape(table.shape[0], *(side for entry in entries for side in entry.shape))
    places = range(1, 3 * len(cuts) + 1, 3)
    table = table.permute(*places, 0, *(place + 1 for place in places), *(place + 2 for place in places))
    cells, queries, keys = (math.prod(entry.shape[i] for entry in entries) for i in range(3))
    return table.reshape(cells, -1, queries, keys)


def neighborhood_boxes(problem: Problem) -> tuple[Tensor, Tensor]:
    """Neighborhood attention by boxes of one size, with the log-sum-exp; see `api.na2d` for the arguments."""
    query, key, value, axes, scale, rpb, *more, with_lse = problem
    size, group = query.shape[1:-2], query.shape[-2] // key.shape[-2]
    if group > 1:
        key, value, *more = (None if x is None else x.repeat_interleave(group, dim=-2) for x in (key, value, *more))
    cuts = [_Cut(axis, query.device) for axis in axes]
    of_queries = [(cut.tiles, cut.tile, cut.axis.dilation) for cut in cuts]
    of_keys = [(cut.tiles, cut.box, cut.axis.dilation) for cut in cuts]

    key_index = [cut.keys() for cut in cuts]

    def boxes(x: Tensor) -> Tensor:
        x = _padded(x, [cut.ranks * cut.axis.dilation for cut in cuts])
        # Ranks and groups apart: a key's number is that of its rank.
        x = x.reshape(x.shape[0], *(n for cut in cuts for n in (cut.ranks, cut.axis.dilation)), *x.shape[-2:])
        for place, index in enumerate(key_index):
            x = x.index_select(2 * place + 1, index)
        return _arranged(x, of_keys)

    query = _arranged(_padded(query, [math.prod(axis) for axis in of_queries]), of_queries) * scale
    scores = query @ boxes(key).transpose(-1, -2) + _mask(rpb, cuts, query)
    if more[0] is not None:
        seen, extra_values = (x.transpose(1, 2).unsqueeze(1) for x in more)
        scores = torch.cat([scores, query @ seen.transpose(-1, -2)], dim=-1)
    # exp(-60) adds nothing, but of the mask's own numbers onnxruntime's Softmax makes denormal ones, which are slow.
    scores = torch.maximum(scores, scores.amax(-1, keepdim=True) - _LEAST)
    weights = scores.softmax(-1)
    own = weights[..., : weights.shape[-1] - more[0].shape[1]] if more[0] is not None else weights
    out = own @ boxes(value)
    if more[0] is not None:
        out = out + weights[..., own.shape[-1] :] @ extra_values
    crop = (slice(None), *(slice(length) for length in size))
    lse = _restored(scores.logsumexp(-1, keepdim=True), of_queries)[crop].squeeze(-1) if with_lse else None
    return _restored(out, of_queries)[crop], lse
