"""Neighborhood attention: every query attends to the ``kernel_size`` nearest keys of its dilation group."""

from .api import na2d

__all__ = ["na2d"]
