"""Multi-scale cross-axis attention (MCANet, arXiv 2312.08866): strips of several lengths, then rows attend to columns.

Written anew from a description of the published code, which never had weights; there is no reference output, and no
parity is claimed.
"""

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from .depthwise import apply_depthwise
from .pointwise import apply_pointwise


class CrossAxisAttention2d(nn.Module):
    """Attention among whole rows and among whole columns, by cosine similarity, crosswise; the input is added.

    One branch adds up depthwise rows of the normalised map, the other columns. A head's queries, of the rows' branch,
    come from the columns' and the other way round. The normalised queries are added to what they attend to, and one
    1x1 convolution serves all four projections, as published; the published temperature, which nothing used, is left
    out.

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        lengths: Of the strips, odd.

    Shape:
        NCHW maps ``[B, dim, H, W]`` to the same shape; any H and W.

    Raises:
        ValueError: If the heads don't divide the channels.

    Example:
        >>> CrossAxisAttention2d(16, num_heads=4)(torch.randn(1, 16, 5, 7)).shape
        torch.Size([1, 16, 5, 7])
    """

    def __init__(self, dim: int, num_heads: int = 8, lengths: tuple[int, ...] = (7, 11, 21)):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the channels; got {num_heads} heads and {dim} channels")
        self.num_heads = num_heads
        self.norm = LayerNorm2d(dim, eps=1e-5)
        self.rows = nn.ModuleList(nn.Conv2d(dim, dim, (1, k), padding=(0, k // 2), groups=dim) for k in lengths)
        self.columns = nn.ModuleList(nn.Conv2d(dim, dim, (k, 1), padding=(k // 2, 0), groups=dim) for k in lengths)
        self.proj = nn.Conv2d(dim, dim, 1)

    @property
    def unrecorded(self) -> str:
        """Why it tells no weights of positions."""
        return "whole rows attend to whole rows, and columns to columns: there are no weights of positions"

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, dim, H, W]`` to the same shape."""
        normed = self.norm(x)
        rows = apply_pointwise(self.proj, sum(apply_depthwise(conv, normed) for conv in self.rows))
        columns = apply_pointwise(self.proj, sum(apply_depthwise(conv, normed) for conv in self.columns))
        among_rows = self._attend(columns, rows)
        among_columns = self._attend(rows.mT, columns.mT).mT
        return apply_pointwise(self.proj, among_rows) + apply_pointwise(self.proj, among_columns) + x

    def _attend(self, query: Tensor, key: Tensor) -> Tensor:
        """Let rows of ``query`` attend to rows of ``key``, which are the values too; ``[B, dim, H, W]`` both."""
        batch, _, height, width = query.shape

        def tokens(x: Tensor) -> Tensor:
            heads = x.reshape(batch, self.num_heads, -1, height, width)
            return heads.permute(0, 1, 3, 4, 2).reshape(batch, self.num_heads, height, -1)

        query, value = F.normalize(tokens(query), dim=-1), tokens(key)
        # Cosines need no scale.
        out = F.scaled_dot_product_attention(query, F.normalize(value, dim=-1), value, scale=1.0) + query
        out = out.reshape(batch, self.num_heads, height, width, -1)
        return out.permute(0, 1, 4, 2, 3).reshape(batch, -1, height, width)
