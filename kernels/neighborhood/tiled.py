"""Neighborhood attention by tiles, in plain torch: a few dense attentions instead of one window per query.

The map is cut into tiles of queries, and a tile attends to the smallest box of keys that holds its windows. What a
query must not see is masked, and the relative position bias rides in the same tensor as the mask, so that a tile is
one scaled_dot_product_attention. Two choices keep the rest cheap:

* The last axis (columns) is cut by one gather into ``[..., column in tile, tile]``. A row of tiles is then a slice of
  the other axes, and its tiles are extra heads of one attention call, whose mask broadcasts over the batch.
* Tiles are small: work grows with the box of keys, not with the window.

A dilation is a permutation of each axis by group; tiles are cut within the groups.

Nothing but the operands is kept for the backward pass, which computes the scores again, a row of tiles at a time.

What a query must not see has a weight of zero, and zero times NaN is NaN. So where numbers are not finite, products are
taken of the finite ones alone, and NaN put where a pair that is seen has another (`_product`). Graphs that are traced,
and torch.func's transforms, which can't look at numbers, multiply as they are.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import exporting, in_forward_mode, is_transforming
from .problem import Problem
from .window import Axis, axis_offsets, axis_ranges, flatten_axes, unflatten_axes


class _Tile(NamedTuple):
    """One tile on one axis; positions are in the axis's order by dilation group."""

    queries: np.ndarray  # [T]
    keys: np.ndarray  # [S], consecutive
    entries: np.ndarray  # [T, S] entry of the axis's bias table, or its last one for a key out of the window


class _RowOfTiles(NamedTuple):
    """One attention call: slices of the axes before the last, and the number of its mask."""

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    mask: int


class _Plan(NamedTuple):
    """How a map is cut. Token indices are flat, row-major."""

    rows: list[_RowOfTiles]
    query_index: np.ndarray  # tokens in the order [..., Tx, tiles]
    key_index: np.ndarray  # tokens in the order [..., Sx, tiles]
    output_index: np.ndarray  # where each token lies in the rows' outputs, one after another
    tiles: int  # on the last axis, its dilation groups counted in
    masks: list[tuple[np.ndarray, ...]]  # distinct masks: entries of each axis before the last, [T, S]
    column_entries: np.ndarray  # [tiles, Tx, Sx]
    columns: tuple[np.ndarray, np.ndarray]  # [Tx * tiles] and [Sx * tiles]: those of the tiles' queries and keys
    repeated: np.ndarray | None  # [Tx * tiles], whether a query is there again to fill its tile; None if none is


def _axis_order(axis: Axis) -> np.ndarray:
    """Return the positions of an axis, ordered by dilation group."""
    return np.concatenate([np.arange(group, axis.length, axis.dilation) for group in range(axis.dilation)])


def _group_parts(axis: Axis, tile_length: int) -> Iterator[np.ndarray]:
    """Yield the positions of each tile's queries; no tile crosses a dilation group."""
    for group in range(axis.dilation):
        positions = np.arange(group, axis.length, axis.dilation)
        yield from np.array_split(positions, -(-len(positions) // tile_length))


def _axis_tiles(axis: Axis, tile_length: int, biased: bool) -> list[_Tile]:
    """Cut an axis into tiles of at most ``tile_length`` queries."""
    first, count = axis_ranges(axis)
    offsets = axis_offsets(axis)
    place = np.empty(axis.length, dtype=np.int64)
    place[_axis_order(axis)] = np.arange(axis.length)
    outside = 2 * axis.kernel_size - 1
    tiles = []
    for queries in _group_parts(axis, tile_length):
        last = first[queries] + axis.dilation * (count[queries] - 1)
        keys = np.arange(first[queries].min(), last.max() + 1, axis.dilation)
        step = (keys - first[queries, None]) // axis.dilation
        seen = (step >= 0) & (step < count[queries, None])
        entries = np.where(seen, offsets[queries, None] + step if biased else 0, outside)
        tiles.append(_Tile(place[queries], place[keys], entries))
    return tiles


def _level(tiles: list[_Tile]) -> _Tile:
    """Stack tiles of different sizes: the last query is repeated, the last key too but out of every window."""
    query_count = max(len(tile.queries) for tile in tiles)
    key_count = max(len(tile.keys) for tile in tiles)
    outside = max(tile.entries.max() for tile in tiles)
    levelled = []
    for queries, keys, entries in tiles:
        more_queries, more_keys = query_count - len(queries), key_count - len(keys)
        entries = np.pad(entries, ((0, 0), (0, more_keys)), constant_values=outside)
        levelled.append(
            _Tile(
                np.pad(queries, (0, more_queries), mode="edge"),
                np.pad(keys, (0, more_keys), mode="edge"),
                np.pad(entries, ((0, more_queries), (0, 0)), mode="edge"),
            )
        )
    return _Tile(*(np.stack(part) for part in zip(*levelled, strict=True)))


def _tile_length(axis: Axis) -> int:
    """Return the tile length of an axis that costs least: query-key pairs, and keys at the price of 2.5 queries.

    Shorter tiles than four queries would compute fewer pairs, but not faster: calls and gathers begin to dominate.
    """
    first, count = axis_ranges(axis)
    last = first + axis.dilation * (count - 1)

    def cost(tile_length: int) -> float:
        parts = list(_group_parts(axis, tile_length))
        most_keys = max((last[part].max() - first[part].min()) // axis.dilation + 1 for part in parts)
        return len(parts) * (max(map(len, parts)) + 2.5) * int(most_keys)

    longest = -(-axis.length // axis.dilation)
    return min(range(min(4, longest), min(max(16, axis.stride), longest) + 1), key=cost)


@functools.lru_cache(maxsize=256)
def _plan(axes: tuple[Axis, ...], biased: bool) -> _Plan:
    *leading, last = axes
    columns = _level(_axis_tiles(last, _tile_length(last), biased))
    tiles = len(columns.queries)
    column_order = _axis_order(last)

    # Flat index of every position of the leading axes, in the order of their groups.
    lead_index = np.zeros((), dtype=np.int64)
    for axis in leading:
        lead_index = lead_index[..., None] * axis.length + _axis_order(axis)
    lead_index = lead_index[..., None, None] * last.length
    query_index = lead_index + column_order[columns.queries.T]
    key_index = lead_index + column_order[columns.keys.T]

    rows, masks, outputs = [], {}, []
    for row in itertools.product(*(_axis_tiles(axis, _tile_length(axis), biased) for axis in leading)):
        identity = tuple((tile.entries.shape, tile.entries.tobytes()) for tile in row)
        mask = masks.setdefault(identity, (len(masks), tuple(tile.entries for tile in row)))[0]
        queries = tuple(slice(int(tile.queries[0]), int(tile.queries[-1]) + 1) for tile in row)
        keys = tuple(slice(int(tile.keys[0]), int(tile.keys[-1]) + 1) for tile in row)
        rows.append(_RowOfTiles(queries, keys, mask))
        outputs.append(query_index[queries].ravel())
    output = np.concatenate(outputs)
    output_index = np.empty(math.prod(axis.length for axis in axes), dtype=np.int64)
    output_index[output] = np.arange(output.size)
    own = np.diff(columns.queries, axis=1, prepend=-1).T.ravel() != 0
    return _Plan(
        rows=rows,
        query_index=query_index.ravel(),
        key_index=key_index.ravel(),
        output_index=output_index,
        tiles=tiles,
        masks=[entries for _, entries in masks.values()],
        column_entries=columns.entries,
        columns=(column_order[columns.queries.T].ravel(), column_order[columns.keys.T].ravel()),
        repeated=None if own.all() else ~own,
    )


def clear_plans() -> None:
    """Forget how maps are cut; at most 256 shapes are remembered."""
    _plan.cache_clear()


def _mask(entries: Sequence[np.ndarray], column_entries: np.ndarray, table: Tensor) -> Tensor:
    """Return bias and mask of a row of tiles, ``[tiles * heads, queries, keys]``.

    Args:
        entries: Entries ``[T, S]`` of each axis before the last.
        column_entries: Entries ``[tiles, Tx, Sx]`` of the last axis.
        table: Bias by entry, ``[heads, ...]``, with -inf in the last entry of every axis.
    """
    for i, index in enumerate((*entries, column_entries)):
        table = table.index_select(i + 1, torch.from_numpy(index.ravel()).to(table.device))
    shapes = [*(index.shape for index in entries), column_entries.shape]
    table = table.reshape(table.shape[0], *itertools.chain(*shapes))
    rank, tiles = len(entries), table.ndim - 3
    queries = [*range(1, 2 * rank, 2), tiles + 1]
    keys = [*range(2, 2 * rank + 1, 2), tiles + 2]
    table = table.permute(tiles, 0, *queries, *keys)
    return table.flatten(rank + 3).flatten(2, rank + 2).flatten(0, 1)


def all_finite(*tensors: Tensor | None) -> bool:
    """Return whether every number is finite, or can't be looked at."""
    if torch.compiler.is_compiling() or exporting() or is_transforming():
        return True
    tensors = [x.detach() for x in tensors if x is not None]
    if any(type(x) is not Tensor or x.is_meta for x in tensors):  # fake ones have no numbers
        return True
    # A sum that overflows is taken for a number that is not finite, which costs time and nothing else.
    return bool(sum(x.sum(dtype=_lse_dtype(x)) for x in tensors).isfinite())


def product_of_seen(weights: Tensor, x: Tensor, seen: Tensor) -> Tensor:
    """Return ``weights @ x`` where pairs that are not ``seen`` have no part, whatever their numbers."""
    # On some CPUs a row's NaN reaches the next one in torch's products of bfloat16.
    bad, exact = ~x.isfinite(), _lse_dtype(x)
    out = weights.masked_fill(~seen, 0).to(exact) @ x.masked_fill(bad, 0).to(exact)
    return out.masked_fill(seen.to(exact) @ bad.to(exact) > 0, float("nan")).to(x.dtype)


def _product(weights: Tensor, x: Tensor, seen: Tensor | None) -> Tensor:
    return weights @ x if seen is None else product_of_seen(weights, x, seen)


def _scores(query: Tensor, key: Tensor, mask: Tensor, scale: float, seen: Tensor | None) -> Tensor:
    exact = _lse_dtype(query)
    if seen is None:
        return (query * scale @ key.transpose(-1, -2)).to(exact) + mask
    return (query.to(exact) * scale @ key.transpose(-1, -2).to(exact) + mask).masked_fill(~seen, float("-inf"))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, with_lse: bool, finite: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of ``[B, heads, tokens, dim]`` with a mask ``[heads, queries, keys]``; the log-sum-exp on request."""
    if not with_lse and finite:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[None], scale=scale), None
    seen = None if finite else mask != float("-inf")
    scores = _scores(query, key, mask, scale, seen)
    return _product(scores.softmax(-1).to(value.dtype), value, seen), scores.logsumexp(-1)


def _lse_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _table(rpb: Tensor | None, query: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Return the bias by entry, ``[heads, ...]``, with one more entry on every axis, -inf: for keys outside."""
    heads = query.shape[-2]
    table = query.new_zeros(heads, *(2 * axis.kernel_size - 1 for axis in axes)) if rpb is None else rpb
    return F.pad(table.to(query.dtype), (0, 1) * len(axes), value=float("-inf"))


def _masks(plan: _Plan, table: Tensor, more: int) -> list[Tensor]:
    """Return the distinct masks of the rows of tiles, with so many more keys that every query sees."""
    return [F.pad(_mask(entries, plan.column_entries, table), (0, more)) for entries in plan.masks]


def _of_all_tiles(plan: _Plan, *additional: Tensor | None) -> list[Tensor]:
    """Return additional keys and values as every row of tiles takes them, ``[B, tiles * heads, N, dim]``."""
    return [x.transpose(1, 2).repeat(1, plan.tiles, 1, 1) for x in additional if x is not None]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    axes: tuple[Axis, ...],
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend with as many heads of keys as of queries, on two axes or more."""
    spatial, heads = query.shape[1:-2], query.shape[-2]
    finite = all_finite(query, key, value, rpb, additional_keys, additional_values)
    plan = _plan(axes, rpb is not None)
    lead = [axis.length for axis in axes[:-1]]
    query_index, key_index, output_index = (
        torch.from_numpy(index).to(query.device) for index in (plan.query_index, plan.key_index, plan.output_index)
    )

    def cut(x: Tensor, index: Tensor) -> Tensor:  # to [B, *lead, column in tile, tiles * heads, dim]
        dim = x.shape[-1]
        x = x.flatten(-2).flatten(1, -2).index_select(1, index)
        return x.unflatten(2, (heads, dim)).unflatten(1, (*lead, -1, plan.tiles)).flatten(-3, -2)

    masks = _masks(plan, _table(rpb, query, axes), 0 if additional_keys is None else additional_keys.shape[1])
    query, key, value = cut(query, query_index), cut(key, key_index), cut(value, key_index)
    more = _of_all_tiles(plan, additional_keys, additional_values)
    outputs, lses = [], []
    for row in plan.rows:
        tokens = [
            x[(slice(None), *part)].flatten(1, -3).transpose(1, 2)
            for x, part in ((query, row.queries), (key, row.keys), (value, row.keys))
        ]
        if more:
            tokens[1:] = (torch.cat(parts, 2) for parts in zip(tokens[1:], more, strict=True))
        output, lse = _attend(*tokens, masks[row.mask], scale, with_lse, finite)
        outputs.append(output.transpose(1, 2))
        lses.append(lse)

    def join(parts: list[Tensor]) -> Tensor:  # from [B, tokens in tile, tiles * heads, ...] a row to [B, *spatial, ...]
        x = torch.cat(parts, 1).unflatten(2, (plan.tiles, heads)).flatten(1, 2)
        return x.flatten(2).index_select(1, output_index).unflatten(2, x.shape[2:]).unflatten(1, spatial)

    return join(outputs), join([lse.transpose(1, 2) for lse in lses]) if with_lse else None


class _Rows:
    """Takes rows of tiles out of a map in the order of its dilation groups, and adds rows to such a map."""

    def __init__(self, plan: _Plan, columns: np.ndarray, heads: int, device: torch.device):
        self._columns, self._tiles, self._heads = torch.from_numpy(columns).to(device), plan.tiles, heads

    def take(self, x: Tensor, part: tuple[slice, ...], unseen: Tensor | None = None) -> Tensor:
        """Return ``[B, tiles * heads, tokens, dim]`` of ``[B, *spatial, heads, dim]``, zero in columns ``unseen``."""
        x = x[(slice(None), *part)].index_select(-3, self._columns)
        if unseen is not None:
            x = x.masked_fill(unseen[:, None, None], 0)
        return x.unflatten(-3, (-1, self._tiles)).flatten(-3, -2).flatten(1, -3).transpose(1, 2)

    def add(self, total: Tensor, part: tuple[slice, ...], x: Tensor) -> None:
        """Add what `take` would return to where it would take it from."""
        total = total[(slice(None), *part)]
        x = x.transpose(1, 2).unflatten(-2, (self._tiles, self._heads))
        total.index_add_(-3, self._columns, x.unflatten(1, (*total.shape[1:-3], -1)).flatten(-4, -3).to(total.dtype))


def _by_group(x: Tensor, axes: Sequence[Axis], back: bool = False) -> Tensor:
    """Order the axes of ``[B, *spatial, ...]`` before the last by dilation group, or put them back."""
    for i, axis in enumerate(axes[:-1]):
        if axis.dilation > 1:
            order = _axis_order(axis)
            x = x.index_select(i + 1, torch.from_numpy(np.argsort(order) if back else order).to(x.device))
    return x


def _bias_gradient(entries: Sequence[np.ndarray], column_entries: np.ndarray, grad: Tensor, table: Tensor) -> Tensor:
    """Add up the gradient of a `_mask` by entry of the table: the transpose of what makes the mask of the table."""
    heads, tiles = table.shape[0], len(column_entries)
    queries = [*(index.shape[0] for index in entries), column_entries.shape[1]]
    keys = [*(index.shape[1] for index in entries), column_entries.shape[2]]
    rank = len(queries)
    grad = grad.reshape(tiles, heads, *queries, *keys)
    pairs = [axis for i in range(rank - 1) for axis in (2 + i, 2 + rank + i)]
    grad = grad.permute(1, *pairs, 0, 1 + rank, 1 + 2 * rank)
    for i, index in enumerate((*entries, column_entries)):
        grad = grad.flatten(i + 1, i + index.ndim)
        total = grad.new_zeros(*grad.shape[: i + 1], table.shape[i + 1], *grad.shape[i + 2 :])
        grad = total.index_add_(i + 1, torch.from_numpy(index.ravel()).to(grad.device), grad)
    return grad


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    tensors: Sequence[Tensor | None],
    axes: tuple[Axis, ...],
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `_forward`'s ``tensors``; made of differentiable operators."""
    query, key, value, rpb, additional_keys, additional_values = tensors
    heads, extra = query.shape[-2], 0 if additional_keys is None else additional_keys.shape[1]
    finite = all_finite(*tensors, grad_out, grad_lse)
    plan = _plan(axes, rpb is not None)
    table = _table(rpb, query, axes)
    masks = _masks(plan, table, extra)
    of_queries, of_keys = (_Rows(plan, columns, heads, query.device) for columns in plan.columns)
    repeated = None if plan.repeated is None else torch.from_numpy(plan.repeated).to(query.device)
    operands = [query, key, value, additional_keys, additional_values]
    query, key, value, grad_out = (_by_group(x, axes) for x in (query, key, value, grad_out))
    grad_lse = None if grad_lse is None else _by_group(grad_lse.unsqueeze(-1), axes)
    more = _of_all_tiles(plan, additional_keys, additional_values)
    grads, mask_grads = None, [None] * len(masks)
    for row in plan.rows:
        q, k, v = of_queries.take(query, row.queries), of_keys.take(key, row.keys), of_keys.take(value, row.keys)
        grad = of_queries.take(grad_out, row.queries, repeated)
        if more:
            k, v = (torch.cat(parts, 2) for parts in zip((k, v), more, strict=True))
        mask = masks[row.mask]
        seen = back = None
        if not finite:
            seen = mask != float("-inf")
            back = seen.transpose(-1, -2)
        weights = _scores(q, k, mask, scale, seen).softmax(-1)
        value_grad = (grad @ v.transpose(-1, -2)).to(weights.dtype)
        if not finite:
            weights, value_grad = weights.masked_fill(~seen, 0), value_grad.masked_fill(~seen, 0)
        score_grad = weights * value_grad
        share = score_grad.sum(-1, keepdim=True)
        if grad_lse is not None:
            share = share - of_queries.take(grad_lse, row.queries, repeated)
        score_grad = score_grad - weights * share
        if rpb is not None:
            own = score_grad[..., : score_grad.shape[-1] - extra].sum(0)
            mask_grads[row.mask] = own if mask_grads[row.mask] is None else mask_grads[row.mask] + own
        if grads is None:  # of a tensor that depends on all operands, for vmap
            grads = [None if x is None else score_grad.new_zeros(x.shape) for x in operands]
        scores = (score_grad * scale).to(q.dtype)
        of_queries.add(grads[0], row.queries, _product(scores, k, seen))
        for i, of_pairs, others in ((1, scores, q), (2, weights.to(q.dtype), grad)):
            x = _product(of_pairs.transpose(-1, -2), others, back)
            of_keys.add(grads[i], row.keys, x[:, :, : x.shape[2] - extra])
            if extra:
                grads[i + 2] += x[:, :, x.shape[2] - extra :].unflatten(1, (-1, heads)).sum(1).transpose(1, 2)
    bias_grad = None
    if rpb is not None:
        parts = zip(plan.masks, mask_grads, strict=True)
        bias_grad = sum(_bias_gradient(entries, plan.column_entries, grad, table) for entries, grad in parts)
        bias_grad = bias_grad[(slice(None), *(slice(-1),) * len(axes))].to(rpb.dtype)
    grads[:3] = (_by_group(x, axes, back=True) for x in grads[:3])
    grads = [None if x is None else grad.to(x.dtype) for grad, x in zip(grads, operands, strict=True)]
    return *grads[:3], bias_grad, *grads[3:]


class _Tiled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments) -> tuple[Tensor, Tensor | None]:
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.axes, ctx.scale, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None):
        tensors = ctx.saved_tensors  # once: under checkpointing each reading computes them
        query, _, value, *_ = tensors
        if grad_out is None:
            grad_out = query.new_zeros(*query.shape[:-1], value.shape[-1])
        return *_backward(grad_out, grad_lse, tensors, ctx.axes, ctx.scale), None, None, None


def obstacle() -> str | None:
    """Return why the tiled path cannot run, or None if it can."""
    return "it carries no derivatives along; boxes do" if in_forward_mode() else None


# The plan is made in numpy; torch.compile takes the whole function as it is and compiles the tensor part.
@torch.compiler.allow_in_graph
def neighborhood_tiled(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Neighborhood attention by tiles; see `api.na2d` for the arguments."""
    query, key, value, axes, scale, rpb, *more, with_lse = problem
    # Where torch.compile leaves sizes open, a plan is of certain ones: others compile again.
    axes = unflatten_axes(flatten_axes(axes))
    heads, line = query.shape[-2], len(axes) == 1
    if heads != key.shape[-2]:
        group = heads // key.shape[-2]
        key, value, *more = (None if x is None else x.repeat_interleave(group, dim=-2) for x in (key, value, *more))
    if line:  # a map of one row
        axes = (Axis(1, 1), *axes)
        query, key, value, rpb = (None if x is None else x.unsqueeze(1) for x in (query, key, value, rpb))
    # An exported graph must consist of torch's own operators.
    attend = _forward if exporting() or not torch.is_grad_enabled() else _Tiled.apply
    out, lse = attend(query, key, value, rpb, *more, axes, scale, with_lse)
    if line:
        out, lse = out.squeeze(1), None if lse is None else lse.squeeze(1)
    return out, lse
