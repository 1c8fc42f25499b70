"""Seeing what a network looks at, and what such a map is worth; it is ``foveate.explain``. On torch and timm alone."""

from .cam import cam_layer, grad_cam, grad_cam_plus_plus, layer_cam
from .heads import describe_heads
from .judge import deletion, insertion, max_box_acc_v2, pixel_ap, pointing_game
from .rollout import Pixel, relevance, rollout

__all__ = [
    "Pixel",
    "Region",
    "cam_layer",
    "deletion",
    "describe_heads",
    "grad_cam",
    "grad_cam_plus_plus",
    "insertion",
    "layer_cam",
    "max_box_acc_v2",
    "picture",
    "pixel_ap",
    "pointing_game",
    "relevance",
    "rollout",
]


def __getattr__(name: str) -> object:
    # Pictures need matplotlib, which is an extra.
    if name in ("picture", "Region"):
        from ..pictures import attention

        return getattr(attention, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
