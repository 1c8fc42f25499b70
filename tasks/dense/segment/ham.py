"""The heads of SegNeXt: Light-Ham (arXiv 2209.08575) and the older HamNet (arXiv 2109.04553).

Written anew after github.com/Visual-Attention-Network/SegNeXt and VAN-Segmentation (Apache-2.0), whose weights they
read, as they do those of mmseg.
"""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from timm.layers import ConvNormAct, GroupNormAct
from torch import Tensor, nn

from ....blocks.hamburger import Hamburger2d
from ... import TaskError
from .fcn import classifier, init_convolutions
from .inference import resize_to

# With a norm of 32 groups, eps 1e-5.
_group_conv = partial(ConvNormAct, norm_layer=GroupNormAct)


def _check_channels(channels: int) -> None:
    if channels % 32 or channels < 64:
        raise TaskError(f"the norms have 32 groups of 2 channels or more: channels=64, 96, 128, ...; got {channels}")


def _init(head: nn.Module) -> None:
    init_convolutions(head)
    for conv in (head.hamburger.ham_in, head.hamburger.ham_out):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(head.hamburger.ham_in.bias)


class LightHamHead(nn.Module):
    """SegNeXt's head: the three coarser maps at one scale, squeezed, through a `Hamburger2d`, aligned.

    Args:
        in_channels: Channels of each map of the backbone, from the finest to the coarsest; the finest isn't used.
        num_classes: Classes.
        channels: Channels of the head, a multiple of 32, at least 64: 256 for SegNeXt-T and S, 512 for B, 1024 for L.
        rank: Bases of the factorisation: by the authors 16 for T and S, 64 for B and L; 16 for all in mmseg.
        seed: Of the bases; see `Hamburger2d`.
        random_bases: Whether to draw new bases for each image while training, as published.
        one_step_gradient: Whether gradients flow through the last step of the factorisation alone.
        dropout: Dropout rate, of whole channels, before the classifier.
        ham_channels: Channels that are factorised, ``channels`` by default; 480 of 512 in the wide head on VAN-B0.

    Shape:
        Maps ``[B, C_i, H_i, W_i]`` to logits ``[B, num_classes, H_1, W_1]`` at the scale of the second.

    Raises:
        TaskError: If there are no such channels, or there are fewer than two maps.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = (
        "channels",
        "rank",
        "seed",
        "random_bases",
        "one_step_gradient",
        "dropout",
        "ham_channels",
    )

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 256,
        rank: int = 16,
        seed: int = 0,
        random_bases: bool = False,
        one_step_gradient: bool = False,
        dropout: float = 0.1,
        ham_channels: int | None = None,
    ):
        super().__init__()
        _check_channels(channels)
        if len(in_channels) < 2:
            raise TaskError(f"light_ham reads all maps but the finest; the backbone has {len(in_channels)} alone")
        self.squeeze = _group_conv(sum(in_channels[1:]), channels)
        self.hamburger = Hamburger2d(
            channels, rank, seed, random_bases, one_step_gradient=one_step_gradient, inner_dim=ham_channels
        )
        self.align = _group_conv(channels, channels)
        self.dropout = nn.Dropout2d(dropout)
        _init(self)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map the backbone's features to logits at the scale of the second."""
        size = features[1].shape[-2:]
        x = self.squeeze(torch.cat([resize_to(x, size) for x in features[1:]], 1))
        return self.conv_seg(self.dropout(self.align(self.hamburger(x))))


class HamNetHead(nn.Module):
    """HamNet's head: the coarsest map through 3x3 convolutions and a `Hamburger2d`, joined with the map itself.

    The published models have VAN at an output stride of 8, its setting ``"ham_net"``, and an auxiliary head.

    Args:
        in_channels: Channels of each map of the backbone.
        num_classes: Classes.
        channels: Channels of the head, a multiple of 32, at least 64.
        rank: Bases of the factorisation.
        seed: Of the bases; see `Hamburger2d`.
        random_bases: Whether to draw new bases for each image while training, as published.
        one_step_gradient: Whether gradients flow through the last step of the factorisation alone.
        dropout: Dropout rate, of whole channels, before the classifier.

    Shape:
        Maps ``[B, C_i, H_i, W_i]`` to logits ``[B, num_classes, H_n, W_n]`` at the scale of the coarsest.

    Raises:
        TaskError: If there are no such channels.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("channels", "rank", "seed", "random_bases", "one_step_gradient", "dropout")

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        rank: int = 64,
        seed: int = 0,
        random_bases: bool = False,
        one_step_gradient: bool = False,
        dropout: float = 0.1,
    ):
        super().__init__()
        _check_channels(channels)
        self.squeeze = _group_conv(in_channels[-1], channels, 3)
        self.hamburger = Hamburger2d(channels, rank, seed, random_bases, one_step_gradient=one_step_gradient)
        self.align = _group_conv(channels, channels, 3)
        self.join = _group_conv(in_channels[-1] + channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        _init(self)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map the backbone's features to logits at the scale of the coarsest."""
        x = self.align(self.hamburger(self.squeeze(features[-1])))
        return self.conv_seg(self.dropout(self.join(torch.cat([features[-1], x], 1))))


def convert_ham(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the entries of published Light-Ham and HamNet heads, below ``head.``, to ours; leave all others alone."""
    older = any(key.startswith("head.ham_in.") for key in state)
    if not older and not any(key.startswith("head.hamburger.") for key in state):
        return state
    converted = {}
    for key, value in state.items():
        if key.startswith(("head.", "aux_head.")):
            if older:
                key = key.replace("head.conv_cat.", "head.join.")
                for part in ("ham_in", "ham_out", "ham"):
                    key = key.replace(f"head.{part}.", f"head.hamburger.{part}.")
            key = key.replace(".hamburger.ham.", ".hamburger.").replace(".ham_in.conv.", ".ham_in.")
            key = key.replace(".ham_out.conv.", ".ham_out.").replace(".ham_out.gn.", ".norm.").replace(".gn.", ".bn.")
        converted[key] = value
    return converted
