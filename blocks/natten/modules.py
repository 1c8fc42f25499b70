"""What NATTEN's modules of all releases share: parameters, their names, and what they do with them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...kernels import na1d, na1d_av, na1d_qk, na2d, na2d_av, na2d_qk, na3d, na3d_av, na3d_qk
from ..neighborhood import pad_to_fit
from ..plain import is_plain

_FUSED = {1: na1d, 2: na2d, 3: na3d}
_QK = {1: na1d_qk, 2: na2d_qk, 3: na3d_qk}
_AV = {1: na1d_av, 2: na2d_av, 3: na3d_av}


def per_axis(name: str, rank: int, value) -> tuple:
    """Return a setting as one for each axis.

    Raises:
        ValueError: If it has another number of them.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(values) != rank:
        raise ValueError(f"{name} must be one value, or one for each of {rank} axes; got {value}")
    return values


class NeighborhoodModule(nn.Module):
    """Multi-head self-attention of each position to its neighborhood, ``[B, *spatial, dim]`` to the same.

    The parameters are NATTEN's, in every release: ``qkv.weight``, ``qkv.bias``, ``rpb``, ``proj.weight``,
    ``proj.bias``. Weights that nobody drops or looks at are never held in memory.

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        kernel_size: Length of the window, or one for each axis.
        dilation: Distance between neighbors.
        bias: Whether there is a relative position bias ``rpb`` ``[heads, 2 * kernel_size - 1, ...]``.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        qk_scale: Factor on the queries; ``(dim / num_heads) ** -0.5`` if None or 0.
        attn_drop: Dropout rate of the weights, which are not normalised again.
        proj_drop: Dropout rate of the output.
        is_causal: Whether a position sees only itself and what comes before it on an axis.
        stride: Consecutive queries that share a window.

    Raises:
        ValueError: If the settings don't fit each other, or an input's size.
    """

    rank: int
    pads = False  # whether a map shorter than a window is padded with zeros at its end, before `qkv`

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        is_causal: bool | Sequence[bool] = False,
        stride: int | Sequence[int] = 1,
    ):
        super().__init__()
        name = type(self).__name__
        if dim % num_heads:
            raise ValueError(f"{name} needs num_heads to divide dim; got dim {dim}, num_heads {num_heads}")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.kernel_size = per_axis(f"{name}'s kernel_size", self.rank, kernel_size)
        self.dilation = per_axis(f"{name}'s dilation", self.rank, dilation)
        self.is_causal = per_axis(f"{name}'s is_causal", self.rank, is_causal)
        self.stride = per_axis(f"{name}'s stride", self.rank, stride)
        if bias and (any(self.is_causal) or any(kernel % 2 == 0 for kernel in self.kernel_size)):
            raise ValueError(f"{name} has a bias for odd kernel sizes only, and on no causal axis")
        self._windows = self.kernel_size, self.dilation
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        table = [2 * kernel - 1 for kernel in self.kernel_size]
        self.rpb = nn.Parameter(torch.empty(num_heads, *table)) if bias else None
        if bias:
            nn.init.trunc_normal_(self.rpb, std=0.02, a=-2.0, b=2.0)
        self.attn_drop_rate = attn_drop
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def windows(self, size: tuple[int, ...]) -> tuple[Sequence[int], Sequence[int]]:
        """Return kernel size and dilation for each axis of a map of ``size``."""
        return self._windows

    def extra_repr(self) -> str:
        """Return the settings that `print(model)` shows."""
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
            f"dilation={self.dilation}, rel_pos_bias={self.rpb is not None}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attend within the neighborhoods of ``x`` ``[B, *spatial, dim]``."""
        if x.ndim != self.rank + 2:
            raise ValueError(f"{type(self).__name__} takes [B, *{self.rank} axes, dim]; got {list(x.shape)}")
        size = tuple(x.shape[1:-1])
        kernel_size, dilation = self.windows(size)
        if self.pads:
            x = pad_to_fit(x, [math.prod(window) for window in zip(kernel_size, dilation, strict=True)])
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        rpb = None if self.rpb is None else self.rpb.to(query.dtype)
        if is_plain(self.attn_drop) and not (self.training and self.attn_drop.p):
            options = (kernel_size, self.stride, dilation, self.is_causal, self.scale)
            x = _FUSED[self.rank](query, key, value, *options, rpb=rpb)
        else:
            windows = (kernel_size, dilation, self.is_causal)
            scores = _QK[self.rank](query * self.scale, key, *windows, rpb=rpb)
            # Who looks at the dropout's input expects the heads first.
            weights = self.attn_drop(scores.softmax(-1).movedim(-2, 1)).movedim(1, -2)
            x = _AV[self.rank](weights, value, *windows)
        x = x[(slice(None), *(slice(length) for length in size))].flatten(-2)
        return self.proj_drop(self.proj(x))
