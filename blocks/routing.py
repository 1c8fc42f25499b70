"""BiFormer's attention modules (arXiv 2303.08810): bi-level routing, and global attention with local enhancement.

Both add LePE, a depthwise convolution, to the attention's output before the last projection.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from ..kernels.lengths import is_open
from ..kernels.pointwise import pointwise
from ..kernels.precision import full_precision
from ..kernels.routing import routed_attention
from ..kernels.routing.reference import cut_regions, routed_attention_weights
from .depthwise import apply_depthwise
from .initialize import init_linear
from .plain import is_plain
from .pointwise import apply_linear
from .record import Recorded, Softmax, exact, heads_to_map, map_to_heads, number_box
from .token_attention import attend_tokens


class RoutedRegions(NamedTuple):
    """Which regions the queries of each region of a map attend to.

    Attributes:
        index: ``[B, rows * columns, topk]``; regions are numbered row-major, the best match comes first.
        grid: Rows and columns of regions.
        region_size: Height and width of a region in tokens; the last row or column may reach beyond the map.
    """

    index: Tensor
    grid: tuple[int, int]
    region_size: tuple[int, int]


def _region_means(x: Tensor, height: int, width: int) -> Tensor:
    """Return the mean over the tokens of each region of ``x`` ``[B, H, W, C]`` as ``[B, regions, C]``."""
    if is_open(height, width):
        # ONNX's AveragePool has no window that is computed.
        real = pad_to_regions(x.new_ones(1, x.shape[1], x.shape[2], 1), height, width, 0, 0)
        sums, counts = (cut_regions(y, (height, width)).sum(2) for y in (pad_to_regions(x, height, width, 0, 0), real))
        return sums / counts
    x = F.avg_pool2d(x.permute(0, 3, 1, 2), (height, width), ceil_mode=True, count_include_pad=False)
    return x.flatten(2).mT


def _best(query_and_key: Tensor, topk: int) -> Tensor:
    query, key = query_and_key.chunk(2, -1)
    logits = query @ key.mT
    return logits.topk(min(topk, logits.shape[-1])).indices


@torch.jit.ignore
def route(x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, topk: int) -> Tensor:
    """Choose the ``topk`` regions that match each region of ``x`` best: ``[B, regions, topk]``, best first.

    A region is described by the means of its queries and of its keys over all heads. The projection is linear, so the
    means are taken of ``x`` and then projected, in float32 whatever the dtype of the rest: means of rounded queries
    and keys change one set in six in bfloat16, and this costs next to nothing.

    Args:
        x: ``[B, H, W, C]``.
        weight: Projection to queries and keys, ``[2 * C, C]``.
        bias: Its bias ``[2 * C]``.
        height: Height of a region; the last row of regions may be lower.
        width: Width of a region; likewise.
        topk: Regions to choose; all, if there are fewer.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    x, weight = x.detach().to(exact), weight.detach().to(exact)
    bias = None if bias is None else bias.detach().to(exact)
    with full_precision(x):
        return _best(F.linear(_region_means(x, height, width), weight, bias), topk)


@torch.jit.ignore
def route_projected(query_and_key: Tensor, height: int, width: int, topk: int) -> Tensor:
    """Choose regions as `route` does, from the projections ``[B, H, W, 2 * C]`` themselves, rounded as they are."""
    exact = query_and_key.detach().to(torch.promote_types(query_and_key.dtype, torch.float32))
    with full_precision(exact):
        return _best(_region_means(exact, height, width), topk)


register_notrace_function(route)
register_notrace_function(route_projected)


@torch.jit.ignore
def attend(qk: Tensor, v: Tensor, num_heads: int, routes: Tensor, height: int, width: int, scale: float) -> Tensor:
    """Call the operator as one node of a traced graph: ``[B, H, W, 2 * C]``, ``[B, H, W, C]`` to ``[B, H, W, C]``."""
    query, key = qk.unflatten(-1, (2, num_heads, -1)).unbind(3)
    value = v.unflatten(-1, (num_heads, -1))
    return routed_attention(query, key, value, routes, (height, width), scale=scale).flatten(3)


register_notrace_function(attend)


@register_notrace_function
def region_size(height: int, width: int, n_win: int, ragged: bool) -> tuple[int, int]:
    """Return height and width of the regions of a map; see `BiLevelRoutingAttention2d`."""
    if ragged:
        return max(1, height // n_win), max(1, width // n_win)
    return (height + n_win - 1) // n_win, (width + n_win - 1) // n_win


@register_notrace_function
def pad_to_regions(x: Tensor, region_height: int, region_width: int, rows: int, columns: int) -> Tensor:
    """Zero-pad ``x`` ``[B, H, W, C]`` at the bottom and right: up to ``rows`` regions, or to whole ones if 0."""
    height, width = x.shape[1], x.shape[2]
    rows = (height + region_height - 1) // region_height if rows == 0 else rows
    columns = (width + region_width - 1) // region_width if columns == 0 else columns
    bottom, right = rows * region_height - height, columns * region_width - width
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript skips it only when it stands alone)
        if is_open(bottom, right):
            return F.pad(x, (0, 0, 0, right, 0, bottom))
    return x if bottom == 0 and right == 0 else F.pad(x, (0, 0, 0, right, 0, bottom))


class BiLevelRoutingAttention2d(nn.Module):
    """Multi-head self-attention in which a region of the map sees the ``topk`` regions that match it best.

    The two published operators are one function where ``n_win`` divides height and width; at other sizes they differ,
    and ``ragged`` chooses:

    * False: the map is zero-padded at the bottom and right to ``n_win x n_win`` regions of equal size. The padded
      positions are projected, routed, attended to and convolved like any other (the ``auto_pad`` of the published code;
      where that was off or missing, odd sizes failed, and padding is ours).
    * True: regions have ``H // n_win x W // n_win`` tokens, so there may be more than ``n_win`` of them on an axis. The
      map is padded after the projection: padded keys and values are zeros, which still take part in the softmax.
      Regions are routed by their real tokens, and LePE sees no padding (the published NCHW operator). Maps of fewer
      than ``n_win`` tokens on an axis, where it failed, get regions of one token; that is ours.

    If there are fewer than ``topk`` regions, all are used. The routing is computed in float32 even under autocast or in
    a half-precision model, where rounding would choose other regions; see `route`. It carries no gradient. Only a
    ``qkv`` that is more than a plain layer (see `blocks.plain.is_plain`) is routed by its own output, rounded or not.

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``. All share one routing.
        n_win: Regions along each axis. The weights don't depend on it.
        topk: Regions that each region attends to.
        ragged: How a map is cut whose size is no multiple of ``n_win``.
        lepe_kernel: Width of the depthwise convolution of the values, which is added to the output; odd.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        scale: Factor on the scores; ``dim ** -0.5`` by default, of the full width as published, not of a head's.
        channels_first: Whether maps are NCHW instead of NHWC; the parameters are the same.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``, or ``[B, dim, H, W]`` with ``channels_first``; any H and W.

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim``, ``lepe_kernel`` is even, or ``n_win`` or ``topk`` is not
            positive.

    Example:
        >>> attention = BiLevelRoutingAttention2d(64, num_heads=2, n_win=7, topk=4)
        >>> attention(torch.randn(1, 20, 30, 64)).shape
        torch.Size([1, 20, 30, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        n_win: int = 7,
        topk: int = 4,
        ragged: bool = False,
        lepe_kernel: int = 5,
        qkv_bias: bool = True,
        scale: float | None = None,
        channels_first: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        _check_settings("BiLevelRoutingAttention2d", dim, num_heads, lepe_kernel)
        if n_win < 1 or topk < 1:
            raise ValueError(f"BiLevelRoutingAttention2d needs n_win and topk of at least 1; got {n_win} and {topk}")
        self.num_heads = num_heads
        self.n_win = n_win
        self.topk = topk
        self.ragged = ragged
        self.scale = dim**-0.5 if scale is None else scale
        self.channels_first = channels_first
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.lepe = nn.Conv2d(dim, dim, lepe_kernel, padding=lepe_kernel // 2, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projections as published: truncated normal, std 0.02."""
        init_linear(self.qkv, self.proj)

    def extra_repr(self) -> str:
        """Return the settings that `print(model)` shows."""
        return f"num_heads={self.num_heads}, n_win={self.n_win}, topk={self.topk}, ragged={self.ragged}"

    def _project(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries with keys ``[B, H, W, 2 * dim]``, values ``[B, H, W, dim]``, and the routes of regions."""
        if not is_plain(self.qkv):
            return self._call_projection(x, height, width)
        weight, bias = self.qkv.weight, self.qkv.bias
        width_qk = 2 * x.shape[-1]
        qk_bias, v_bias = (None, None) if bias is None else (bias[:width_qk], bias[width_qk:])
        # Values by themselves: LePE needs them as a map without gaps, and queries and keys can be freed before it.
        qk, v = pointwise(x, weight[:width_qk], qk_bias), pointwise(x, weight[width_qk:], v_bias)
        if qk.dtype.itemsize >= 4:  # means of what isn't rounded cost less than a second projection
            return qk, v, route_projected(qk, height, width, self.topk)
        return qk, v, route(x, weight[:width_qk], qk_bias, height, width, self.topk)

    def _call_projection(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x)
        qk, v = qkv[..., : 2 * x.shape[-1]], qkv[..., 2 * x.shape[-1] :]
        return qk, v, route_projected(qk, height, width, self.topk)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within the routed regions of a map."""
        if self.channels_first:
            x = x.permute(0, 2, 3, 1)
        height, width = x.shape[1], x.shape[2]
        region_height, region_width = region_size(height, width, self.n_win, self.ragged)
        if not self.ragged:
            x = pad_to_regions(x, region_height, region_width, self.n_win, self.n_win)
        if torch.jit.is_scripting():
            qk, v, routes = self._call_projection(x, region_height, region_width)
        else:
            qk, v, routes = self._project(x, region_height, region_width)
        if self.ragged:
            qk = pad_to_regions(qk, region_height, region_width, 0, 0)
            x = pad_to_regions(v, region_height, region_width, 0, 0)
        else:
            x = v
        x = attend(qk, x, self.num_heads, routes, region_height, region_width, self.scale)
        del qk
        v = v.permute(0, 3, 1, 2)
        lepe = (self.lepe(v) if torch.jit.is_scripting() else apply_depthwise(self.lepe, v)).permute(0, 2, 3, 1)
        x = x[:, :height, :width] + lepe[:, :height, :width]
        x = self.proj(x) if torch.jit.is_scripting() else apply_linear(self.proj, x)
        return x.permute(0, 3, 1, 2) if self.channels_first else x

    def _inspect(self, x: Tensor) -> tuple[Tensor, RoutedRegions]:
        """Return queries, keys and values ``[B, H', W', 3, heads, dim]`` of the padded map, and its routes."""
        if self.channels_first:
            x = x.permute(0, 2, 3, 1)
        size = region_size(x.shape[1], x.shape[2], self.n_win, self.ragged)
        if not self.ragged:
            x = pad_to_regions(x, *size, self.n_win, self.n_win)
        qk, v, index = self._project(x, *size)
        qkv = pad_to_regions(torch.cat([qk, v], -1), *size, 0, 0)
        grid = qkv.shape[1] // size[0], qkv.shape[2] // size[1]
        return qkv.unflatten(-1, (3, self.num_heads, -1)), RoutedRegions(index, grid, size)

    @torch.jit.ignore
    def routed_regions(self, x: Tensor) -> RoutedRegions:
        """Return which regions each region of the map ``x`` attends to."""
        return self._inspect(x)[1]

    @torch.jit.ignore
    def attention_map(self, x: Tensor) -> Tensor:
        """Return the weights ``[B, regions, heads, tokens, topk * tokens]`` of each query over its regions' keys.

        Keys are region after region as `routed_regions` names them, row-major inside. Memory grows with the regions'
        size squared: this is for pictures and analysis.
        """
        qkv, regions = self._inspect(x)
        query, key, _ = qkv.unbind(3)
        return routed_attention_weights(query, key, regions.index, regions.region_size, self.scale)

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`."""
        size = tuple(x.shape[2:]) if self.channels_first else tuple(x.shape[1:3])
        qkv, regions = self._inspect(x)
        numbers = number_box(size, qkv.shape[1:3]).to(x.device)
        tokens = cut_regions(numbers[None, :, :, None], regions.region_size)[0, :, :, 0]
        order = numbers.flatten().argsort()
        region = torch.empty_like(order)
        region[tokens.flatten()] = torch.arange(len(tokens), device=x.device).repeat_interleave(tokens.shape[1])
        q, k, v = (part.flatten(1, 2).transpose(1, 2)[:, :, order] for part in qkv.unbind(3))

        def support(queries: Tensor) -> Tensor:
            return tokens[regions.index[:, region[queries]]].flatten(2)[:, None]

        def local() -> Tensor:
            seen = qkv[:, :, :, 2].flatten(3)
            seen = seen[:, : size[0], : size[1]] if self.ragged else seen
            lepe = self.lepe(seen.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return map_to_heads(lepe[:, : size[0], : size[1]], self.num_heads)

        def project(heads: Tensor) -> Tensor:
            out = self.proj(heads_to_map(heads, size))
            return out.permute(0, 3, 1, 2) if self.channels_first else out

        operator = Softmax(q[:, :, : size[0] * size[1]] * self.scale, k, support)
        return Recorded("routing", size, operator, exact(v), project, local, details={"regions": regions})


class LePEAttention2d(nn.Module):
    """Multi-head self-attention over a whole map, plus a depthwise convolution of its input or of its values.

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        lepe: What the convolution sees: the module's ``"input"``, as in most of the published models, or the
            ``"value"`` projection, as in the paper and in biformer_stl_nchw.
        lepe_kernel: Width of the convolution; odd.
        qkv_bias: Whether the projection to queries, keys and values has a bias.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``, any H and W.

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim``, ``lepe_kernel`` is even, or ``lepe`` is unknown.

    Example:
        >>> attention = LePEAttention2d(64, num_heads=8)
        >>> attention(torch.randn(1, 5, 7, 64)).shape
        torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        lepe: str = "input",
        lepe_kernel: int = 5,
        qkv_bias: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        _check_settings("LePEAttention2d", dim, num_heads, lepe_kernel)
        if lepe not in ("input", "value"):
            raise ValueError(f"LePEAttention2d takes lepe 'input' or 'value'; got {lepe!r}")
        self.num_heads = num_heads
        self.lepe_of_value = lepe == "value"
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.lepe = nn.Conv2d(dim, dim, lepe_kernel, padding=lepe_kernel // 2, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projections as published: truncated normal, std 0.02."""
        init_linear(self.qkv, self.proj)

    def extra_repr(self) -> str:
        """Return the settings that `print(model)` shows."""
        return f"num_heads={self.num_heads}, lepe={'value' if self.lepe_of_value else 'input'!r}"

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``x`` ``[B, H, W, dim]``."""
        channels = x.shape[-1]
        qkv = self.qkv(x) if torch.jit.is_scripting() else apply_linear(self.qkv, x)
        local = qkv[..., 2 * channels :] if self.lepe_of_value else x
        local = local.permute(0, 3, 1, 2)
        lepe = self.lepe(local) if torch.jit.is_scripting() else apply_depthwise(self.lepe, local)
        lepe = lepe.permute(0, 2, 3, 1)
        q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = attend_tokens(q, k, v).transpose(1, 2).flatten(2)
        out = out.unflatten(1, (x.shape[1], x.shape[2])) + lepe
        return self.proj(out) if torch.jit.is_scripting() else apply_linear(self.proj, out)

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`."""
        size = tuple(x.shape[1:3])
        qkv = self.qkv(x)
        q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

        def local() -> Tensor:
            seen = qkv[..., 2 * x.shape[-1] :] if self.lepe_of_value else x
            return map_to_heads(self.lepe(seen.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), self.num_heads)

        operator = Softmax(q * q.shape[3] ** -0.5, k)
        return Recorded("global", size, operator, exact(v), lambda heads: self.proj(heads_to_map(heads, size)), local)


def _check_settings(name: str, dim: int, num_heads: int, lepe_kernel: int) -> None:
    if dim % num_heads:
        raise ValueError(f"{name} needs num_heads to divide dim; got dim {dim}, heads {num_heads}")
    if lepe_kernel % 2 == 0:
        raise ValueError(f"{name} needs an odd lepe_kernel, so that the map keeps its size; got {lepe_kernel}")
