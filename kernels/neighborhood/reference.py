"""The specification of neighborhood attention in plain torch: gather every window, then softmax over it.

It holds every window in memory (``kernel_size**2`` copies of keys and values), so it is the oracle of the tests and
the source of attention maps, not a path for training.
"""

import torch
from torch import Tensor

from .window import axis_offsets, axis_windows


def _gather_windows(x: Tensor, kernel_size: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """Return the window of every position of ``x`` ``[B, H, W, heads, dim]`` as ``[B, H, W, heads, Kh*Kw, dim]``."""
    height, width = x.shape[1:3]
    rows = torch.from_numpy(axis_windows(height, kernel_size[0], dilation[0])).to(x.device)
    columns = torch.from_numpy(axis_windows(width, kernel_size[1], dilation[1])).to(x.device)
    windows = x[:, rows[:, None, :, None], columns[None, :, None, :]]
    return windows.flatten(3, 4).transpose(3, 4)


def na2d_weights(
    query: Tensor,
    key: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
    rpb: Tensor | None,
) -> Tensor:
    """Return the attention weights ``[B, H, W, heads, Kh*Kw]`` of each query over its window, row-major.

    Column ``i * Kw + j`` belongs to the key at ``axis_windows`` row ``i`` and column ``j``.
    """
    keys = _gather_windows(key, kernel_size, dilation)
    scores = torch.einsum("byxhd,byxhkd->byxhk", query * scale, keys)
    if rpb is not None:
        height, width = query.shape[1:3]
        rows = torch.from_numpy(axis_offsets(height, kernel_size[0], dilation[0])).to(rpb.device)
        columns = torch.from_numpy(axis_offsets(width, kernel_size[1], dilation[1])).to(rpb.device)
        bias = rpb[:, rows[:, None, :, None], columns[None, :, None, :]]
        scores = scores + bias.flatten(3).permute(1, 2, 0, 3).to(scores.dtype)
    return scores.softmax(-1)


def na2d_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
    rpb: Tensor | None,
) -> Tensor:
    """Neighborhood attention by brute force; see `foveate.kernels.na2d` for the arguments."""
    weights = na2d_weights(query, key, kernel_size, dilation, scale, rpb)
    return torch.einsum("byxhk,byxhkd->byxhd", weights, _gather_windows(value, kernel_size, dilation))
