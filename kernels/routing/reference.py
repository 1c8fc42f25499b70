"""The specification of routed attention in plain torch: gather the chosen regions, then softmax over them.

It holds ``topk`` copies of keys and values and all the scores in memory, as the published code does, so it is the
oracle of the tests and the measure of the other paths, not a path for large maps.
"""

import torch
from torch import Tensor


def cut_regions(x: Tensor, region_size: tuple[int, int]) -> Tensor:
    """Cut maps ``[B, H, W, ...]`` into regions ``[B, regions, tokens, ...]``, both row-major."""
    height, width = region_size
    x = x.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def merge_regions(x: Tensor, region_size: tuple[int, int], width: int) -> Tensor:
    """Put regions ``[B, regions, tokens, ...]`` back into maps ``[B, H, width, ...]``."""
    x = x.unflatten(2, region_size).unflatten(1, (-1, width // region_size[1])).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def gather_regions(x: Tensor, routes: Tensor) -> Tensor:
    """Return the chosen regions of ``x`` ``[B, regions, tokens, ...]`` as ``[B, regions, topk * tokens, ...]``."""
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
    return x[batch, routes].flatten(2, 3)


def routed_attention_weights(
    query: Tensor, key: Tensor, routes: Tensor, region_size: tuple[int, int], scale: float
) -> Tensor:
    """Return the attention weights ``[B, regions, heads, tokens, topk * tokens]`` of every query over its keys.

    Queries are in the order of `cut_regions`; keys in that order too, region after region as ``routes`` names them.
    """
    queries = cut_regions(query, region_size)
    keys = gather_regions(cut_regions(key, region_size), routes)
    return torch.einsum("brthd,brnhd->brhtn", queries * scale, keys).softmax(-1)


def routed_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, region_size: tuple[int, int], scale: float
) -> Tensor:
    """Routed attention by gathering; see `foveate.kernels.routed_attention` for the arguments."""
    weights = routed_attention_weights(query, key, routes, region_size, scale)
    values = gather_regions(cut_regions(value, region_size), routes)
    out = torch.einsum("brhtn,brnhd->brthd", weights, values)
    return merge_regions(out, region_size, query.shape[2])
