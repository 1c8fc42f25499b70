"""Attention operators as functions, each with a plain-torch reference beside its fast paths."""

from .attention import attention, merge_attentions
from .deformable import multi_scale_deformable_attention
from .neighborhood import na1d, na2d, na3d, neighborhood_backends, set_neighborhood_backend
from .quadtree import quadtree_scores, quadtree_values
from .routing import routed_attention

__all__ = [
    "attention",
    "merge_attentions",
    "multi_scale_deformable_attention",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_backends",
    "quadtree_scores",
    "quadtree_values",
    "routed_attention",
    "set_neighborhood_backend",
]
