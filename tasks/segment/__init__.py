"""Segmentation: every pixel its class, and with Mask2Former every object its mask."""

from .segmenter import Segmenter, create_segmenter

__all__ = ["Segmenter", "create_segmenter"]
