"""What is exported of a model: its answer whole, in tensors of fixed sizes, or its maps; and on which images."""

import torch
from torch import Tensor, nn

from .. import TaskError
from ..dense.deploy import deployable


class Pyramid(nn.Module):
    """The maps that a model's heads would get, as a tuple of ``[B, C_i, H_i, W_i]``.

    Args:
        model: A classifier of timm's, or a detector or segmenter with ``backbone`` and perhaps ``neck``.

    Raises:
        TaskError: If a classifier has no maps.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.dense = hasattr(model, "backbone")
        if not self.dense and not hasattr(model, "forward_intermediates"):
            raise TaskError(f"{type(model).__name__} gives no feature maps; export it without --features")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of normalised images ``[B, C, H, W]``."""
        if not self.dense:
            return tuple(self.model.forward_intermediates(x, intermediates_only=True))
        if hasattr(self.model, "features"):
            return tuple(self.model.features(x))
        return tuple(self.model.neck(self.model.backbone(x)))


def whole_model(model: nn.Module, output: str | None = None) -> nn.Module:
    """Return what answers as a model's `predict` does, from normalised images ``[B, C, H, W]``, in tensors alone.

    Args:
        model: A classifier, which is returned as it is, or a detector or segmenter; see `dense.deploy.deployable`.
        output: Of Mask2Former and OneFormer ``"semantic"``, ``"instance"`` or ``"panoptic"``.

    Raises:
        TaskError: If there is no such output.
    """
    return deployable(model, output) if hasattr(model, "backbone") else model.eval()


def output_names(model: nn.Module, count: int) -> list[str]:
    """Return what the ``count`` outputs of a model, or of what stands for it, are called in a file."""
    names = getattr(model, "OUTPUTS", None)
    if names is not None:
        return list(names)
    return ["output"] if count == 1 else [f"map{level}" for level in range(count)]


def example_images(channels: int, height: int, width: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Return normalised images ``[batch, channels, height, width]`` of noise, always the same: ``images`` in a file."""
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))
