"""Attention modules, each usable alone on maps."""

from .agent import AgentAttention2d, AgentTokenAttention
from .cross_shaped import CrossShapedAttention2d
from .deformable import DeformableAttention2d
from .dual import ChannelGroupAttention2d, DualAttention2d, WindowAttention2d
from .global_attention import GlobalAttention2d
from .neighborhood import NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d
from .quadtree import QuadTreeAttention2d
from .routing import BiLevelRoutingAttention2d, LePEAttention2d, RoutedRegions

__all__ = [
    "AgentAttention2d",
    "AgentTokenAttention",
    "BiLevelRoutingAttention2d",
    "ChannelGroupAttention2d",
    "CrossShapedAttention2d",
    "DeformableAttention2d",
    "DualAttention2d",
    "GlobalAttention2d",
    "LePEAttention2d",
    "NeighborhoodAttention1d",
    "NeighborhoodAttention2d",
    "NeighborhoodAttention3d",
    "QuadTreeAttention2d",
    "RoutedRegions",
    "WindowAttention2d",
]
