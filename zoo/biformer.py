"""BiFormer: hierarchical vision transformers with bi-level routing attention.

Paper: BiFormer: Vision Transformer with Bi-Level Routing Attention, CVPR 2023, arXiv 2303.08810.

Origin: github.com/rayleizhu/BiFormer, branch public_release, code MIT. Written anew on
`blocks.BiLevelRoutingAttention2d`; the authors' classification and dense checkpoints load through
`convert_checkpoint`. Their download links are dead, so no weights are fetched: give the file you have as
``pretrained_cfg_overlay=dict(file=path)``.

The last stage attends globally, with eight heads at any width and LePE of the attention's input, as the published
weights need it. The two STL models keep Swin-T's layout and are different functions, whose checkpoints are not
interchangeable: biformer_stl_nchw cuts maps otherwise (``ragged``) and takes LePE from the values in the last stage.

Image sizes: any from 32 pixels, where the paper's code wanted multiples of 112. What is ours of that:

* tiny, small, base: always pad as the published ``auto_pad=True`` does, at the sizes that failed without it.
* biformer_stl: its code had no padding at all; it pads by the same rule.
* biformer_stl_nchw: follows the published rule from 112 pixels on; below, where that code failed, a region has one
  token on the short axis, and a map with fewer than ``topk`` regions uses all of them.
* the STL models drop the last rows and columns of images that their patches don't divide, as published.

``n_win`` is no part of the weights: 7 for classification, 8 for segmentation, 16 for detection, as the dense settings
say.
"""

import re
from collections.abc import Sequence

import torch
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm2d,
    calculate_drop_path_rates,
)
from timm.models import register_model
from torch import Tensor, nn

from ..blocks.depthwise import apply_depthwise
from ..blocks.initialize import init_linear
from ..blocks.layout import channels_last
from ..blocks.pointwise import PointwiseMlp
from ..blocks.pyramid import BatchNormDownsample, BatchNormStem
from ..blocks.routing import BiLevelRoutingAttention2d, LePEAttention2d
from ._build import IMAGENET_CFG, build, cfgs_with_links
from ._pyramid import Pyramid, Stage

__all__ = ["BiFormer"]


class PatchStem(nn.Module):
    """Patches of 4, then a norm; NCHW."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, dim, 4, stride=4, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, in_chans, H, W]`` to ``[B, dim, H // 4, W // 4]``, channels last in memory."""
        return self.norm(self.proj(channels_last(x)))


class PatchDownsample(nn.Module):
    """A norm, then patches of 2; NCHW."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.conv = nn.Conv2d(dim, out_dim, 2, stride=2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, dim, H, W]`` to ``[B, out_dim, H // 2, W // 2]``."""
        return self.conv(self.norm(x))


class Block(nn.Module):
    """Transformer block, after an optional residual 3x3 depthwise convolution that tells positions; NCHW."""

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp_ratio: float,
        pos_conv: bool,
        drop_path: float,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pos_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if pos_conv else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attention
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = PointwiseMlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, dim, H, W]`` to the same shape; channels last in memory if they were so."""
        if self.pos_conv is not None:
            x = x + self.pos_conv(x) if torch.jit.is_scripting() else apply_depthwise(self.pos_conv, x, residual=True)
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class BiFormer(Pyramid):
    """Four stages on maps of 1/4 to 1/32 of the image: three of bi-level routing attention, the last one global.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` or ``""``.
        embed_dim: Channels of the first stage; each further stage has twice as many.
        depths: Blocks per stage.
        head_dim: Channels of a head in routed stages.
        global_heads: Heads in global stages.
        n_win: Regions along each axis of a map.
        topks: Regions that each region attends to, per stage; None for global attention.
        mlp_ratio: Hidden channels of the MLP over its input's.
        stl: Whether the layout is Swin-T's: patches instead of convolutions, no convolution before the attention.
        ragged: Whether maps are cut and padded as in biformer_stl_nchw; see `blocks.BiLevelRoutingAttention2d`.
        global_lepe: What LePE sees in global stages, ``"input"`` or ``"value"``.
        conv_linear: Whether the blocks' linear layers were published as 1x1 convolutions: checkpoints have them in that
            shape, and they start from torch's default instead of a normal of std 0.02.
        out_norms: Whether each stage's output gets a norm, as in the published dense models; then ``forward_features``
            ends with the last of them instead of the classifier's norm.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; blocks before it have proportionally less.

    Shape:
        Images ``[B, in_chans, H, W]`` of any size from 32 pixels to logits ``[B, num_classes]``.

    Raises:
        ValueError: If ``topks`` does not name a number or None for every stage.
    """

    output_fmt = "NCHW"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (4, 4, 18, 4),
        head_dim: int = 32,
        global_heads: int = 8,
        n_win: int = 7,
        topks: Sequence[int | None] = (1, 4, 16, None),
        mlp_ratio: float = 3.0,
        stl: bool = False,
        ragged: bool = False,
        global_lepe: str = "input",
        conv_linear: bool = False,
        out_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        if len(topks) != len(depths):
            raise ValueError(
                f"topks must name a number of regions, or None, for each of {len(depths)} stages; got {list(topks)}"
            )
        channels = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        def attention(dim: int, topk: int | None) -> nn.Module:
            if topk is None:
                return LePEAttention2d(dim, global_heads, global_lepe, **dd)
            return BiLevelRoutingAttention2d(dim, dim // head_dim, n_win, topk, ragged, **dd)

        downsample = PatchDownsample if stl else BatchNormDownsample
        stages = []
        for i, (dim, topk) in enumerate(zip(channels, topks, strict=True)):
            blocks = [
                Block(dim, attention(dim, topk), mlp_ratio, not stl, drop_path, **dd) for drop_path in drop_paths[i]
            ]
            shrink = nn.Identity() if i == 0 else downsample(dim // 2, dim, **dd)
            stages.append(Stage(shrink, blocks))
        super().__init__(
            (PatchStem if stl else BatchNormStem)(in_chans, embed_dim, **dd),
            stages,
            channels=channels,
            norm=nn.BatchNorm2d(channels[-1], **dd),
            out_norms=[LayerNorm2d(dim, eps=1e-6, **dd) for dim in channels] if out_norms else None,
            head=ClassifierHead(channels[-1], num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
        )
        self.conv_linear = conv_linear
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise as published; may be called again, after ``to_empty`` for instance."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not (self.conv_linear and name.startswith("stages.")):
                init_linear(module)
            elif isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)):
                module.reset_parameters()


def convert_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a published state dict to ``model``'s names.

    Reads the authors' classification and dense files; leaves our own names alone. A file of one STL model keeps its
    names when ``model`` is the other one, and so does not fit: the two are different functions.
    """
    if any(key.startswith("stem.") for key in state):
        return dict(state)
    return dict(_renamed(key, value, model) for key, value in state.items())


# Of `Block`, per published class: BiFormer, BiFormerSTL, nchwBiFormerSTL.
_NAMES = {
    "main": (("pos_embed", "pos_conv"), ("attn.qkv.qkv", "attn.qkv"), ("attn.wo", "attn.proj"), ("mlp.3", "mlp.fc2")),
    "stl": (("attn.qkv.qkv", "attn.qkv"), ("attn.wo", "attn.proj"), ("mlp.2", "mlp.fc2")),
    "stl_nchw": (("attn.qkv_linear", "attn.qkv"), ("attn.output_linear", "attn.proj"), ("mlp.2", "mlp.fc2")),
}


def _renamed(key: str, value: Tensor, model: nn.Module) -> tuple[str, Tensor]:
    stl = isinstance(model.stem, PatchStem)
    nchw = stl and model.conv_linear
    stem = ("proj", "norm") if stl else ("conv1", "norm1", "act", "conv2", "norm2")
    shrink = ("norm", "conv") if stl else ("conv", "norm")
    if match := re.fullmatch(r"downsample_layers\.(\d)\.(\d)\.(\w+)", key):
        i, j, leaf = int(match[1]), int(match[2]), match[3]
        names = stem if i == 0 else shrink
        if j < len(names):
            key = f"stem.{names[j]}.{leaf}" if i == 0 else f"stages.{i}.downsample.{names[j]}.{leaf}"
    elif match := re.fullmatch(r"stages\.(\d)\.(blocks\.)?(\d+)\.(.+)\.(\w+)", key):
        i, blocks, j, layer, leaf = match.groups()
        if bool(blocks) == stl:
            names = dict(_NAMES["stl_nchw" if nchw else "stl" if stl else "main"]) | {"mlp.0": "mlp.fc1"}
            key = f"stages.{i}.blocks.{j}.{names.get(layer, layer)}.{leaf}"
            if nchw and value.ndim == 4 and value.shape[2:] == (1, 1):
                value = value[:, :, 0, 0]
    key = re.sub(r"^extra_norms\.", "out_norms.", key)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key), value


_TINY = dict(embed_dim=64, depths=(2, 2, 8, 2), drop_path_rate=0.1)
_SMALL = dict(embed_dim=64, depths=(4, 4, 18, 4), drop_path_rate=0.15)
_BASE = dict(embed_dim=96, depths=(4, 4, 18, 4), drop_path_rate=0.4)
_STL = dict(embed_dim=96, depths=(2, 2, 6, 2), mlp_ratio=4.0, stl=True, drop_path_rate=0.1)
_STL_NCHW = dict(**_STL, ragged=True, global_lepe="value", conv_linear=True)


def _biformer(name: str, pretrained: bool, options: dict, config: dict) -> BiFormer:
    return build(BiFormer, name, pretrained, convert_checkpoint, **{**config, **options})


def _dense(n_win: int, drop_path_rate: float) -> dict:
    return {"out_norms": True, "n_win": n_win, "drop_path_rate": drop_path_rate}


# What the published dense models of the family do otherwise, for `head_options_of`: mmdet until 2.18 chose
# candidates of RetinaNet by anchors, and the segmenters' images are stretched.
head_options = {"biformer_*": {"retinanet": {"selection": "anchors"}, "images": {"divisor": 32}}}
# The published dense settings, for `create_backbone(name, setting=...)`. Detection is Mask R-CNN and RetinaNet,
# segmentation is Semantic FPN.
dense_settings: dict[str, dict[str, dict]] = {
    "biformer_small": {
        "detection": _dense(16, 0.2),
        "segmentation": _dense(8, 0.15),
        "upernet": _dense(8, 0.3),
    },
    "biformer_base": {
        "detection": _dense(16, 0.3),
        "segmentation": _dense(8, 0.3),
        "upernet": _dense(8, 0.4),
    },
}


def _cfg(**options) -> dict:
    return IMAGENET_CFG | {
        "first_conv": "stem.conv1",
        "license": "mit",
        "origin_url": "https://github.com/rayleizhu/BiFormer",
        "paper_name": "BiFormer: Vision Transformer with Bi-Level Routing Attention",
        "paper_ids": "arXiv:2303.08810",
        **options,
    }


default_cfgs = cfgs_with_links(
    {
        "biformer_tiny.rayleizhu_in1k": _cfg(),
        "biformer_small.rayleizhu_in1k": _cfg(),
        "biformer_base.rayleizhu_in1k": _cfg(),
        "biformer_stl.rayleizhu_in1k": _cfg(first_conv="stem.proj"),
        "biformer_stl_nchw.rayleizhu_in1k": _cfg(first_conv="stem.proj"),
    }
)


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-T."""
    return _biformer("biformer_tiny", pretrained, kwargs, _TINY)


@register_model
def biformer_small(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-S."""
    return _biformer("biformer_small", pretrained, kwargs, _SMALL)


@register_model
def biformer_base(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-B."""
    return _biformer("biformer_base", pretrained, kwargs, _BASE)


@register_model
def biformer_stl(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-STL: bi-level routing attention in Swin-T's layout."""
    return _biformer("biformer_stl", pretrained, kwargs, _STL)


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-STL on the NCHW operator, which treats ragged maps differently and takes LePE from the values."""
    return _biformer("biformer_stl_nchw", pretrained, kwargs, _STL_NCHW)
