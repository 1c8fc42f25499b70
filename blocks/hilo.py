"""HiLo attention (LITv2, arXiv 2205.13213): some heads attend within small windows, the others to a pooled map."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from ..kernels.lengths import padding_to
from .initialize import init_linear
from .pointwise import apply_linear
from .record import Given, Recorded, Rows, Softmax, Windows, exact, heads_to_map, map_to_heads
from .token_attention import attend_in_windows, attend_tokens, pad_to_windows, windows_stay
from .window import cut_windows, join_windows, number_windows


@register_notrace_function
def pool_windows(x: Tensor, size: int) -> Tensor:
    """Average the windows of a map ``[B, H, W, C]``, zeros at the bottom and right included: ``[B, windows, C]``."""
    x = F.pad(x, (0, 0, 0, padding_to(x.shape[2], size), 0, padding_to(x.shape[1], size)))
    return F.avg_pool2d(x.permute(0, 3, 1, 2), size).flatten(2).transpose(1, 2)


class HiLoAttention2d(nn.Module):
    """Multi-head self-attention that splits its heads between high and low frequencies of a map.

    High frequencies: heads that attend within windows that do not overlap. Low frequencies: heads whose queries are all
    positions, and whose keys and values are averages of the windows. Their outputs are joined, high before low, without
    a projection of both. With windows of one position all heads are of the second kind, and attention is global.

    A map that is no multiple of the window is padded with zeros at the bottom and right, before the projections. As in
    the published dense models nothing of that is masked: padded positions are keys within their windows, and the zeros
    count in the averages.

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        window_size: Height and width of a window.
        alpha: The part of the heads, rounded down, that attend to the pooled map; from 0 to 1.
        qkv_bias: Whether the projections to queries, keys and values have a bias.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``, any H and W.

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim``, or ``alpha`` or the window is out of range.

    Example:
        >>> attention = HiLoAttention2d(64, num_heads=4)
        >>> attention(torch.randn(1, 20, 30, 64)).shape
        torch.Size([1, 20, 30, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 2,
        alpha: float = 0.5,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"HiLo attention needs num_heads to divide dim; got dim {dim}, heads {num_heads}")
        if not 0 <= alpha <= 1 or window_size < 1:
            raise ValueError(
                f"HiLo attention needs alpha from 0 to 1 and windows of at least one position; got alpha {alpha}, "
                f"windows of {window_size}"
            )
        self.window_size = window_size
        self.low_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.high_heads = num_heads - self.low_heads
        low, high = (heads * (dim // num_heads) for heads in (self.low_heads, self.high_heads))
        self.h_qkv = nn.Linear(dim, 3 * high, bias=qkv_bias, **dd) if high else None
        self.h_proj = nn.Linear(high, high, **dd) if high else None
        self.l_q = nn.Linear(dim, low, bias=qkv_bias, **dd) if low else None
        self.l_kv = nn.Linear(dim, 2 * low, bias=qkv_bias, **dd) if low else None
        self.l_proj = nn.Linear(low, low, **dd) if low else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projections as published: truncated normal, std 0.02."""
        init_linear(*self.children())

    def extra_repr(self) -> str:
        """Return the settings that `print(model)` shows."""
        return f"window_size={self.window_size}, {self.high_heads} heads high, {self.low_heads} low"

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``x`` ``[B, H, W, dim]``."""
        # Torch's script compiles only the branch of what there is.
        if self.h_qkv is None:
            out = self._attend_low(x)
        elif self.l_q is None:
            out = self._attend_high(x)
        else:
            out = torch.cat([self._attend_high(x), self._attend_low(x)], dim=-1)
        return out

    def _attend_high(self, x: Tensor) -> Tensor:
        """Attend within windows."""
        if torch.jit.is_scripting():
            return self._attend_cut(x)
        else:
            stay = windows_stay(x, self.high_heads, self.h_qkv, self.h_proj)
            return self._attend_in_place(x) if stay else self._attend_cut(x)

    def _attend_in_place(self, x: Tensor) -> Tensor:
        size = self.window_size
        qkv = apply_linear(self.h_qkv, pad_to_windows(x, size, size))
        out = apply_linear(self.h_proj, attend_in_windows(qkv, self.high_heads, size, size))
        return out[:, : x.shape[1], : x.shape[2]]

    def _attend_cut(self, x: Tensor) -> Tensor:
        height, width, size = x.shape[1], x.shape[2], self.window_size
        windows = cut_windows(x, size, size, 0, 0)
        qkv = self.h_qkv(windows) if torch.jit.is_scripting() else apply_linear(self.h_qkv, windows)
        q, k, v = qkv.unflatten(-1, (3, self.high_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = attend_tokens(q, k, v).transpose(1, 2).flatten(2)
        out = self.h_proj(out) if torch.jit.is_scripting() else apply_linear(self.h_proj, out)
        return join_windows(out, height, width, size, size, 0, 0)

    def _attend_low(self, x: Tensor) -> Tensor:
        """Attend to the averages of windows."""
        height, width = x.shape[1], x.shape[2]
        tokens = x.flatten(1, 2)
        pooled = tokens if self.window_size == 1 else pool_windows(x, self.window_size)
        q = self.l_q(tokens) if torch.jit.is_scripting() else apply_linear(self.l_q, tokens)
        kv = self.l_kv(pooled) if torch.jit.is_scripting() else apply_linear(self.l_kv, pooled)
        q = q.unflatten(-1, (self.low_heads, -1)).transpose(1, 2)
        k, v = kv.unflatten(-1, (2, self.low_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = attend_tokens(q, k, v).transpose(1, 2).flatten(2)
        out = self.l_proj(out) if torch.jit.is_scripting() else apply_linear(self.l_proj, out)
        return out.unflatten(1, (height, width))

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`.

        Values of low frequencies are means of the windows' values: their weights are divided among the tokens.
        """
        size, side = tuple(x.shape[1:3]), self.window_size
        count, high = size[0] * size[1], self.high_heads
        windows = Windows(number_windows(size, (side, side)).to(x.device))
        cut = cut_windows(x, side, side, 0, 0)
        values, operators = [], []
        if self.h_qkv is not None:
            q, k, v = (map_to_heads(part, high) for part in self.h_qkv(cut).chunk(3, -1))
            q, k, v = (windows.join(part) for part in (q, k, v))
            operators.append(Softmax(q[:, :, :count] * q.shape[3] ** -0.5, k, windows.keys))
            values.append(v)
        if self.l_q is not None:
            pooled = x.flatten(1, 2) if side == 1 else pool_windows(x, side)
            q = map_to_heads(self.l_q(x), self.low_heads)
            k = map_to_heads(self.l_kv(pooled).chunk(2, -1)[0], self.low_heads)
            operators.append(Softmax(q * q.shape[3] ** -0.5, k))
            values.append(windows.join(map_to_heads(self.l_kv(cut).chunk(2, -1)[1], self.low_heads)))

        def rows(queries: Tensor) -> Rows:
            parts = [operator.rows(queries) for operator in operators]
            if self.l_q is not None:
                low = parts[-1].weights[..., windows.window] / side**2
                if self.h_qkv is None:
                    return Rows(None, low)
                within = low.new_zeros(low.shape[0], high, *low.shape[2:])
                within.scatter_(-1, parts[0].keys.expand_as(parts[0].weights), parts[0].weights)
                return Rows(None, torch.cat([within, low], 1))
            return parts[0]

        def project(heads: Tensor) -> Tensor:
            layers, parts = (self.h_proj, self.l_proj), (heads[:, :high], heads[:, high:])
            outs = [
                layer(heads_to_map(part, size)) for layer, part in zip(layers, parts, strict=True) if layer is not None
            ]
            return torch.cat(outs, -1)

        values = exact(torch.cat(values, 1))
        row_size = sum(operator.row_size for operator in operators) + 2 * values.shape[1] * values.shape[2]
        return Recorded(
            "window" if high else "global",
            size,
            Given(rows, values.shape[1], count, values.shape[2], row_size, x.device),
            values,
            project,
            note=f"the first {high} of {values.shape[1]} heads are within windows, the others see means of windows"
            if high and self.low_heads
            else "",
        )
