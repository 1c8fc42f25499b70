"""Neighborhood attention for exported graphs: all tiles in one batch, cut and masked by arithmetic on positions.

As in `tiled`, a tile of queries attends to the smallest box of keys that holds their windows. Here all boxes are of one
size, a tile's number says where it lies, and the relative position bias is gathered by row and column; so a graph has
as many nodes for a map of any size, no tables but of an axis's length, and the map's sides may be unknown until it is
run. Numbers aren't looked at: a key or value that is NaN or infinite makes NaN of every query whose box holds it,
whether its window does or not.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import chain

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

    @property
    def is_whole(self) -> bool:
        """Whether it is known that a single box holds all ranks."""
        return self._known and self.tiles == 1 and self.box == self.ranks

    def _starts(self) -> Tensor:
        """Return the first key of every tile's box, ``[tiles]``."""
        before = self.axis.kernel_size - 1 if self.axis.is_causal else self.axis.kernel_size // 2
        first = torch.arange(self.tiles, device=self._device) * self.tile - (before + self._slack)
        return first.clamp(max=self.ranks - self.box).clamp(min=0)

    def _boxes(self) -> Tensor:
        """Return the ranks of all boxes' keys, ``[tiles, box]``; of axes shorter than a box some beyond the end."""
        return self._starts()[:, None] + torch.arange(self.box, device=self._device)

    def keys(self) -> Tensor:
        """Return the ranks of all boxes' keys, ``[tiles, box]``; in place of those beyond the end the last."""
        if self._known:
            return torch.from_numpy(self._known_keys()).to(self._device)
        return self._boxes().clamp(max=self.ranks - 1)

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


def _moved(x: Tensor, sides: Sequence[int], order: Iterable[int]) -> Tensor:
    """Permute the axes of ``x`` when it is reshaped to ``sides``; but for those of one entry, which cost time."""
    places = [i for i, side in enumerate(sides) if not (isinstance(side, int) and side == 1)]
    return x.reshape([sides[i] for i in places]).permute([places.index(i) for i in order if i in places])


def _arranged(x: Tensor, shape: Sequence[tuple[int, int, int]]) -> Tensor:
    """Return ``[B, groups * heads, tiles, tokens, dim]`` of a map whose axes are each (tiles, tokens, groups)."""
    (batch, *_, heads, dim), rank = x.shape, len(shape)
    tiles, tokens, groups = (range(1 + part, 3 * rank + 1, 3) for part in range(3))
    x = _moved(
        x,
        [batch, *(side for axis in shape for side in axis), heads, dim],
        (0, *groups, 3 * rank + 1, *tiles, *tokens, 3 * rank + 2),
    )
    tiles, tokens, groups = (math.prod(axis[part] for axis in shape) for part in range(3))
    return x.reshape(batch, groups * heads, tiles, tokens, dim)


def _restored(x: Tensor, shape: Sequence[tuple[int, int, int]], heads: int) -> Tensor:
    """Return the map ``[B, *spatial, heads, dim]`` of which `_arranged` made ``x``."""
    batch, dim, rank = x.shape[0], x.shape[-1], len(shape)
    tiles, tokens, groups = ([axis[part] for axis in shape] for part in range(3))
    places = [i for axis in range(1, rank + 1) for i in (rank + 1 + axis, 2 * rank + 1 + axis, axis)]
    x = _moved(x, [batch, *groups, heads, *tiles, *tokens, dim], (0, *places, rank + 1, 3 * rank + 2))
    return x.reshape(batch, *(math.prod(axis) for axis in shape), heads, dim)


def _padded(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Pad the spatial axes of ``[B, *spatial, heads, dim]`` with zeros to ``lengths``."""
    more = [length - have for length, have in zip(lengths, x.shape[1:-2], strict=True)]
    if all(isinstance(n, int) and n == 0 for n in more):
        return x
    return F.pad(x, [0, 0, 0, 0, *(n for axis in reversed(more) for n in (0, axis))])


def _mask(rpb: Tensor | None, cuts: Sequence[_Cut], like: Tensor, heads: int) -> Tensor:
    """Return bias and mask ``[groups * heads, tiles, queries, keys]``, or of one head for all."""
    sides = [2 * cut.axis.kernel_size - 1 for cut in cuts]
    alike = all(cut.axis.dilation == 1 for cut in cuts)
    table = like.new_zeros(1 if alike else heads, *sides) if rpb is None else rpb.to(like.dtype)
    table = F.pad(table, (0, 1) * len(cuts), value=float("-inf"))
    entries = [cut.entries() for cut in cuts]
    # The last axis first: the others then move whole rows.
    for place in reversed(range(len(cuts))):
        table = table.index_select(place + 1, entries[place].flatten())
    shape = [(cut.axis.dilation, cut.tiles, cut.tile, cut.box) for cut in cuts]
    groups, *others = (range(1 + part, 4 * len(cuts) + 1, 4) for part in range(4))
    table = _moved(table, [len(table), *(side for axis in shape for side in axis)], (*groups, 0, *chain(*others)))
    return table.reshape(-1, *(math.prod(axis[part] for axis in shape) for part in (1, 2, 3)))


def _places(cuts: Sequence[_Cut]) -> Tensor:
    """Return where the keys of all boxes lie among the ranks of a map, ``[tiles * keys]``."""
    place, *others = (cut.keys() for cut in cuts)
    for keys, cut in zip(others, cuts[1:], strict=True):
        place = place[..., None, None] * cut.ranks + keys
    rank = len(cuts)
    return place.permute(*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)).flatten()


def neighborhood_boxes(problem: Problem) -> tuple[Tensor, Tensor]:
    """Neighborhood attention by boxes of one size, with the log-sum-exp; see `api.na2d` for the arguments."""
    query, key, value, axes, scale, rpb, *more, with_lse = problem
    size, group = query.shape[1:-2], query.shape[-2] // key.shape[-2]
    if group > 1:
        key, value, *more = (None if x is None else x.repeat_interleave(group, dim=-2) for x in (key, value, *more))
    cuts = [_Cut(axis, query.device) for axis in axes]
    of_queries = [(cut.tiles, cut.tile, cut.axis.dilation) for cut in cuts]
    of_ranks = [(1, cut.ranks, cut.axis.dilation) for cut in cuts]
    heads, groups = query.shape[-2], math.prod(cut.axis.dilation for cut in cuts)
    places = None if all(cut.is_whole for cut in cuts) else _places(cuts)

    def boxes(x: Tensor) -> Tensor:
        x = _padded(x, [cut.ranks * cut.axis.dilation for cut in cuts])
        x = _arranged(x, of_ranks)
        if places is None:
            return x
        x = x.squeeze(2).index_select(2, places)
        return x.reshape(*x.shape[:2], -1, math.prod(cut.box for cut in cuts), x.shape[-1])

    query = _arranged(_padded(query, [math.prod(axis) for axis in of_queries]), of_queries) * scale
    scores = query @ boxes(key).transpose(-1, -2) + _mask(rpb, cuts, query, heads)
    if more[0] is not None:
        seen, extra_values = (x.transpose(1, 2).repeat(1, groups, 1, 1).unsqueeze(2) for x in more)
        scores = torch.cat([scores, query @ seen.transpose(-1, -2)], dim=-1)
    # exp(-60) adds nothing, but of the mask's own numbers onnxruntime's Softmax makes denormal ones, which are slow.
    scores = torch.maximum(scores, scores.amax(-1, keepdim=True) - _LEAST)
    weights = scores.softmax(-1)
    own = weights[..., : weights.shape[-1] - more[0].shape[1]] if more[0] is not None else weights
    out = own @ boxes(value)
    if more[0] is not None:
        out = out + weights[..., own.shape[-1] :] @ extra_values
    crop = (slice(None), *(slice(length) for length in size))
    lse = _restored(scores.logsumexp(-1, keepdim=True), of_queries, heads)[crop].squeeze(-1) if with_lse else None
    return _restored(out, of_queries, heads)[crop], lse
