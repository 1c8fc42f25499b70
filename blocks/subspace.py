"""ULSAM (arXiv 2006.15102, WACV 2020): a softmax over the positions of each group of channels."""

import torch
from torch import Tensor, nn

from .record import Recorded, tell_gate

__all__ = ["SubspaceAttention"]


class _Subspace(nn.Module):
    """The weights of a group's positions."""

    def __init__(self, channels: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv_dws = nn.Conv2d(channels, channels, 1, groups=channels, **dd)
        self.bn_dws = nn.BatchNorm2d(channels, momentum=0.9, **dd)
        self.maxpool = nn.MaxPool2d(3, stride=1, padding=1)
        self.conv_point = nn.Conv2d(channels, 1, 1, **dd)
        self.bn_point = nn.BatchNorm2d(1, momentum=0.9, **dd)

    def forward(self, x: Tensor) -> Tensor:
        out = self.maxpool(self.bn_dws(self.conv_dws(x)).relu())
        scores = self.bn_point(self.conv_point(out)).relu()
        return scores.flatten(2).softmax(2).view_as(scores)


class SubspaceAttention(nn.Module):
    """Add to each group of channels its positions weighted by a softmax over all of them.

    A group's weights are one map: a scale and bias per channel, batch norm, ReLU, 3x3 maximum, 1x1 convolution to one
    channel, batch norm, ReLU, softmax over the positions; ``x + x * weights``. Parameter names are the authors'
    (github.com/Nandan91/ULSAM, which states no license; written anew).

    The class is an attention layer of timm: ``timm.create_model("resnet18",
    block_args=dict(attn_layer=SubspaceAttention))``.

    Args:
        channels: Channels.
        num_splits: Groups; must divide ``channels``.

    Shape:
        ``[B, channels, H, W]`` to ``[B, channels, H, W]``, any H and W.

    Raises:
        ValueError: If the groups don't divide the channels.

    Example:
        >>> SubspaceAttention(64)(torch.randn(1, 64, 9, 14)).shape
        torch.Size([1, 64, 9, 14])
    """

    def __init__(self, channels: int, num_splits: int = 4, device=None, dtype=None):
        super().__init__()
        if num_splits < 1 or channels % num_splits:
            raise ValueError(f"num_splits must divide the channels; got {channels} channels, {num_splits} splits")
        self.subspaces = nn.ModuleList(
            _Subspace(channels // num_splits, device=device, dtype=dtype) for _ in range(num_splits)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Weigh ``x`` ``[B, channels, H, W]``."""
        return x * self._gate(x)

    def _gate(self, x: Tensor) -> Tensor:
        groups = x.chunk(len(self.subspaces), 1)
        gates = []
        # TorchScript and fx take neither zip nor a loop over the groups.
        for index, space in enumerate(self.subspaces):
            gates.append(space(groups[index]).expand_as(groups[index]))
        return torch.cat(gates, 1) + 1

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`."""
        return tell_gate(x, self._gate(x))
