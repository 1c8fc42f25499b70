"""The floor of a model's time, in inference or training: its own linear and convolution layers alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Floor:
    """The linear and convolution operators of a model's forward pass, in their order, as torch's plain ones.

    Each has the layer's own weights, and an input of the shape and the order in memory that the model gives it; what
    lies between, and what a fast path does otherwise, is left out. Operators that no layer owns are not seen.

    Args:
        model: In evaluation mode, or in training mode if gradients are wanted.
        images: What it is called with.
        train: Whether the gradients of each operator are computed as well, right after it: of its weights, its bias,
            and, where the model needs it, its input.

    Example:
        >>> floor = Floor(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()), torch.randn(1, 3, 9, 9))
        >>> len(floor.operators)
        1
        >>> floor()
    """

    def __init__(self, model: nn.Module, images: Tensor, train: bool = False):
        self.train = train
        self.operators: list[tuple[nn.Module, Tensor]] = []
        self.gradients: dict[tuple, Tensor] = {}  # of outputs, by shape and order in memory
        inputs: dict[tuple, Tensor] = {}

        def record(layer: nn.Module, args: tuple) -> None:
            x = args[0]
            key = (x.shape, x.stride(), x.dtype, x.requires_grad)
            if key not in inputs:
                like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).normal_()
                inputs[key] = like.requires_grad_(x.requires_grad)
            self.operators.append((layer, inputs[key]))

        # A hooked layer is called, whatever fast path would read its weights.
        hooks = [layer.register_forward_pre_hook(record) for layer in model.modules() if isinstance(layer, LAYERS)]
        try:
            with torch.inference_mode(not train):
                model(images)
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(self) -> None:
        """Run them."""
        for layer, x in self.operators:
            if isinstance(layer, nn.Linear):
                out = F.linear(x, layer.weight, layer.bias)
            else:
                out = layer._conv_forward(x, layer.weight, layer.bias)
            if self.train and out.requires_grad:
                operands = (tensor for tensor in (x, layer.weight, layer.bias) if tensor is not None)
                leaves = [tensor for tensor in operands if tensor.requires_grad]
                torch.autograd.grad(out, leaves, self._gradient(out))

    def _gradient(self, out: Tensor) -> Tensor:
        key = (out.shape, out.stride())
        if key not in self.gradients:
            self.gradients[key] = torch.randn_like(out)
        return self.gradients[key]
