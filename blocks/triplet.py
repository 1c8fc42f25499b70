"""Triplet attention (arXiv 2010.03045): gates over each pair of channel, height and width."""

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn

from .published_names import rename_entries
from .record import Recorded, tell_gate

__all__ = ["TripletAttention"]

# From the names in the authors' networks to those of their module.
_AUTHORS_NAMES = {
    "ChannelGateH.spatial.": "cw.conv.",
    "ChannelGateW.spatial.": "hc.conv.",
    "SpatialGate.spatial.": "hw.conv.",
}


class _Gate(nn.Module):
    """Gate over two axes of ``[B, Z, Y, X]`` from the maximum and the mean over Z."""

    def __init__(self, kernel_size: int, device=None, dtype=None):
        super().__init__()
        self.conv = ConvNormAct(2, 1, kernel_size, apply_act=False, device=device, dtype=dtype)
        self.conv.bn.momentum = 0.01

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], dim=1)
        return torch.sigmoid(self.conv(pooled))


class TripletAttention(nn.Module):
    """Scale a map by the mean of three gates: over channel and width, over height and channel, over height and width.

    Each gate is a 7x7 convolution with batch norm of the maximum and the mean over the third axis; 300 parameters in
    all, whatever the channels. Parameter names are those of the authors' module (github.com/landskape-ai/
    triplet-attention); ``load_state_dict`` also reads those of their networks, where the gates are called otherwise.

    The class is an attention layer of timm: ``timm.create_model("resnet18",
    block_args=dict(attn_layer=TripletAttention))``.

    Args:
        channels: Channels; for timm's sake, the parameters do not depend on it.
        spatial: Whether there is a gate over height and width.
        kernel_size: Width of the convolutions.

    Shape:
        ``[B, channels, H, W]`` to ``[B, channels, H, W]``, any H and W.

    Example:
        >>> TripletAttention(64)(torch.randn(1, 64, 9, 14)).shape
        torch.Size([1, 64, 9, 14])
    """

    def __init__(self, channels: int, spatial: bool = True, kernel_size: int = 7, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cw = _Gate(kernel_size, **dd)
        self.hc = _Gate(kernel_size, **dd)
        self.hw = _Gate(kernel_size, **dd) if spatial else None
        self.register_load_state_dict_pre_hook(_from_authors)

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x`` ``[B, channels, H, W]``."""
        return x * self._gate(x)

    def _gate(self, x: Tensor) -> Tensor:
        over_channel_width = self.cw(x.transpose(1, 2)).transpose(1, 2)
        over_height_channel = self.hc(x.transpose(1, 3)).transpose(1, 3)
        if self.hw is None:
            return (over_channel_width + over_height_channel) / 2
        return (over_channel_width + over_height_channel + self.hw(x)) / 3

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`."""
        return tell_gate(x, self._gate(x))


def _from_authors(module: TripletAttention, state: dict[str, Tensor], prefix: str, *_) -> None:
    read_authors_names(state, prefix)


def read_authors_names(state: dict[str, Tensor], prefix: str) -> None:
    """Rename, in place, what the gates under ``prefix`` are called in the authors' networks."""
    rename_entries(state, prefix, _AUTHORS_NAMES)
