"""Attention U-Net's decoder (arXiv 1804.03999) on any backbone: gates choose what the skips pass on.

Written anew from the paper's equations; no weights were published, and no parity is claimed.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct
from torch import Tensor, nn

from ... import TaskError
from .fcn import classifier, init_convolutions
from .inference import resize_to


class AttentionGate(nn.Module):
    """Additive attention (eq. 1 and 2): a coarser map tells where a finer one counts.

    ``a = up(sigmoid(psi(relu(theta(x) + up(phi(g))))))``, one number a position, and the output ``BN(W(x * a))``.

    Args:
        channels: Channels of the finer map ``x``.
        gating_channels: Channels of the coarser map ``g``.
        inner: Channels in which the two are added.

    Shape:
        ``x`` ``[B, channels, H, W]`` and ``g`` ``[B, gating_channels, h, w]`` to ``[B, channels, H, W]``. The stride of
        2 is preceded by zeros at the bottom and right where H or W is odd.
    """

    def __init__(self, channels: int, gating_channels: int, inner: int):
        super().__init__()
        self.theta = nn.Conv2d(channels, inner, 2, stride=2, bias=False)
        self.phi = nn.Conv2d(gating_channels, inner, 1)
        self.psi = nn.Conv2d(inner, 1, 1)
        self.out = ConvNormAct(channels, channels, bias=True, apply_act=False)

    def forward(self, x: Tensor, gating: Tensor) -> Tensor:
        """Return the gated ``x``."""
        height, width = x.shape[-2:]
        seen = self.theta(F.pad(x, (0, width % 2, 0, height % 2)))
        scores = self.psi((seen + resize_to(self.phi(gating), seen.shape[-2:])).relu())
        return self.out(x * resize_to(scores.sigmoid(), (height, width)))


class AttentionUNetHead(nn.Module):
    """From the coarsest map to the finest: gate the next one, join it with what comes from below, convolve twice.

    Args:
        in_channels: Channels of each map of the backbone, from the finest to the coarsest.
        num_classes: Classes.
        channels: Channels at the finest scale; each coarser one has twice as many.
        dropout: Dropout rate, of whole channels, before the classifier.

    Shape:
        Maps ``[B, C_i, H_i, W_i]`` to logits ``[B, num_classes, H_0, W_0]``.

    Raises:
        TaskError: If there are fewer than two maps.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("channels", "dropout")

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int = 64, dropout: float = 0.1):
        super().__init__()
        if len(in_channels) < 2:
            raise TaskError(f"attention_unet joins several maps; the backbone has {len(in_channels)} alone")
        self.gates, self.convs = nn.ModuleList(), nn.ModuleList()
        below = in_channels[-1]
        for level in reversed(range(len(in_channels) - 1)):
            skip, width = in_channels[level], channels * 2**level
            self.gates.append(AttentionGate(skip, below, max(1, skip // 2)))
            self.convs.append(nn.Sequential(ConvNormAct(skip + below, width, 3), ConvNormAct(width, width, 3)))
            below = width
        self.dropout = nn.Dropout2d(dropout)
        init_convolutions(self)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map the backbone's features to logits at the scale of the finest."""
        *skips, x = features
        for skip, gate, convs in zip(reversed(skips), self.gates, self.convs, strict=True):
            x = convs(torch.cat([gate(skip, x), resize_to(x, skip.shape[-2:])], 1))
        return self.conv_seg(self.dropout(x))
