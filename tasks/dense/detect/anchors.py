"""Anchors of published detectors: sides by stride, not rounded, centred on the top-left corner of each cell."""

from collections.abc import Sequence

import torch
from torch import Tensor


class AnchorGrid:
    """The anchors of every cell of a pyramid's maps.

    A level of stride ``s`` has anchors of height ``s * scale * sqrt(ratio)`` and width ``s * scale / sqrt(ratio)``.
    torchvision's generator rounds them and derives strides from the sizes of image and map, so it is none of these.

    Attributes:
        per_cell: Anchors of a cell; ratios outside, scales inside.

    Args:
        strides: Stride in pixels of each level.
        scales: Sides in strides.
        ratios: Heights over widths.
    """

    def __init__(self, strides: Sequence[int], scales: Sequence[float], ratios: Sequence[float] = (0.5, 1.0, 2.0)):
        self.strides = tuple(strides)
        self.scales = tuple(scales)
        self.ratios = tuple(ratios)
        self.per_cell = len(self.scales) * len(self.ratios)

    def base(self, stride: int) -> Tensor:
        """Return the anchors ``[per_cell, 4]`` around the origin of a level, as xyxy."""
        scales = torch.tensor(self.scales, dtype=torch.float32, device="cpu")
        heights = torch.tensor(self.ratios, dtype=torch.float32, device="cpu").sqrt()
        width = (stride * (1 / heights)[:, None] * scales).flatten()
        height = (stride * heights[:, None] * scales).flatten()
        return torch.stack([-0.5 * width, -0.5 * height, 0.5 * width, 0.5 * height], dim=1)

    def __call__(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors ``[H_i * W_i * per_cell, 4]`` of every level of maps ``[B, C, H_i, W_i]``.

        Rows run along the cells, and within a cell along its anchors; xyxy in pixels, float32.
        """
        grids = []
        for stride, level in zip(self.strides, maps, strict=True):
            height, width = level.shape[-2:]
            x = torch.arange(width, dtype=torch.float32, device=level.device) * stride
            y = torch.arange(height, dtype=torch.float32, device=level.device) * stride
            corner = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
            cells = corner.reshape(-1, 2).repeat(1, 2)
            grids.append((cells[:, None] + self.base(stride).to(level.device)).flatten(0, 1))
        return grids
