"""Object detection and instance segmentation."""

from .assign import draw_evenly, draw_randomly
from .detector import CascadeMaskRCNN, Detector, MaskRCNN, RetinaNet, create_detector
from .transform import DetectorTransform

__all__ = [
    "CascadeMaskRCNN",
    "Detector",
    "DetectorTransform",
    "MaskRCNN",
    "RetinaNet",
    "create_detector",
    "draw_evenly",
    "draw_randomly",
]


def __getattr__(name: str):
    # The engine's task reads data with libraries that a detector doesn't need.
    if name in ("Task", "Detect"):
        from .task import Detect

        return Detect
    if name == "Predictor":
        from .predict import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
