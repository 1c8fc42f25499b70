"""Multi-scale deformable attention as a module (Deformable DETR, arXiv 2010.04159, section 4.1).

Written anew; the parameters have the names that Deformable DETR, Mask2Former and OneFormer gave them.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from ..kernels.bilinear import neighbors
from ..kernels.deformable import multi_scale_deformable_attention
from .record import Given, Recorded, Rows, exact


@register_notrace_function
def pixel_centres(shapes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """Return the centres ``[S, 2]``, (x, y) in units of the sides, of all pixels of maps with ``shapes``."""
    centres = []
    for height, width in shapes:
        y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height
        x = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width
        centres.append(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1))
    return torch.cat(centres)


class MultiScaleDeformableAttention(nn.Module):
    """Multi-head attention of queries to a few points on maps of several scales; each query predicts where and how.

    Scores come from the query alone, and there are no keys. Offsets are in pixels of the map they are on, or in
    parts of the query's box.

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        num_levels: Maps.
        num_points: Points on each map, for each head.

    Shape:
        Queries ``[B, Q, dim]`` to ``[B, Q, dim]``.

    Example:
        >>> attention = MultiScaleDeformableAttention(64, num_heads=4, num_levels=2)
        >>> shapes = [(5, 7), (10, 14)]
        >>> tokens = torch.randn(1, 5 * 7 + 10 * 14, 64)
        >>> attention(tokens, pixel_centres(shapes, tokens), tokens, shapes).shape
        torch.Size([1, 175, 64])
    """

    def __init__(self, dim: int, num_heads: int = 8, num_levels: int = 3, num_points: int = 4, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(
                f"MultiScaleDeformableAttention needs num_heads to divide dim; got dim {dim}, heads {num_heads}"
            )
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2, **dd)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points, **dd)
        self.value_proj = nn.Linear(dim, dim, **dd)
        self.output_proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as published: equal weights, and points along one direction for each head, a pixel apart."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2.0 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = (directions[:, None, None] * steps[:, None]).expand(-1, self.num_levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.reshape(-1))
        for weight in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias):
            nn.init.zeros_(weight)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def extra_repr(self) -> str:
        """Return the settings that `print(model)` shows."""
        return f"num_heads={self.num_heads}, num_levels={self.num_levels}, num_points={self.num_points}"

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        value: Tensor,
        shapes: Sequence[tuple[int, int]],
        padding: Tensor | None = None,
    ) -> Tensor:
        """Attend from ``query`` to points around ``reference``.

        Args:
            query: ``[B, Q, dim]``.
            reference: Where each query looks from, (x, y) in units of the maps' sides: ``[Q, 2]``, ``[B, Q, 2]``, or
                ``[B, Q, levels, 2]`` if it differs between maps. Or boxes, (x, y, width, height), in units of which
                offsets are then: half a side, shared by the points.
            value: Pixels of all maps, row by row and one map after the other: ``[B, S, dim]``.
            shapes: Height and width of each map.
            padding: Which pixels ``[B, S]`` are none of the image, bool; they count as zero.

        Returns:
            ``[B, Q, dim]``.
        """
        locations, weights = self._locate(query, reference, shapes)
        value = self._project(value, padding)
        return self.output_proj(multi_scale_deformable_attention(value, shapes, locations, weights))

    def _locate(self, query: Tensor, reference: Tensor, shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Return points ``[B, Q, heads, levels, points, 2]``, in units of the sides, and weights without the last."""
        if reference.ndim < 4:
            reference = reference.unsqueeze(-2)
        reference = reference.unsqueeze(-3).unsqueeze(-2)
        offsets = self.sampling_offsets(query).unflatten(-1, (self.num_heads, self.num_levels, self.num_points, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        if reference.shape[-1] == 4:
            locations = reference[..., :2] + offsets / self.num_points * reference[..., 2:] * 0.5
        else:
            sides = torch.tensor([(width, height) for height, width in shapes], device=query.device)
            locations = reference + offsets / sides[:, None]
        return locations, weights.unflatten(-1, (self.num_levels, self.num_points))

    def _project(self, value: Tensor, padding: Tensor | None) -> Tensor:
        """Return values ``[B, S, heads, dim / heads]``; those of padding are zero."""
        value = self.value_proj(value)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        return value.unflatten(-1, (self.num_heads, -1))

    @torch.jit.ignore
    def recorded(
        self,
        query: Tensor,
        reference: Tensor,
        value: Tensor,
        shapes: Sequence[tuple[int, int]],
        padding: Tensor | None = None,
    ) -> Recorded:
        """Tell what a call did; see `blocks.record`.

        Values are the pixels of all maps, then one of zeros, on which the weight of what lies beyond the maps is.
        """
        locations, weights = self._locate(query, reference, shapes)
        locations, weights = exact(locations), exact(weights)
        keys, shares, start = [], [], 0
        for level, (height, width) in enumerate(shapes):
            x, y = (
                neighbors(at * side - 0.5, torch.tensor(float(side), device=at.device))
                for at, side in zip(locations[:, :, :, level].unbind(-1), (width, height), strict=True)
            )
            for row, row_share in zip(y[:2], y[2:], strict=True):
                for column, column_share in zip(x[:2], x[2:], strict=True):
                    keys.append(start + row.long() * width + column.long())
                    shares.append(row_share * column_share * weights[:, :, :, level])
            start += height * width
        keys, shares = (torch.cat(part, -1).transpose(1, 2) for part in (keys, shares))
        keys = F.pad(keys, (0, 1), value=start)
        shares = torch.cat([shares, 1 - shares.sum(-1, keepdim=True)], -1)
        values = self._project(value, padding).transpose(1, 2)
        queries, row_size = query.shape[1], 2 * self.num_heads * keys.shape[-1]
        operator = Given(
            lambda rows: Rows(keys[:, :, rows], shares[:, :, rows]),
            self.num_heads,
            queries,
            start + 1,
            row_size,
            query.device,
        )
        return Recorded(
            "deformable",
            (queries,),
            operator,
            F.pad(exact(values), (0, 0, 0, 1)),
            lambda heads: self.output_proj(heads.transpose(1, 2).flatten(2)),
            note="queries of several maps; values are the pixels of all of them, then what lies beyond",
            details={"locations": locations},
        )
