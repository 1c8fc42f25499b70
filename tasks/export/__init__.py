"""Models in the formats of other programs: ONNX, torch.export and safetensors, each checked against the model itself.

A file is written whole or not at all, and only if what it computes is what the model computes.
"""

from .check import aligned, check_inputs, differences
from .files import FORMATS, Options, check_exportable, export_model
from .modules import Pyramid, example_images, output_names, whole_model

__all__ = [
    "FORMATS",
    "Options",
    "Pyramid",
    "aligned",
    "check_exportable",
    "check_inputs",
    "differences",
    "example_images",
    "export_model",
    "output_names",
    "whole_model",
]
