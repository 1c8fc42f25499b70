"""The specification of neighborhood attention in plain torch: gather every window, then softmax over it.

It holds every window in memory (a copy of keys and values per neighbor), so it is the oracle of the tests and the
source of attention maps, not a path for training.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .problem import Problem
from .window import Axis, neighbors


@functools.lru_cache(maxsize=16)
def window_tables(axes: tuple[Axis, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return key tokens ``[tokens, neighbors]``, -1 for none, and their entries in a flattened bias table."""
    return neighbors(axes, np.arange(math.prod([axis.length for axis in axes])))


def gather_windows(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Return the windows of ``x`` ``[B, tokens, heads, dim]``, ``[B, tokens, neighbors, heads, dim]``; 0 for no key."""
    tokens = torch.from_numpy(window_tables(tuple(axes))[0]).to(x.device)
    rows = x[:, tokens]
    return rows.masked_fill((tokens < 0)[:, :, None, None], 0) if any(axis.is_causal for axis in axes) else rows


def reference_scores(query: Tensor, key: Tensor, axes: Sequence[Axis], scale: float, rpb: Tensor | None) -> Tensor:
    """Return the scores ``[B, tokens, heads, neighbors]`` of each query over its window, -inf where there is no key.

    Neighbors are in row-major order of the axes' windows.
    """
    query, key = query.flatten(1, -3), key.flatten(1, -3)
    tokens, entries = (torch.from_numpy(table).to(query.device) for table in window_tables(tuple(axes)))
    key = key.repeat_interleave(query.shape[2] // max(key.shape[2], 1), dim=2)
    scores = torch.einsum("bnhd,bnkhd->bnhk", query * scale, gather_windows(key, axes))
    if rpb is not None:
        scores = scores + rpb.flatten(1)[:, entries].transpose(0, 1).to(scores.dtype)
    return scores.masked_fill((tokens < 0)[:, None, :], float("-inf"))


def neighborhood_reference(problem: Problem) -> tuple[Tensor, Tensor]:
    """Neighborhood attention by brute force, with the log-sum-exp of the scores; see `api.na2d` for the arguments."""
    query, key, value, axes, scale, rpb, additional_keys, additional_values, _ = problem
    group = query.shape[-2] // max(key.shape[-2], 1)
    values = gather_windows(value.flatten(1, -3).repeat_interleave(group, dim=2), axes)
    scores = reference_scores(query, key, axes, scale, rpb)
    if additional_keys is not None:
        more = additional_keys.repeat_interleave(group, dim=2)
        more_scores = torch.einsum("bnhd,bmhd->bnhm", query.flatten(1, -3) * scale, more)
        scores = torch.cat([scores, more_scores], -1)
    weights = scores.softmax(-1)
    neighbors = values.shape[2]
    output = torch.einsum("bnhk,bnkhd->bnhd", weights[..., :neighbors], values)
    if additional_values is not None:
        more = additional_values.repeat_interleave(group, dim=2)
        output = output + torch.einsum("bnhm,bmhd->bnhd", weights[..., neighbors:], more)
    spatial = query.shape[1:-2]
    return output.unflatten(1, spatial), scores.logsumexp(-1).unflatten(1, spatial)
