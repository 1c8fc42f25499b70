"""Attention by rows of a map: so many queries at a time that their scores stay small."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .backends import exporting

# Scores held at once, over all images and heads: what a few megabytes hold.
CHUNK = 1 << 21


def rows_at_once(height: int, scores: int) -> int:
    """Return how many rows of a map to work on at once, whose scores are ``scores`` numbers in all."""
    return height if exporting() else max(1, min(height, CHUNK * height // max(scores, 1)))


def run_rows(function: Callable, *arguments: Tensor):
    """Call ``function`` for some rows of a larger map, and again in the backward pass instead of keeping its scores."""
    if torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)


def join_rows(parts: list[Tensor]) -> Tensor:
    """Join what was made row by row, ``[B, heads, n, ...]``."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
