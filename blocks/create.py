"""Every spatial attention of foveate by name, under one signature."""

import difflib
from collections.abc import Callable, Mapping

from torch import nn

from .agent import AgentAttention2d
from .aggregated import AggregatedAttention2d
from .contmix import ContextMixing2d
from .cross_shaped import CrossShapedAttention2d
from .deformable import DeformableAttention2d
from .dual import DualAttention2d
from .global_attention import GlobalAttention2d
from .hilo import HiLoAttention2d
from .inline import InLineAttention2d
from .large_kernel import LargeKernelAttention2d
from .mixture_of_heads import MixtureOfHeads2d
from .neighborhood import NeighborhoodAttention2d
from .quadtree import QuadTreeAttention2d
from .routing import BiLevelRoutingAttention2d
from .shift import Shift2d
from .window import WindowAttention2d


class _Shift(Shift2d):
    """Shifts of channels, which know no heads."""

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None, **options):
        super().__init__(dim, **options)


def _mixture_of_heads(
    dim: int,
    num_heads: int,
    attention: str = "neighborhood",
    attention_options: Mapping | None = None,
    shared_heads: int | None = None,
    routed_heads: int | None = None,
    balance_weight: float = 0.01,
    device=None,
    dtype=None,
) -> MixtureOfHeads2d:
    """Weigh the heads of another attention of the table; by default, half of the heads are shared, half of the rest."""
    dd = {"device": device, "dtype": dtype}
    shared_heads = num_heads // 2 if shared_heads is None else shared_heads
    routed_heads = (num_heads - shared_heads + 1) // 2 if routed_heads is None else routed_heads
    module = create_attention(attention, dim, num_heads, **{**(attention_options or {}), **dd})
    return MixtureOfHeads2d(module, num_heads, shared_heads, routed_heads, balance_weight, **dd)


class _LargeKernel(LargeKernelAttention2d):
    """Large kernel attention, which knows no heads."""

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None, **options):
        super().__init__(dim, **options, device=device, dtype=dtype)


# By name: the module, and the options it gets beyond its own defaults.
_ATTENTIONS: dict[str, tuple[Callable[..., nn.Module], dict]] = {
    "aggregated": (AggregatedAttention2d, {}),
    "agent": (AgentAttention2d, {"agents": 7, "map_size": 14}),
    "bilevel": (BiLevelRoutingAttention2d, {}),
    "contmix": (ContextMixing2d, {}),
    "cross_shaped": (CrossShapedAttention2d, {}),
    "deformable": (DeformableAttention2d, {}),
    "dilated": (NeighborhoodAttention2d, {"dilation": 2}),
    "dual": (DualAttention2d, {}),
    "global": (GlobalAttention2d, {}),
    "hilo": (HiLoAttention2d, {}),
    "inline": (InLineAttention2d, {}),
    "large_kernel": (_LargeKernel, {}),
    "moh": (_mixture_of_heads, {}),
    "neighborhood": (NeighborhoodAttention2d, {}),
    "quadtree": (QuadTreeAttention2d, {"levels": 3}),
    "shift": (_Shift, {}),
    "window": (WindowAttention2d, {}),
}


def list_attentions() -> list[str]:
    """Return the names that `create_attention` knows."""
    return sorted(_ATTENTIONS)


def create_attention(name: str, dim: int, num_heads: int, **options) -> nn.Module:
    """Create an attention by name.

    Args:
        name: One of `list_attentions`, such as ``"neighborhood"``.
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        **options: Options of the module, ``device`` and ``dtype`` among them. All work without any; defaults are the
            module's own, but for ``dilation=2`` (dilated), ``levels=3`` (quadtree), ``agents=7`` and ``map_size=14``
            (agent). A mixture of heads (moh) takes the name of another one as ``attention`` (``"neighborhood"`` by
            default), with its options as ``attention_options``; the ``balance_weight`` of each counts in full, where
            the published trainings divide 0.01 by their number.

    Returns:
        Module from maps ``[B, H, W, dim]`` to the same shape, for any H and W.

    Raises:
        ValueError: If there is no such attention.
        TypeError: If the module has no such option.

    Example:
        >>> for name in list_attentions():
        ...     attention = create_attention(name, 64, num_heads=2)
        ...     assert attention(torch.randn(1, 20, 30, 64)).shape == (1, 20, 30, 64)
    """
    if name not in _ATTENTIONS:
        near = difflib.get_close_matches(name, _ATTENTIONS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(repr, list_attentions()))}"
        raise ValueError(f"unknown attention {name!r}; {hint}")
    module, defaults = _ATTENTIONS[name]
    return module(dim, num_heads, **{**defaults, **options})
