"""UperNet (arXiv 1807.10221): pyramid pooling on the coarsest map, a feature pyramid, and all levels fused.

Written anew after the settings of mmseg (github.com/open-mmlab/mmsegmentation, Apache-2.0), whose weights it reads.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn

from ....kernels.lengths import is_open
from .fcn import classifier, init_convolutions
from .inference import resize_to


class _Grid(nn.AdaptiveAvgPool2d):
    """Adaptive average pooling to a square grid, of whose bins a graph of any size would else keep its example's."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if not is_open(height, width):
            return super().forward(x)
        rows, columns = (_bins(length, self.output_size, x) for length in (height, width))
        return rows @ x @ columns.T


def _bins(length: int, count: int, like: Tensor) -> Tensor:
    """Return the matrix ``[count, length]`` of pooling a line, in operators that take a length known later."""
    position = torch.arange(length, device=like.device)
    bin_ = torch.arange(count, device=like.device)[:, None]
    inside = (position >= bin_ * length // count) & (position < ((bin_ + 1) * length + count - 1) // count)
    inside = inside.to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


class UPerHead(nn.Module):
    """UperNet's head on the maps of any backbone.

    Args:
        in_channels: Channels of each map of the backbone, from the finest to the coarsest.
        num_classes: Classes.
        channels: Channels inside.
        pool_scales: Sides of the grids to which the coarsest map is pooled.
        dropout: Dropout rate, of whole channels, before the classifier.

    Shape:
        Maps ``[B, C_i, H_i, W_i]`` to logits ``[B, num_classes, H_0, W_0]``.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("channels", "pool_scales", "dropout")

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ):
        super().__init__()
        *finer, coarsest = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(_Grid(scale), ConvNormAct(coarsest, channels)) for scale in pool_scales
        )
        self.bottleneck = ConvNormAct(coarsest + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNormAct(width, channels) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvNormAct(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvNormAct(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        init_convolutions(self)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map the backbone's features to logits at the scale of the finest."""
        *finer, coarsest = features
        pooled = [resize_to(module(coarsest), coarsest.shape[-2:]) for module in self.psp_modules]
        levels = [self.bottleneck(torch.cat([coarsest, *pooled], dim=1))]
        for lateral, x in zip(reversed(self.lateral_convs), reversed(finer), strict=True):
            x = lateral(x)
            levels.append(x + resize_to(levels[-1], x.shape[-2:]))
        top, *rest = levels
        levels = [conv(x) for conv, x in zip(self.fpn_convs, reversed(rest), strict=True)]
        size = levels[0].shape[-2:]
        fused = torch.cat([resize_to(x, size) for x in (*levels, top)], dim=1)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(fused)))
