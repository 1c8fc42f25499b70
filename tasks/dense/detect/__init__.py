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
