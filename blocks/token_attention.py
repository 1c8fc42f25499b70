"""Attention between tokens as layers call it: whole, or within the windows of a map."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from ..kernels.lengths import padding_to
from ..kernels.token_attention import reads_in_place, token_attention, window_attention
from .plain import is_plain


@register_notrace_function
def attend_tokens(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attend from ``[B, heads, N, dim]`` to ``[B, heads, M, dim]``; see `kernels.token_attention`.

    Example:
        >>> attend_tokens(torch.randn(1, 2, 9, 16), *torch.randn(2, 1, 2, 49, 16)).shape
        torch.Size([1, 2, 9, 16])
    """
    # TorchScript leaves the other branch out.
    if torch.jit.is_scripting():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    else:
        # torch.fx follows functions that a subclass in another file calls, with what stands for tensors.
        operator = token_attention if isinstance(q, Tensor) else F.scaled_dot_product_attention
        return operator(q, k, v, bias, scale=scale)


def windows_stay(x: Tensor, num_heads: int, *layers: nn.Module) -> bool:
    """Return whether the windows of a map ``[B, H, W, C]`` need not be cut, by what reads them where they lie.

    Its projections, ``layers``, then get the map: who looks at one of them sees windows, as published code cuts them.
    """
    return is_plain(*layers) and reads_in_place(x, num_heads)


def pad_to_windows(x: Tensor, height: int, width: int) -> Tensor:
    """Zero-pad ``x`` ``[B, H, W, C]`` at the bottom and right to whole windows."""
    pad_y, pad_x = padding_to(x.shape[1], height), padding_to(x.shape[2], width)
    return F.pad(x, (0, 0, 0, pad_x, 0, pad_y)) if pad_y > 0 or pad_x > 0 else x


def attend_in_windows(qkv: Tensor, num_heads: int, height: int, width: int, bias: Tensor | None = None) -> Tensor:
    """Attend within the windows of a map ``[B, H, W, 3 * C]`` of queries, keys and values, to ``[B, H, W, C]``.

    Args:
        qkv: Of whole windows.
        num_heads: Heads.
        height: Of a window.
        width: Likewise.
        bias: Added to every window's scores, ``[1, heads, height * width, height * width]``.
    """
    windows = qkv.unflatten(-1, (3, num_heads, -1)).unflatten(2, (-1, width)).unflatten(1, (-1, height))
    q, k, v = windows.permute(5, 0, 1, 3, 6, 2, 4, 7).unbind(0)
    out = window_attention(q, k, v, bias)
    return out.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)
