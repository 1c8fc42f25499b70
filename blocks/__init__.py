"""Attention modules, each usable alone on maps."""

from .neighborhood import NeighborhoodAttention2d

__all__ = ["NeighborhoodAttention2d"]
