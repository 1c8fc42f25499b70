"""MCANet's head (arXiv 2312.08866): multi-scale cross-axis attention on the coarser maps, joined with the finest.

Written anew from a description; no weights were published, and no parity is claimed.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn

from ....blocks.cross_axis import CrossAxisAttention2d
from ... import TaskError
from .fcn import classifier, init_convolutions
from .inference import resize_to


def _separable(in_channels: int, channels: int) -> nn.Sequential:
    depthwise = ConvNormAct(in_channels, in_channels, 3, groups=in_channels)
    return nn.Sequential(depthwise, ConvNormAct(in_channels, channels))


class MCAHead(nn.Module):
    """All maps at the scale of the finest: the coarser ones squeezed and attended to, then two separable convolutions.

    Args:
        in_channels: Channels of each map of the backbone, from the finest to the coarsest.
        num_classes: Classes.
        channels: Channels of the attention and the convolutions.
        num_heads: Attention heads; must divide ``channels``.
        dropout: Dropout rate, of whole channels, before the classifier.

    Shape:
        Maps ``[B, C_i, H_i, W_i]`` to logits ``[B, num_classes, H_0, W_0]``.

    Raises:
        TaskError: If there are fewer than two maps, or the heads don't divide the channels.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("channels", "num_heads", "dropout")

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 128,
        num_heads: int = 8,
        dropout: float = 0.1,
    ):
        super().__init__()
        if len(in_channels) < 2:
            raise TaskError(f"mca joins coarser maps with the finest; the backbone has {len(in_channels)} alone")
        if channels % num_heads:
            raise TaskError(f"num_heads must divide channels; got {num_heads} heads and {channels} channels")
        self.squeeze = ConvNormAct(sum(in_channels[1:]), channels)
        self.cross_axis = CrossAxisAttention2d(channels, num_heads)
        self.convs = nn.Sequential(_separable(channels + in_channels[0], channels), _separable(channels, channels))
        self.dropout = nn.Dropout2d(dropout)
        init_convolutions(self)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map the backbone's features to logits at the scale of the finest."""
        finest, *coarser = features
        x = self.squeeze(torch.cat([resize_to(x, finest.shape[-2:]) for x in coarser], 1))
        x = self.convs(torch.cat([self.cross_axis(x), finest], 1))
        return self.conv_seg(self.dropout(x))
