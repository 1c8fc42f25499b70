"""Attention of TransNeXt (arXiv 2311.17132): to a window and a pooled map at once, or to the whole map."""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from ..kernels.aggregated import aggregated_attention, window_tokens
from ..kernels.aggregated_native import Projected, aggregated_native, obstacle
from ..kernels.backends import Backend, choose
from ..kernels.rows import join_rows, rows_at_once, run_rows
from ..kernels.token_attention import token_attention
from .continuous_bias import AxisTable, ContinuousBias, bias_axes, bias_of_rows, pooling_matrix
from .pointwise import apply_linear
from .record import Recorded, Softmax, exact, heads_to_map, land_by_axes, pooling_axis


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _init_queries(temperature: Tensor, *small: Tensor) -> None:
    nn.init.constant_(temperature, math.log(math.e ** (1 / 0.24) - 1))  # softplus makes 1 / 0.24 of it
    for parameter in small:
        trunc_normal_(parameter, std=0.02)


@torch.jit.ignore
def pool_map(x: Tensor, height: int, width: int) -> Tensor:
    """Pool a map ``[B, H, W, C]`` to ``[B, height, width, C]`` as adaptive average pooling does."""
    size = (int(x.shape[1]), int(x.shape[2]))
    if size[0] % height == 0 and size[1] % width == 0:
        step = (size[0] // height, size[1] // width)
        return F.avg_pool2d(x.permute(0, 3, 1, 2), step, step).permute(0, 2, 3, 1)
    # Bins that overlap; ONNX has no operator for them.
    rows, columns = (pooling_matrix(*axis).to(x) for axis in zip(size, (height, width), strict=True))
    x = torch.einsum("pw,bhwc->bhpc", columns, x)
    return torch.einsum("ph,bhwc->bpwc", rows, x)


# Sizes decide how it is computed: a node of its own in a traced graph.
@register_notrace_module
class AggregatedAttention2d(nn.Module):
    """Multi-head self-attention to the window around each position and to a pooled map, by one softmax over both.

    The window is cut at the borders. Queries and keys are unit vectors; a learned embedding is added to the queries,
    and their scale grows with the logarithm of the number of keys. To the window's weights after the softmax those
    of learned tokens are added, which depend on the query alone.

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

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``x`` ``[B, H, W, dim]``."""
        size = (x.shape[1], x.shape[2])
        pooled = pooled_size(size, self.sr_ratio, self.fixed_pool_size)
        query = self.q(x) if torch.jit.is_scripting() else apply_linear(self.q, x)
        kv = self.kv(x) if torch.jit.is_scripting() else apply_linear(self.kv, x)
        tokens = self.act(self.sr(x) if torch.jit.is_scripting() else apply_linear(self.sr, x))
        tokens = self.norm(pool_map(tokens, pooled[0], pooled[1])).flatten(1, 2)
        pooled_kv = self.kv(tokens) if torch.jit.is_scripting() else apply_linear(self.kv, tokens)
        out = attend_projected(
            query,
            kv,
            pooled_kv,
            self.cpb(size, pooled, self.sr_ratio),
            self.temperature,
            self.query_embedding,
            self.relative_pos_bias_local,
            self.learnable_tokens,
            self.learnable_bias,
            pooled,
            self.sr_ratio,
            self.cpb.trained_size,
            None,  # a function that TorchScript ignores has no defaults in it
        )
        return self.proj_drop(self.proj(out) if torch.jit.is_scripting() else apply_linear(self.proj, out))

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`. Values are the map's tokens, then the pooled map's."""
        size = height, width = tuple(x.shape[1:3])
        count, slots = height * width, self.window_size**2
        pooled = pooled_size(size, self.sr_ratio, self.fixed_pool_size)
        tokens = self.norm(pool_map(self.act(self.sr(x)), *pooled)).flatten(1, 2)
        vectors = unit_vectors(
            self.q(x), self.kv(x), self.kv(tokens), self.temperature, self.query_embedding, slots, pooled
        )
        unit, query, key, value, *pooled_vectors = vectors
        query, key, value, pooled_key, pooled_value = (
            part.flatten(1, -3).transpose(1, 2) for part in (query, key, value, *pooled_vectors)
        )
        table = self.cpb(size, pooled, self.sr_ratio)
        rows, columns = bias_axes(size, pooled, self.sr_ratio, self.cpb.trained_size)
        beyond = torch.arange(count, count + pooled[0] * pooled[1], device=x.device)

        def support(queries: Tensor) -> Tensor:
            window = window_tokens(queries, height, width, self.window_size)
            return torch.cat([window, beyond.expand(len(queries), -1)], 1)[None, None]

        def bias(queries: Tensor, keys: Tensor) -> Tensor:
            local = exact(self.relative_pos_bias_local)[:, None].expand(-1, len(queries), -1)
            return torch.cat([local, _bias_of_queries(table, rows, columns, queries, width)], 2)

        def added(queries: Tensor) -> Tensor:
            some = unit.flatten(1, 2)[:, queries, None]
            return exact(learned_weights(some, self.learnable_tokens, self.learnable_bias))[:, :, 0].transpose(1, 2)

        arguments = (query, torch.cat([key, pooled_key], 2), support, bias)
        axes = [pooling_axis(*axis, x.device) for axis in zip(size, pooled, strict=True)]
        landing = land_by_axes(*axes).behind(count)
        return Recorded(
            "neighborhood",
            size,
            Softmax(*arguments, added),
            exact(torch.cat([value, pooled_value], 2)),
            lambda heads: self.proj(heads_to_map(heads, size)),
            landing=landing,
            normalised=False,
            signed=True,
            softmax=Softmax(*arguments),
            note="a softmax over the window and a pooled map; learned tokens add to the window's weights, of any sign",
            details={"pooled": pooled},
        )


def _bias_of_queries(table: Tensor, rows: AxisTable, columns: AxisTable, queries: Tensor, width: int) -> Tensor:
    """Return the bias ``[heads, Q, keys]`` of some queries, numbered row-major, from `ContinuousBias`'s output."""
    row, column = queries // width, queries % width
    parts, order = [], []
    for y in row.unique().tolist():
        parts.append(bias_of_rows(table, rows, columns, y, y + 1)[:, column[row == y]])
        order.append((row == y).nonzero()[:, 0])
    return exact(torch.cat(parts, 1))[:, torch.cat(order).argsort()]


@torch.jit.ignore
def pooled_size(size: tuple[int, int], sr_ratio: int, fixed: int | None) -> tuple[int, int]:
    """Return height and width of the pooled map of `AggregatedAttention2d`.

    Raises:
        ValueError: If a map is not larger than ``fixed``.
    """
    height, width = map(int, size)
    if fixed is None:
        return max(1, height // sr_ratio), max(1, width // sr_ratio)
    if fixed >= min(height, width):
        raise ValueError(
            f"fixed_pool_size {fixed} needs maps that are larger; got {height}x{width}. Give larger images, or a "
            "smaller fixed_pool_size"
        )
    return fixed, fixed


@torch.jit.ignore
def attend_projected(
    query: Tensor,
    kv: Tensor,
    pooled_kv: Tensor,
    bias_table: Tensor,
    temperature: Tensor,
    query_embedding: Tensor,
    local_bias: Tensor,
    tokens: Tensor,
    token_bias: Tensor,
    pooled: tuple[int, int],
    sr_ratio: int,
    trained_size: tuple[int, int] | None,
    backend: str | None = None,
) -> Tensor:
    """Attend as `AggregatedAttention2d` does, ``[B, H, W, dim]`` before its projection.

    Args:
        query: Queries ``[B, H, W, dim]`` as projected.
        kv: Keys and values ``[B, H, W, 2 * dim]`` as projected.
        pooled_kv: Those of the pooled map, ``[B, M, 2 * dim]``.
        bias_table: What `ContinuousBias` returns.
        temperature: The module's parameter, like the next four.
        query_embedding: ``[heads, 1, head_dim]``.
        local_bias: ``[heads, slots]``.
        tokens: ``[heads, head_dim, slots]``.
        token_bias: ``[heads, 1, slots]``.
        pooled: Height and width of the pooled map.
        sr_ratio: As in `bias_axes`, like ``trained_size``.
        trained_size: Maps whose bias is resized, or None.
        backend: ``"native"``, in C for inference on CPUs, or ``"torch"``; by default the first that can run.

    Raises:
        ValueError: If there is no such backend or it cannot run; the message says why.
    """
    size = (int(query.shape[1]), int(query.shape[2]))
    axes = bias_axes(size, pooled, sr_ratio, trained_size)
    tensors = (temperature, query_embedding, local_bias, tokens, token_bias, bias_table)
    call = Call(Projected(query, kv, pooled_kv, *tensors), pooled, axes)
    return _BACKENDS[choose("aggregated attention", _BACKENDS, call, backend)].run(call)


class Call(NamedTuple):
    """A call of `attend_projected`: the tensors, the pooled map's height and width, and the tables of both axes."""

    tensors: Projected
    pooled: tuple[int, int]
    axes: tuple[AxisTable, AxisTable]


def _attend_native(call: Call) -> Tensor:
    height, width = map(int, call.tensors.query.shape[1:3])
    window = math.isqrt(call.tensors.local_bias.shape[1])
    scale = key_scale(height, width, window, math.prod(call.pooled))
    return aggregated_native(call.tensors, scale, tuple((axis.index, axis.weight) for axis in call.axes))


def _attend_in_torch(call: Call) -> Tensor:
    query, kv, pooled_kv, temperature, query_embedding, local_bias, tokens, token_bias, bias_table = call.tensors
    unit, scaled, key, value, pooled_key, pooled_value = unit_vectors(
        query, kv, pooled_kv, temperature, query_embedding, tokens.shape[2], call.pooled
    )
    rows, columns = call.axes
    return aggregated_attention(
        scaled,
        key,
        value,
        pooled_key,
        pooled_value,
        local_bias,
        bias_table,
        lambda table, first, end: bias_of_rows(table, rows, columns, first, end),
        learned_weights(unit, tokens, token_bias),
    ).flatten(-2)


# In order of preference.
_BACKENDS: dict[str, Backend] = {
    "native": Backend(_attend_native, lambda call: obstacle(call.tensors)),
    "torch": Backend(_attend_in_torch),
}


def unit_vectors(
    query: Tensor,
    kv: Tensor,
    pooled_kv: Tensor,
    temperature: Tensor,
    query_embedding: Tensor,
    slots: int,
    pooled: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `aggregated_attention` takes: unit queries, those scaled, then keys, values, and the pooled ones.

    Args:
        query: As in `attend_projected`, like the next four.
        kv: Keys and values.
        pooled_kv: Those of the pooled map.
        temperature: ``[heads, 1, 1]``.
        query_embedding: ``[heads, 1, head_dim]``.
        slots: Positions of a window.
        pooled: Height and width of the pooled map.
    """
    heads, head_dim = len(temperature), int(query_embedding.shape[2])
    size = (int(query.shape[1]), int(query.shape[2]))
    unit = F.normalize(query.unflatten(-1, (heads, head_dim)), dim=-1)
    key, value = kv.unflatten(-1, (2, heads, head_dim)).unbind(-3)
    pooled_key, pooled_value = pooled_kv.unflatten(-1, (2, heads, head_dim)).unbind(-3)
    scale = key_scale(*size, math.isqrt(slots), math.prod(pooled)).to(temperature)
    scaled = (unit + query_embedding[:, 0]) * (F.softplus(temperature[:, 0]) * scale[:, :, None, None])
    key, pooled_key = (F.normalize(part, dim=-1).to(part.dtype) for part in (key, pooled_key))
    return unit, scaled.to(key.dtype), key, value, pooled_key, pooled_value


def learned_weights(unit: Tensor, tokens: Tensor, token_bias: Tensor) -> Tensor:
    """Return what the learned tokens add to the windows' weights, ``[B, H, W, heads, slots]``, for unit queries."""
    added = torch.baddbmm(token_bias.to(unit.dtype), unit.flatten(0, 2).transpose(0, 1), tokens.to(unit.dtype))
    return added.transpose(0, 1).unflatten(0, unit.shape[:3])


@functools.lru_cache(maxsize=128)
def _key_scale(height: int, width: int, window: int, pooled: int) -> np.ndarray:
    reach = window // 2
    rows, columns = (
        np.minimum(np.arange(length) + reach, length - 1) - np.maximum(np.arange(length) - reach, 0) + 1
        for length in (height, width)
    )
    return np.log(rows[:, None] * columns + pooled)


@torch.compiler.allow_in_graph
def key_scale(height: int, width: int, window: int, pooled: int) -> Tensor:
    """Return the logarithm of the number of keys that each position sees, ``[H, W]``."""
    return torch.tensor(_key_scale(*map(int, (height, width, window, pooled))))


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
        size = (x.shape[1], x.shape[2])
        tokens = x.flatten(1, 2)
        qkv = self.qkv(tokens) if torch.jit.is_scripting() else apply_linear(self.qkv, tokens)
        table = self.cpb(size, size, 1)
        out = attend_globally(qkv, table, self.temperature, self.query_embedding, size, self.cpb.trained_size)
        return self.proj_drop(self.proj(out) if torch.jit.is_scripting() else apply_linear(self.proj, out))

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`."""
        size = tuple(x.shape[1:3])
        table = self.cpb(size, size, 1)
        rows, columns = bias_axes(size, size, 1, self.cpb.trained_size)
        query, key, value = unit_queries(self.qkv(x.flatten(1, 2)), self.temperature, self.query_embedding, size)
        operator = Softmax(query, key, bias=lambda queries, _: _bias_of_queries(table, rows, columns, queries, size[1]))
        return Recorded("global", size, operator, exact(value), lambda heads: self.proj(heads_to_map(heads, size)))


def unit_queries(
    qkv: Tensor, temperature: Tensor, query_embedding: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scaled queries, unit keys and values ``[B, heads, N, head_dim]``; arguments as in `attend_globally`."""
    query, key, value = qkv.unflatten(-1, (3, len(temperature), -1)).permute(2, 0, 3, 1, 4).unbind(0)
    scale = F.softplus(temperature) * math.log(size[0] * size[1])
    query = ((F.normalize(query, dim=-1) + query_embedding) * scale).to(value.dtype)
    return query, F.normalize(key, dim=-1).to(value.dtype), value


@torch.jit.ignore
def attend_globally(
    qkv: Tensor,
    bias_table: Tensor,
    temperature: Tensor,
    query_embedding: Tensor,
    size: tuple[int, int],
    trained_size: tuple[int, int] | None,
) -> Tensor:
    """Attend as `UnitGlobalAttention2d` does, ``[B, H, W, dim]`` before its projection; the bias of some rows at once.

    Args:
        qkv: Queries, keys and values ``[B, N, 3 * dim]`` as projected.
        bias_table: What `ContinuousBias` returns.
        temperature: The module's parameter.
        query_embedding: Likewise.
        size: Height and width of the map.
        trained_size: As in `bias_axes`.
    """
    height, width = map(int, size)
    query, key, value = unit_queries(qkv, temperature, query_embedding, (height, width))
    rows, columns = bias_axes(size, size, 1, trained_size)
    step = rows_at_once(height, query.shape[1] * (height * width) ** 2)
    parts = []
    for first in range(0, height, step):
        end = min(first + step, height)

        def attend(query, key, value, table, first=first, end=end):
            bias = bias_of_rows(table, rows, columns, first, end).to(query.dtype)[None]
            return token_attention(query, key, value, bias, scale=1.0)

        arguments = (query[:, :, first * width : end * width], key, value, bias_table)
        parts.append(attend(*arguments) if step == height else run_rows(attend, *arguments))
    return join_rows(parts).transpose(1, 2).flatten(2).unflatten(1, (height, width))
