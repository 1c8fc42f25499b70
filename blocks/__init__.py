"""Attention modules, each usable alone on maps."""

from .global_attention import GlobalAttention2d
from .neighborhood import NeighborhoodAttention2d

__all__ = ["GlobalAttention2d", "NeighborhoodAttention2d"]
