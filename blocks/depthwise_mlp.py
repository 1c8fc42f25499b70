"""PVTv2's MLP (arXiv 2106.13797), which convolves its hidden map."""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .depthwise import apply_depthwise
from .pieces import finish_by_pieces, may_take_pieces, sum_over_channels
from .pointwise import apply_linear

# Of the MLP's hidden map at a time, where it is computed in pieces.
_PIECE_BYTES = 8 * 2**20


class DepthwiseMlp(nn.Module):
    """PVTv2's MLP on maps: linear, depthwise 3x3, GELU, linear; NHWC.

    Its hidden map is the largest tensor of the model, up to 8 times its input, but no hidden channel and no image
    depends on another. Without gradients on the CPU it is therefore computed in pieces if it is large: images, or
    channels of an image, for which fresh memory costs less. With gradients it is kept once if it is large, before the
    convolution.

    Args:
        dim: Channels.
        hidden: Channels between the layers.
        drop: Dropout rate after either linear layer.

    Shape:
        ``[B, H, W, dim]`` to the same shape.

    Example:
        >>> DepthwiseMlp(16, 64)(torch.randn(1, 5, 7, 16)).shape
        torch.Size([1, 5, 7, 16])
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.act = nn.GELU()
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, dim]`` to the same shape."""
        if not torch.jit.is_scripting() and self._in_pieces(x):
            return self._forward_in_pieces(x)
        return self._feed_forward(x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            x = self.act(self.dwconv(self.fc1(x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
            return self.drop(self.fc2(self.drop(x)))
        x = apply_linear(self.fc1, x)
        out = finish_by_pieces(x, self.act, self.drop, self.fc2, self.dwconv)
        if out is not None:
            return out
        x = apply_depthwise(self.dwconv, x.permute(0, 3, 1, 2), self.act).permute(0, 2, 3, 1)
        return self.drop(apply_linear(self.fc2, self.drop(x)))

    @torch.jit.ignore
    def _in_pieces(self, x: Tensor) -> bool:
        if (self.training and self.drop.p > 0) or not may_take_pieces(
            x, self.fc1, self.dwconv, self.act, self.drop, self.fc2
        ):
            return False
        return x.shape[:3].numel() * self.fc1.out_features * x.element_size() >= 2 * _PIECE_BYTES

    @torch.jit.ignore
    def _forward_in_pieces(self, x: Tensor) -> Tensor:
        channel_bytes = x.shape[1] * x.shape[2] * x.element_size()
        image_bytes = channel_bytes * self.fc1.out_features
        if image_bytes < 2 * _PIECE_BYTES:
            images = max(1, _PIECE_BYTES // image_bytes)
            return torch.cat([self._feed_forward(part) for part in x.split(images)])
        layers = (self.fc1, self.dwconv, self.act, self.fc2)
        channels = max(16, _PIECE_BYTES // channel_bytes // 16 * 16)
        return torch.cat([sum_over_channels(y, *layers, channels) for y in x.split(1)])


register_notrace_module(DepthwiseMlp)
