"""DeepLabV3 (arXiv 1706.05587): atrous spatial pyramid pooling on a map of stride 8 or 16; torchvision's head."""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead


class DeepLabV3Head(nn.Module):
    """torchvision's DeepLabV3 head on the coarsest map of any backbone.

    The published rates belong to a stride: 6, 12, 18 to 16 (Efficient Local Attention's setting), 12, 24, 36 to 8. On
    another stride they keep their extent on the image.

    Args:
        in_channels: Channels of each map of the backbone.
        num_classes: Classes.
        stride: Stride of the coarsest map with respect to the image.

    Shape:
        Maps ``[B, C_i, H_i, W_i]`` to logits ``[B, num_classes, H_n, W_n]`` at the scale of the coarsest map.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, stride: int = 16):
        super().__init__()
        self.classifier = DeepLabHead(in_channels[-1], num_classes, [rate * 16 // stride for rate in (6, 12, 18)])

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map the backbone's features to logits at the scale of the coarsest."""
        return self.classifier(features[-1])
