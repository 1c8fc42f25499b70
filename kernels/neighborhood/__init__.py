"""Neighborhood attention: every query attends to the ``kernel_size`` nearest keys of its dilation group."""

from .api import clear_plans, na1d, na2d, na3d, neighborhood_backends, set_neighborhood_backend
from .cost import NeighborhoodCost, neighborhood_cost
from .unfused import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk, unfused_neighborhood_backends

__all__ = [
    "NeighborhoodCost",
    "clear_plans",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "neighborhood_backends",
    "neighborhood_cost",
    "set_neighborhood_backend",
    "unfused_neighborhood_backends",
]
