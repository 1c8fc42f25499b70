"""Semantic FPN (arXiv 1901.02446): a feature pyramid whose levels are convolved up to the finest and added.

Written anew after the settings of mmseg (github.com/open-mmlab/mmsegmentation, Apache-2.0), whose weights it reads.
"""

from collections.abc import Sequence
from typing import ClassVar

from timm.layers import ConvNormAct
from torch import Tensor, nn

from ..neck import FeaturePyramid
from .fcn import classifier, init_convolutions
from .inference import resize_to


class SemanticFPNHead(nn.Module):
    """A feature pyramid and, for each of its levels, as many convolutions and doublings as lead to the finest.

    Args:
        in_channels: Channels of each map of the backbone, from the finest to the coarsest.
        num_classes: Classes.
        channels: Channels of the convolutions.
        neck_channels: Channels of the feature pyramid.
        dropout: Dropout rate, of whole channels, before the classifier.

    Shape:
        Maps ``[B, C_i, H_i, W_i]`` to logits ``[B, num_classes, H_0, W_0]``.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("channels", "neck_channels", "dropout")

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 128,
        neck_channels: int = 256,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.neck = FeaturePyramid(in_channels, neck_channels, num_outs=len(in_channels))
        self.scale_heads = nn.ModuleList()
        for level in range(len(in_channels)):
            layers: list[nn.Module] = []
            for step in range(max(1, level)):
                layers.append(ConvNormAct(neck_channels if step == 0 else channels, channels, 3))
                if level > 0:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*layers))
        self.dropout = nn.Dropout2d(dropout)
        init_convolutions(self.scale_heads)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map the backbone's features to logits at the scale of the finest."""
        finest, *coarser = (head(x) for head, x in zip(self.scale_heads, self.neck(features), strict=True))
        for x in coarser:
            finest = finest + resize_to(x, finest.shape[-2:])
        return self.conv_seg(self.dropout(finest))
