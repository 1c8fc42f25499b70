"""Neighborhood attention as modules in one to three dimensions: NAT (arXiv 2204.07143), DiNAT (arXiv 2209.15001)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, trunc_normal_
from torch import Tensor, nn

from ..kernels import na1d, na2d, na3d
from ..kernels.lengths import is_open
from ..kernels.neighborhood.reference import reference_scores
from ..kernels.neighborhood.window import Axis, neighbors
from .initialize import init_linear
from .pointwise import apply_linear
from .record import Recorded, Softmax, exact, heads_to_map, number_box

_OPERATORS = {1: na1d, 2: na2d, 3: na3d}


# One node of a traced graph each: padding and the operator's plan depend on the shapes.
@register_notrace_function
@torch.jit.ignore
def pad_to_fit(x: Tensor, least: list[int]) -> Tensor:
    """Zero-pad ``x`` ``[B, *spatial, C]`` at the end of its spatial axes to the least sizes."""
    if is_open(*x.shape[1:-1]):
        more = [torch.sym_max(0, minimum - length) for minimum, length in zip(least, x.shape[1:-1], strict=True)]
        return F.pad(x, [0, 0] + [n for axis in reversed(more) for n in (0, axis)])
    more = [max(0, minimum - length) for minimum, length in zip(least, x.shape[1:-1], strict=True)]
    return F.pad(x, [0, 0] + [n for axis in reversed(more) for n in (0, axis)]) if any(more) else x


@register_notrace_function
@torch.jit.ignore
def attend(
    qkv: Tensor,
    rpb: Tensor | None,
    num_heads: int,
    size: list[int],
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    scale: float,
) -> Tensor:
    """Apply the operator to ``qkv`` ``[B, *spatial, 3 * C]`` and crop to ``size``: ``[B, *size, C]``."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)
    rpb = None if rpb is None else rpb.to(q.dtype)
    operator = _OPERATORS[len(size)]
    out = operator(q, k, v, kernel_size, stride, dilation, is_causal, scale, rpb=rpb)
    return out[(slice(None), *(slice(length) for length in size))].flatten(-2)


class _NeighborhoodAttention(nn.Module):
    rank: int

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        qkv_bias: bool = True,
        rel_pos_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
        stride: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        name = type(self).__name__
        if dim % num_heads:
            raise ValueError(f"{name} needs num_heads to divide dim; got dim {dim}, num_heads {num_heads}")
        self.kernel_size = self._per_axis("kernel_size", kernel_size)
        self.stride = self._per_axis("stride", stride)
        self.dilation = self._per_axis("dilation", dilation)
        self.is_causal = self._per_axis("is_causal", is_causal)
        if rel_pos_bias and any(kernel % 2 == 0 for kernel in self.kernel_size):
            raise ValueError(f"{name} defines rel_pos_bias for odd kernel sizes only; got kernel_size {kernel_size}")
        if rel_pos_bias and (max(self.stride) > 1 or any(self.is_causal)):
            raise ValueError(f"{name} defines rel_pos_bias neither with a stride nor on a causal axis")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        self.least = [kernel * step for kernel, step in zip(self.kernel_size, self.dilation, strict=True)]
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        table = [2 * kernel - 1 for kernel in self.kernel_size]
        self.rpb = nn.Parameter(torch.empty(num_heads, *table, **dd)) if rel_pos_bias else None
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def _per_axis(self, name: str, value) -> list:
        values = list(value) if isinstance(value, Sequence) else [value] * self.rank
        if len(values) != self.rank:
            raise ValueError(f"{type(self).__name__} takes one {name}, or {self.rank} of them; got {value}")
        return values

    def reset_parameters(self) -> None:
        """Initialise the projections and the bias table as published: truncated normal, std 0.02; biases zero."""
        init_linear(self.qkv, self.proj)
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)

    def extra_repr(self) -> str:
        """Return the settings that `print(model)` shows."""
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"

    def forward(self, x: Tensor) -> Tensor:
        """Attend within the neighborhoods of ``x`` ``[B, *spatial, dim]``."""
        padded = pad_to_fit(x, self.least)
        qkv = self.qkv(padded) if torch.jit.is_scripting() else apply_linear(self.qkv, padded)
        x = attend(
            qkv,
            self.rpb,
            self.num_heads,
            x.shape[1:-1],
            self.kernel_size,
            self.stride,
            self.dilation,
            self.is_causal,
            self.scale,
        )
        return self.proj_drop(self.proj(x) if torch.jit.is_scripting() else apply_linear(self.proj, x))

    @torch.jit.ignore
    def attention_map(self, x: Tensor) -> Tensor:
        """Return the weights ``[B, *spatial, heads, neighbors]`` of each position of ``x`` over its window.

        The keys are the product of the axes' `kernels.neighborhood.window.axis_windows`, in row-major order. Memory
        grows with the window: this is for pictures and analysis.
        """
        q, k, _ = self.qkv(pad_to_fit(x, self.least)).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        scores = reference_scores(q, k, self._axes(q.shape[1:-2]), self.scale, self.rpb)
        weights = scores.softmax(-1).unflatten(1, q.shape[1:-2])
        return weights[(slice(None), *(slice(length) for length in x.shape[1:-1]))]

    def _axes(self, size: Sequence[int]) -> list[Axis]:
        settings = zip(size, self.kernel_size, self.stride, self.dilation, self.is_causal, strict=True)
        return [Axis(*setting) for setting in settings]

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`."""
        size = x.shape[1:-1]
        q, k, v = self.qkv(pad_to_fit(x, self.least)).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        axes = self._axes(q.shape[1:-2])
        numbers = number_box(size, q.shape[1:-2]).to(x.device)
        order = numbers.flatten().argsort()
        q, k, v = (part.flatten(1, -3).transpose(1, 2)[:, :, order] for part in (q, k, v))
        count = size.numel()
        rpb = None if self.rpb is None else exact(self.rpb).flatten(1)

        def find(queries: Tensor) -> tuple[Tensor, Tensor]:
            tables = neighbors(axes, order[queries].cpu().numpy())
            return tuple(torch.from_numpy(table).to(x.device) for table in tables)

        def support(queries: Tensor) -> Tensor:
            tokens, _ = find(queries)
            return torch.where(tokens < 0, -1, numbers.flatten()[tokens])[None, None]

        operator = Softmax(
            q[:, :, :count] * self.scale,
            k,
            support,
            None if rpb is None else lambda queries, _: rpb[:, find(queries)[1]],
        )
        return Recorded(
            "neighborhood", tuple(size), operator, exact(v), lambda heads: self.proj(heads_to_map(heads, size))
        )


class NeighborhoodAttention2d(_NeighborhoodAttention):
    """Multi-head self-attention in which a position sees its ``kernel_size x kernel_size`` neighborhood.

    A map smaller than ``kernel_size * dilation`` is padded with zeros at the bottom and right before the projection to
    queries, keys and values; the padded positions take part as keys, as in the modules that the published models were
    trained with (NATTEN up to 0.15.1).

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        kernel_size: Window height and width, or one for both.
        dilation: Distance between neighbors.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        rel_pos_bias: Whether scores get a learned bias by relative position, a table ``rpb``
            ``[heads, 2 * Kh - 1, 2 * Kw - 1]``. Needs odd kernels, no stride and no causal axis.
        scale: Factor on the scores; ``(dim / num_heads) ** -0.5`` by default.
        proj_drop: Dropout rate of the output.
        stride: Consecutive queries that share a window.
        is_causal: Whether a position sees only itself and what comes before it on an axis.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``, any H and W.

    Raises:
        ValueError: If the settings don't fit each other.

    Example:
        >>> attention = NeighborhoodAttention2d(64, num_heads=2, kernel_size=7, dilation=2)
        >>> attention(torch.randn(1, 20, 30, 64)).shape
        torch.Size([1, 20, 30, 64])
    """

    rank = 2


class NeighborhoodAttention1d(_NeighborhoodAttention):
    """Neighborhood attention on lines ``[B, L, dim]``; everything else as in `NeighborhoodAttention2d`.

    Example:
        >>> attention = NeighborhoodAttention1d(32, num_heads=2, kernel_size=5, rel_pos_bias=False, is_causal=True)
        >>> attention(torch.randn(1, 50, 32)).shape
        torch.Size([1, 50, 32])
    """

    rank = 1


class NeighborhoodAttention3d(_NeighborhoodAttention):
    """Neighborhood attention on volumes ``[B, D, H, W, dim]``; everything else as in `NeighborhoodAttention2d`.

    Example:
        >>> attention = NeighborhoodAttention3d(32, num_heads=2, kernel_size=(3, 5, 5))
        >>> attention(torch.randn(1, 4, 9, 7, 32)).shape
        torch.Size([1, 4, 9, 7, 32])
    """

    rank = 3
