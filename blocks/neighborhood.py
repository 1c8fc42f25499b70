"""Neighborhood attention as a module: NAT (arXiv 2204.07143) and DiNAT (arXiv 2209.15001)."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, trunc_normal_
from torch import Tensor, nn

from ..kernels import na2d
from ..kernels.neighborhood.reference import reference_scores
from ..kernels.neighborhood.window import Axis


@register_notrace_function
def pad_to_fit(x: Tensor, least_height: int, least_width: int) -> Tensor:
    """Zero-pad ``x`` ``[B, H, W, C]`` at the bottom and right to the least size."""
    height, width = x.shape[1:3]
    if height >= least_height and width >= least_width:
        return x
    return F.pad(x, (0, 0, 0, max(0, least_width - width), 0, max(0, least_height - height)))


@torch.jit.ignore
def attend(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, dilation: int, scale: float, rpb: Tensor | None
) -> Tensor:
    """Call the operator as one node of a traced graph: its checks and plans depend on the shapes."""
    return na2d(q, k, v, kernel_size, dilation=dilation, scale=scale, rpb=rpb)


register_notrace_function(attend)


class NeighborhoodAttention2d(nn.Module):
    """Multi-head self-attention in which a position sees its ``kernel_size x kernel_size`` neighborhood.

    A map smaller than ``kernel_size * dilation`` is padded with zeros at the bottom and right before the projection to
    queries, keys and values; the padded positions take part as keys, as in the modules that the published models were
    trained with (NATTEN up to 0.15.1).

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        kernel_size: Window height and width.
        dilation: Distance between neighbors.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        rel_pos_bias: Whether scores get a learned bias by relative position, a table ``rpb``
            ``[heads, 2 * kernel_size - 1, 2 * kernel_size - 1]``. Needs an odd ``kernel_size``.
        scale: Factor on the scores; ``(dim / num_heads) ** -0.5`` by default.
        proj_drop: Dropout rate of the output.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``, any H and W.

    Example:
        >>> attention = NeighborhoodAttention2d(64, num_heads=2, kernel_size=7, dilation=2)
        >>> attention(torch.randn(1, 20, 30, 64)).shape
        torch.Size([1, 20, 30, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        qkv_bias: bool = True,
        rel_pos_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"NeighborhoodAttention2d needs num_heads to divide dim; got dim {dim}, heads {num_heads}")
        if rel_pos_bias and kernel_size % 2 == 0:
            raise ValueError(f"rel_pos_bias is defined for odd kernel sizes only; got kernel_size {kernel_size}")
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = (
            nn.Parameter(torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1, **dd))
            if rel_pos_bias
            else None
        )
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the bias table and the projections as published: truncated normal, std 0.02."""
        for linear in (self.qkv, self.proj):
            trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)

    def extra_repr(self) -> str:
        """Return the settings that `print(model)` shows."""
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}, num_heads={self.num_heads}"

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        least = self.kernel_size * self.dilation
        qkv = self.qkv(pad_to_fit(x, least, least))
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        """Attend within the neighborhoods of ``x`` ``[B, H, W, dim]``."""
        height, width = x.shape[1:3]
        q, k, v = self._qkv(x)
        rpb = None if self.rpb is None else self.rpb.to(q.dtype)
        x = attend(q, k, v, self.kernel_size, self.dilation, self.scale, rpb)
        x = x[:, :height, :width].flatten(3)
        return self.proj_drop(self.proj(x))

    @torch.jit.ignore
    def attention_map(self, x: Tensor) -> Tensor:
        """Return the weights ``[B, H, W, heads, kernel_size ** 2]`` of each position of ``x`` over its window.

        The keys are those of `kernels.neighborhood.window.axis_windows`, rows first. Memory grows with the window: this
        is for pictures and analysis.
        """
        height, width = x.shape[1:3]
        q, k, _ = self._qkv(x)
        axes = [Axis(length, self.kernel_size, dilation=self.dilation) for length in q.shape[1:3]]
        weights = reference_scores(q, k, axes, self.scale, self.rpb).softmax(-1)
        return weights.unflatten(1, q.shape[1:3])[:, :height, :width]
