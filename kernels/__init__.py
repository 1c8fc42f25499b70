"""Attention operators as functions, each with a plain-torch reference beside its fast paths."""

from .neighborhood import na1d, na2d, na3d, neighborhood_backends, set_neighborhood_backend

__all__ = ["na1d", "na2d", "na3d", "neighborhood_backends", "set_neighborhood_backend"]
