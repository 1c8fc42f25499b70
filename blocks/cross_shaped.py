"""Cross-shaped window attention: CSWin (Dong et al., CVPR 2022, arXiv 2107.00652)."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from ..kernels.attention import without_cudnn
from ..kernels.lengths import padding_to
from ..kernels.token_attention import token_attention
from .initialize import init_linear
from .pointwise import apply_linear
from .record import Recorded, Softmax, Windows, exact, heads_to_map, map_to_heads, number_box
from .window import cut_windows, join_windows


@register_notrace_function
def stripe_size(length: int, stripe: int) -> int:
    """Return the extent of a stripe on an axis of ``length``: 0 stands for the whole axis."""
    return length if stripe == 0 else stripe


@register_notrace_function
def pad_to_stripes(qkv: Tensor, stripe_height: int, stripe_width: int) -> Tensor:
    """Zero-pad ``[B, H, W, C]`` on all sides, the odd line at the bottom and right, to whole stripes."""
    height, width = qkv.shape[1], qkv.shape[2]
    pad_y, pad_x = padding_to(height, stripe_height), padding_to(width, stripe_width)
    if pad_y == 0 and pad_x == 0:
        return qkv
    return F.pad(qkv, (0, 0, pad_x // 2, pad_x - pad_x // 2, pad_y // 2, pad_y - pad_y // 2))


@register_notrace_function
def unpad_stripes(x: Tensor, height: int, width: int) -> Tensor:
    """Undo `pad_to_stripes` for a map of ``height x width``."""
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    return x[:, top : top + height, left : left + width]


@register_notrace_function
@torch.jit.ignore
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend within windows: ``[windows, heads, tokens, dim]`` each, to the same shape."""
    with without_cudnn(q):
        return token_attention(q, k, v)


class CrossShapedAttention2d(nn.Module):
    """Multi-head self-attention within stripes: half of the heads in vertical ones, half in horizontal ones.

    Values pass a depthwise 3x3 convolution within their stripe (locally-enhanced positional encoding), which is added.
    A map that does not divide into stripes is padded with zeros on all sides after the projection to queries, keys and
    values; the padded positions take part as keys, as in CSWin's published segmentation code.

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        stripe: Width of the vertical stripes and height of the horizontal ones; None for one window, the whole map,
            with all heads.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop: Dropout rate of the output.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``, any H and W.

    Example:
        >>> attention = CrossShapedAttention2d(64, num_heads=2, stripe=7)
        >>> attention(torch.randn(1, 20, 30, 64)).shape
        torch.Size([1, 20, 30, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stripe: int | None = 7,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        # Height and width of the stripes of every branch, 0 for the whole axis.
        self.stripes: list[tuple[int, int]] = [(0, 0)] if stripe is None else [(0, stripe), (stripe, 0)]
        branches = len(self.stripes)
        if dim % num_heads or num_heads % branches:
            raise ValueError(
                f"CrossShapedAttention2d needs num_heads to divide dim, and {branches} to divide num_heads; "
                f"got dim {dim}, heads {num_heads}"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.lepe = nn.ModuleList(
            nn.Conv2d(dim // branches, dim // branches, 3, padding=1, groups=dim // branches, **dd)
            for _ in self.stripes
        )
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projections as published: truncated normal, std 0.02."""
        init_linear(self.qkv, self.proj)

    def extra_repr(self) -> str:
        """Return the settings that `print(model)` shows."""
        return f"num_heads={self.num_heads}, stripes={self.stripes}"

    def forward(self, x: Tensor) -> Tensor:
        """Attend within the stripes of ``x`` ``[B, H, W, dim]``."""
        height, width = x.shape[1], x.shape[2]
        branches = len(self.stripes)
        # [B, H, W, 3, branches, C]
        qkv = self.qkv(x) if torch.jit.is_scripting() else apply_linear(self.qkv, x)
        qkv = qkv.unflatten(-1, (3, branches, -1))
        outs = []
        for i, lepe in enumerate(self.lepe):
            stripe_height = stripe_size(height, self.stripes[i][0])
            stripe_width = stripe_size(width, self.stripes[i][1])
            branch = pad_to_stripes(qkv[:, :, :, :, i].flatten(3), stripe_height, stripe_width)
            padded_height, padded_width = branch.shape[1], branch.shape[2]
            windows = cut_windows(branch, stripe_height, stripe_width, 0, 0)
            q, k, v = windows.unflatten(-1, (3, self.num_heads // branches, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            out = attend(q, k, v).transpose(1, 2).flatten(2)
            local = windows.chunk(3, dim=-1)[2].unflatten(1, (stripe_height, stripe_width)).permute(0, 3, 1, 2)
            out = out + lepe(local).flatten(2).transpose(1, 2)
            out = join_windows(out, padded_height, padded_width, stripe_height, stripe_width, 0, 0)
            outs.append(unpad_stripes(out, height, width))
        x = torch.cat(outs, dim=-1)
        return self.proj_drop(self.proj(x) if torch.jit.is_scripting() else apply_linear(self.proj, x))

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`. Branches with less padding have zeros at the end."""
        size = height, width = tuple(x.shape[1:3])
        branches, count = len(self.stripes), height * width
        qkv = self.qkv(x).unflatten(-1, (3, branches, -1))
        cuts, heads, windows = [], [], []
        for i in range(branches):
            stripe = stripe_size(height, self.stripes[i][0]), stripe_size(width, self.stripes[i][1])
            branch = pad_to_stripes(qkv[:, :, :, :, i].flatten(3), *stripe)
            cuts.append((cut_windows(branch, *stripe, 0, 0), tuple(branch.shape[1:3]), stripe))
            before = [(padded - length) // 2 for padded, length in zip(branch.shape[1:3], size, strict=True)]
            numbers = number_box(size, branch.shape[1:3], before)[None, :, :, None].to(x.device)
            windows.append(Windows(cut_windows(numbers, *stripe, 0, 0).squeeze(-1)))
            parts = cuts[-1][0].unflatten(-1, (3, self.num_heads // branches, -1)).permute(2, 0, 3, 1, 4)
            heads.append(torch.stack([windows[-1].join(part) for part in parts]))
        values = max(part.shape[3] for part in heads)
        q, k, v = torch.cat([F.pad(part, (0, 0, 0, values - part.shape[3])) for part in heads], 2).unbind(0)

        def support(queries: Tensor) -> Tensor:
            keys = [part.keys(queries) for part in windows]
            most = max(part.shape[3] for part in keys)
            keys = torch.cat([F.pad(part, (0, most - part.shape[3]), value=-1) for part in keys], 1)
            return keys.repeat_interleave(self.num_heads // branches, 1)

        def local() -> Tensor:
            outs = []
            for (cut, padded, stripe), lepe in zip(cuts, self.lepe, strict=True):
                out = lepe(cut.chunk(3, dim=-1)[2].unflatten(1, stripe).permute(0, 3, 1, 2)).flatten(2).mT
                outs.append(unpad_stripes(join_windows(out, *padded, *stripe, 0, 0), height, width))
            return map_to_heads(torch.cat(outs, -1), self.num_heads)

        operator = Softmax(q[:, :, :count] * q.shape[3] ** -0.5, k, support)
        return Recorded("stripes", size, operator, exact(v), lambda out: self.proj(heads_to_map(out, size)), local)
