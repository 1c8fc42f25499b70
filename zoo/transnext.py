"""TransNeXt: a pyramid whose attention sees a window and a pooled map at once; MoH-ViT: with heads chosen by position.

Papers: TransNeXt: Robust Foveal Visual Perception for Vision Transformers, Shi, CVPR 2024, arXiv 2311.17132. MoH:
Multi-Head Attention as Mixture-of-Head Attention, Jin et al., arXiv 2410.11842.

Origin: github.com/DaiShiResearch/TransNeXt (Apache-2.0) and github.com/SkyworkAI/MoH, folder MoH-ViT (Apache-2.0).
Written anew on `blocks.AggregatedAttention2d` and `blocks.MixtureOfHeads2d`; the authors' classifiers, and the
backbones of their detectors and segmenters, load through `convert_checkpoint`.

Nothing in the weights depends on the image size. The bias by position is computed from distances in units of the
training images (``pretrain_size``), so that images of any size are taken, also such as are no multiple of 32, which the
published classifiers refused. The published dense models resize the bias of square images instead (``interpolate``).
"""

import re
from collections.abc import Sequence
from typing import Final

import torch
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, register_notrace_module
from timm.models import register_model
from torch import Tensor, nn

from ..blocks.aggregated import AggregatedAttention2d, UnitGlobalAttention2d
from ..blocks.depthwise import apply_depthwise
from ..blocks.initialize import init_linear
from ..blocks.mixture_of_heads import HeadRouter, MixtureOfHeads2d
from ..blocks.pieces import may_take_pieces, sum_over_channels
from ..blocks.pointwise import apply_linear
from ._build import IMAGENET_CFG, build, cfgs_with_links
from ._pyramid import Pyramid, Stage

__all__ = ["TransNeXt"]

_STRIDES = (4, 8, 16, 32)
# Of the hidden channels at a time, where they are computed in pieces: about a core's second-level cache.
_PIECE_BYTES = 2 * 2**20


class PatchEmbed(nn.Module):
    """Overlapping convolution, then a norm; from NCHW images or NHWC maps to NHWC maps."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, from_images: bool, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.from_images = from_images
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, kernel // 2, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x if self.from_images else x.permute(0, 3, 1, 2))
        return self.norm(x.permute(0, 2, 3, 1))


@register_notrace_module
class ConvGlu(nn.Module):
    """MLP whose gate is one half of its hidden channels after a 3x3 depthwise convolution; NHWC."""

    def __init__(self, dim: int, hidden: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, 2 * hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self._in_pieces(x):
            return self._forward_in_pieces(x)
        x = self.fc1(x) if torch.jit.is_scripting() else apply_linear(self.fc1, x)
        gate, value = x.chunk(2, -1)
        gate = gate.permute(0, 3, 1, 2)
        gate = self.act(self.dwconv(gate)) if torch.jit.is_scripting() else apply_depthwise(self.dwconv, gate, self.act)
        x = gate.permute(0, 2, 3, 1) * value
        return self.fc2(x) if torch.jit.is_scripting() else apply_linear(self.fc2, x)

    @torch.jit.ignore
    def _in_pieces(self, x: Tensor) -> bool:
        layers = (self.fc1, self.dwconv, self.act, self.fc2)
        return may_take_pieces(x, *layers) and not torch.is_autocast_enabled("cpu")

    @torch.jit.ignore
    def _forward_in_pieces(self, x: Tensor) -> Tensor:
        """Compute some images and hidden channels at a time: they stay in the cache."""
        layers = (self.fc1, self.dwconv, self.act, self.fc2)
        hidden = self.fc2.in_features
        channel_bytes = x.shape[1] * x.shape[2] * x.element_size()
        channels = max(16, _PIECE_BYTES // channel_bytes // 16 * 16)
        images = max(1, _PIECE_BYTES // (channel_bytes * hidden))
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for part, written in zip(x.split(images), out.split(images), strict=True):
            written.copy_(sum_over_channels(part, *layers, channels, gated=True))
        return out


class Block(nn.Module):
    """Pre-norm transformer block; NHWC."""

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float, drop_path: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attention
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ConvGlu(dim, int(2 * int(dim * mlp_ratio) / 3), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class TransNeXt(Pyramid):
    """Four stages on maps of 1/4 to 1/32 of the image: aggregated attention, and global attention where none is pooled.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` or ``""``.
        img_size: Side of the images; counts only as default of ``pretrain_size``, and for ``interpolate``.
        pretrain_size: Side of the images that the weights were trained on; ``img_size`` by default.
        fixed_pool_size: Side of the pooled maps, for a cost linear in the pixels ("linear mode"); by default it grows
            with the map, as ``sr_ratios`` say. Must be smaller than the maps of stages that pool.
        interpolate: Whether the bias by position is that of images of ``img_size``, resized, as in the published
            detectors and segmenters, instead of computed anew for each size.
        embed_dim: Channels of the first stage; each further stage has twice as many.
        depths: Blocks per stage.
        head_dim: Channels of a head.
        mlp_ratios: Per stage, 1.5 times the hidden channels of the MLP over its input's.
        sr_ratios: Per stage, positions along an axis for one of the pooled map; 1 for global attention.
        window_size: Odd side of the windows.
        shared_heads: Per stage, heads that every position uses, for a mixture of heads (MoH); none by default.
        routed_heads: Per stage, heads that each position chooses of the others; with ``shared_heads``.
        balance_loss: Factor on the mean of the routers' balance losses, which the model reports while it trains; see
            `blocks.losses`.
        qkv_bias: Whether the projections to queries, keys and values have biases.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after the attention's projection.
        drop_path_rate: Stochastic depth of the last block; blocks before it have proportionally less.

    Shape:
        Images ``[B, in_chans, H, W]`` of any size to logits ``[B, num_classes]``.

    Raises:
        ValueError: If the settings don't fit each other, or an image ``fixed_pool_size``.
    """

    symbolic_size: Final[bool] = False

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int = 224,
        pretrain_size: int | None = None,
        fixed_pool_size: int | None = None,
        interpolate: bool = False,
        embed_dim: int = 48,
        depths: Sequence[int] = (2, 2, 15, 2),
        head_dim: int = 24,
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        window_size: int = 3,
        shared_heads: Sequence[int] | None = None,
        routed_heads: Sequence[int] | None = None,
        balance_loss: float = 0.01,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        if (shared_heads is None) != (routed_heads is None):
            raise ValueError("a mixture of heads needs both shared_heads and routed_heads, or neither")
        if interpolate and fixed_pool_size is not None:
            raise ValueError("interpolate resizes the bias of maps that grow with the image: leave fixed_pool_size out")
        channels = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        pretrain_size = pretrain_size or img_size
        routers = sum(depth for depth, routed in zip(depths, routed_heads or (), strict=False) if routed)
        balance_weight = balance_loss / max(routers, 1)

        def attention(i: int) -> nn.Module:
            heads = channels[i] // head_dim
            options = {
                "pretrain_size": max(1, pretrain_size // _STRIDES[i]),
                "trained_size": max(1, img_size // _STRIDES[i]) if interpolate else None,
                "qkv_bias": qkv_bias,
                "proj_drop": proj_drop_rate,
                **dd,
            }
            if sr_ratios[i] == 1:
                module = UnitGlobalAttention2d(channels[i], heads, **options)
            else:
                module = AggregatedAttention2d(
                    channels[i], heads, window_size, sr_ratios[i], fixed_pool_size, **options
                )
            if shared_heads is None:
                return module
            return MixtureOfHeads2d(module, heads, shared_heads[i], routed_heads[i], balance_weight, **dd)

        stages = []
        for i, dim in enumerate(channels):
            shrink = nn.Identity() if i == 0 else PatchEmbed(dim // 2, dim, 3, 2, False, **dd)
            blocks = [Block(dim, attention(i), mlp_ratios[i], drop_path, **dd) for drop_path in drop_paths[i]]
            stages.append(Stage(shrink, blocks, nn.LayerNorm(dim, eps=1e-6, **dd)))
        super().__init__(
            PatchEmbed(in_chans, embed_dim, 7, 4, True, **dd),
            stages,
            channels=channels,
            reductions=_STRIDES[: len(depths)],
            norm=nn.Identity(),
            head=ClassifierHead(channels[-1], num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise as published; may be called again, after ``to_empty`` for instance."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
                nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that optimizers should not decay: temperatures, embeddings, what makes biases."""
        parts = ("query_embedding", "relative_pos_bias_local", ".cpb.", "temperature")
        return {name for name, _ in self.named_parameters() if any(part in name for part in parts)}


def convert_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a published state dict to ``model``'s names; leaves our own names alone."""
    if any(key.startswith("stem.") for key in state):
        return dict(state)
    mixture = any(isinstance(module, HeadRouter) for module in model.modules())
    converted = {}
    for key, value in state.items():
        if key.endswith(".attn.sr.weight") and value.ndim == 4:
            value = value.flatten(1)  # published as a 1x1 convolution
        if mixture:
            key = re.sub(r"\.attn\.(?!proj\.|wg)", ".attn.attention.", key)
            key = re.sub(r"\.attn\.(wg\w*)\.", r".attn.router.\1.", key)
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        converted[re.sub(r"^stages\.0\.downsample\.", "stem.", key)] = value
    return converted


# Published stages count from 1.
_NAMES = (
    (r"^patch_embed(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}.downsample."),
    (r"^block(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks."),
    (r"^norm(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}.norm."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"\.cpb_fc(\d)\.", r".cpb.fc\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)

_MICRO = dict(embed_dim=48, depths=(2, 2, 15, 2), drop_path_rate=0.15)
_MICRO_AAAA = dict(**_MICRO, sr_ratios=(16, 8, 4, 2), img_size=256)
_TINY = dict(embed_dim=72, depths=(2, 2, 15, 2), drop_path_rate=0.25)
_SMALL = dict(embed_dim=72, depths=(5, 5, 22, 5), drop_path_rate=0.45)
_BASE = dict(embed_dim=96, depths=(5, 5, 23, 5), drop_path_rate=0.6)
_SMALL_384 = {**_SMALL, "img_size": 384, "pretrain_size": 224, "drop_path_rate": 0.7}
_BASE_384 = {**_BASE, "img_size": 384, "pretrain_size": 224, "drop_path_rate": 0.8}
_MOH_SMALL_75 = dict(**_SMALL, shared_heads=(3, 6, 3, 4), routed_heads=(0, 0, 6, 12))
_MOH_SMALL_80 = dict(**_SMALL, shared_heads=(3, 6, 3, 8), routed_heads=(0, 0, 6, 12))
_MOH_BASE_50 = dict(**_BASE, shared_heads=(2, 2, 2, 4), routed_heads=(2, 4, 6, 8))
_MOH_BASE_75 = dict(**_BASE, shared_heads=(4, 8, 4, 5), routed_heads=(0, 0, 8, 16))


def _transnext(name: str, pretrained: bool, options: dict, config: dict) -> TransNeXt:
    return build(TransNeXt, name, pretrained, convert_checkpoint, **{**config, **options})


# The published dense settings, for `create_backbone(name, setting=...)`: Mask R-CNN; DINO, of a lower drop path;
# UPerNet on single crops; Mask2Former, of DINO's drop path; UPerNet on whole images of several sizes.
def _dense(drop_path_rate: float, query_rate: float) -> dict[str, dict]:
    options = {"pretrain_size": 224, "drop_path_rate": drop_path_rate}
    detection = {**options, "img_size": 800, "interpolate": True}
    segmentation = {**options, "img_size": 512, "interpolate": True}
    return {
        "detection": detection,
        "dino": {**detection, "drop_path_rate": query_rate},
        "segmentation": segmentation,
        "mask2former": {**segmentation, "drop_path_rate": query_rate},
        "segmentation_extrapolation": {**options, "img_size": 512},
    }


# What the published dense models of the family do otherwise, for `head_options_of`: mmseg's sizes of ADE20K's images.
head_options = {"transnext_*": {"mask2former": {"sides": (512, 2048)}}}


dense_settings: dict[str, dict[str, dict]] = {
    "transnext_tiny": _dense(0.4, 0.3),
    "transnext_small": _dense(0.6, 0.5),
    "transnext_base": _dense(0.7, 0.6),
}

_CFG = IMAGENET_CFG | {
    "first_conv": "stem.proj",
    "license": "apache-2.0",
    "origin_url": "https://github.com/DaiShiResearch/TransNeXt",
    "paper_ids": "arXiv:2311.17132",
}
_CFG_384 = _CFG | {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0, "crop_mode": "squash"}
_CFG_MOH = _CFG | {"origin_url": "https://github.com/SkyworkAI/MoH", "paper_ids": "arXiv:2410.11842"}

default_cfgs = cfgs_with_links(
    {
        "transnext_micro.shi_in1k": _CFG,
        "transnext_tiny.shi_in1k": _CFG,
        "transnext_small.shi_in1k": _CFG,
        "transnext_base.shi_in1k": _CFG,
        "transnext_small_384.shi_in1k": _CFG_384,
        "transnext_base_384.shi_in1k": _CFG_384,
        "transnext_micro_AAAA.shi_in1k": _CFG | {"input_size": (3, 256, 256), "pool_size": (8, 8)},
        "moh_transnext_small_75.chat_univi_in1k": _CFG_MOH,
        "moh_transnext_small_80.chat_univi_in1k": _CFG_MOH,
        "moh_transnext_base_50.chat_univi_in1k": _CFG_MOH,
        "moh_transnext_base_75.chat_univi_in1k": _CFG_MOH,
    }
)


@register_model
def transnext_micro(pretrained: bool = False, **kwargs) -> TransNeXt:
    """TransNeXt-Micro: 12.8 M parameters."""
    return _transnext("transnext_micro", pretrained, kwargs, _MICRO)


@register_model
def transnext_tiny(pretrained: bool = False, **kwargs) -> TransNeXt:
    """TransNeXt-Tiny: 28.3 M parameters."""
    return _transnext("transnext_tiny", pretrained, kwargs, _TINY)


@register_model
def transnext_small(pretrained: bool = False, **kwargs) -> TransNeXt:
    """TransNeXt-Small: 49.7 M parameters."""
    return _transnext("transnext_small", pretrained, kwargs, _SMALL)


@register_model
def transnext_base(pretrained: bool = False, **kwargs) -> TransNeXt:
    """TransNeXt-Base: 89.7 M parameters."""
    return _transnext("transnext_base", pretrained, kwargs, _BASE)


@register_model
def transnext_small_384(pretrained: bool = False, **kwargs) -> TransNeXt:
    """TransNeXt-Small at 384 pixels, tuned from 224."""
    return _transnext("transnext_small_384", pretrained, kwargs, _SMALL_384)


@register_model
def transnext_base_384(pretrained: bool = False, **kwargs) -> TransNeXt:
    """TransNeXt-Base at 384 pixels, tuned from 224."""
    return _transnext("transnext_base_384", pretrained, kwargs, _BASE_384)


@register_model
def transnext_micro_AAAA(pretrained: bool = False, **kwargs) -> TransNeXt:
    """TransNeXt-Micro with aggregated attention in all four stages, at 256 pixels: 13.1 M parameters."""
    return _transnext("transnext_micro_AAAA", pretrained, kwargs, _MICRO_AAAA)


@register_model
def moh_transnext_small_75(pretrained: bool = False, **kwargs) -> TransNeXt:
    """MoH-ViT-S of 75 % active heads: TransNeXt-Small whose heads each position weighs and chooses."""
    return _transnext("moh_transnext_small_75", pretrained, kwargs, _MOH_SMALL_75)


@register_model
def moh_transnext_small_80(pretrained: bool = False, **kwargs) -> TransNeXt:
    """MoH-ViT-S of 80 % active heads."""
    return _transnext("moh_transnext_small_80", pretrained, kwargs, _MOH_SMALL_80)


@register_model
def moh_transnext_base_50(pretrained: bool = False, **kwargs) -> TransNeXt:
    """MoH-ViT-B of 50 % active heads: TransNeXt-Base whose heads each position weighs and chooses."""
    return _transnext("moh_transnext_base_50", pretrained, kwargs, _MOH_BASE_50)


@register_model
def moh_transnext_base_75(pretrained: bool = False, **kwargs) -> TransNeXt:
    """MoH-ViT-B of 75 % active heads."""
    return _transnext("moh_transnext_base_75", pretrained, kwargs, _MOH_BASE_75)
