"""Dual attention (DaViT, arXiv 2204.03645): within windows of positions, and within groups of channels."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, to_2tuple, trunc_normal_
from torch import Tensor, nn

from .pointwise import PointwiseLinear


@register_notrace_function
def partition_windows(x: Tensor, window_height: int, window_width: int) -> Tensor:
    """Cut ``x`` ``[B, H, W, C]`` into windows ``[B * windows, window_height, window_width, C]``.

    A map that the windows don't divide is padded with zeros at the bottom and right.
    """
    batch, height, width, dim = x.shape
    bottom, right = -height % window_height, -width % window_width
    if torch.compiler.is_compiling() or bottom > 0 or right > 0:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    rows, columns = (height + bottom) // window_height, (width + right) // window_width
    x = x.reshape(batch, rows, window_height, columns, window_width, dim)
    return x.transpose(2, 3).reshape(batch * rows * columns, window_height, window_width, dim)


@register_notrace_function
def merge_windows(windows: Tensor, height: int, width: int) -> Tensor:
    """Undo `partition_windows`: join ``windows`` to a map of ``height`` and ``width`` and drop what was padded."""
    window_height, window_width, dim = windows.shape[1:]
    rows, columns = -(-height // window_height), -(-width // window_width)
    x = windows.reshape(-1, rows, columns, window_height, window_width, dim).transpose(2, 3)
    x = x.reshape(-1, rows * window_height, columns * window_width, dim)
    return x[:, :height, :width]


def _reset_linear(*layers: nn.Linear) -> None:
    for layer in layers:
        trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class WindowAttention2d(nn.Module):
    """Multi-head self-attention within windows that do not overlap, without position bias.

    A map that the windows don't divide is padded with zeros at the bottom and right before the projection to queries,
    keys and values, and no mask hides the padding, as published: the padded positions take part as keys.

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        window_size: Height and width of a window.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop: Dropout rate of the output.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``, any H and W.

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim``.

    Example:
        >>> attention = WindowAttention2d(64, num_heads=2, window_size=7)
        >>> attention(torch.randn(1, 20, 30, 64)).shape
        torch.Size([1, 20, 30, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | tuple[int, int] = 7,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"WindowAttention2d needs num_heads to divide dim; got dim {dim}, heads {num_heads}")
        self.num_heads = num_heads
        self.window_height, self.window_width = to_2tuple(window_size)
        self.qkv = PointwiseLinear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = PointwiseLinear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projections as published: truncated normal, std 0.02."""
        _reset_linear(self.qkv, self.proj)

    def extra_repr(self) -> str:
        """Return the settings that `print(model)` shows."""
        return f"window_size={self.window_height}x{self.window_width}, num_heads={self.num_heads}"

    def forward(self, x: Tensor) -> Tensor:
        """Attend within the windows of ``x`` ``[B, H, W, dim]``."""
        height, width = x.shape[1:3]
        windows = partition_windows(x, self.window_height, self.window_width)
        qkv = self.qkv(windows).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        windows = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        windows = windows.unflatten(1, (self.window_height, self.window_width))
        return self.proj_drop(self.proj(merge_windows(windows, height, width)))


class ChannelGroupAttention2d(nn.Module):
    """Self-attention between the channels of a group, over the whole map (DaViT, section 3.3).

    Within each group of ``d = dim / num_groups`` channels, with keys, values and queries as ``[d, positions]``
    matrices, the result is ``softmax(d ** -0.5 * K @ V.T) @ Q``. The roles differ from those of attention between
    positions, and the scale is that of the published code: the scores are sums over all positions and grow with the
    map.

    In half precision those sums pass the largest number of float16 on large maps. The fused operator keeps them in
    float32, so that the result is finite at any size.

    Args:
        dim: Channels.
        num_groups: Groups of channels; must divide ``dim``.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop: Dropout rate of the output.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``, any H and W.

    Raises:
        ValueError: If ``num_groups`` does not divide ``dim``.

    Example:
        >>> attention = ChannelGroupAttention2d(64, num_groups=2)
        >>> attention(torch.randn(1, 20, 30, 64)).shape
        torch.Size([1, 20, 30, 64])
    """

    def __init__(
        self,
        dim: int,
        num_groups: int,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_groups:
            raise ValueError(
                f"ChannelGroupAttention2d needs num_groups to divide dim; got dim {dim}, groups {num_groups}"
            )
        self.num_groups = num_groups
        self.scale = (dim // num_groups) ** -0.5
        self.qkv = PointwiseLinear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = PointwiseLinear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projections as published: truncated normal, std 0.02."""
        _reset_linear(self.qkv, self.proj)

    def extra_repr(self) -> str:
        """Return the settings that `print(model)` shows."""
        return f"num_groups={self.num_groups}"

    def forward(self, x: Tensor) -> Tensor:
        """Attend between the channels of ``x`` ``[B, H, W, dim]``."""
        height, width = x.shape[1:3]
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_groups, -1))
        q, k, v = qkv.permute(2, 0, 3, 4, 1).unbind(0)
        x = F.scaled_dot_product_attention(k, v, q, scale=self.scale)
        x = x.permute(0, 3, 1, 2).flatten(2).unflatten(1, (height, width))
        return self.proj_drop(self.proj(x))


class DualAttention2d(nn.Module):
    """Attention within windows of positions, then within groups of channels, each added to its input.

    The pair of DaViT as one module, without norms and MLPs: local detail from the windows, global context from the
    channels, at a cost linear in the number of positions.

    Args:
        dim: Channels.
        num_heads: Attention heads of the windows and groups of the channels; must divide ``dim``.
        window_size: Height and width of a window.
        qkv_bias: Whether the projections to queries, keys and values have a bias.
        proj_drop: Dropout rate of either output.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``, any H and W.

    Example:
        >>> attention = DualAttention2d(64, num_heads=2)
        >>> attention(torch.randn(1, 20, 30, 64)).shape
        torch.Size([1, 20, 30, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | tuple[int, int] = 7,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.spatial = WindowAttention2d(dim, num_heads, window_size, qkv_bias, proj_drop, **dd)
        self.channel = ChannelGroupAttention2d(dim, num_heads, qkv_bias, proj_drop, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``x`` ``[B, H, W, dim]``."""
        x = x + self.spatial(x)
        return x + self.channel(x)
