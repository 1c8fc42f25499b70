"""Routed attention in plain torch, a few regions at a time.

Keys and values are cut into regions once, some heads at a time; only the regions that a chunk of queries needs are
gathered, and the next chunk reuses their memory. The backward pass gathers and computes the scores again instead of
keeping them.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import cut_regions, merge_regions

# Numbers a chunk may hold, of gathered keys and values or of scores: some megabytes stay near the processor.
_CHUNK = 1 << 20
# Numbers the copies of keys and values may hold that are cut into regions; at least a head's.
_COPY = 1 << 22


def _chunks(rows: int, columns: int, region_numbers: int) -> Iterator[tuple[slice, slice]]:
    """Cut a grid of regions into runs of whole rows, or of columns of one row, of about `_CHUNK` numbers."""
    regions = max(1, _CHUNK // max(1, region_numbers))
    if regions >= columns:
        step = regions // columns
        for row in range(0, rows, step):
            yield slice(row, min(row + step, rows)), slice(0, columns)
        return
    for row in range(rows):
        for column in range(0, columns, regions):
            yield slice(row, row + 1), slice(column, min(column + regions, columns))


def _head_groups(key: Tensor, value: Tensor) -> list[slice]:
    """Cut the heads into groups whose keys and values are about `_COPY` numbers."""
    heads = key.shape[3]
    step = max(1, min(heads, _COPY * heads // max(1, key.numel() + value.numel())))
    return [slice(first, first + step) for first in range(0, heads, step)]


def _rows(x: Tensor, height: int) -> Tensor:
    """Cut maps ``[B, H, W, heads, dim]`` into rows of regions ``[B * rows, height, W, heads, dim]``, a view if any."""
    return x.unflatten(1, (-1, height)).flatten(0, 1)


def _cut(rows: Tensor, chunk: tuple[slice, slice], width: int) -> Tensor:
    """Return the regions of a chunk as ``[regions, heads, tokens, dim]``."""
    columns = slice(chunk[1].start * width, chunk[1].stop * width)
    x = rows[chunk[0], :, columns].unflatten(2, (-1, width)).transpose(1, 2)
    return x.flatten(2, 3).flatten(0, 1).transpose(1, 2)


def _put(rows: Tensor, chunk: tuple[slice, slice], width: int, x: Tensor) -> None:
    """Write ``[regions, heads, tokens, dim]`` to where `_cut` reads it."""
    columns = slice(chunk[1].start * width, chunk[1].stop * width)
    target = rows[chunk[0], :, columns].unflatten(2, (-1, width)).transpose(1, 2)
    target.copy_(x.transpose(1, 2).unflatten(1, (-1, width)).unflatten(0, target.shape[:2]))


def check_routes(routes: Tensor) -> None:
    """Raise an IndexError if routes ``[B, regions, topk]`` on a CPU name a region that there is not."""
    regions = routes.shape[1]
    # On a GPU the check would wait for the device; indexing by a wrong route is undefined there.
    if routes.device.type == "cpu" and routes.numel() and not 0 <= routes.min() <= routes.max() < regions:
        raise IndexError(f"routes must be in [0, {regions}); got {routes.min().item()} to {routes.max().item()}")


def _flat_routes(routes: Tensor, columns: int) -> Tensor:
    """Number the regions through the whole batch: ``[B, regions, topk]`` to ``[B * rows, columns, topk]``."""
    check_routes(routes)
    batch, regions = routes.shape[:2]
    first = torch.arange(0, batch * regions, max(1, regions), device=routes.device)
    return (routes + first[:, None, None]).reshape(-1, columns, routes.shape[2])


def _gather(regions: Tensor, routes: Tensor) -> Tensor:
    """Return the chosen of ``regions`` ``[all, tokens, heads, dim]`` as ``[chunk, heads, topk * tokens, dim]``."""
    x = regions.index_select(0, routes.flatten())
    return x.view(-1, routes.shape[-1] * x.shape[1], *x.shape[2:]).transpose(1, 2)


def chunked_forward(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, region_size: tuple[int, int], scale: float
) -> Tensor:
    """Return routed attention ``[B, H, W, heads, dim_v]``; see `foveate.kernels.routed_attention`."""
    routes = _flat_routes(routes, query.shape[2] // region_size[1])
    out = query.new_empty(*query.shape[:4], value.shape[-1])
    for heads in _head_groups(key, value):
        parts = (x[..., heads, :] for x in (query, key, value, out))
        _attend(*parts, routes, region_size, scale)
    return out


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    routes: Tensor,
    region_size: tuple[int, int],
    scale: float,
) -> None:
    height, width = region_size
    keys, values = (cut_regions(x, region_size).flatten(0, 1).contiguous() for x in (key, value))
    queries, outs = _rows(query, height), _rows(out, height)
    gathered = routes.shape[2] * (keys[:1].numel() + values[:1].numel())
    for chunk in _chunks(len(routes), routes.shape[1], gathered):
        region_index = routes[chunk].flatten(0, 1)
        x = F.scaled_dot_product_attention(
            _cut(queries, chunk, width), _gather(keys, region_index), _gather(values, region_index), scale=scale
        )
        _put(outs, chunk, width, x)


def chunked_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    region_size: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value for the gradient ``grad`` of the output."""
    height, width = region_size
    columns, heads, topk = query.shape[2] // width, query.shape[3], routes.shape[2]
    tokens = height * width
    exact = torch.promote_types(query.dtype, torch.float32)
    keys, values = (cut_regions(x, region_size).flatten(0, 1).contiguous() for x in (key, value))
    grad_keys, grad_values = (torch.zeros_like(x, dtype=exact) for x in (keys, values))
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    routes = _flat_routes(routes, columns)
    queries, grads, grad_queries = (_rows(x, height) for x in (query, grad, grad_query))

    keys_of_region = topk * tokens
    gathered = topk * (keys[:1].numel() + values[:1].numel())
    # A region whose scores alone are too many is taken a few of its queries at a time.
    step = max(1, min(tokens, _CHUNK // max(1, heads * keys_of_region)))
    for chunk in _chunks(len(routes), columns, max(gathered, heads * step * keys_of_region)):
        region_index = routes[chunk].flatten(0, 1)
        k, v = _gather(keys, region_index).to(exact), _gather(values, region_index).to(exact)
        all_q, all_g = _cut(queries, chunk, width).to(exact), _cut(grads, chunk, width).to(exact)
        grad_q, grad_k, grad_v = [], 0, 0
        for q, g in zip(all_q.split(step, 2), all_g.split(step, 2), strict=True):
            weights = torch.softmax((q * scale) @ k.mT, -1)
            grad_v = grad_v + weights.mT @ g
            # The softmax's gradient, in place of the weights' own.
            grad_scores = g @ v.mT
            grad_scores -= (grad_scores * weights).sum(-1, keepdim=True)
            grad_scores *= weights
            grad_q.append(grad_scores @ k * scale)
            grad_k = grad_k + grad_scores.mT @ q * scale
        _put(grad_queries, chunk, width, torch.cat(grad_q, 2))
        for total, part in ((grad_keys, grad_k), (grad_values, grad_v)):
            part = part.transpose(1, 2).reshape(-1, *total.shape[1:])
            total.index_add_(0, region_index.flatten(), part)

    grad_key, grad_value = (
        merge_regions(x.unflatten(0, (len(query), -1)), region_size, query.shape[2]).to(like.dtype)
        for x, like in ((grad_keys, key), (grad_values, value))
    )
    return grad_query, grad_key, grad_value
