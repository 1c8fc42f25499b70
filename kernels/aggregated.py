"""Aggregated attention: each position sees its window and a pooled map in one softmax (TransNeXt, arXiv 2311.17132).

The window is cut at the map's borders: what lies outside has no weight. The neighborhood operators shift theirs
inwards; here they run on a map with a margin, whose own windows are thrown away, so that all others lie free.
"""

import functools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import exporting, in_forward_mode
from .neighborhood.tiled import all_finite
from .neighborhood.unfused import na2d_av, na2d_qk
from .rows import join_rows, rows_at_once, run_rows


@functools.lru_cache(maxsize=128)
def _mask(height: int, width: int, window: int) -> np.ndarray:
    step = np.arange(window) - window // 2
    rows, columns = (np.arange(length)[:, None] + step for length in (height, width))
    rows, columns = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(height, width, -1)


@torch.compiler.allow_in_graph
def window_mask(height: int, width: int, window: int) -> Tensor:
    """Return which keys of each position's window lie on the map, ``[H, W, window * window]``, row-major."""
    return torch.tensor(_mask(*map(int, (height, width, window))))


def window_tokens(queries: Tensor, height: int, width: int, window: int) -> Tensor:
    """Return the keys of some queries' windows, ``[Q, window * window]``, row-major, -1 beyond the map."""
    step = torch.arange(window, device=queries.device) - window // 2
    rows, columns = queries[:, None] // width + step, queries[:, None] % width + step
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    return torch.where(inside, rows[:, :, None] * width + columns[:, None], -1).flatten(1)


def _margin(x: Tensor, window: int) -> Tensor:
    """Return ``x`` ``[B, H, W, heads, n]`` with zeros around it."""
    reach = window // 2
    return F.pad(x, [0, 0, 0, 0, reach, reach, reach, reach])


def _middle(x: Tensor, window: int) -> Tensor:
    reach = window // 2
    return x[:, reach : x.shape[1] - reach, reach : x.shape[2] - reach]


def _without_margin(window: int, *seen: Tensor) -> bool:
    """Return whether to work on the maps ``seen``, whose windows shift, and to move what belongs to the borders.

    That overwrites parts of results, which is for no graph and no gradient. What a shifted window sees and a free one
    does not has weights of zero, which keep no NaN out.
    """
    fits = min(seen[0].shape[1:3]) >= window
    taken = fits and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or exporting())
    return taken and not in_forward_mode() and all_finite(*seen)


def _move_borders(x: Tensor, window: int, to_free: bool) -> None:
    """Move the entries ``[B, H, W, heads, window, window]`` of border windows from the shifted to the free window.

    A free window's entries beyond the map are left alone. The other way, without ``to_free``, entries of the shifted
    window that the free one lacks become 0.
    """
    reach = window // 2
    for axis in (1, 2):
        length, slots = x.shape[axis], axis + 3
        # The middle position of a map as short as the window has its free window.
        for i in range(reach):
            for position, by in ((i, reach - i), (length - 1 - i, i - reach)):
                border = x.select(axis, position).movedim(slots - 1, 0)
                source, target = (slice(None, -by), slice(by, None)) if by > 0 else (slice(-by, None), slice(None, by))
                if not to_free:
                    source, target = target, source
                border[target] = border[source].clone()
                if not to_free:
                    border[slice(-by, None) if by > 0 else slice(None, -by)] = 0


def _moved_scores(query: Tensor, key: Tensor, window: int, backend: str | None) -> Tensor:
    """Return what `cut_window_scores` does, but anything where a window leaves the map."""
    scores = na2d_qk(query, key, window, backend=backend)
    _move_borders(scores.unflatten(-1, (window, window)), window, to_free=True)
    return scores


def _moved_values(weights: Tensor, value: Tensor, window: int, backend: str | None) -> Tensor:
    """Return what `cut_window_values` does; overwrites the weights."""
    _move_borders(weights.unflatten(-1, (window, window)), window, to_free=False)
    return na2d_av(weights, value, window, backend=backend)


def cut_window_scores(query: Tensor, key: Tensor, window: int, *, backend: str | None = None) -> Tensor:
    """Return the products of each query with the keys of its free window; 0 where a window leaves the map.

    Args:
        query: ``[B, H, W, heads, dim]``.
        key: Same shape and dtype.
        window: Odd side of the window, from 3.
        backend: As in `na2d_qk`.

    Returns:
        ``[B, H, W, heads, window * window]``, keys row-major.
    """
    if _without_margin(window, key):
        scores = _moved_scores(query, key, window, backend)
        return scores.masked_fill_(~window_mask(*map(int, query.shape[1:3]), window).to(query.device)[:, :, None], 0)
    scores = na2d_qk(_margin(query, window), _margin(key, window), window, backend=backend)
    return _middle(scores, window)


def cut_window_values(weights: Tensor, value: Tensor, window: int, *, backend: str | None = None) -> Tensor:
    """Return the sums of each free window's values by weights; beyond the map there are none, whatever their weight.

    Args:
        weights: ``[B, H, W, heads, window * window]``.
        value: ``[B, H, W, heads, dim]``.
        window: Odd side of the window, from 3.
        backend: As in `na2d_av`.

    Returns:
        ``[B, H, W, heads, dim]`` in the dtype of ``value``.
    """
    if _without_margin(window, value):
        weights = weights.clone(memory_format=torch.contiguous_format)
        return _moved_values(weights, value, window, backend)
    sums = na2d_av(_margin(weights, window), _margin(value, window), window, backend=backend)
    return _middle(sums, window)


def _infer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled: tuple[Tensor, Tensor],
    local_bias: Tensor,
    pool_bias: Callable[[int, int], Tensor],
    added_weights: Tensor | None,
    rows: int,
    backend: str | None,
) -> Tensor:
    """Return what `aggregated_attention` does, every number written once; without gradients.

    ``pooled`` are key and value; so many ``rows`` are taken at a time.
    """
    height, width = map(int, query.shape[1:3])
    slots = local_bias.shape[-1]
    window = math.isqrt(slots)
    local = _moved_scores(query, key, window, backend)
    window_weights = torch.empty_like(local, dtype=value.dtype, memory_format=torch.contiguous_format)
    pooled_key, pooled_value = pooled[0].permute(0, 2, 3, 1), pooled[1].transpose(1, 2)
    sums = []
    for first in range(0, height, rows):
        end = min(first + rows, height)
        products = query[:, first:end].flatten(1, 2).transpose(1, 2) @ pooled_key
        scores = local_bias.new_empty(*products.shape[:-1], slots + products.shape[-1])
        bias = local_bias[first:end].flatten(0, 1).transpose(0, 1)
        torch.add(local[:, first:end].flatten(1, 2).transpose(1, 2), bias, out=scores[..., :slots])
        torch.add(products, pool_bias(first, end), out=scores[..., slots:])
        weights = scores.softmax(-1)
        inside = weights[..., :slots].transpose(1, 2).unflatten(1, (end - first, width))
        part = window_weights[:, first:end]
        if added_weights is None:
            part.copy_(inside)
        else:
            torch.add(inside.to(part.dtype), added_weights[:, first:end].to(part.dtype), out=part)
        sums.append(weights[..., slots:].to(value.dtype) @ pooled_value)
    out = _moved_values(window_weights, value, window, backend)
    return out.add_(join_rows(sums).transpose(1, 2).unflatten(1, (height, width)))


def _softmax_rows(
    query: Tensor, local: Tensor, pooled_key: Tensor, pooled_value: Tensor, pool_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the window's weights ``[B, heads, n, slots]`` and the pooled part ``[B, heads, n, dim]`` of some rows."""
    slots = local.shape[-1]
    pooled = query.flatten(1, 2).transpose(1, 2) @ pooled_key.permute(0, 2, 3, 1)
    scores = torch.cat([local.flatten(1, 2).transpose(1, 2), (pooled + pool_bias).to(local.dtype)], -1)
    weights = scores.softmax(-1).to(pooled_value.dtype)
    return weights[..., :slots], weights[..., slots:] @ pooled_value.transpose(1, 2)


def aggregated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    local_bias: Tensor,
    bias_table: Tensor,
    pool_bias: Callable[[Tensor, int, int], Tensor],
    added_weights: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attend to the window around each position and to a pooled map, by one softmax over both.

    The scores with the pooled map are made for some rows at a time, and again in the backward pass, so that memory
    grows with the map's positions and not with their product with the pooled ones. Gradients of any order.

    Args:
        query: ``[B, H, W, heads, dim]``, scaled.
        key: Same shape and dtype.
        value: Same shape and dtype.
        pooled_key: ``[B, M, heads, dim]``.
        pooled_value: Same shape.
        local_bias: ``[heads, window * window]``, added to the window's scores.
        bias_table: What ``pool_bias`` makes biases of.
        pool_bias: From the table, the first row and the one after the last, the bias of these rows' queries to the
            pooled keys, ``[heads, rows * W, M]``.
        added_weights: ``[B, H, W, heads, window * window]``, added to the window's weights after the softmax
            (TransNeXt); 0 by default.
        backend: The window's path, as in `na2d_qk`.

    Returns:
        ``[B, H, W, heads, dim]`` in the dtype of ``value``.

    Raises:
        ValueError: If the window is no odd square, or shapes don't fit.
    """
    batch, height, width, heads, _ = map(int, query.shape)
    slots = local_bias.shape[-1]
    window = math.isqrt(slots)
    if window * window != slots or window % 2 == 0 or window < 3:
        raise ValueError(f"aggregated_attention needs odd windows from 3x3 on; got {slots} entries of local_bias")
    exact = torch.promote_types(query.dtype, torch.float32)
    if query.dtype == torch.bfloat16 and query.device.type == "cpu" and not all_finite(query, key, value):
        # On some CPUs a row's NaN reaches the next one in torch's products of bfloat16.
        tensors = (x.float() for x in (query, key, value, pooled_key, pooled_value))
        added_weights = None if added_weights is None else added_weights.float()
        out = aggregated_attention(*tensors, local_bias, bias_table, pool_bias, added_weights, backend=backend)
        return out.to(value.dtype)
    mask = window_mask(height, width, window).to(query.device)
    bias = local_bias.to(exact).masked_fill(~mask[:, :, None], float("-inf"))
    rows = rows_at_once(height, batch * heads * height * width * (slots + pooled_key.shape[1]))
    if _without_margin(window, key, value):
        whole = partial(pool_bias, bias_table)
        return _infer(query, key, value, (pooled_key, pooled_value), bias, whole, added_weights, rows, backend)
    local = cut_window_scores(query, key, window, backend=backend) + bias
    weights, pooled = [], []
    for first in range(0, height, rows):
        end = min(first + rows, height)

        def attend(query, local, pooled_key, pooled_value, table, first=first, end=end):
            return _softmax_rows(query, local, pooled_key, pooled_value, pool_bias(table, first, end))

        parts = (query[:, first:end], local[:, first:end], pooled_key, pooled_value, bias_table)
        outputs = attend(*parts) if rows == height else run_rows(attend, *parts)
        weights.append(outputs[0])
        pooled.append(outputs[1])
    window_weights = join_rows(weights).transpose(1, 2).unflatten(1, (height, width))
    if added_weights is not None:
        window_weights = window_weights + added_weights
    out = cut_window_values(window_weights, value, window, backend=backend)
    return out + join_rows(pooled).transpose(1, 2).unflatten(1, (height, width))


def aggregated_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    local_bias: Tensor,
    pool_bias: Tensor,
    added_weights: Tensor | None = None,
) -> Tensor:
    """Return what `aggregated_attention` does, from unfolded windows and all scores; the bias is ``[heads, N, M]``."""
    height, width, heads, dim = query.shape[1:]
    slots = local_bias.shape[-1]
    window = math.isqrt(slots)

    def unfold(x: Tensor) -> Tensor:
        columns = F.unfold(x.flatten(3).permute(0, 3, 1, 2), window, padding=window // 2)
        return columns.unflatten(1, (heads, dim, slots)).permute(0, 1, 4, 3, 2)  # [B, heads, N, slots, dim]

    def by_heads(x: Tensor) -> Tensor:
        return x.flatten(1, -3).transpose(1, 2)

    mask = window_mask(height, width, window).to(query.device).flatten(0, 1)
    queries = by_heads(query)
    local = (queries[..., None, :] * unfold(key)).sum(-1) + local_bias[:, None]
    local = local.masked_fill(~mask, float("-inf"))
    pooled = queries @ by_heads(pooled_key).transpose(-1, -2) + pool_bias
    weights = torch.cat([local, pooled], -1).softmax(-1)
    inside = weights[..., :slots] if added_weights is None else weights[..., :slots] + by_heads(added_weights)
    out = (inside[..., None] * unfold(value)).sum(-2) + weights[..., slots:] @ by_heads(pooled_value)
    return out.transpose(1, 2).unflatten(1, (height, width))
