"""The operator as published, in plain torch: gather every query's keys and values, then multiply.

Values are gathered for every query, as the published operator takes its index: ``16 K`` copies of a quarter of the
map. It is the oracle of the tests and what the other paths' memory is measured against.
"""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of scores, and of the sums, for inputs of ``dtype``: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def children(token_index: Tensor) -> Tensor:
    """Return the children ``[..., 4 * K]`` of chosen tokens ``[..., K]``; child ``c`` of ``t`` is token ``4 t + c``."""
    return (token_index.unsqueeze(-1) * 4 + torch.arange(4, device=token_index.device)).flatten(-2)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Return rows ``[B, heads, ..., dim]`` of ``x`` ``[B, heads, tokens, dim]`` at ``index`` ``[B, heads, ...]``."""
    batch = torch.arange(x.shape[0], device=x.device).view(-1, 1, *[1] * (index.ndim - 2))
    head = torch.arange(x.shape[1], device=x.device).view(1, -1, *[1] * (index.ndim - 2))
    return x[batch, head, index]


def scores_reference(query: Tensor, key: Tensor, token_index: Tensor) -> Tensor:
    """Scores by gathering; see `foveate.kernels.quadtree_scores` for the arguments."""
    dtype = accumulation_dtype(query.dtype)
    keys = _gather(key.flatten(2, 3), children(token_index)).to(dtype)
    return torch.einsum("bhnfd,bhnkd->bhnfk", query.to(dtype), keys)


def values_reference(weights: Tensor, value: Tensor, token_index: Tensor) -> Tensor:
    """Aggregation by gathering; see `foveate.kernels.quadtree_values` for the arguments."""
    dtype = accumulation_dtype(value.dtype)
    index = children(token_index).unsqueeze(3).expand(*weights.shape)
    values = _gather(value.flatten(2, 3), index).to(dtype)
    return torch.einsum("bhnfk,bhnfkd->bhnfd", weights.to(dtype), values).to(value.dtype)
