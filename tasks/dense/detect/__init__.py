"""Object detection and instance segmentation."""

from .assign import sample_evenly, sample_randomly
from .detector import DINO, CascadeMaskRCNN, Detector, MaskRCNN, RetinaNet, create_detector
from .transform import DetectorTransform

__all__ = [
    "DINO",
    "CascadeMaskRCNN",
    "Detector",
    "DetectorTransform",
    "MaskRCNN",
    "RetinaNet",
    "create_detector",
    "sample_evenly",
    "sample_randomly",
]
