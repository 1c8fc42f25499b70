"""Neighborhood attention: every query attends to the ``kernel_size`` nearest keys of its dilation group."""

from .api import clear_plans, na1d, na2d, na3d, neighborhood_backends, set_neighborhood_backend

__all__ = ["clear_plans", "na1d", "na2d", "na3d", "neighborhood_backends", "set_neighborhood_backend"]
