"""Attention within windows, shifted or not: Swin (arXiv 2103.14030, section 3.2) and the families that use it."""

import torch
from timm.layers import register_notrace_function, to_2tuple, trunc_normal_
from torch import Tensor, nn

from ..kernels.lengths import padding_to
from .initialize import init_linear
from .pointwise import apply_linear
from .record import Recorded, Softmax, Windows, exact, heads_to_map, number_box
from .relative_bias import relative_bias
from .token_attention import attend_in_windows, attend_tokens, pad_to_windows, windows_stay


@register_notrace_function
def axis_shift(shift: int, length: int, window: int, other_length: int, other_window: int, rule: str) -> int:
    """Return the cyclic shift of an axis of ``length`` under the rule ``shift_where`` of `WindowAttention2d`."""
    covered = length <= window or (rule == "map" and other_length <= other_window)
    return 0 if covered and rule != "all" else shift


@register_notrace_function
def cut_windows(x: Tensor, window_height: int, window_width: int, shift_y: int, shift_x: int) -> Tensor:
    """Cut ``x`` ``[B, H, W, C]`` into windows ``[B * windows, window_height * window_width, C]``, row-major.

    The map is first padded with zeros at the bottom and right to whole windows, then rolled up and left by the shift.
    """
    x = pad_to_windows(x, window_height, window_width)
    if shift_y > 0 or shift_x > 0:
        x = torch.roll(x, (-shift_y, -shift_x), (1, 2))
    x = x.unflatten(2, (-1, window_width)).unflatten(1, (-1, window_height))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


@register_notrace_function
def join_windows(
    windows: Tensor, height: int, width: int, window_height: int, window_width: int, shift_y: int, shift_x: int
) -> Tensor:
    """Undo `cut_windows` for a map of ``height x width``: ``[B * windows, N, C]`` to ``[B, H, W, C]``."""
    rows, columns = -(-height // window_height), -(-width // window_width)
    x = windows.unflatten(1, (window_height, window_width)).unflatten(0, (-1, rows, columns))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    if shift_y > 0 or shift_x > 0:
        x = torch.roll(x, (shift_y, shift_x), (1, 2))
    return x[:, :height, :width]


def _axis_regions(length: int, window: int, shift: int, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    return (position >= length - window).int() + (position >= length - shift).int()


@register_notrace_function
def shift_mask(
    x: Tensor, height: int, width: int, window_height: int, window_width: int, shift_y: int, shift_x: int
) -> Tensor | None:
    """Return the mask ``[windows, N, N]`` of a shifted map in the dtype of ``x``, or None if nothing shifts.

    The roll brings opposite borders into one window; pairs from different sides get -100, as published.
    """
    if shift_y == 0 and shift_x == 0:
        return None
    rows = _axis_regions(height + padding_to(height, window_height), window_height, shift_y, x.device)
    columns = _axis_regions(width + padding_to(width, window_width), window_width, shift_x, x.device)
    region = (3 * rows[:, None] + columns)[None, :, :, None]
    region = cut_windows(region, window_height, window_width, 0, 0).squeeze(-1)
    return (region[:, :, None] != region[:, None, :]).to(x.dtype) * -100.0


@register_notrace_function
def add_mask(bias: Tensor | None, mask: Tensor | None, windows: int) -> Tensor | None:
    """Return the sum of a bias ``[1, heads, N, N]`` and a mask ``[windows of an image, N, N]``, either None.

    The sum is repeated for the images of the batch, which has ``windows`` windows in all.
    """
    if mask is None:
        return bias
    mask = mask[:, None]
    total = mask if bias is None else bias + mask
    return total.expand(windows // mask.shape[0], -1, -1, -1, -1).flatten(0, 1)


def from_swin_table(table: Tensor, window_size: tuple[int, int] | None = None) -> Tensor:
    """Return Swin's bias table ``[(2h - 1) * (2w - 1), heads]`` as ``rpb`` ``[heads, 2h - 1, 2w - 1]``.

    Swin indexes by query minus key, ``rpb`` by key minus query, hence the flip. The window is square by default.
    """
    if window_size is None:
        side = round(table.shape[0] ** 0.5)
        shape = (side, side)
    else:
        shape = (2 * window_size[0] - 1, 2 * window_size[1] - 1)
    return table.t().unflatten(1, shape).flip(1, 2)


class WindowAttention2d(nn.Module):
    """Multi-head self-attention within windows that do not overlap, optionally shifted.

    A map that is no multiple of the window is padded with zeros at the bottom and right, before the projection to
    queries, keys and values; padded positions take part as keys, as in Swin's dense models.

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        window_size: Height and width of a window.
        shift_size: Rows and columns by which the windows are shifted, less than the window.
        shift_where: ``"axis"``: an axis that one window covers is not shifted. ``"map"``: neither axis is if one of
            them is covered, as in Swin's classifier. ``"all"``: every map is shifted, as in Swin's dense models.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        rel_pos_bias: Whether scores get a learned bias by relative position, a table ``rpb``
            ``[heads, 2h - 1, 2w - 1]`` as in neighborhood attention; `from_swin_table` converts Swin's.
        proj_drop: Dropout rate of the output.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``, any H and W.

    Example:
        >>> attention = WindowAttention2d(64, num_heads=2, window_size=7, shift_size=3)
        >>> attention(torch.randn(1, 20, 30, 64)).shape
        torch.Size([1, 20, 30, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | tuple[int, int] = 7,
        shift_size: int | tuple[int, int] = 0,
        shift_where: str = "axis",
        qkv_bias: bool = True,
        rel_pos_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"WindowAttention2d needs num_heads to divide dim; got dim {dim}, heads {num_heads}")
        if shift_where not in ("axis", "map", "all"):
            raise ValueError(f"shift_where must be 'axis', 'map' or 'all'; got {shift_where!r}")
        self.num_heads = num_heads
        self.shift_where = shift_where
        self.window_height, self.window_width = to_2tuple(window_size)
        self.shift_y, self.shift_x = to_2tuple(shift_size)
        if not (0 <= self.shift_y < self.window_height and 0 <= self.shift_x < self.window_width):
            raise ValueError(
                f"WindowAttention2d needs 0 <= shift_size < window_size; got {shift_size} for windows of {window_size}"
            )
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = (
            nn.Parameter(torch.empty(num_heads, 2 * self.window_height - 1, 2 * self.window_width - 1, **dd))
            if rel_pos_bias
            else None
        )
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the bias table and the projections as Swin does: truncated normal, std 0.02."""
        init_linear(self.qkv, self.proj)
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)

    def extra_repr(self) -> str:
        """Return the settings that `print(model)` shows."""
        window, shift = (self.window_height, self.window_width), (self.shift_y, self.shift_x)
        return f"window_size={window}, shift_size={shift}, num_heads={self.num_heads}"

    def forward(self, x: Tensor) -> Tensor:
        """Attend within the windows of ``x`` ``[B, H, W, dim]``."""
        if torch.jit.is_scripting():
            return self._attend(x)
        else:
            stay = windows_stay(x, self.num_heads, self.qkv, self.proj) and self._shifts(x) == (0, 0)
            return self._attend_in_place(x) if stay else self._attend(x)

    def _shifts(self, x: Tensor) -> tuple[int, int]:
        height, width = x.shape[1], x.shape[2]
        window_y, window_x, where = self.window_height, self.window_width, self.shift_where
        shift_y = axis_shift(self.shift_y, height, window_y, width, window_x, where)
        return shift_y, axis_shift(self.shift_x, width, window_x, height, window_y, where)

    def _bias(self, x: Tensor) -> Tensor | None:
        if self.rpb is None:
            return None
        return relative_bias(self.rpb, self.window_height, self.window_width).to(x.dtype)[None]

    def _attend_in_place(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        qkv = apply_linear(self.qkv, pad_to_windows(x, self.window_height, self.window_width))
        out = attend_in_windows(qkv, self.num_heads, self.window_height, self.window_width, self._bias(qkv))
        return self.proj_drop(apply_linear(self.proj, out)[:, :height, :width])

    def _attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        shift_y, shift_x = self._shifts(x)
        windows = cut_windows(x, self.window_height, self.window_width, shift_y, shift_x)
        qkv = self.qkv(windows) if torch.jit.is_scripting() else apply_linear(self.qkv, windows)
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        mask = shift_mask(q, height, width, self.window_height, self.window_width, shift_y, shift_x)
        windows = attend_tokens(q, k, v, add_mask(self._bias(q), mask, q.shape[0]))
        windows = windows.transpose(1, 2).flatten(2)
        windows = self.proj(windows) if torch.jit.is_scripting() else apply_linear(self.proj, windows)
        x = join_windows(windows, height, width, self.window_height, self.window_width, shift_y, shift_x)
        return self.proj_drop(x)

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`."""
        size = height, width = tuple(x.shape[1:3])
        window = self.window_height, self.window_width
        shift_y, shift_x = self._shifts(x)
        cut = cut_windows(x, *window, shift_y, shift_x)
        q, k, v = self.qkv(cut).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = shift_mask(q, height, width, *window, shift_y, shift_x)
        numbers = number_windows(size, window, (shift_y, shift_x)).to(x.device)
        windows = Windows(numbers, None if mask is None else mask != 0)
        q, k, v = (windows.join(part) for part in (q, k, v))
        bias = None if self.rpb is None else windows.bias(relative_bias(self.rpb, *window))
        operator = Softmax(q[:, :, : height * width] * q.shape[3] ** -0.5, k, windows.keys, bias)
        return Recorded("window", size, operator, exact(v), lambda heads: self.proj(heads_to_map(heads, size)))


def number_windows(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int] = (0, 0)) -> Tensor:
    """Return the tokens of each window that `cut_windows` cuts, numbered as `number_box` does: ``[windows, n]``."""
    padded = [length + padding_to(length, side) for length, side in zip(size, window, strict=True)]
    return cut_windows(number_box(size, padded)[None, :, :, None], *window, *shift).squeeze(-1)
