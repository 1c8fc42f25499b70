"""The floor of a model's time: its own linear and convolution layers alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Floor:
    """The linear and convolution operators of a model's forward pass, in their order, as torch's plain ones.

    Each has the layer's own weights, and an input of the shape and the order in memory that the model gives it; what
    lies between, and what a fast path does otherwise, is left out. Operators that no layer owns are not seen.

    Args:
        model: In evaluation mode.
        images: What it is called with.

    Example:
        >>> floor = Floor(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()), torch.randn(1, 3, 9, 9))
        >>> len(floor.operators)
        1
        >>> floor()
    """

    def __init__(self, model: nn.Module, images: Tensor):
        self.operators: list[tuple[nn.Module, Tensor]] = []
        inputs: dict[tuple, Tensor] = {}

        def record(layer: nn.Module, args: tuple) -> None:
            x = args[0]
            key = (x.shape, x.stride(), x.dtype)
            if key not in inputs:
                inputs[key] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).normal_()
            self.operators.append((layer, inputs[key]))

        # A hooked layer is called, whatever fast path would read its weights.
        hooks = [layer.register_forward_pre_hook(record) for layer in model.modules() if isinstance(layer, LAYERS)]
        try:
            with torch.inference_mode():
                model(images)
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(self) -> None:
        """Run them."""
        for layer, x in self.operators:
            if isinstance(layer, nn.Linear):
                F.linear(x, layer.weight, layer.bias)
            else:
                layer._conv_forward(x, layer.weight, layer.bias)
