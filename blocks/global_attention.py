"""Attention over a whole map with a learned bias by relative position."""

import torch
from timm.layers import register_notrace_function, trunc_normal_
from torch import Tensor, nn

from .record import Recorded, Softmax, exact, heads_to_map
from .relative_bias import relative_bias, resize_bias_table
from .token_attention import attend_tokens


@register_notrace_function
def check_map_size(height: int, width: int, expected_height: int, expected_width: int) -> None:
    """Raise a ValueError unless a map has the size that a bias table is for."""
    if height != expected_height or width != expected_width:
        raise ValueError(
            f"the bias table is for maps of {expected_height}x{expected_width}; got {height}x{width}. "
            "Resize the images, or call set_input_size on the model"
        )


class GlobalAttention2d(nn.Module):
    """Multi-head self-attention over a whole map, with a bias by relative position or without.

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        map_size: Height and width of the maps; the bias table ``rpb`` belongs to them. None for no bias.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop: Dropout rate of the output.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``, H and W as in ``map_size``, any if that is None.

    Example:
        >>> attention = GlobalAttention2d(64, num_heads=2, map_size=(14, 14))
        >>> attention(torch.randn(1, 14, 14, 64)).shape
        torch.Size([1, 14, 14, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        map_size: tuple[int, int] | None = None,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"GlobalAttention2d needs num_heads to divide dim; got dim {dim}, heads {num_heads}")
        self.num_heads = num_heads
        self.height, self.width = (0, 0) if map_size is None else map_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = (
            None
            if map_size is None
            else nn.Parameter(torch.empty(num_heads, 2 * self.height - 1, 2 * self.width - 1, **dd))
        )
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the bias table: truncated normal, std 0.02."""
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)

    @torch.jit.ignore
    def set_map_size(self, map_size: tuple[int, int]) -> None:
        """Resample the bias table (bicubic) for maps of another size; nothing to do without one."""
        if self.rpb is None:
            return
        self.height, self.width = map_size
        table = resize_bias_table(self.rpb.detach(), (2 * self.height - 1, 2 * self.width - 1))
        self.rpb = nn.Parameter(table, requires_grad=self.rpb.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``x`` ``[B, H, W, dim]``.

        Raises:
            ValueError: If the map is not of the size that the bias table is for.
        """
        height, width = x.shape[1], x.shape[2]
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = None
        if self.rpb is not None:
            check_map_size(height, width, self.height, self.width)
            bias = relative_bias(self.rpb, self.height, self.width).to(q.dtype)[None]
        x = attend_tokens(q, k, v, bias)
        x = x.transpose(1, 2).flatten(2).unflatten(1, (height, width))
        return self.proj_drop(self.proj(x))

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`."""
        size, bias = tuple(x.shape[1:3]), None
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.rpb is not None:
            table = exact(relative_bias(self.rpb, self.height, self.width))
            bias = lambda queries, _: table[:, queries]  # noqa: E731
        operator = Softmax(q * q.shape[3] ** -0.5, k, bias=bias)
        return Recorded("global", size, operator, exact(v), lambda heads: self.proj(heads_to_map(heads, size)))
