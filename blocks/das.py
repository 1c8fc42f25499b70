"""DAS (arXiv 2311.12091): a gate from deformable convolution that attends to salient places."""

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import DeformConv2d, deform_conv2d

from .record import Recorded, tell_gate

__all__ = ["DeformableGate"]


class _DeformableConv(DeformConv2d):
    """torchvision's layer, computed in float32 whatever the precision of its parameters and inputs."""

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        # torchvision has no bfloat16 kernel, and sums positions and offsets in the input's precision.
        return deform_conv2d(x.float(), offset.float(), self.weight.float(), padding=self.padding)


class DeformableGate(nn.Module):
    """Scale a map by a gate for every channel and position, whose receptive field moves with the content.

    A depthwise separable convolution compresses the channels, with instance norm and GELU (equation 1); a deformable
    3x3 convolution at predicted offsets restores them (equation 2); layer norm and sigmoid make the gate (equations 3
    and 4). Written from the paper: its authors released neither code nor weights that we could find. The layer norm is
    over the channels of each position, so that any map size fits. Offsets start at zero.

    The class is an attention layer of timm: ``timm.create_model("resnet18",
    block_args=dict(attn_layer=DeformableGate))``.

    Args:
        channels: Channels.
        ratio: Compressed channels over ``channels``.
        kernel_size: Width of the depthwise, the offset and the deformable convolution; odd.

    Shape:
        ``[B, channels, H, W]`` to ``[B, channels, H, W]``, any H and W with more than one position in the batch.

    Raises:
        ValueError: If the kernel is even.

    Example:
        >>> DeformableGate(64)(torch.randn(1, 64, 9, 14)).shape
        torch.Size([1, 64, 9, 14])
    """

    def __init__(self, channels: int, ratio: float = 0.2, kernel_size: int = 3, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd; got {kernel_size}")
        compressed = max(1, round(channels * ratio))
        self.padding = kernel_size // 2
        self.depthwise = nn.Conv2d(
            channels, channels, kernel_size, padding=self.padding, groups=channels, bias=False, **dd
        )
        self.pointwise = nn.Conv2d(channels, compressed, 1, bias=False, **dd)
        self.norm1 = nn.GroupNorm(compressed, compressed, **dd)
        self.act = nn.GELU()
        self.offset = nn.Conv2d(compressed, 2 * kernel_size**2, kernel_size, padding=self.padding, **dd)
        self.deformable = _DeformableConv(compressed, channels, kernel_size, padding=self.padding, bias=False).to(**dd)
        self.norm2 = LayerNorm2d(channels, eps=1e-5, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as a plain convolution: offsets of zero."""
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x`` ``[B, channels, H, W]``."""
        return x * self._gate(x)

    def _gate(self, x: Tensor) -> Tensor:
        compressed = self.act(self.norm1(self.pointwise(self.depthwise(x))))
        attended = self.deformable(compressed, self.offset(compressed))
        return torch.sigmoid(self.norm2(attended.to(x.dtype)))

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`."""
        return tell_gate(x, self._gate(x))
