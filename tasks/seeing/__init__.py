"""Seeing what a network looks at, and what such a map is worth; it is ``foveate.explain``. On torch and timm alone."""

from .cam import cam_layer, grad_cam, grad_cam_plus_plus, layer_cam
from .judge import deletion, insertion, max_box_acc_v2, pixel_ap, pointing_game
from .rollout import relevance, rollout

__all__ = [
    "cam_layer",
    "deletion",
    "grad_cam",
    "grad_cam_plus_plus",
    "insertion",
    "layer_cam",
    "max_box_acc_v2",
    "pixel_ap",
    "pointing_game",
    "relevance",
    "rollout",
]
