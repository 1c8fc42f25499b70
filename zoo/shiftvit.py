"""ShiftViT: a pyramid of MLPs whose only exchange between positions is a shift of some channels by one of them.

Paper: When Shift Operation Meets Vision Transformer, Wang et al., AAAI 2022, arXiv 2201.10801.

Origin: github.com/microsoft/SPACH (MIT). Written anew on `blocks.Shift2d`; the published classifiers load through
`convert_checkpoint`. The shift replaces the map itself: also what the MLP is added to is shifted.

Norms are group norms of one group, whose statistics are those of a whole map, so that padding changes every value.
The paper's detectors and segmenters were never published; the dense form here is the output of each stage as it is.
"""

import re
from collections.abc import Sequence

import torch
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from ..blocks.plain import is_plain
from ..blocks.pointwise import apply_pointwise, for_pointwise
from ..blocks.pyramid import check_holds_patch
from ..blocks.shift import Shift2d
from ._build import IMAGENET_CFG, build, cfgs_with_links
from ._pyramid import Pyramid, Stage

__all__ = ["ShiftViT"]


class ConvMlp(nn.Module):
    """Two 1x1 convolutions around a GELU; NCHW."""

    def __init__(self, dim: int, hidden: int, drop: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(dim, hidden, 1, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x)) if torch.jit.is_scripting() else apply_pointwise(self.fc1, x, self.act)
        x = self.drop(x)
        return self.drop(self.fc2(x) if torch.jit.is_scripting() else apply_pointwise(self.fc2, x))


class Block(nn.Module):
    """A shift of the map, then an MLP after a norm, added to it; NCHW."""

    def __init__(self, dim: int, mlp_ratio: float, parts: int, drop: float, drop_path: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.shift = Shift2d(dim, parts, channels_first=True)
        self.norm2 = nn.GroupNorm(1, dim, **dd)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.shift(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stem(nn.Module):
    """Patches of 4x4, then a norm; what is left over at the bottom and right is cut off; NCHW."""

    def __init__(self, in_chans: int, dim: int, drop: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, dim, 4, stride=4, **dd)
        self.norm = nn.GroupNorm(1, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        check_holds_patch(x.shape[2], x.shape[3], 4)
        x = self.proj(x)
        if torch.jit.is_scripting():
            pass
        elif is_plain(self.proj):  # for the MLPs' sake
            x = for_pointwise(x)
        return self.drop(self.norm(x))


class Downsample(nn.Module):
    """A norm, then a 2x2 convolution of stride 2, which cuts off an odd row or column; NCHW."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.GroupNorm(1, dim, **dd)
        self.reduction = nn.Conv2d(dim, 2 * dim, 2, stride=2, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_holds_patch(x.shape[2], x.shape[3], 2)
        return self.reduction(self.norm(x))


class ShiftViT(Pyramid):
    """Four stages of shifts and MLPs on maps of 1/4 to 1/32 of the image.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` or ``""``.
        embed_dim: Channels of the first stage; each further stage has twice as many.
        depths: Blocks per stage.
        mlp_ratio: Hidden channels of the MLP over its input's.
        parts: Into how many groups the channels are divided, four of which are shifted.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after the stem and in the MLPs.
        drop_path_rate: Stochastic depth of the last block; blocks before it have proportionally less.

    Shape:
        Images ``[B, in_chans, H, W]`` of at least 32x32 pixels to logits ``[B, num_classes]``. Each stage cuts off what
        its patches don't cover.
    """

    output_fmt = "NCHW"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        mlp_ratio: float = 4.0,
        parts: int = 12,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        channels = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(channels):
            blocks = [Block(dim, mlp_ratio, parts, proj_drop_rate, drop_path, **dd) for drop_path in drop_paths[i]]
            stages.append(Stage(nn.Identity() if i == 0 else Downsample(dim // 2, **dd), blocks))
        super().__init__(
            Stem(in_chans, embed_dim, proj_drop_rate, **dd),
            stages,
            channels=channels,
            norm=nn.GroupNorm(1, channels[-1], **dd),
            head=ClassifierHead(channels[-1], num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise as published, convolutions and linear layers from a truncated normal of std 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()


def convert_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a published state dict to ``model``'s names; leaves our own names alone."""
    if any(key.startswith("stem.") for key in state):
        return dict(state)
    converted = {}
    for key, value in state.items():
        key = re.sub(r"^patch_embed\.", "stem.", key)
        key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", key)
        key = re.sub(r"^layers\.", "stages.", key)
        converted[re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)] = value
    return converted


_LIGHT_TINY = dict(embed_dim=96, depths=(2, 2, 6, 2), drop_path_rate=0.2)
_R4_TINY = dict(embed_dim=96, depths=(2, 2, 12, 3), drop_path_rate=0.2)
_R2_TINY = dict(embed_dim=96, depths=(6, 8, 18, 6), mlp_ratio=2.0, drop_path_rate=0.2)
_LIGHT_SMALL = dict(embed_dim=96, depths=(2, 2, 18, 2), drop_path_rate=0.4)
_R4_SMALL = dict(embed_dim=96, depths=(2, 6, 24, 4), drop_path_rate=0.4)
_R2_SMALL = dict(embed_dim=96, depths=(10, 18, 36, 10), mlp_ratio=2.0, drop_path_rate=0.4)
_LIGHT_BASE = dict(embed_dim=128, parts=16, depths=(2, 2, 18, 2), drop_path_rate=0.5)
_R4_BASE = dict(embed_dim=128, parts=16, depths=(4, 6, 22, 4), drop_path_rate=0.5)
_R2_BASE = dict(embed_dim=128, parts=16, depths=(10, 18, 36, 10), mlp_ratio=2.0, drop_path_rate=0.6)


def _shiftvit(name: str, pretrained: bool, options: dict, config: dict) -> ShiftViT:
    return build(ShiftViT, name, pretrained, convert_checkpoint, **{**config, **options})


def _cfg(**options) -> dict:
    return IMAGENET_CFG | {
        "first_conv": "stem.proj",
        "license": "mit",
        "origin_url": "https://github.com/microsoft/SPACH",
        "paper_ids": "arXiv:2201.10801",
        **options,
    }


default_cfgs = cfgs_with_links(
    {
        "shiftvit_light_tiny.msft_in1k": _cfg(),
        "shiftvit_r4_tiny.untrained": _cfg(),
        "shiftvit_r2_tiny.msft_in1k": _cfg(),
        "shiftvit_light_small.msft_in1k": _cfg(),
        "shiftvit_r4_small.untrained": _cfg(),
        "shiftvit_r2_small.msft_in1k": _cfg(),
        "shiftvit_light_base.untrained": _cfg(),
        "shiftvit_r4_base.untrained": _cfg(),
        "shiftvit_r2_base.untrained": _cfg(),
    }
)


@register_model
def shiftvit_light_tiny(pretrained: bool = False, **kwargs) -> ShiftViT:
    """ShiftViT-Tiny, light: 19.6 M parameters."""
    return _shiftvit("shiftvit_light_tiny", pretrained, kwargs, _LIGHT_TINY)


@register_model
def shiftvit_r4_tiny(pretrained: bool = False, **kwargs) -> ShiftViT:
    """ShiftViT-Tiny with MLPs of ratio 4: 31.4 M parameters; without published weights."""
    return _shiftvit("shiftvit_r4_tiny", pretrained, kwargs, _R4_TINY)


@register_model
def shiftvit_r2_tiny(pretrained: bool = False, **kwargs) -> ShiftViT:
    """ShiftViT-Tiny with MLPs of ratio 2, the paper's Shift-T: 28.6 M parameters."""
    return _shiftvit("shiftvit_r2_tiny", pretrained, kwargs, _R2_TINY)


@register_model
def shiftvit_light_small(pretrained: bool = False, **kwargs) -> ShiftViT:
    """ShiftViT-Small, light: 33.8 M parameters."""
    return _shiftvit("shiftvit_light_small", pretrained, kwargs, _LIGHT_SMALL)


@register_model
def shiftvit_r4_small(pretrained: bool = False, **kwargs) -> ShiftViT:
    """ShiftViT-Small with MLPs of ratio 4: 51.5 M parameters; without published weights."""
    return _shiftvit("shiftvit_r4_small", pretrained, kwargs, _R4_SMALL)


@register_model
def shiftvit_r2_small(pretrained: bool = False, **kwargs) -> ShiftViT:
    """ShiftViT-Small with MLPs of ratio 2, the paper's Shift-S: 50.3 M parameters."""
    return _shiftvit("shiftvit_r2_small", pretrained, kwargs, _R2_SMALL)


@register_model
def shiftvit_light_base(pretrained: bool = False, **kwargs) -> ShiftViT:
    """ShiftViT-Base, light: 59.7 M parameters; without published weights."""
    return _shiftvit("shiftvit_light_base", pretrained, kwargs, _LIGHT_BASE)


@register_model
def shiftvit_r4_base(pretrained: bool = False, **kwargs) -> ShiftViT:
    """ShiftViT-Base with MLPs of ratio 4: 87.3 M parameters; without published weights."""
    return _shiftvit("shiftvit_r4_base", pretrained, kwargs, _R4_BASE)


@register_model
def shiftvit_r2_base(pretrained: bool = False, **kwargs) -> ShiftViT:
    """ShiftViT-Base with MLPs of ratio 2, the paper's Shift-B: 89.0 M parameters; without published weights."""
    return _shiftvit("shiftvit_r2_base", pretrained, kwargs, _R2_BASE)
