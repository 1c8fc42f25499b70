"""FCN (arXiv 1411.4038): a convolution and a classifier on one map; here the auxiliary head of deep supervision.

Written anew after the settings of mmseg (github.com/open-mmlab/mmsegmentation, Apache-2.0), whose weights it reads.
"""

from collections.abc import Sequence

from timm.layers import ConvNormAct, GroupNormAct
from torch import Tensor, nn


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """Return the 1x1 convolution that ends a head: normal of std 0.01, no bias at first."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


def init_convolutions(head: nn.Module) -> None:
    """Draw the convolutions before a norm as mmseg does: Kaiming normal over the outputs, for ReLU."""
    for module in head.modules():
        if isinstance(module, ConvNormAct):
            nn.init.kaiming_normal_(module.conv.weight, mode="fan_out", nonlinearity="relu")


class FCNHead(nn.Module):
    """A 3x3 convolution with norm and ReLU, dropout and a classifier, on one of the backbone's maps.

    Args:
        in_channels: Channels of each map of the backbone.
        num_classes: Classes.
        channels: Channels of the convolution.
        index: The map to use; the third by default.
        dropout: Dropout rate, of whole channels.
        group_norm: Whether the norm is one of 32 groups, as beside HamNet, instead of a batch norm.

    Shape:
        Maps ``[B, C_i, H_i, W_i]`` to logits ``[B, num_classes, H, W]`` at the scale of the chosen one.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 256,
        index: int = 2,
        dropout: float = 0.1,
        group_norm: bool = False,
    ):
        super().__init__()
        self.index = index
        norm = GroupNormAct if group_norm else nn.BatchNorm2d
        self.convs = nn.Sequential(ConvNormAct(in_channels[index], channels, 3, norm_layer=norm))
        self.dropout = nn.Dropout2d(dropout)
        init_convolutions(self)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map the backbone's features to logits."""
        return self.conv_seg(self.dropout(self.convs(features[self.index])))
