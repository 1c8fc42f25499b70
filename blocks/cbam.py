"""CBAM (arXiv 1807.06521): gates for channels, then for positions."""

import torch
from timm.layers.cbam import CbamModule
from torch import Tensor

from .published_names import rename_entries
from .record import Recorded, tell_gate

__all__ = ["CBAM"]

# From the authors' names to timm's.
_AUTHORS_NAMES = {
    "ChannelGate.mlp.1.": "channel.fc1.",
    "ChannelGate.mlp.3.": "channel.fc2.",
    "SpatialGate.spatial.conv.": "spatial.conv.conv.",
    "SpatialGate.spatial.bn.": "spatial.conv.bn.",
}


class CBAM(CbamModule):
    """timm's CBAM with the authors' settings: biases in the MLP, ``channels // reduction`` hidden channels.

    Loads the authors' weights (github.com/Jongchan/attention-module) as well as its own: ``load_state_dict`` renames
    them, turns the linear layers into 1x1 convolutions, and exchanges the two inputs of the spatial convolution, which
    are maximum and mean there, mean and maximum in timm.

    The class is an attention layer of timm: ``timm.create_model("resnet18", block_args=dict(attn_layer=CBAM))``.

    Args:
        channels: Channels.
        reduction: Channels over hidden channels of the MLP.
        spatial_kernel_size: Width of the spatial convolution.

    Shape:
        ``[B, channels, H, W]`` to ``[B, channels, H, W]``, any H and W.

    Example:
        >>> CBAM(64)(torch.randn(1, 64, 9, 14)).shape
        torch.Size([1, 64, 9, 14])
    """

    def __init__(self, channels: int, reduction: int = 16, spatial_kernel_size: int = 7, device=None, dtype=None):
        super().__init__(
            channels,
            rd_channels=max(1, channels // reduction),
            spatial_kernel_size=spatial_kernel_size,
            mlp_bias=True,
            device=device,
            dtype=dtype,
        )
        self.spatial.conv.bn.momentum = 0.01
        self.register_load_state_dict_pre_hook(_from_authors)

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`."""
        return tell_gate(x, gate_of(self, x))


def gate_of(module: CbamModule, x: Tensor) -> Tensor:
    """Return what timm's CBAM multiplies ``x`` ``[B, C, H, W]`` by; its parts return what they gated."""
    channel, spatial = module.channel, module.spatial
    pooled = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    gate = channel.gate(sum(channel.fc2(channel.act(channel.fc1(part))) for part in pooled))
    gated = x * gate
    pooled = torch.cat([gated.mean(1, keepdim=True), gated.amax(1, keepdim=True)], 1)
    return gate * spatial.gate(spatial.conv(pooled))


def _from_authors(module: CBAM, state: dict[str, Tensor], prefix: str, *_) -> None:
    read_authors_names(state, prefix)


def read_authors_names(state: dict[str, Tensor], prefix: str) -> None:
    """Rename, in place, what the authors' CBAM has under ``prefix``."""
    for key in rename_entries(state, prefix, _AUTHORS_NAMES):
        name = key.removeprefix(prefix)
        if name.startswith("channel.") and name.endswith(".weight"):
            state[key] = state[key][:, :, None, None]
        elif name.startswith("spatial.conv.conv."):
            state[key] = torch.flip(state[key], dims=(1,))
