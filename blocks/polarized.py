"""Polarized self-attention (arXiv 2107.00782): channel and spatial gates that keep full resolution where they gate."""

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from .record import Recorded, tell_gate

__all__ = ["PolarizedAttention"]


class PolarizedAttention(nn.Module):
    """Scale a map by a gate per channel and a gate per position, in parallel (and added) or in sequence.

    The channel gate pools ``channels / 2`` values over the positions by a softmax; the spatial gate compares the pooled
    half of the channels with those of each position. Parameter names are the authors' (github.com/DeLightCMU/PSA), and
    so are two differences between their layouts: in sequence the channel gate has an MLP with a norm, and the softmax
    of the spatial gate is over the positions of each channel before they are weighted; in parallel it comes after.

    The class is an attention layer of timm: ``timm.create_model("resnet18",
    block_args=dict(attn_layer=PolarizedAttention))``.

    Args:
        channels: Channels; even, and a multiple of 8 in sequence.
        layout: ``"parallel"`` or ``"sequential"``.

    Shape:
        ``[B, channels, H, W]`` to ``[B, channels, H, W]``, any H and W.

    Raises:
        ValueError: If the layout is unknown or the channels don't divide.

    Example:
        >>> PolarizedAttention(64, layout="sequential")(torch.randn(1, 64, 9, 14)).shape
        torch.Size([1, 64, 9, 14])
    """

    def __init__(self, channels: int, layout: str = "parallel", device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if layout not in ("parallel", "sequential"):
            raise ValueError(f"layout must be 'parallel' or 'sequential'; got {layout!r}")
        self.sequential = layout == "sequential"
        divisor = 8 if self.sequential else 2
        if channels % divisor:
            raise ValueError(f"{layout} polarized attention needs a multiple of {divisor} channels; got {channels}")
        half = channels // 2
        self.conv_q_right = nn.Conv2d(channels, 1, 1, bias=False, **dd)
        self.conv_v_right = nn.Conv2d(channels, half, 1, bias=False, **dd)
        if self.sequential:
            self.conv_up = nn.Sequential(
                nn.Conv2d(half, half // 4, 1, **dd),
                LayerNorm2d(half // 4, eps=1e-5, **dd),
                nn.ReLU(),
                nn.Conv2d(half // 4, channels, 1, **dd),
            )
            self.register_load_state_dict_pre_hook(_flatten_norm)
        else:
            self.conv_up = nn.Conv2d(half, channels, 1, bias=False, **dd)
        self.conv_q_left = nn.Conv2d(channels, half, 1, bias=False, **dd)
        self.conv_v_left = nn.Conv2d(channels, half, 1, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise queries and values as published: normal, He's scale by the inputs."""
        for layer in (self.conv_q_right, self.conv_v_right, self.conv_q_left, self.conv_v_left):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")

    def _channel_gate(self, x: Tensor) -> Tensor:
        weights = self.conv_q_right(x).flatten(2).softmax(2)
        pooled = self.conv_v_right(x).flatten(2) @ weights.transpose(1, 2)
        return torch.sigmoid(self.conv_up(pooled.unsqueeze(3)))

    def _spatial_gate(self, x: Tensor) -> Tensor:
        # The mean of the projected map is the projection of the mean.
        query = self.conv_q_left(x.mean((2, 3), keepdim=True)).flatten(2).transpose(1, 2)
        keys = self.conv_v_left(x).flatten(2)
        scores = query @ keys.softmax(2) if self.sequential else (query @ keys).softmax(2)
        return torch.sigmoid(scores).unflatten(2, (x.shape[2], x.shape[3]))

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x`` ``[B, channels, H, W]``."""
        if self.sequential:
            x = x * self._channel_gate(x)
            return x * self._spatial_gate(x)
        return x * self._channel_gate(x) + x * self._spatial_gate(x)

    @torch.jit.ignore
    def recorded(self, x: Tensor) -> Recorded:
        """Tell what a call with ``x`` did; see `blocks.record`."""
        channel = self._channel_gate(x)
        gate = channel * self._spatial_gate(x * channel) if self.sequential else channel + self._spatial_gate(x)
        return tell_gate(x, gate)


def _flatten_norm(module: PolarizedAttention, state: dict[str, Tensor], prefix: str, *_) -> None:
    """Give the authors' norm weights, ``[channels, 1, 1]``, the shape of ours, in place."""
    for key in (f"{prefix}conv_up.1.weight", f"{prefix}conv_up.1.bias"):
        if key in state:
            state[key] = state[key].flatten()
