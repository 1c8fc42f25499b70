"""Deformable self-attention across maps of several scales, as Mask2Former's pixel decoder and DINO's encoder have it.

Written anew after section 4.1 of Deformable DETR (arXiv 2010.04159).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...blocks.multi_scale_deformable import MultiScaleDeformableAttention


def wave_periods(half: int, like: Tensor, temperature: float) -> Tensor:
    """Return the periods ``[half]`` of sine embeddings in units of 2 pi, float32; a sine and a cosine share each."""
    steps = torch.arange(half, device=like.device, dtype=torch.float32)
    return temperature ** (2 * torch.div(steps, 2, rounding_mode="floor") / half)


def waves(angles: Tensor, periods: Tensor) -> Tensor:
    """Return the sines and cosines ``[..., half]``, alternating, of angles ``[...]`` divided by periods ``[half]``."""
    angles = angles[..., None] / periods
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(-2)


def sine_position(
    height: int,
    width: int,
    channels: int,
    like: Tensor,
    temperature: float = 10000.0,
    offset: float = 0.0,
    padding: Tensor | None = None,
) -> Tensor:
    """Return the sine embedding ``[1 or B, channels, height, width]`` of a map's positions.

    The first half of the channels tells the row, the second the column; in each, sine and cosine alternate. Positions
    count from 1 and are scaled to the range up to 2 pi. Computed in float32.

    Args:
        height: Of the map.
        width: Of the map.
        channels: Of the embedding.
        like: Has its device.
        temperature: Ratio of the longest period and the shortest, about.
        offset: Added to the positions before they are scaled.
        padding: Which places ``[B, height, width]`` of each image's map are none of the image, bool; they don't count.
    """
    if padding is None:
        y = torch.arange(1, height + 1, device=like.device, dtype=torch.float32)[None, :, None]
        x = torch.arange(1, width + 1, device=like.device, dtype=torch.float32)[None, None]
    else:
        y, x = ((~padding).cumsum(dim, dtype=torch.float32) for dim in (1, 2))
    periods = wave_periods(channels // 2, like, temperature)
    rows = waves((y + offset) / (y[:, -1, None] + 1e-6) * (2 * math.pi), periods)
    columns = waves((x + offset) / (x[:, :, -1, None] + 1e-6) * (2 * math.pi), periods)
    shape = (y.shape[0], height, width, channels // 2)
    return torch.cat([rows.expand(shape), columns.expand(shape)], dim=-1).permute(0, 3, 1, 2)


def flatten_maps(maps: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the pixels ``[B, S, C]`` of maps ``[B, C, H_l, W_l]``, row by row, one map after the other; and shapes."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1), [tuple(x.shape[-2:]) for x in maps]


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention across all maps and an MLP, each followed by a norm of the sum."""

    def __init__(self, dim: int, hidden: int, num_heads: int, num_levels: int, num_points: int, dropout: float = 0.0):
        super().__init__()
        self.self_attn = MultiScaleDeformableAttention(dim, num_heads, num_levels, num_points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        shapes: Sequence[tuple[int, int]],
        padding: Tensor | None = None,
    ) -> Tensor:
        """Map tokens ``[B, S, dim]`` to such; see `MultiScaleDeformableAttention` for the other arguments."""
        x = self.norm1(x + self.dropout(self.self_attn(x + position, reference, x, shapes, padding)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))
