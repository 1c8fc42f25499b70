"""Dual attention (DaViT, arXiv 2204.03645): within windows of positions, and within groups of channels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .initialize import init_linear
from .pointwise import apply_linear
from .record import Recorded, Softmax, exact
from .window import WindowAttention2d


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
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projections as published: truncated normal, std 0.02."""
        init_linear(self.qkv, self.proj)

    def extra_repr(self) -> str:
        """Return the settings that `print(model)` shows."""
        return f"num_groups={self.num_groups}"

    def forward(self, x: Tensor) -> Tensor:
        """Attend between the channels of ``x`` ``[B, H, W, dim]``."""
        height, width = x.shape[1:3]
        qkv = self.qkv(x) if torch.jit.is_scripting() else apply_linear(self.qkv, x)
        qkv = qkv.flatten(1, 2).unflatten(-1, (3, self.num_groups, -1))
        q, k, v = qkv.permute(2, 0, 3, 4, 1).unbind(0)
        x = F.scaled_dot_product_attention(k, v, q, scale=self.scale)
        x = x.permute(0, 3, 1, 2).flatten(2).unflatten(1, (height, width))
        return self.proj_drop(self.proj(x) if torch.jit.is_scripting() else apply_linear(self.proj, x))

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`."""
        size = tuple(x.shape[1:3])
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_groups, -1)).permute(2, 0, 3, 4, 1).unbind(0)

        def project(groups: Tensor) -> Tensor:
            return self.proj(groups.permute(0, 3, 1, 2).flatten(2).unflatten(1, size))

        return Recorded("channel", size, Softmax(k * self.scale, v), exact(q), project)


class DualAttention2d(nn.Module):
    """Attention within windows of positions, then within groups of channels: DaViT's pair as one module.

    Local detail from the windows and global context from the channels, at a cost linear in the number of positions. The
    channels attend to the input plus the windows' output, and the outputs of both are added, so that a block adds the
    sum to its input, as for any other attention.

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
        self.spatial = WindowAttention2d(
            dim, num_heads, window_size, qkv_bias=qkv_bias, rel_pos_bias=False, proj_drop=proj_drop, **dd
        )
        self.channel = ChannelGroupAttention2d(dim, num_heads, qkv_bias, proj_drop, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``x`` ``[B, H, W, dim]``."""
        local = self.spatial(x)
        return local + self.channel(x + local)
