"""Segmentation: every pixel its class, and with Mask2Former every object its mask."""

from .mask2former import Mask2Former
from .segmenter import Segmenter, create_segmenter

__all__ = ["Mask2Former", "Segmenter", "create_segmenter"]
