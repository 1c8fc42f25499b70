"""Attention operators as functions, each with a plain-torch reference beside its fast paths."""

# A program that starts in a checkout finds this folder as `kernels` too, and transformers asks for a package of that
# name: there it stays empty, since an operator that torch gets twice takes its first definition away.
if __name__ != "kernels":
    from .attention import attention, merge_attentions
    from .deformable import deformable_backends, multi_scale_deformable_attention
    from .depthwise import depthwise_backends, depthwise_conv2d
    from .gelu_linear import gelu_linear, gelu_linear_backends
    from .neighborhood import (
        na1d,
        na1d_av,
        na1d_qk,
        na2d,
        na2d_av,
        na2d_bias,
        na2d_qk,
        na3d,
        na3d_av,
        na3d_qk,
        neighborhood_backends,
        neighborhood_cost,
        set_neighborhood_backend,
        unfused_neighborhood_backends,
    )
    from .point_attention import point_attention, point_attention_backends
    from .pointwise import pointwise_backends
    from .quadtree import quadtree_backends, quadtree_level, quadtree_level_backends, quadtree_scores, quadtree_values
    from .routing import routed_attention, routing_backends
    from .token_attention import token_attention, token_attention_backends, window_attention

__all__ = [
    "attention",
    "deformable_backends",
    "depthwise_backends",
    "depthwise_conv2d",
    "gelu_linear",
    "gelu_linear_backends",
    "merge_attentions",
    "multi_scale_deformable_attention",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_bias",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "neighborhood_backends",
    "neighborhood_cost",
    "point_attention",
    "point_attention_backends",
    "pointwise_backends",
    "quadtree_backends",
    "quadtree_level",
    "quadtree_level_backends",
    "quadtree_scores",
    "quadtree_values",
    "routed_attention",
    "routing_backends",
    "set_neighborhood_backend",
    "token_attention",
    "token_attention_backends",
    "unfused_neighborhood_backends",
    "window_attention",
]
