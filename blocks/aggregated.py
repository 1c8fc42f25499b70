"""Attention of TransNeXt (arXiv 2311.17132): to a window and a pooled map at once, or to the whole map."""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from ..kernels.aggregated import aggregated_attention, join_rows, rows_at_once, run_rows
from .continuous_bias import AxisTable, ContinuousBias, bias_of_rows, pooling_matrix
from .pointwise import apply_linear


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _init_queries(temperature: Tensor, *small: Tensor) -> None:
    nn.init.constant_(temperature, math.log(math.e ** (1 / 0.24) - 1))  # softplus makes 1 / 0.24 of it
    for parameter in small:
        trunc_normal_(parameter, std=0.02)


def pool_map(x: Tensor, height: int, width: int) -> Tensor:
    """Pool a map ``[B, H, W, C]`` to ``[B, height, width, C]`` as adaptive average pooling does."""
    size = (int(x.shape[1]), int(x.shape[2]))
    if size[0] % height == 0 and size[1] % width == 0:
        step = (size[0] // height, size[1] // width)
        return F.avg_pool2d(x.permute(0, 3, 1, 2), step, step).permute(0, 2, 3, 1)
    # Bins that overlap; ONNX has no operator for them.
    rows, columns = (torch.from_numpy(pooling_matrix(*axis)).to(x) for axis in zip(size, (height, width), strict=True))
    x = torch.einsum("pw,bhwc->bhpc", columns, x)
    return torch.einsum("ph,bhwc->bpwc", rows, x)


# Sizes decide how it is computed: a node of its own in a traced graph.
@register_notrace_module
class AggregatedAttention2d(nn.Module):
    """Multi-head self-attention to the window around each position and to a pooled map, by one softmax over both.

    The window is cut at the borders. Queries and keys are unit vectors; a learned embedding is added to the queries,
    and their scale grows with the logarithm of the number of keys. To the window's weights after the softmax those
    of learned tokens are added, which any query has (eq. 6 to 8 of the paper).

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        window_size: Odd side of the window, from 3.
        sr_ratio: Positions of the map, along each axis, for one of the pooled map; what is left over makes none.
        fixed_pool_size: Side of the pooled map instead, for a cost linear in the positions ("linear mode").
        pretrain_size: Side, or height and width, of the maps in whose length the bias by position measures distances.
        trained_size: Side, or height and width, of maps whose bias is resized for others (bilinear), as the published
            dense models do; None to compute it for each size.
        qkv_bias: Whether the projections to queries, keys and values have biases.
        proj_drop: Dropout rate of the output.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``; any H and W, with ``fixed_pool_size`` such as are larger than it.

    Raises:
        ValueError: If the settings, or a map and ``fixed_pool_size``, don't fit each other.

    Example:
        >>> AggregatedAttention2d(48, num_heads=2)(torch.randn(1, 20, 30, 48)).shape
        torch.Size([1, 20, 30, 48])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 3,
        sr_ratio: int = 2,
        fixed_pool_size: int | None = None,
        pretrain_size: int | tuple[int, int] = 14,
        trained_size: int | tuple[int, int] | None = None,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"AggregatedAttention2d needs num_heads to divide dim; got dim {dim}, heads {num_heads}")
        if window_size % 2 == 0 or window_size < 3:
            raise ValueError(f"AggregatedAttention2d needs an odd window_size from 3 on; got {window_size}")
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.window_size = window_size
        self.fixed_pool_size = fixed_pool_size
        head_dim, slots = dim // num_heads, window_size**2
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, head_dim, **dd))
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, slots, **dd))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, head_dim, slots, **dd))
        self.learnable_bias = nn.Parameter(torch.empty(num_heads, 1, slots, **dd))
        self.sr = nn.Linear(dim, dim, **dd)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        trained = None if trained_size is None else _pair(trained_size)
        self.cpb = ContinuousBias(num_heads, _pair(pretrain_size), trained, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what is no layer's, as published."""
        _init_queries(self.temperature, self.query_embedding, self.learnable_tokens)
        nn.init.zeros_(self.learnable_bias)
        trunc_normal_(self.relative_pos_bias_local, std=0.0004)

    @torch.jit.ignore
    def pooled_size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the pooled map.

        Raises:
            ValueError: If a map is not larger than ``fixed_pool_size``.
        """
        fixed = self.fixed_pool_size
        if fixed is None:
            return max(1, height // self.sr_ratio), max(1, width // self.sr_ratio)
        if fixed >= min(height, width):
            raise ValueError(
                f"fixed_pool_size {fixed} needs maps that are larger; got {height}x{width}. Give larger images, or a "
                "smaller fixed_pool_size"
            )
        return fixed, fixed

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``x`` ``[B, H, W, dim]``."""
        return self._attend(x)

    @torch.jit.ignore
    def _attend(self, x: Tensor) -> Tensor:
        size = (int(x.shape[1]), int(x.shape[2]))
        pooled = self.pooled_size(*size)
        heads = (self.num_heads, -1)
        unit = F.normalize(apply_linear(self.q, x).unflatten(-1, heads), dim=-1)
        key, value = apply_linear(self.kv, x).unflatten(-1, (2, *heads)).unbind(-3)
        tokens = self.norm(pool_map(self.act(apply_linear(self.sr, x)), *pooled)).flatten(1, 2)
        pooled_key, pooled_value = apply_linear(self.kv, tokens).unflatten(-1, (2, *heads)).unbind(-3)
        rows, columns = self.cpb.axes(size, pooled, self.sr_ratio)
        out = aggregated_attention(
            (self.scaled(unit, math.prod(pooled))).to(key.dtype),
            F.normalize(key, dim=-1).to(key.dtype),
            value,
            F.normalize(pooled_key, dim=-1).to(key.dtype),
            pooled_value,
            self.relative_pos_bias_local,
            self.cpb(rows, columns),
            lambda table, first, end: bias_of_rows(table, rows, columns, first, end),
            self.token_weights(unit),
        )
        return self.proj_drop(apply_linear(self.proj, out.flatten(-2)))

    @torch.jit.ignore
    def token_weights(self, unit: Tensor) -> Tensor:
        """Return what the learned tokens add to the windows' weights, ``[B, H, W, heads, slots]``."""
        tokens, bias = self.learnable_tokens.to(unit.dtype), self.learnable_bias.to(unit.dtype)
        weights = torch.baddbmm(bias, unit.flatten(0, 2).transpose(0, 1), tokens)
        return weights.transpose(0, 1).unflatten(0, unit.shape[:3])

    @torch.jit.ignore
    def scaled(self, unit: Tensor, pooled: int) -> Tensor:
        """Return the queries of unit vectors ``[B, H, W, heads, head_dim]``: longer where more keys are seen."""
        scale = key_scale(int(unit.shape[1]), int(unit.shape[2]), self.window_size, pooled)
        scale = torch.from_numpy(scale).to(self.temperature)[:, :, None, None]
        return (unit + self.query_embedding[:, 0]) * (F.softplus(self.temperature[:, 0]) * scale)


@functools.lru_cache(maxsize=128)
def key_scale(height: int, width: int, window: int, pooled: int) -> np.ndarray:
    """Return the logarithm of the number of keys that each position sees, ``[H, W]``."""
    reach = window // 2
    rows, columns = (
        np.minimum(np.arange(length) + reach, length - 1) - np.maximum(np.arange(length) - reach, 0) + 1
        for length in (height, width)
    )
    return np.log(rows[:, None] * columns + pooled)


@register_notrace_module
class UnitGlobalAttention2d(nn.Module):
    """Multi-head self-attention over a whole map as in TransNeXt's last stage: unit vectors, scale by the map's size.

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        pretrain_size: As in `AggregatedAttention2d`, like ``trained_size``.
        trained_size: Side, or height and width, of maps whose bias is resized for others.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop: Dropout rate of the output.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``, any H and W.

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim``.

    Example:
        >>> UnitGlobalAttention2d(48, num_heads=2)(torch.randn(1, 7, 9, 48)).shape
        torch.Size([1, 7, 9, 48])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        pretrain_size: int | tuple[int, int] = 7,
        trained_size: int | tuple[int, int] | None = None,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"UnitGlobalAttention2d needs num_heads to divide dim; got dim {dim}, heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, dim // num_heads, **dd))
        trained = None if trained_size is None else _pair(trained_size)
        self.cpb = ContinuousBias(num_heads, _pair(pretrain_size), trained, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what is no layer's, as published."""
        _init_queries(self.temperature, self.query_embedding)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``x`` ``[B, H, W, dim]``."""
        return self._attend(x)

    @torch.jit.ignore
    def _attend(self, x: Tensor) -> Tensor:
        size = (int(x.shape[1]), int(x.shape[2]))
        tokens = size[0] * size[1]
        qkv = apply_linear(self.qkv, x.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query = (F.normalize(query, dim=-1) + self.query_embedding) * (F.softplus(self.temperature) * math.log(tokens))
        query, key = query.to(value.dtype), F.normalize(key, dim=-1).to(value.dtype)
        rows, columns = self.cpb.axes(size, size, 1)
        out = _attend_globally(query, key, value, self.cpb(rows, columns), rows, columns)
        return self.proj_drop(apply_linear(self.proj, out.transpose(1, 2).flatten(2).unflatten(1, size)))


def _attend_globally(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, rows: AxisTable, columns: AxisTable
) -> Tensor:
    """Attend to all keys, ``[B, heads, N, dim]``, the bias of some rows at a time."""
    height, width = len(rows.index), len(columns.index)
    step = rows_at_once(height, query.shape[1] * (height * width) ** 2)
    parts = []
    for first in range(0, height, step):
        end = min(first + step, height)

        def attend(query, key, value, table, first=first, end=end):
            bias = bias_of_rows(table, rows, columns, first, end).to(query.dtype)[None]
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)

        arguments = (query[:, :, first * width : end * width], key, value, table)
        parts.append(attend(*arguments) if step == height else run_rows(attend, *arguments))
    return join_rows(parts)
