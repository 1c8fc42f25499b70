"""QuadTree attention as a module: types A and B of arXiv 2201.02767 (ICLR 2022)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from ..kernels import quadtree_level, quadtree_scores, quadtree_values
from ..kernels.backends import exporting, is_exporting
from ..kernels.lengths import padding_to
from ..kernels.pointwise import pointwise
from ..kernels.precision import full_precision
from ..kernels.quadtree.level import level_obstacle
from ..kernels.quadtree.reference import accumulation_dtype, children
from ..kernels.token_attention import token_attention
from .layout import channels_last
from .plain import is_plain
from .pointwise import apply_linear
from .record import Given, Landing, Recorded, Rows, exact, heads_to_map, map_to_heads

# Of one chunk of the coarsest level's scores, which are the only ones that grow with the square of the map.
_COARSE_BYTES = 64 * 2**20

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class Routes(NamedTuple):
    """Which tokens the queries of one level of the pyramid used, and how much.

    Attributes:
        tokens: ``[B, heads, h, w, T]`` int64, for every query of the level's ``h x w`` grid the tokens that it attended
            to, as ``row * width + column`` of the keys' grid, which is the same one in self-attention.
        weights: ``[B, heads, h, w, T]``, their attention weights in that level's message.
    """

    tokens: Tensor
    weights: Tensor


@torch.jit.ignore
def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of ``x`` ``[B, H, W, C]`` until height and width are multiples."""
    height, width = x.shape[1:3]
    below, right = padding_to(height, multiple), padding_to(width, multiple)
    if below:
        x = torch.cat([x, x[:, -1:].expand(-1, below, -1, -1)], 1)
    if right:
        x = torch.cat([x, x[:, :, -1:].expand(-1, -1, right, -1)], 2)
    return x


register_notrace_function(pad_to_multiple)


def to_tree(x: Tensor, depth: int, heads: int = 1) -> Tensor:
    """Order the tokens of a map so that siblings lie side by side, ``depth`` levels deep.

    Token ``n`` of a level has the tokens ``4 n .. 4 n + 3`` of the next finer one as its children: upper left, upper
    right, lower left, lower right.

    Args:
        x: ``[B, H, W, heads * dim]``, H and W multiples of ``2 ** depth``.
        depth: Levels above this map; 0 for the coarsest, whose order is row-major.
        heads: Heads to split the channels into.

    Returns:
        ``[B, heads, H * W, dim]``.
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2**depth, *[2] * depth, width // 2**depth, *[2] * depth, heads, channels // heads)
    halvings = [axis for level in range(depth) for axis in (2 + level, 3 + depth + level)]
    x = x.permute(0, 3 + 2 * depth, 1, 2 + depth, *halvings, 4 + 2 * depth)
    return x.reshape(batch, heads, height * width, channels // heads)


def from_tree(x: Tensor, height: int, width: int, depth: int) -> Tensor:
    """Undo `to_tree`: order tokens ``[B, heads, H * W, dim]`` as a map ``[B, H, W, heads * dim]``."""
    batch, heads, _, dim = x.shape
    x = x.reshape(batch, heads, height // 2**depth, width // 2**depth, *[2] * (2 * depth), dim)
    rows, columns = range(4, 4 + 2 * depth, 2), range(5, 5 + 2 * depth, 2)
    x = x.permute(0, 2, *rows, 3, *columns, 1, 4 + 2 * depth)
    return x.reshape(batch, height, width, heads * dim)


def pool(x: Tensor) -> Tensor:
    """Average 2x2 tokens of ``[B, H, W, C]``."""
    return (x[:, ::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, ::2] + x[:, 1::2, 1::2]) * 0.25


def topk_of_levels(
    owner: str, channels: tuple[int, int], levels: int, topk: int | Sequence[int], kind: str
) -> list[int]:
    """Return how many tokens are handed down from each level, coarse to fine, or refuse for ``owner`` what can't be.

    ``channels`` are all, and the heads that must divide them.
    """
    dim, num_heads = channels
    if dim % num_heads:
        raise ValueError(f"{owner} needs num_heads to divide dim; got dim {dim}, heads {num_heads}")
    if levels < 1:
        raise ValueError(f"{owner} needs at least 1 level; got {levels}")
    if kind not in ("A", "B"):
        raise ValueError(f"{owner} has the kinds 'A' and 'B'; got {kind!r}")
    # Type A leaves its best tokens out even where there is no finer level, so one level needs a number as well.
    needed = max(1, levels - 1) if kind == "A" else levels - 1
    numbers = [topk] * needed if isinstance(topk, int) else list(topk)[:needed]
    if len(numbers) < needed or min(numbers, default=1) < 1:
        raise ValueError(
            f"topk must be a positive number, or {needed} of them for a pyramid of {levels} levels; got {topk!r}"
        )
    return numbers


class QuadTreeAttention2d(nn.Module):
    """Multi-head self-attention that looks closely only where the coarser view was worth it.

    Queries, keys and values form a pyramid of ``levels`` maps, each half as wide as the next. At the coarsest level
    every query sees every token; at each finer level it sees the children of the ``topk`` tokens that scored best for
    its parent. Every level contributes a message, and those of coarser levels are copied to the tokens below them.

    Type B (the paper's QuadTree-B) attends fully at every level, makes coarser values by a learned branch, adds a
    depthwise convolution of the values to each message (LePE) and weighs the levels by learned scalars. Type A averages
    values, and leaves out of a level's message the tokens that the next one refines, whose weights it shares out.

    A map whose height or width is no multiple of ``2 ** (levels - 1)`` is padded at the bottom and right by repeating
    its last row and column, which then take part as tokens, and the output is cut. Where there are fewer tokens to
    choose from than ``topk``, all are chosen. Both rules are ours: the published code raises an error.

    The choice of tokens is discontinuous, so whatever it depends on is computed in float32: the coarser levels' pooled
    input, projections, scores and order, in half precision modules and under autocast too. A half precision module
    thus chooses the same tokens as a float32 one with the same weights and inputs. Values, messages and the finest
    level's projections, on which no choice depends, keep the module's precision; scores of chosen tokens are always
    float32.

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        levels: Maps in the pyramid; 1 is plain attention over the whole map.
        topk: Tokens that each query hands down to its children, for all levels or for each, coarse to fine. The finest
            level hands nothing down: a sequence may leave it out, and may be longer than the pyramid.
        kind: ``"B"`` or ``"A"``.
        value_act: Activation of type B's value branches: ``"gelu"`` (classification) or ``"relu"`` (the published
            detectors and segmenters).
        qkv_bias: Whether the projections to queries, keys and values have a bias.
        proj_drop: Dropout rate of the output.
        backend: Path of the operator, as in `foveate.kernels.quadtree_scores`, or ``"native"``: type B's levels as
            `foveate.kernels.quadtree_level` each. The fastest that runs by default.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``, any H and W.

    Raises:
        ValueError: If the heads do not divide the channels, or ``levels``, ``topk``, ``kind`` or ``value_act`` is none
            of those allowed.

    Example:
        >>> attention = QuadTreeAttention2d(64, num_heads=2, levels=3, topk=8)
        >>> attention(torch.randn(1, 20, 30, 64)).shape
        torch.Size([1, 20, 30, 64])
    """

    topk: list[int]
    backend: str | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        levels: int,
        topk: int | Sequence[int] = 8,
        kind: str = "B",
        value_act: str = "gelu",
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        backend: str | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if value_act not in _ACTIVATIONS:
            raise ValueError(f"value_act is one of {', '.join(map(repr, _ACTIVATIONS))}; got {value_act!r}")
        self.topk = topk_of_levels(type(self).__name__, (dim, num_heads), levels, topk, kind)
        self.num_heads = num_heads
        self.levels = levels
        self.kind = kind
        self.multiple = 2 ** (levels - 1)
        self.backend = backend
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        if kind == "B":
            self.value_branches = nn.ModuleList(
                _ValueBranch(dim, _ACTIVATIONS[value_act], **dd) for _ in range(levels - 1)
            )
            self.lepe = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) for _ in range(levels))
            self.level_weights = nn.Parameter(torch.empty(levels, **dd))
        else:
            self.value_branches = self.lepe = nn.ModuleList()
            self.register_parameter("level_weights", None)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as published: convolutions, and the projections that were such, by fan-out; the output at 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()
        for linear in (self.qk, self.v):
            nn.init.normal_(linear.weight, std=(2.0 / linear.in_features) ** 0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.trunc_normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)
        if self.kind == "B":
            nn.init.normal_(self.level_weights)

    def extra_repr(self) -> str:
        """Return the settings that `print(model)` shows."""
        return f"kind={self.kind}, levels={self.levels}, topk={self.topk}, num_heads={self.num_heads}"

    def _values(self, x: Tensor) -> list[Tensor]:
        """Return the value maps from fine to coarse."""
        values = [self.v(x) if torch.jit.is_scripting() else apply_linear(self.v, x)]
        if self.kind == "A":
            for _ in range(self.levels - 1):
                values.append(pool(values[-1]))
        else:
            for branch in self.value_branches:
                values.append(branch(values[-1].permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return values

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``x`` ``[B, H, W, dim]``."""
        height, width = x.shape[1], x.shape[2]
        x = pad_to_multiple(x, self.multiple)
        x = self._call_layers(x) if torch.jit.is_scripting() else self._use_layers(x)
        x = x[:, :height, :width]
        return self.proj_drop(self.proj(x) if torch.jit.is_scripting() else apply_linear(self.proj, x))

    def _use_layers(self, x: Tensor) -> Tensor:
        """Return the output before the projection, by the parameters of layers as long as they are plain ones."""
        if not is_plain(self.qk, *self.lepe):
            return self._call_layers(x)
        values = self._values(x)
        weights, biases = [conv.weight for conv in self.lepe], [conv.bias for conv in self.lepe]
        lepe = [] if self.kind == "A" else positional(values, weights, biases, self.level_weights)
        return attend(self._pyramid(x), values, self.level_weights, self.num_heads, self.topk, self.backend, lepe)

    def _pyramid(self, x: Tensor) -> list[Tensor]:
        if is_plain(self.qk):
            finest = apply_linear(self.qk, x)
            return project_pyramid(x, finest, self.qk.weight, self.qk.bias, self.levels, self.kind == "A")
        return pool_pyramid(self.qk(x), self.levels)

    def _call_layers(self, x: Tensor) -> Tensor:
        """Return the output before the projection; every layer is called, once."""
        values = self._values(x)
        pyramid = pool_pyramid(self.qk(x), self.levels)
        lepe = self._call_lepe(values)
        return attend(pyramid, values, self.level_weights, self.num_heads, self.topk, self.backend, lepe)

    def _call_lepe(self, values: list[Tensor]) -> list[Tensor]:
        """Return each level's LePE, coarse to fine, of value maps, fine to coarse; none of type A."""
        lepe = []
        for level, conv in enumerate(self.lepe):
            lepe.append(conv(values[self.levels - 1 - level].permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return lepe if self.level_weights is None else weigh_positional(lepe, self.level_weights)

    @torch.jit.ignore
    def routes(self, x: Tensor) -> list[Routes]:
        """Return which tokens each query of ``x`` ``[B, H, W, dim]`` used, for each level from coarse to fine.

        Grids are those of the padded map: level ``l`` of ``levels`` is ``2 ** (levels - 1 - l)`` times coarser than it.
        The query at ``(r, c)`` of a level is the parent of those at ``(2 r, 2 c)`` to ``(2 r + 1, 2 c + 1)``. The
        weights of type A add up to 1 over all levels above and at a finest query (except with a single level, where the
        best tokens are left out); those of type B add up to 1 at every level.
        """
        used: list[tuple[Tensor, Tensor]] = []
        x = pad_to_multiple(x, self.multiple)
        queries, keys = _queries_and_keys(self._pyramid(x), self.num_heads)
        message(queries, keys, self._values(x)[::-1], self.level_weights, self.topk, self.backend, used)
        grid = (x.shape[1] // self.multiple, x.shape[2] // self.multiple)
        return routes_of(used, grid, grid)

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`.

        Values are the tokens of all levels, the finest first. What padding repeats is counted as what it repeats, on
        the finest level; coarser tokens cover some of it.
        """
        size, levels = tuple(x.shape[1:3]), range(self.levels)
        padded = pad_to_multiple(x, self.multiple)
        values = self._values(padded)
        routes = self.routes(x)[::-1]  # fine to coarse
        shares = self.level_weights.softmax(0).float().flip(0) if self.kind == "B" else x.new_ones(self.levels).float()
        grids = [tuple(value.shape[1:3]) for value in values]
        starts = [0]
        for grid in (size, *grids[1:]):
            starts.append(starts[-1] + grid[0] * grid[1])

        def number(level: int, tokens: Tensor) -> Tensor:
            row, column = tokens // grids[level][1], tokens % grids[level][1]
            if level == 0:
                return row.clamp(max=size[0] - 1) * size[1] + column.clamp(max=size[1] - 1)
            return starts[level] + tokens

        def rows(queries: Tensor) -> Rows:
            row, column, keys, weights = queries // size[1], queries % size[1], [], []
            for level, (tokens, weight) in enumerate(routes):
                place = (slice(None), slice(None), row >> level, column >> level)
                keys.append(number(level, tokens[place]))
                weights.append(exact(weight[place]) * shares[level])
            return Rows(torch.cat(keys, -1), torch.cat(weights, -1))

        cells, covered, parts = [], [], []
        for level in levels:
            place = torch.arange(grids[0][0] * grids[0][1], device=x.device)
            row, column = place // grids[0][1], place % grids[0][1]
            at = number(0, place)
            if level == 0:
                at = at.unique()
                cells.append(at)
            else:
                cells.append(starts[level] + (row >> level) * grids[level][1] + (column >> level))
            covered.append(at)
            parts.append(torch.full(at.shape, 4.0**-level, device=x.device))
        landing = Landing(torch.cat(cells), torch.cat(covered)[None], torch.cat(parts)[None])
        first = values[0][:, : size[0], : size[1]].flatten(1, 2)
        mixed = torch.cat([first, *(value.flatten(1, 2) for value in values[1:])], 1)

        def local() -> Tensor:
            return map_to_heads(add_levels(self._call_lepe(values))[:, : size[0], : size[1]], self.num_heads)

        row_size = 3 * self.num_heads * sum(route.tokens.shape[-1] for route in routes)
        alone = self.kind == "A" and self.levels == 1
        return Recorded(
            "quadtree",
            size,
            Given(rows, self.num_heads, size[0] * size[1], starts[-1], row_size, x.device),
            exact(map_to_heads(mixed, self.num_heads)),
            lambda heads: self.proj(heads_to_map(heads, size)),
            None if self.kind == "A" else local,
            landing=landing,
            normalised=not alone,
            note="the best tokens are left out, for there is no finer level: rows add up to less than 1" * alone,
            details={"routes": routes, "shares": shares, "starts": starts, "grids": grids},
        )

    @torch.jit.ignore
    def attention_map(self, x: Tensor, row: int, column: int) -> Tensor:
        """Return where the query at ``(row, column)`` of ``x`` ``[B, H, W, dim]`` looked: ``[B, heads, H, W]``.

        Every level's weights are spread evenly over the positions their tokens cover; type B's levels are weighed as in
        the output. Over the padded map the weights of a query add up to 1.
        """
        height, width = x.shape[1:3]
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"the map is {height}x{width}; it has no position ({row}, {column})")
        routes = self.routes(x)
        shares = self.level_weights.softmax(0).float() if self.kind == "B" else torch.ones(self.levels, device=x.device)
        total = 0
        for level, (tokens, weights) in enumerate(routes):
            span = 2 ** (self.levels - 1 - level)
            size = tokens.shape[2:4]
            tokens, weights = (part[:, :, row // span, column // span] for part in (tokens, weights))
            flat = weights.new_zeros(*weights.shape[:2], size[0] * size[1]).scatter_add(2, tokens, weights)
            level_map = flat.unflatten(2, size) * shares[level] / span**2
            total = total + level_map.repeat_interleave(span, 2).repeat_interleave(span, 3)
        return total[:, :, :height, :width]


# One node of a traced graph each: their course depends on shapes.
@register_notrace_function
@torch.jit.ignore
def project_pyramid(
    x: Tensor, finest: Tensor, weight: Tensor, bias: Tensor | None, levels: int, finest_chooses: bool
) -> list[Tensor]:
    """Return queries and keys ``[B, h, w, 2 * dim]`` of every level, coarse to fine.

    A pooled projection is the projection of the pooled input, so the coarser levels are projected from it. The finest
    level is projected anew if a choice depends on it, which is so for a single level of type A.

    Args:
        x: Input ``[B, H, W, dim]``.
        finest: Queries and keys of ``x``, ``[B, H, W, 2 * dim]``.
        weight: Weight of the projection to queries and keys.
        bias: Its bias.
        levels: Levels.
        finest_chooses: Whether it is type A.
    """
    with full_precision(x):
        pooled = x.to(accumulation_dtype(x.dtype))
        weight, bias = weight.to(pooled.dtype), None if bias is None else bias.to(pooled.dtype)
        project = F.linear if torch.compiler.is_compiling() or exporting() else pointwise
        pyramid = [project(pooled, weight, bias) if levels == 1 and finest_chooses else finest]
        for _ in range(levels - 1):
            pooled = pool(pooled)
            pyramid.insert(0, project(pooled, weight, bias))
    return pyramid


@register_notrace_function
@torch.jit.ignore
def pool_pyramid(finest: Tensor, levels: int) -> list[Tensor]:
    """Return what `project_pyramid` does, from the finest level's projections alone, rounded as they are."""
    with full_precision(finest):
        pyramid, pooled = [finest], finest.to(accumulation_dtype(finest.dtype))
        for _ in range(levels - 1):
            pooled = pool(pooled)
            pyramid.insert(0, pooled)
    return pyramid


@register_notrace_function
@torch.jit.ignore
def attend(
    pyramid: list[Tensor],
    values: list[Tensor],
    level_weights: Tensor | None,
    num_heads: int,
    topk: list[int],
    backend: str | None,
    lepe: list[Tensor],
) -> Tensor:
    """Return the sum of all levels' messages and LePE ``[B, H, W, dim]``.

    Args:
        pyramid: Queries and keys ``[B, h, w, 2 * dim]``, coarse to fine.
        values: Value maps, fine to coarse.
        level_weights: Type B's weights of the levels, coarse to fine, before their softmax; None is type A.
        num_heads: Attention heads.
        topk: Tokens to choose at each level, coarse to fine.
        backend: Path of the operator.
        lepe: Type B's LePE of each level, coarse to fine; none is type A's.
    """
    obstacle = _level_obstacle(pyramid[-1], values, level_weights, num_heads)
    if backend == "native" and obstacle is not None:
        raise ValueError(f"QuadTree attention's backend 'native' cannot run here: {obstacle}")
    if backend in (None, "native") and obstacle is None:
        return _attend_level_by_level(pyramid, values, level_weights.softmax(0), num_heads, topk, lepe)
    queries, keys = _queries_and_keys(pyramid, num_heads)
    del pyramid  # its copies in tree order are all that is needed
    out = message(queries, keys, values[::-1], level_weights, topk, backend, None)
    out = from_tree(out, values[0].shape[1], values[0].shape[2], len(values) - 1)
    return out + add_levels(lepe) if lepe else out


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))


def _split_query_and_key(qk: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    return qk.unflatten(-1, (2, heads, -1)).unbind(3)


def _level_obstacle(finest: Tensor, values: list[Tensor], level_weights: Tensor | None, heads: int) -> str | None:
    if level_weights is None or len(values) == 1:
        return "it is for type B, and for two levels or more"
    return level_obstacle(*_split_query_and_key(finest, heads), _split_heads(values[0], heads))


def _attend_level_by_level(
    pyramid: list[Tensor], values: list[Tensor], shares: Tensor, heads: int, topk: list[int], lepe: list[Tensor]
) -> Tensor:
    """Do what `attend` does for type B, without any order but that of the maps, and in float32."""
    dtype = values[0].dtype
    pyramid, values, lepe = ([x.float() for x in maps] for maps in (pyramid, values, lepe))
    shares = shares.float()
    queries, keys = _queries_and_keys(pyramid[:1], heads)
    size, levels = pyramid[0].shape[1:3], len(pyramid)
    out, tokens, _ = _coarsest(queries[0], keys[0], to_tree(values[-1], 0, heads), topk, False, None)
    total = torch.addcmul(_split_heads(lepe[0], heads), out.transpose(1, 2).unflatten(1, size), shares[0])
    tokens = tokens.unflatten(2, size)
    for level in range(1, levels):
        query, key = _split_query_and_key(pyramid[level], heads)
        value, base = (_split_heads(x, heads) for x in (values[levels - 1 - level], lepe[level]))
        best = min(topk[level], 4 * tokens.shape[-1]) if level < levels - 1 else 0
        added = {"share": shares[level], "parent": total, "base": base}
        total, tokens = quadtree_level(query, key, value, tokens, best, **added, backend="native")
    return total.flatten(3).to(dtype)


def _queries_and_keys(pyramid: list[Tensor], heads: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return scaled queries, and keys, each ``[B, heads, tokens, dim / heads]``, coarse to fine."""
    dim = pyramid[0].shape[-1] // 2
    scale = (dim // heads) ** -0.5
    queries = [to_tree(qk[..., :dim] * scale, level, heads) for level, qk in enumerate(pyramid)]
    return queries, [to_tree(qk[..., dim:], level, heads) for level, qk in enumerate(pyramid)]


def message(
    queries: list[Tensor],
    keys: list[Tensor],
    value_maps: list[Tensor],
    level_weights: Tensor | None,
    topk: list[int],
    backend: str | None,
    recorded: list[tuple[Tensor, Tensor]] | None,
    real: list[Tensor] | None = None,
) -> Tensor:
    """Return the sum of all levels' messages ``[B, heads, tokens, dim / heads]``, in tree order.

    Without ``level_weights`` it is type A. Each level's tokens and weights are appended to ``recorded`` if given.
    Queries and keys are taken out of their lists, so that a level's are freed when it is done. Keys may be of another
    map than queries; ``real`` ``[B, tokens]``, coarse to fine, says which of them take part, and the values of the
    others are zeros.
    """
    levels, heads = len(queries), queries[0].shape[1]
    values = [to_tree(value, level, heads) for level, value in enumerate(value_maps)]
    shares = None if level_weights is None else level_weights.softmax(0).to(values[0].dtype).unbind()
    if levels == 1 and shares is not None and recorded is None and real is None:
        # The share of a single level is 1, but has a gradient: zero.
        return token_attention(queries[0], keys[0], values[0], scale=1.0) * shares[0]
    mask = None if real is None else real[0][:, None, None]
    coarsest = (queries.pop(0), keys.pop(0), values.pop(0))
    total, token_index, handed = _coarsest(*coarsest, topk, shares is None, recorded, mask)
    if shares is not None:
        total = total * shares[0]
    for level in range(1, levels):
        candidates = token_index
        query, key = (part.pop(0).unflatten(2, (-1, 4)) for part in (queries, keys))
        scores = quadtree_scores(query, key, candidates, backend=backend)
        del query, key
        if real is not None:
            index = children(candidates).flatten(2)
            mask = real[level][:, None].expand(-1, heads, -1).gather(2, index).view(*candidates.shape[:3], 1, -1)
            scores = _without(scores, mask)
        if shares is None:
            # What the parent handed down with a chosen token is divided among the token's children.
            weights = (scores.unflatten(-1, (-1, 4)).softmax(-1) * handed[:, :, :, None, :, None]).flatten(-2)
        else:
            weights = scores.softmax(-1)
        if level < levels - 1:
            weights, position, handed = _hand_down(scores, weights, topk[level], shares is None)
            # In arithmetic: runtimes have few operators on bits.
            parent = position.div(4, rounding_mode="trunc")
            token_index = candidates.unsqueeze(3).expand(-1, -1, -1, 4, -1).gather(-1, parent)
            token_index = (token_index - parent) * 4 + position
            token_index = token_index.flatten(2, 3)
            handed = None if handed is None else handed.flatten(2, 3)
        out = quadtree_values(weights, values.pop(0).unflatten(2, (-1, 4)), candidates, backend=backend)
        # A token's message goes to its four children as well.
        total = total.unsqueeze(3)
        total = total + out if shares is None else torch.addcmul(total, out, shares[level])
        total = total.flatten(2, 3)
        if recorded is not None:
            tokens = children(candidates).unsqueeze(3).expand_as(weights)
            recorded.append((tokens.flatten(2, 3), weights.flatten(2, 3)))
    return total


def _coarsest(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk: list[int],
    type_a: bool,
    recorded: list[tuple[Tensor, Tensor]] | None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Attend from every query to every token; return the message, and the chosen tokens and their weights."""
    batch, heads = query.shape[:2]
    tokens = key.shape[2]
    rows = max(1, _COARSE_BYTES // max(1, batch * heads * tokens * 4))
    chunks = []
    # An exported graph must not depend on the number of tokens.
    for part in (query,) if is_exporting() else query.split(rows, 2):
        with full_precision(part):
            scores = _without(part @ key.transpose(-2, -1), real)
            weights, position, handed = scores.softmax(-1), None, None
            if topk:
                weights, position, handed = _hand_down(scores, weights, topk[0], type_a)
            out = weights.to(value.dtype) @ value
        chunks.append((out, position, handed, None if recorded is None else weights))
    out, position, handed, weights = (
        None if parts[0] is None else parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        for parts in zip(*chunks, strict=True)
    )
    if recorded is not None:
        recorded.append((torch.arange(tokens, device=query.device).expand_as(weights), weights))
    return out, position, handed


def _without(scores: Tensor, real: Tensor | None) -> Tensor:
    """Return scores that are the least number where ``real`` is False: of nothing but such there is no NaN."""
    return scores if real is None else scores.masked_fill(~real, torch.finfo(scores.dtype).min)


def routes_of(used: list[tuple[Tensor, Tensor]], grid: tuple[int, int], key_grid: tuple[int, int]) -> list[Routes]:
    """Return what `message` recorded by rows and columns; both grids are those of the coarsest level."""
    routes = []
    for level, (tokens, weights) in enumerate(used):
        size, keys = ((side[0] * 2**level, side[1] * 2**level) for side in (grid, key_grid))
        order = torch.arange(keys[0] * keys[1], device=tokens.device).view(1, *keys, 1)
        tokens, heads = to_tree(order, level).flatten()[tokens], tokens.shape[1]
        # Queries go back to rows and columns; what they saw rides along as channels.
        maps = [
            from_tree(part.flatten(0, 1).unsqueeze(1), *size, level).unflatten(0, (-1, heads))
            for part in (tokens, weights)
        ]
        routes.append(Routes(*maps))
    return routes


def _hand_down(scores: Tensor, weights: Tensor, topk: int, type_a: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Choose the best positions of the last axis; return the message's weights, the positions, and their weights.

    Type A takes the chosen positions out of the message, because the next level refines them.
    """
    # Type B's softmax keeps the order of the scores, which have fewer ties.
    ranked = weights if type_a else scores
    position = ranked.detach().topk(min(topk, ranked.shape[-1]), sorted=False).indices
    if not type_a:
        return weights, position, None
    return weights.scatter(-1, position, 0.0), position, weights.gather(-1, position)


@register_notrace_function
@torch.jit.ignore
def positional(
    values: list[Tensor], weights: list[Tensor], biases: list[Tensor | None], level_weights: Tensor
) -> list[Tensor]:
    """Return type B's LePE of each level by its share, ``[B, h, w, dim]``, coarse to fine.

    Args:
        values: Value maps, fine to coarse.
        weights: Weights of the depthwise convolutions, coarse to fine.
        biases: Their biases.
        level_weights: Weights of the levels, coarse to fine, before their softmax.
    """
    dtype = values[0].dtype
    maps = []
    for value, weight, bias, share in zip(values[::-1], weights, biases, level_weights.softmax(0), strict=True):
        # The share of a level scales its convolution: that is smaller than the map.
        weight, bias = (weight * share).to(dtype), (bias * share).to(dtype)
        level = F.conv2d(value.permute(0, 3, 1, 2), weight, bias, padding=1, groups=weight.shape[0])
        maps.append(level.permute(0, 2, 3, 1))
    return maps


@register_notrace_function
@torch.jit.ignore
def weigh_positional(levels: list[Tensor], level_weights: Tensor) -> list[Tensor]:
    """Return what `positional` does, from the convolutions' outputs ``[B, h, w, dim]``, coarse to fine."""
    shares = level_weights.softmax(0)
    return [level * share.to(level.dtype) for level, share in zip(levels, shares, strict=True)]


def add_levels(levels: list[Tensor]) -> Tensor:
    """Return the sum of maps ``[B, h, w, dim]``, coarse to fine, each half as wide as the next."""
    total: Tensor | None = None
    for level in levels:
        total = _add_to_finer(total, level)
    return total


def _add_to_finer(coarse: Tensor | None, fine: Tensor) -> Tensor:
    """Return the map ``fine`` ``[B, h, w, C]`` plus the next coarser one's pixel above each of its own."""
    if coarse is None:
        return fine
    cells = fine.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
    return (cells + coarse[:, :, None, :, None]).flatten(3, 4).flatten(1, 2)


class _ValueBranch(nn.Sequential):
    """Map from one level's values to those of the next coarser one, NCHW with channels last in memory."""

    def __init__(self, dim: int, act: Callable[[], nn.Module], device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            nn.GroupNorm(1, dim, **dd),
            act(),
            nn.Conv2d(dim, dim, 2, stride=2, **dd),
            nn.GroupNorm(1, dim, **dd),
            act(),
            nn.Conv2d(dim, dim, 1, **dd),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, dim, H, W]`` to ``[B, dim, H / 2, W / 2]``."""
        for layer in self:
            # The layout that the norm's kernel keeps but its meta function forgets (torch 2.14), so graphs were wrong.
            x = channels_last(layer(x))
        return x
