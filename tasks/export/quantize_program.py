"""Smaller programs of torch.export: int8 by torchao's PT2E, and the half types; of classifiers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import TaskError
from ..extras import require
from .program import trace


class InDtype(nn.Module):
    """A model that computes in another type; images and answers stay float32.

    Args:
        model: Maps images ``[B, C, H, W]`` to a tensor; it is changed.
        dtype: Such as ``torch.bfloat16``.

    Attributes:
        rounding: How much coarser the type is than float32; `check.accepted` reads it.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model = model.to(dtype)
        self.rounding = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's answer in float32."""
        # Of its weights now: `check.accepted` makes them float64.
        return self.model(x.to(next(self.model.parameters()).dtype)).float()


def calibrated_module(model: nn.Module, example: Tensor, images: Sequence[Tensor], dynamic_batch: bool) -> nn.Module:
    """Return a model in int8, whose scales are measured on images, to be written by `export_model`.

    Quantised are convolutions and products with weights, by the rules of torchao's `X86InductorQuantizer`.

    Args:
        model: Maps images ``[B, C, H, W]`` to a tensor; in evaluation mode.
        example: What it is traced with.
        images: To calibrate by, each ``[1, C, H, W]``.
        dynamic_batch: Whether it is to take any number of images.

    Raises:
        TaskError: If torchao isn't installed, or finds nothing to quantise.
    """
    pt2e = require("torchao.quantization.pt2e.quantize_pt2e")
    x86 = require("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    traced = trace(model, example, dynamic_batch, False).module()
    observed = pt2e.prepare_pt2e(traced, quantizer)
    with torch.no_grad():
        for image in images:
            observed(image.expand(len(example), -1, -1, -1))
    quantized = pt2e.convert_pt2e(observed)
    if not any("quantize_per" in str(node.target) for node in quantized.graph.nodes):
        raise TaskError("--int8: torchao finds no convolution and no product with weights in this model")
    _drop_unused(quantized)
    return quantized


def _drop_unused(module: torch.fx.GraphModule) -> None:
    """Delete the weights in float32 that those in int8 stand for."""
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name not in used]:
        owner, _, last = name.rpartition(".")
        delattr(module.get_submodule(owner), last)
