"""Deformable attention, to points that the map itself chooses: DAT (arXiv 2201.00520) and DAT++ (arXiv 2309.01430).

Positions are normalised as `torch.nn.functional.grid_sample` does with aligned corners: -1 is the centre of the first
row or column, 1 that of the last. They are computed in float32 at least, whatever the precision of the features.
"""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, register_notrace_function, trunc_normal_
from torch import Tensor, nn

from ..kernels.bilinear import neighbors, sample_aligned
from ..kernels.depthwise import depthwise_conv2d
from ..kernels.point_attention import displacement_bias, point_attention
from .layout import channels_last
from .plain import is_plain
from .pointwise import apply_pointwise
from .record import Landing, Recorded, Softmax, exact, heads_to_map, land_by_axes, pooling_axis
from .relative_bias import resize_bias_table
from .token_attention import attend_tokens

GEOMETRIES = ("dat", "dat_pp")


def _float32_at_least(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _axis_centres(length: int, divisor: int, like: Tensor) -> Tensor:
    return (torch.arange(length, device=like.device, dtype=like.dtype) + 0.5) / divisor * 2.0 - 1.0


def _axis_corners(length: int, like: Tensor) -> Tensor:
    # One formula for all: a graph of any size has no branch for a side of 1, whose only point is the middle.
    steps = torch.arange(length, device=like.device, dtype=like.dtype)
    return (steps * 2.0 - (length - 1)) / _or_one(length - 1)


def _or_one(steps: int) -> int:
    if torch.jit.is_scripting():
        return max(steps, 1)
    else:
        # Python's would be decided for good by the size that a graph of any is made with.
        return max(steps, 1) if torch.jit.is_tracing() else torch.sym_max(steps, 1)


def _grid(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the points ``[H, W, 2]``, (y, x), of the rows' and columns' positions."""
    rows, columns = rows[:, None].expand(-1, columns.shape[0]), columns[None].expand(rows.shape[0], -1)
    return torch.stack([rows, columns], dim=-1)


@register_notrace_function
def reference_points(height: int, width: int, plus: bool, like: Tensor) -> Tensor:
    """Return the points ``[height, width, 2]``, (y, x), from which the offsets of a grid of keys start.

    In DAT these are the centres of the cells. DAT++ (``plus``) divides by one cell less, so that its points lie half a
    cell further and the last ones outside of the map; a grid of one row or column starts at the middle.
    """
    if plus:
        return _grid(_axis_centres(height, _or_one(height - 1), like), _axis_centres(width, _or_one(width - 1), like))
    return _grid(_axis_centres(height, height, like), _axis_centres(width, width, like))


@register_notrace_function
def query_axes(height: int, width: int, plus: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the rows ``[height]`` and the columns ``[width]`` of a map's queries lie, for the position bias."""
    if plus:
        return _axis_corners(height, like), _axis_corners(width, like)
    return _axis_centres(height, height, like), _axis_centres(width, width, like)


@register_notrace_function
def key_points(offset: Tensor, offset_range: float | None, plus: bool) -> Tensor:
    """Return where the keys lie, ``[N, height, width, 2]``, (y, x), from the predicted offsets ``[N, 2, h, w]``.

    With an ``offset_range`` the offsets are squashed to so many cells of the grid, and points may leave the map.
    Without one they are free, and the points are kept inside: by tanh in DAT, by clamping in DAT++.
    """
    offset = _float32_at_least(offset).permute(0, 2, 3, 1)
    height, width = offset.shape[1], offset.shape[2]
    reference = reference_points(height, width, plus, offset)
    if offset_range is not None:
        less = 1 if plus else 0
        cell = [1.0 / _or_one(height - less), 1.0 / _or_one(width - less)]
        reach = torch.tensor(cell, dtype=offset.dtype, device=offset.device) * offset_range
        return reference + torch.tanh(offset) * reach
    points = reference + offset
    return points.clamp(-1.0, 1.0) if plus else torch.tanh(points)


@register_notrace_function
def zero_offsets(q: Tensor, groups: int, kernel_size: int, stride: int, padding: int) -> Tensor:
    """Return offsets of zero, ``[B * groups, 2, h, w]``, for the grid that a convolution over ``q`` would give."""
    height = (q.shape[2] + 2 * padding - kernel_size) // stride + 1
    width = (q.shape[3] + 2 * padding - kernel_size) // stride + 1
    return torch.zeros(q.shape[0] * groups, 2, height, width, device=q.device)


@register_notrace_function
def sample(x: Tensor, points: Tensor) -> Tensor:
    """Read ``x`` ``[N, C, H, W]`` at ``points`` ``[N, h, w, 2]``, (y, x), bilinear, zero outside: ``[N, C, h, w]``."""
    return sample_aligned(x.to(points.dtype), points.flip(-1)).to(x.dtype)


# What follows takes the table and the points of an attention to its operators, for a map of one size: the table
# ``[heads, rows, columns]``, whose heads of a group are contiguous; keys ``[B * groups, h, w, 2]``, (y, x).
@register_notrace_function
def fit_table(table: Tensor, height: int, width: int, plus: bool) -> Tensor:
    """Return the table for maps of a size: in DAT it belongs to one (bicubic); in DAT++ it is stretched over any."""
    if plus or (table.shape[1] == 2 * height - 1 and table.shape[2] == 2 * width - 1):
        return table
    return resize_bias_table(table, [2 * height - 1, 2 * width - 1])


@register_notrace_function
def position_bias(table: Tensor, points: Tensor, height: int, width: int, groups: int, plus: bool) -> Tensor:
    """Return the bias ``[B, heads, height * width, keys]`` of a map's queries for keys at ``points``."""
    rows, columns = query_axes(height, width, plus, points)
    keys = points.flatten(1, 2).unflatten(0, (-1, groups))
    return displacement_bias(fit_table(table, height, width, plus), keys, rows, columns)


@register_notrace_function
def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor, points: Tensor, groups: int, plus: bool) -> Tensor:
    """Return what the queries ``[B, C, H, W]`` find in keys and values ``[B, C, h, w]``, ``[B, H, W, C]``."""
    height, width = q.shape[2], q.shape[3]
    query, key, value = (x.permute(0, 2, 3, 1).unflatten(3, (table.shape[0], -1)) for x in (q, k, v))
    keys = points.flatten(1, 2).unflatten(0, (-1, groups))
    axes = query_axes(height, width, plus, points)
    table = fit_table(table, height, width, plus)
    return point_attention(query, key.flatten(1, 2), value.flatten(1, 2), table, keys, *axes).flatten(3)


class DeformableAttention2d(nn.Module):
    """Multi-head attention of every position of a map to a few sampled points, which are the same for all queries.

    A small network of two convolutions looks at the queries of a group of heads and moves a coarse grid of reference
    points; keys and values are projected from the features found there. Scores get a bias by the continuous
    displacement between query and key, read from a learned table.

    Two geometries are published and differ in reference points, in what keeps points inside, and in the table:
    ``"dat"`` (section 3.2 of DAT) and ``"dat_pp"`` (DAT++). See `reference_points`, `key_points`, `position_bias`.

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        groups: Groups of channels and heads, each with its own points; must divide ``num_heads``.
        kernel_size: Kernel of the depthwise convolution that predicts the offsets.
        stride: Its stride: every how many positions there is a key.
        map_size: Height and width H and W of the maps that the table of the position bias is made for, ``rpe_table``
            ``[heads, 2H - 1, 2W - 1]``; maps of another size can be used too. None for no position bias.
        geometry: ``"dat_pp"`` or ``"dat"``.
        offset_range: Largest offset, in cells of the grid of keys; None for free offsets.
        offsets: Whether points are moved at all. If not, keys are averages over the cells of the grid.
        proj_drop: Dropout rate of the output.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``, any H and W.

    Example:
        >>> attention = DeformableAttention2d(64, num_heads=2, groups=1, map_size=(14, 14))
        >>> attention(torch.randn(1, 20, 30, 64)).shape
        torch.Size([1, 20, 30, 64])
        >>> points, references = attention.sampled_points(torch.randn(1, 20, 30, 64))
        >>> points.shape, references.shape
        (torch.Size([1, 1, 10, 15, 2]), torch.Size([10, 15, 2]))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        groups: int = 1,
        kernel_size: int = 5,
        stride: int = 2,
        map_size: tuple[int, int] | None = (14, 14),
        geometry: str = "dat_pp",
        offset_range: float | None = None,
        offsets: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads or num_heads % groups:
            raise ValueError(
                "DeformableAttention2d needs num_heads to divide dim, and groups to divide num_heads; "
                f"got dim {dim}, heads {num_heads}, groups {groups}"
            )
        if geometry not in GEOMETRIES:
            raise ValueError(
                f"DeformableAttention2d has no geometry {geometry!r}; it has {', '.join(map(repr, GEOMETRIES))}"
            )
        self.num_heads = num_heads
        self.groups = groups
        self.kernel_size = kernel_size
        self.stride = stride
        self.plus = geometry == "dat_pp"
        self.padding = 0 if self.plus and kernel_size == stride else kernel_size // 2
        self.offset_range = offset_range
        if offsets:
            width = dim // groups
            self.offset_conv = nn.Conv2d(width, width, kernel_size, stride, self.padding, groups=width, **dd)
            self.offset_norm = LayerNorm2d(width, eps=1e-5, **dd)
            self.offset_proj = nn.Conv2d(width, 2, 1, bias=False, **dd)
        else:
            self.offset_conv = self.offset_norm = self.offset_proj = None
        self.q = nn.Conv2d(dim, dim, 1, **dd)
        self.k = nn.Conv2d(dim, dim, 1, **dd)
        self.v = nn.Conv2d(dim, dim, 1, **dd)
        self.rpe_table = (
            nn.Parameter(torch.empty(num_heads, 2 * map_size[0] - 1, 2 * map_size[1] - 1, **dd))
            if map_size is not None
            else None
        )
        self.proj = nn.Conv2d(dim, dim, 1, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the bias table: truncated normal, std 0.01. Convolutions keep torch's initialisation."""
        if self.rpe_table is not None:
            trunc_normal_(self.rpe_table, std=0.01)

    def extra_repr(self) -> str:
        """Return the settings that `print(model)` shows."""
        geometry = GEOMETRIES[int(self.plus)]
        return f"{geometry!r}, groups={self.groups}, stride={self.stride}, num_heads={self.num_heads}"

    @torch.jit.ignore
    def set_map_size(self, map_size: tuple[int, int]) -> None:
        """Resample the table of the position bias (bicubic) for maps of another size."""
        if self.rpe_table is not None:
            table = resize_bias_table(self.rpe_table.detach(), [2 * map_size[0] - 1, 2 * map_size[1] - 1])
            self.rpe_table = nn.Parameter(table, requires_grad=self.rpe_table.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every position of ``x`` ``[B, H, W, dim]`` to the sampled points."""
        x = x.permute(0, 3, 1, 2)
        q = self.q(x) if torch.jit.is_scripting() else apply_pointwise(self.q, x)
        points = self._points(q)
        k, v = self._keys_values(x, points)
        out = self._attend(q, k, v, points) if torch.jit.is_scripting() else self._attend_fast(q, k, v, points)
        out = out.permute(0, 3, 1, 2)
        out = self.proj(out) if torch.jit.is_scripting() else apply_pointwise(self.proj, out)
        return self.proj_drop(out).permute(0, 2, 3, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, points: Tensor) -> Tensor:
        """Return what the queries ``[B, dim, H, W]`` find in keys and values ``[B, dim, h, w]``, ``[B, H, W, dim]``."""
        heads, bias = self.num_heads, self._bias(q, points)
        out = attend_tokens(_tokens(q, heads), _tokens(k, heads), _tokens(v, heads), bias)
        return out.transpose(1, 2).flatten(2).unflatten(1, (q.shape[2], q.shape[3]))

    def _attend_fast(self, q: Tensor, k: Tensor, v: Tensor, points: Tensor) -> Tensor:
        if self.rpe_table is None:
            return self._attend(q, k, v, points)
        return attend(q, k, v, self.rpe_table, points, self.groups, self.plus)

    def _points(self, q: Tensor) -> Tensor:
        """Return where the keys of each group lie, ``[B * groups, h, w, 2]``, (y, x)."""
        if self.offset_conv is None:
            offset = zero_offsets(q, self.groups, self.kernel_size, self.stride, self.padding)
            return key_points(offset, self.offset_range, self.plus)
        offset = self._call_offset_conv(q) if torch.jit.is_scripting() else self._use_offset_conv(q)
        offset = self.offset_proj(F.gelu(self.offset_norm(offset)))
        return key_points(offset, self.offset_range, self.plus)

    def _call_offset_conv(self, q: Tensor) -> Tensor:
        return self.offset_conv(q.unflatten(1, (self.groups, -1)).flatten(0, 1))

    def _use_offset_conv(self, q: Tensor) -> Tensor:
        conv = self.offset_conv
        if not is_plain(conv):
            return self._call_offset_conv(q)
        # All groups at once, with the shared kernel repeated: the map need not be copied group by group.
        weight, bias = conv.weight.repeat(self.groups, 1, 1, 1), conv.bias
        bias = None if bias is None else bias.repeat(self.groups)
        offset = depthwise_conv2d(q, weight, bias, padding=self.padding, stride=self.stride)
        return offset.unflatten(1, (self.groups, -1)).flatten(0, 1)

    def _keys_values(self, x: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[B, dim, h, w]`` at the points of each group."""
        if self.offset_conv is None:
            features = F.adaptive_avg_pool2d(x, points.shape[1:3])
        else:
            # Copied with the channels last, if they are so, which is the cheap order to read.
            groups = x.permute(0, 2, 3, 1).unflatten(3, (self.groups, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)
            features = sample(groups.permute(0, 3, 1, 2), points).unflatten(0, (-1, self.groups)).flatten(1, 2)
        features = channels_last(features)
        if torch.jit.is_scripting():
            return self.k(features), self.v(features)
        return apply_pointwise(self.k, features), apply_pointwise(self.v, features)

    def _bias(self, q: Tensor, points: Tensor) -> Tensor | None:
        """Return the position bias ``[B, heads, H * W, keys]`` in the dtype of ``q``, if there is one."""
        if self.rpe_table is None:
            return None
        return position_bias(self.rpe_table, points, q.shape[2], q.shape[3], self.groups, self.plus).to(q.dtype)

    @torch.jit.ignore
    def sampled_points(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the keys of ``x`` ``[B, H, W, dim]`` lie and where they started, for pictures.

        Returns:
            Points ``[B, groups, h, w, 2]`` and the reference points ``[h, w, 2]``, both as (x, y) in pixels of the map:
            0 is the centre of the first column or row. On an image ``s`` times larger, a point lies at
            ``s * (p + 0.5) - 0.5``. Points outside of the map have no features; reference points may lie there too.
        """
        points = self._points(self.q(x.permute(0, 3, 1, 2))).unflatten(0, (-1, self.groups))
        reference = reference_points(points.shape[2], points.shape[3], self.plus, points)
        last = torch.tensor([x.shape[2] - 1, x.shape[1] - 1], device=x.device)
        return (points.flip(-1) + 1.0) / 2.0 * last, (reference.flip(-1) + 1.0) / 2.0 * last

    @torch.jit.ignore
    def attention_map(self, x: Tensor) -> Tensor:
        """Return the weights ``[B, heads, H, W, h, w]`` of each position of ``x`` ``[B, H, W, dim]`` over the points.

        Head i looks at the points of group ``i // (heads / groups)`` of `sampled_points`.
        """
        x = x.permute(0, 3, 1, 2)
        q = self.q(x)
        points = self._points(q)
        k, _ = self._keys_values(x, points)
        queries, keys = _tokens(q, self.num_heads), _tokens(k, self.num_heads)
        scores = queries * keys.shape[-1] ** -0.5 @ keys.transpose(2, 3)
        bias = self._bias(q, points)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        return weights.unflatten(3, points.shape[1:3]).unflatten(2, x.shape[2:])

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`.

        Keys and values are 1x1 convolutions of all channels, each group of which was read at points of its own: the
        i-th value of every head holds something of the i-th points of all groups, among which its weight is divided.
        """
        size, image = tuple(x.shape[1:3]), x.permute(0, 3, 1, 2)
        q = self.q(image)
        points = self._points(q)
        k, v = self._keys_values(image, points)
        bias = self._bias(q, points)
        queries, keys = _tokens(q, self.num_heads), _tokens(k, self.num_heads)
        operator = Softmax(
            queries * keys.shape[-1] ** -0.5,
            keys,
            bias=None if bias is None else lambda rows, _: exact(bias)[:, :, rows],
        )
        details = {}
        if self.offset_conv is None:
            axes = zip(size, points.shape[1:3], strict=True)
            landing = land_by_axes(*(pooling_axis(*axis, x.device) for axis in axes))
        else:
            places, references = self.sampled_points(x)
            landing = _land_points(places.flatten(2, 3), size)
            details = {"points": places, "references": references}
        return Recorded(
            "deformable",
            size,
            operator,
            exact(_tokens(v, self.num_heads)),
            lambda heads: self.proj(heads_to_map(heads, size).permute(0, 3, 1, 2)).permute(0, 2, 3, 1),
            landing=landing,
            note="values are the sampled points; those of all groups share in a point's weight" * (self.groups > 1),
            details=details,
        )


def _land_points(places: Tensor, size: tuple[int, int]) -> Landing:
    """Return on which pixels points ``[B, groups, n, 2]``, (x, y), were read: a group has its part of the weight."""
    batch, groups, count, _ = places.shape
    (left, right, *column_shares), (upper, lower, *row_shares) = (
        neighbors(places[..., i], torch.tensor(float(length), device=places.device))
        for i, length in enumerate((size[1], size[0]))
    )
    tokens, shares = [], []
    for row, row_share in zip((upper, lower), row_shares, strict=True):
        for column, column_share in zip((left, right), column_shares, strict=True):
            tokens.append(row.long() * size[1] + column.long())
            shares.append(row_share * column_share / groups)
    keys = torch.arange(count, device=places.device).repeat(groups * 4)
    return Landing(keys, *(torch.stack(part, 1).view(batch, -1) for part in (tokens, shares)))


def _tokens(x: Tensor, num_heads: int) -> Tensor:
    """Return a map ``[B, C, H, W]`` as ``[B, heads, H * W, C / heads]``."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (num_heads, -1)).transpose(1, 2)
