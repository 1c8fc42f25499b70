"""DeepLabV3 (arXiv 1706.05587) and DeepLabV3+ (arXiv 1802.02611): atrous spatial pyramid pooling, stride 8 or 16.

mmseg's designs are written anew after its settings (github.com/open-mmlab/mmsegmentation, Apache-2.0); the other is
torchvision's.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from ... import TaskError
from .fcn import classifier, init_convolutions
from .inference import resize_to

DESIGNS = ("torchvision", "mmseg")


def _rates(stride: int) -> list[int]:
    """Return the rates of the three dilated branches: 6, 12, 18 at stride 16, and elsewhere of the same extent."""
    return [rate * 16 // stride for rate in (6, 12, 18)]


class _Separable(nn.Sequential):
    """A 3x3 convolution of each channel and a 1x1 one, each with norm and ReLU."""

    def __init__(self, in_channels: int, channels: int, dilation: int = 1):
        super().__init__()
        self.depthwise_conv = ConvNormAct(in_channels, in_channels, 3, dilation=dilation, groups=in_channels)
        self.pointwise_conv = ConvNormAct(in_channels, channels)


class _AtrousPooling(nn.Module):
    """mmseg's atrous spatial pyramid pooling: the whole map, a 1x1 branch and three dilated ones, convolved to one."""

    def __init__(self, in_channels: int, channels: int, rates: Sequence[int], separable: bool):
        super().__init__()
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvNormAct(in_channels, channels))
        dilated = [
            _Separable(in_channels, channels, rate)
            if separable
            else ConvNormAct(in_channels, channels, 3, dilation=rate)
            for rate in rates
        ]
        self.aspp_modules = nn.ModuleList([ConvNormAct(in_channels, channels), *dilated])
        self.bottleneck = ConvNormAct((len(rates) + 2) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = resize_to(self.image_pool(x), x.shape[-2:])
        return self.bottleneck(torch.cat([pooled, *(module(x) for module in self.aspp_modules)], dim=1))


class DeepLabV3Head(nn.Module):
    """A DeepLabV3 head on the coarsest map of any backbone.

    The published rates belong to a stride: 6, 12, 18 to 16 (Efficient Local Attention's setting), 12, 24, 36 to 8. On
    another stride they keep their extent on the image.

    Args:
        in_channels: Channels of each map of the backbone.
        num_classes: Classes.
        stride: Stride of the coarsest map with respect to the image.
        design: ``"torchvision"``, or ``"mmseg"``, whose branches are 512 wide and end in one 3x3 convolution.
        channels: Width of mmseg's branches; torchvision's are 256.
        dropout: mmseg's dropout rate, of whole channels, before the classifier.

    Raises:
        TaskError: If there is no such design.

    Shape:
        Maps ``[B, C_i, H_i, W_i]`` to logits ``[B, num_classes, H_n, W_n]`` at the scale of the coarsest map.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("stride", "design", "channels", "dropout")

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        stride: int = 16,
        design: str = "torchvision",
        channels: int = 512,
        dropout: float = 0.1,
    ):
        super().__init__()
        if design not in DESIGNS:
            raise TaskError(f"design is {design!r}; it can be {' or '.join(map(repr, DESIGNS))}")
        if design == "torchvision":
            self.classifier = DeepLabHead(in_channels[-1], num_classes, _rates(stride))
            return
        self.classifier = None
        self.aspp = _AtrousPooling(in_channels[-1], channels, _rates(stride), separable=False)
        self.dropout = nn.Dropout2d(dropout)
        init_convolutions(self)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map the backbone's features to logits at the scale of the coarsest."""
        if self.classifier is not None:
            return self.classifier(features[-1])
        return self.conv_seg(self.dropout(self.aspp(features[-1])))


class DeepLabV3PlusHead(nn.Module):
    """mmseg's DeepLabV3+ head: separable pooling on the coarsest map, and the finest map's detail beside it.

    Args:
        in_channels: Channels of each map of the backbone.
        num_classes: Classes.
        stride: Stride of the coarsest map with respect to the image; see `DeepLabV3Head` for the rates.
        channels: Width of the branches.
        detail: Channels to which the finest map is brought.
        dropout: Dropout rate, of whole channels, before the classifier.

    Shape:
        Maps ``[B, C_i, H_i, W_i]`` to logits ``[B, num_classes, H_0, W_0]`` at the scale of the finest.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("stride", "channels", "detail", "dropout")

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        stride: int = 16,
        channels: int = 512,
        detail: int = 48,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.aspp = _AtrousPooling(in_channels[-1], channels, _rates(stride), separable=True)
        self.c1_bottleneck = ConvNormAct(in_channels[0], detail)
        self.sep_bottleneck = nn.Sequential(_Separable(channels + detail, channels), _Separable(channels, channels))
        self.dropout = nn.Dropout2d(dropout)
        init_convolutions(self)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map the backbone's features to logits at the scale of the finest."""
        detail = self.c1_bottleneck(features[0])
        pooled = resize_to(self.aspp(features[-1]), detail.shape[-2:])
        return self.conv_seg(self.dropout(self.sep_bottleneck(torch.cat([pooled, detail], dim=1))))
