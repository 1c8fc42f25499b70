"""Segmentation: every pixel its class, and with Mask2Former every object its mask."""

from .mask2former import Mask2Former
from .segmenter import Segmenter, create_segmenter

__all__ = ["Mask2Former", "Segmenter", "create_segmenter"]


def __getattr__(name: str):
    # The engine's task reads data with libraries that a segmenter doesn't need.
    if name in ("Task", "Segment"):
        from .task import Segment

        return Segment
    if name == "Predictor":
        from .predict import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
