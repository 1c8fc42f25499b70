"""QuadTree attention from one map to another: what matching and stereo use of arXiv 2201.02767 (ICLR 2022)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.lengths import padding_to
from ..kernels.precision import full_precision
from ..kernels.quadtree.reference import accumulation_dtype
from .quadtree import Routes, from_tree, message, routes_of, to_tree, topk_of_levels


class QuadTreeCrossAttention2d(nn.Module):
    """Multi-head attention of one map's positions to another map, which looks closely only where that was worth it.

    Queries of one map, keys and values of the other are projected and averaged into pyramids of ``levels`` maps, each
    half as wide as the next. At the coarsest level every query sees every token of the other map; at each finer level
    it sees the children of the ``topk`` tokens that scored best for its parent. Memory is linear in both maps, but for
    the coarsest level's scores, which are computed in parts. There is no term of position, and values are averages: so
    it is in the published matchers. Both types are those of `QuadTreeAttention2d`, without its convolutions: type B
    attends fully at every level and weighs the levels by learned scalars; type A shares out, at the next level, the
    weights of the tokens that it leaves out of a level's message.

    Padded pixels change nothing: masked ones take no part in averages, are never attended to, and where the mask of the
    first map is False the output is zero. Sides that are no multiple of ``2 ** (levels - 1)`` are padded so; the
    published code raises an error. An image of the other map without a single pixel gives a message of zeros. Scores,
    and averages of what they depend on, are float32 in modules of half precision and under autocast too.

    Args:
        dim: Channels of queries and output.
        num_heads: Attention heads; must divide ``dim``.
        levels: Maps in the pyramids.
        topk: Tokens that each query hands down to its children, for all levels or for each, coarse to fine; the finest
            level hands nothing down, and its number may be left out.
        kind: ``"B"`` or ``"A"``.
        context_dim: Channels of the other map; ``dim`` by default.
        qkv_bias: Whether the projections to queries, keys and values have a bias.
        proj_drop: Dropout rate of the output.
        backend: Path of the operator, as in `foveate.kernels.quadtree_scores`; the fastest that runs by default.

    Shape:
        ``[B, H, W, dim]`` and ``[B, H', W', context_dim]`` to ``[B, H, W, dim]``; masks ``[B, H, W]`` and
        ``[B, H', W']`` bool, True where a pixel is one of the image. Any sizes.

    Raises:
        ValueError: If the heads don't divide the channels, ``levels``, ``topk`` or ``kind`` is none of those allowed,
            or maps and masks don't fit each other.

    Example:
        The best match of each query, as row and column of the other map:

        >>> attention = QuadTreeCrossAttention2d(64, num_heads=2, levels=3, topk=(32, 16, 16))
        >>> left, right = torch.randn(1, 32, 40, 64), torch.randn(1, 24, 48, 64)
        >>> attention(left, right).shape
        torch.Size([1, 32, 40, 64])
        >>> finest = attention.routes(left, right)[-1]
        >>> first_head = finest.tokens[:, 0].gather(-1, finest.weights[:, 0].argmax(-1, keepdim=True)).squeeze(-1)
        >>> torch.stack([first_head // 48, first_head % 48], -1).shape
        torch.Size([1, 32, 40, 2])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        levels: int = 3,
        topk: int | Sequence[int] = (32, 16, 16),
        kind: str = "B",
        context_dim: int | None = None,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        backend: str | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.topk = topk_of_levels(type(self).__name__, (dim, num_heads), levels, topk, kind)
        self.num_heads = num_heads
        self.levels = levels
        self.kind = kind
        self.multiple = 2 ** (levels - 1)
        self.backend = backend
        context_dim = dim if context_dim is None else context_dim
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.k = nn.Linear(context_dim, dim, bias=qkv_bias, **dd)
        self.v = nn.Linear(context_dim, dim, bias=qkv_bias, **dd)
        self.level_weights = nn.Parameter(torch.zeros(levels, **dd)) if kind == "B" else None
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def extra_repr(self) -> str:
        """Return the settings that `print(model)` shows."""
        return f"kind={self.kind}, levels={self.levels}, topk={self.topk}, num_heads={self.num_heads}"

    def forward(
        self, x: Tensor, context: Tensor, mask: Tensor | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        """Attend from ``x`` ``[B, H, W, dim]`` to ``context`` ``[B, H', W', context_dim]``."""
        height, width = x.shape[1:3]
        out = self._attend(x, context, mask, context_mask, None)
        size = [-(-side // self.multiple) * self.multiple for side in (height, width)]
        out = self.proj(from_tree(out, *size, self.levels - 1)[:, :height, :width])
        out = out if mask is None else out.masked_fill(~mask.unsqueeze(-1), 0.0)
        return self.proj_drop(out)

    @torch.jit.ignore
    def routes(
        self, x: Tensor, context: Tensor, mask: Tensor | None = None, context_mask: Tensor | None = None
    ) -> list[Routes]:
        """Return which tokens of ``context`` each query of ``x`` used, for each level from coarse to fine.

        Grids are those of the padded maps: level ``l`` is ``2 ** (levels - 1 - l)`` times coarser. The weights of a
        finest query add up to 1, with type A over all levels above it and its own.
        """
        used: list[tuple[Tensor, Tensor]] = []
        self._attend(x, context, mask, context_mask, used)
        grids = [tuple(-(-side // self.multiple) for side in part.shape[1:3]) for part in (x, context)]
        return routes_of(used, *grids)

    def _attend(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor | None,
        context_mask: Tensor | None,
        used: list[tuple[Tensor, Tensor]] | None,
    ) -> Tensor:
        """Return the sum of all levels' messages ``[B, heads, tokens, dim / heads]``, in tree order."""
        self._check(x, context, mask, context_mask)
        x, mask = _padded(x, mask, self.multiple)
        context, context_mask = _padded(context, context_mask, self.multiple)
        query, key, value = self.q(x), self.k(context), self.v(context)
        with full_precision(query):
            wide = accumulation_dtype(query.dtype)
            queries, _ = _pyramid(query.to(wide) * (query.shape[-1] // self.num_heads) ** -0.5, mask, self.levels)
            keys, real = _pyramid(key.to(wide), context_mask, self.levels)
            values, _ = _pyramid(value, context_mask, self.levels)
            trees = [
                [to_tree(part, depth, self.num_heads) for depth, part in enumerate(parts)] for parts in (queries, keys)
            ]
            if real is not None:
                real = [to_tree(part.unsqueeze(-1), depth).flatten(1) for depth, part in enumerate(real)]
            return message(*trees, values, self.level_weights, self.topk, self.backend, used, real)

    def _check(self, x: Tensor, context: Tensor, mask: Tensor | None, context_mask: Tensor | None) -> None:
        if x.ndim != 4 or context.ndim != 4 or x.shape[0] != context.shape[0]:
            raise ValueError(
                f"QuadTreeCrossAttention2d takes two maps [B, H, W, channels] of one batch; got {list(x.shape)} and "
                f"{list(context.shape)}"
            )
        for name, part, pixels in (("mask", mask, x), ("context_mask", context_mask, context)):
            if part is not None and (part.dtype != torch.bool or part.shape != pixels.shape[:3]):
                raise ValueError(
                    f"QuadTreeCrossAttention2d takes {name} as bool {list(pixels.shape[:3])}; got {part.dtype} "
                    f"{list(part.shape)}"
                )


def _padded(x: Tensor, mask: Tensor | None, multiple: int) -> tuple[Tensor, Tensor | None]:
    """Pad a map at the bottom and right; what is padded is masked, and what is masked is zero."""
    below, right = padding_to(x.shape[1], multiple), padding_to(x.shape[2], multiple)
    if mask is None and (below or right):
        mask = x.new_ones(x.shape[:3], dtype=torch.bool)
    if mask is None:
        return x, None
    x = F.pad(x.masked_fill(~mask.unsqueeze(-1), 0.0), (0, 0, 0, right, 0, below))
    return x, F.pad(mask, (0, right, 0, below))


def _pyramid(x: Tensor, mask: Tensor | None, levels: int) -> tuple[list[Tensor], list[Tensor] | None]:
    """Return maps ``[B, h, w, C]`` and their masks, coarse to fine; only real pixels count in the averages."""
    maps, masks = [x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)], [mask]
    for _ in range(levels - 1):
        total = _cells(maps[0]).sum(-2)
        if mask is None:
            maps.insert(0, total * 0.25)
        else:
            counts = _cells(masks[0].unsqueeze(-1)).sum(-2)
            maps.insert(0, total / counts.clamp(min=1))
            masks.insert(0, counts.squeeze(-1) > 0)
    return maps, None if mask is None else masks


def _cells(x: Tensor) -> Tensor:
    """Return the four pixels of each 2x2 cell of ``[B, H, W, C]`` side by side, ``[B, H / 2, W / 2, 4, C]``."""
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3, 4)
