"""LITv2: convolutional MLPs alone on large maps, HiLo attention on small ones, and patches whose points move.

Paper: Fast Vision Transformers with HiLo Attention, Pan et al., NeurIPS 2022, arXiv 2205.13213. Deformable token
merging is that of LIT (arXiv 2105.14217).

Origin: github.com/ziplab/LITv2, code and weights Apache-2.0. Written anew on `blocks.HiLoAttention2d`; the published
classifiers and dense backbones load through `convert_checkpoint`. Their compiled deformable convolution, which takes no
odd batches, is a gather here.

The published classifiers take square images of multiples of 32 pixels. Here any image of at least 29 pixels a side may
be given, padded as in the published dense models; each merging cuts off an odd row or column.
"""

import re
from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from timm.layers import (
    ClassifierHead,
    DropPath,
    PatchEmbed,
    calculate_drop_path_rates,
    register_notrace_function,
    register_notrace_module,
)
from timm.models import register_model
from torch import Tensor, nn

from ..blocks.depthwise_mlp import DepthwiseMlp
from ..blocks.hilo import HiLoAttention2d
from ..blocks.initialize import init_linear
from ..blocks.pyramid import check_holds_patch
from ..kernels.bilinear import gather_bilinear, sample_bilinear
from ..kernels.precision import full_precision
from ._build import IMAGENET_CFG, build, cfgs_with_links
from ._pyramid import Pyramid, Stage

__all__ = ["LITv2"]


class ConvBlock(nn.Module):
    """An MLP with a depthwise convolution after a norm; NHWC."""

    def __init__(self, dim: int, mlp_ratio: float, drop: float, drop_path: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = DepthwiseMlp(dim, int(dim * mlp_ratio), drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, dim]`` to the same shape."""
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class HiLoBlock(nn.Module):
    """HiLo attention and an MLP with a depthwise convolution, each after a norm; NHWC."""

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attention
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = DepthwiseMlp(dim, int(dim * mlp_ratio), drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, dim]`` to the same shape."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


@register_notrace_function
def sample_patches(x: Tensor, offset: Tensor) -> Tensor:
    """Read patches of 2x2 whose points are moved, bilinear and zero outside, in float32 at least.

    Args:
        x: Map ``[B, H, W, C]``.
        offset: For each patch and each of its points, row by row, how far it moves down and to the right,
            ``[B, H // 2, W // 2, 8]``.

    Returns:
        The points of each patch, ``[B, H // 2, W // 2, 4 * C]``, in the dtype of ``x``.
    """
    if offset.dtype != torch.float64:
        offset = offset.float()
    height, width = offset.shape[1], offset.shape[2]
    rows = 2 * torch.arange(height, dtype=offset.dtype, device=offset.device)
    columns = 2 * torch.arange(width, dtype=offset.dtype, device=offset.device)
    one = torch.arange(2, dtype=offset.dtype, device=offset.device)
    moves = offset.unflatten(3, (2, 2, 2))
    rows = (rows[:, None, None, None] + one[:, None] + moves[..., 0]).flatten(1)
    columns = (columns[:, None, None] + one + moves[..., 1]).flatten(1)
    points = gather_bilinear(x, rows, columns) if torch.jit.is_scripting() else sample_bilinear(x, rows, columns)
    return points.unflatten(1, (height, width, 4)).flatten(3)


class DeformablePatches(nn.Module):
    """Deformable convolution (arXiv 1703.06211) of patches of 2x2, each point moved by an ordinary convolution; NHWC.

    Offsets start at zero, as a convolution of stride 2. They and the points are computed in float32 under autocast.

    Args:
        dim: Channels before.
        out_dim: Channels after.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H // 2, W // 2, out_dim]``.
    """

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_dim, dim, 2, 2, **dd))
        self.bias = nn.Parameter(torch.empty(out_dim, **dd))
        self.conv_offset = nn.Conv2d(dim, 8, 2, stride=2, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as published: as a convolution of torch, and offsets of zero."""
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, dim]`` to ``[B, H // 2, W // 2, out_dim]``."""
        check_holds_patch(x.shape[1], x.shape[2], 2)
        if torch.jit.is_scripting():
            offset = self.conv_offset(x.permute(0, 3, 1, 2))
        else:
            with full_precision(x):
                x = x.to(self.weight.dtype)
                offset = self.conv_offset(x.permute(0, 3, 1, 2))
        patches = sample_patches(x, offset.permute(0, 2, 3, 1))
        return F.linear(patches, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


register_notrace_module(DeformablePatches)


class Downsample(nn.Module):
    """Deformable token merging: deformable patches of 2x2, a batch norm and a GELU; NHWC."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = DeformablePatches(dim, 2 * dim, **dd)
        self.norm = nn.BatchNorm2d(2 * dim, **dd)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, dim]`` to ``[B, H // 2, W // 2, 2 * dim]``."""
        x = self.norm(self.conv(x).permute(0, 3, 1, 2))
        return self.act(x).permute(0, 2, 3, 1)


class LITv2(Pyramid):
    """Four stages on maps of 1/4 to 1/32 of the image, the first ones without attention.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` or ``""``.
        embed_dim: Channels of the first stage; each further stage has twice as many.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        window_sizes: Height and width of HiLo's windows per stage; 0 for no attention, 1 for global attention.
        alpha: The part of the heads that attend to the pooled map.
        mlp_ratio: Hidden channels of the MLP over its input's.
        qkv_bias: Whether the projections to queries, keys and values have a bias.
        out_norms: Which stages' outputs have a norm, in the dense model; None for the classifier.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout in the MLPs.
        drop_path_rate: Stochastic depth of the last block; blocks before it have proportionally less.

    Shape:
        Images ``[B, in_chans, H, W]`` of at least 29x29 pixels, padded with zeros at the bottom and right to a multiple
        of 4, to logits ``[B, num_classes]``.
    """

    symbolic_size: Final[bool] = False

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_sizes: Sequence[int] = (0, 0, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        out_norms: Sequence[bool] | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        norm_layer = nn.LayerNorm
        channels = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        def block(i: int, drop_path: float) -> nn.Module:
            if window_sizes[i] == 0:
                return ConvBlock(channels[i], mlp_ratio, proj_drop_rate, drop_path, **dd)
            attention = HiLoAttention2d(channels[i], num_heads[i], window_sizes[i], alpha, qkv_bias, **dd)
            return HiLoBlock(channels[i], attention, mlp_ratio, proj_drop_rate, drop_path, **dd)

        stages = []
        for i, dim in enumerate(channels):
            blocks = [block(i, drop_path) for drop_path in drop_paths[i]]
            stages.append(Stage(nn.Identity() if i == 0 else Downsample(dim // 2, **dd), blocks))
        norms = out_norms and [
            norm_layer(dim, **dd) if has_norm else nn.Identity()
            for dim, has_norm in zip(channels, out_norms, strict=True)
        ]
        super().__init__(
            PatchEmbed(
                None, 4, in_chans, embed_dim, norm_layer=norm_layer, output_fmt="NHWC", dynamic_img_pad=True, **dd
            ),
            stages,
            channels=channels,
            norm=norm_layer(channels[-1], **dd),
            out_norms=norms,
            head=ClassifierHead(channels[-1], num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise as published; may be called again, after ``to_empty`` for instance."""
        self.apply(_init_weights)


def _init_weights(module: nn.Module) -> None:
    # `apply` visits children first, so the offsets, which start at zero, have the last word.
    if isinstance(module, nn.Linear):
        init_linear(module)
    elif isinstance(module, nn.Conv2d) and module.groups > 1:
        nn.init.normal_(module.weight, std=(2.0 / 9) ** 0.5)
        nn.init.zeros_(module.bias)
    elif hasattr(module, "reset_parameters"):
        module.reset_parameters()


_NAMES = (
    (r"^patch_embed\.", lambda m: "stem."),
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^layers\.", lambda m: "stages."),
    (r"\.downsample\.dconv\.", lambda m: ".downsample.conv."),
    (r"\.downsample\.norm_layer\.", lambda m: ".downsample.norm."),
    (r"\.mlp\.dwconv\.dwconv\.", lambda m: ".mlp.dwconv."),
    (r"^norm(\d)\.", lambda m: f"out_norms.{m[1]}."),
    (r"^head\.(weight|bias)$", lambda m: f"head.fc.{m[1]}"),
)


def convert_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a published state dict to ``model``'s names; leaves our own names alone.

    Reads the authors' classification and dense files.
    """
    converted, names = {}, () if any(key.startswith("stem.") for key in state) else _NAMES
    for key, value in state.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        converted[key] = value
    return converted


_SMALL = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.2)
_MEDIUM = dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.3)
_BASE = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5)

_DETECTION = dict(out_norms=(False, True, True, True))

# The published dense settings, for `create_backbone(name, setting=...)`. In detection the first stage has no norm.
dense_settings: dict[str, dict[str, dict]] = {
    name: {
        "detection": dict(**_DETECTION, drop_path_rate=rate),
        "detection_ws4": dict(**_DETECTION, window_sizes=(0, 0, 4, 1), drop_path_rate=rate),
        "segmentation": dict(out_norms=(True, True, True, True), drop_path_rate=rate),
    }
    for name, rate in (("litv2_small", 0.2), ("litv2_medium", 0.2), ("litv2_base", 0.3))
}


def _litv2(name: str, pretrained: bool, options: dict, config: dict) -> LITv2:
    return build(LITv2, name, pretrained, convert_checkpoint, **{**config, **options})


def _cfg(**options) -> dict:
    return IMAGENET_CFG | {
        "first_conv": "stem.proj",
        "license": "apache-2.0",
        "origin_url": "https://github.com/ziplab/LITv2",
        "paper_ids": "arXiv:2205.13213",
        **options,
    }


default_cfgs = cfgs_with_links(
    {
        "litv2_small.ziplab_in1k": _cfg(),
        "litv2_medium.ziplab_in1k": _cfg(),
        "litv2_base.ziplab_in1k": _cfg(),
        "litv2_base_384.ziplab_in1k": _cfg(
            input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0, crop_mode="squash"
        ),
        "litv2_small_alpha0.ziplab_in1k": _cfg(),
        "litv2_small_alpha02.ziplab_in1k": _cfg(),
        "litv2_small_alpha04.ziplab_in1k": _cfg(),
        "litv2_small_alpha05.ziplab_in1k": _cfg(),
        "litv2_small_alpha07.ziplab_in1k": _cfg(),
        "litv2_small_alpha1.ziplab_in1k": _cfg(),
    }
)


@register_model
def litv2_small(pretrained: bool = False, **kwargs) -> LITv2:
    """LITv2-Small: 27.8 M parameters."""
    return _litv2("litv2_small", pretrained, kwargs, _SMALL)


@register_model
def litv2_medium(pretrained: bool = False, **kwargs) -> LITv2:
    """LITv2-Medium: 48.8 M parameters."""
    return _litv2("litv2_medium", pretrained, kwargs, _MEDIUM)


@register_model
def litv2_base(pretrained: bool = False, **kwargs) -> LITv2:
    """LITv2-Base: 86.5 M parameters."""
    return _litv2("litv2_base", pretrained, kwargs, _BASE)


@register_model
def litv2_base_384(pretrained: bool = False, **kwargs) -> LITv2:
    """LITv2-Base for images of 384 pixels."""
    return _litv2("litv2_base_384", pretrained, kwargs, _BASE)


@register_model
def litv2_small_alpha0(pretrained: bool = False, **kwargs) -> LITv2:
    """LITv2-Small whose heads all attend within windows."""
    return _litv2("litv2_small_alpha0", pretrained, kwargs, dict(**_SMALL, alpha=0.0))


@register_model
def litv2_small_alpha02(pretrained: bool = False, **kwargs) -> LITv2:
    """LITv2-Small with 0.2 of the heads on the pooled map."""
    return _litv2("litv2_small_alpha02", pretrained, kwargs, dict(**_SMALL, alpha=0.2))


@register_model
def litv2_small_alpha04(pretrained: bool = False, **kwargs) -> LITv2:
    """LITv2-Small with 0.4 of the heads on the pooled map."""
    return _litv2("litv2_small_alpha04", pretrained, kwargs, dict(**_SMALL, alpha=0.4))


@register_model
def litv2_small_alpha05(pretrained: bool = False, **kwargs) -> LITv2:
    """LITv2-Small with 0.5 of the heads on the pooled map."""
    return _litv2("litv2_small_alpha05", pretrained, kwargs, dict(**_SMALL, alpha=0.5))


@register_model
def litv2_small_alpha07(pretrained: bool = False, **kwargs) -> LITv2:
    """LITv2-Small with 0.7 of the heads on the pooled map."""
    return _litv2("litv2_small_alpha07", pretrained, kwargs, dict(**_SMALL, alpha=0.7))


@register_model
def litv2_small_alpha1(pretrained: bool = False, **kwargs) -> LITv2:
    """LITv2-Small whose heads all attend to the pooled map."""
    return _litv2("litv2_small_alpha1", pretrained, kwargs, dict(**_SMALL, alpha=1.0))
