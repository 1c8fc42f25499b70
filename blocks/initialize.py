"""How the linear layers of attention start."""

from timm.layers import trunc_normal_
from torch import nn


def init_linear(*layers: nn.Module) -> None:
    """Draw weights from a truncated normal of std 0.02, and let biases be zero; what is no linear layer is left alone.

    Mixture of heads takes the last layer out of the attention that it wraps.
    """
    for layer in layers:
        if isinstance(layer, nn.Linear):
            trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
