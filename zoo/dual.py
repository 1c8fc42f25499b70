"""DaViT: hierarchical vision transformers that alternate window attention and channel-group attention.

Paper: DaViT: Dual Attention Vision Transformers, ECCV 2022, arXiv 2204.03645.

Origin: github.com/dingmyu/davit (MIT). Written anew on `blocks.WindowAttention2d` and `blocks.ChannelGroupAttention2d`.

timm has a ``davit_tiny`` of its own; these are ``foveate_davit_*``, with the same parameter names, so that timm's files
and the authors' load alike, here and there. They differ in what timm lacks: the norms that the published detectors and
segmenters put on each stage's output, a drop path rate for every sub-block, the overlapped merge, and the published
large model for 384 pixels.

They are also faster in float32 on several threads of CPUs with AVX-512, where the linear layers run as convolutions:
the tiny model gave 1.6 times timm's images per second at 224 pixels and batch 4, 1.7 times at 512 and batch 1 (ours:
torch 2.15, 2 threads of an AMD EPYC, median of alternating runs; ``foveate bench models foveate_davit_tiny --peers
davit_tiny`` measures it). Nothing is claimed for one thread, for CPUs with AVX2 alone, GPUs and compiled models.
"""

import logging
import re
from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from timm.layers import (
    ClassifierHead,
    ClNormMlpClassifierHead,
    DropPath,
    calculate_drop_path_rates,
    register_notrace_function,
)
from timm.models import register_model
from torch import Tensor, nn

from ..blocks.depthwise import apply_depthwise
from ..blocks.dual import ChannelGroupAttention2d
from ..blocks.pointwise import PointwiseMlp
from ..blocks.window import WindowAttention2d
from ..kernels.lengths import padding_to
from ._build import IMAGENET_CFG, build, cfgs_with_links
from ._pyramid import Pyramid, Stage

__all__ = ["DaViT"]

_logger = logging.getLogger(__name__)


@register_notrace_function
def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad ``x`` ``[B, C, H, W]`` at the bottom and right to a multiple of ``multiple``."""
    bottom, right = padding_to(x.shape[2], multiple), padding_to(x.shape[3], multiple)
    if torch.compiler.is_compiling() or bottom > 0 or right > 0:
        x = F.pad(x, (0, right, 0, bottom))
    return x


class Stem(nn.Module):
    """Overlapping 7x7 convolution of stride 4, then a norm: NCHW to NHWC."""

    def __init__(self, in_chans: int, dim: int, norm_layer: type[nn.Module], device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_chans, dim, 7, stride=4, padding=3, **dd)
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, in_chans, H, W]`` to ``[B, ceil(H / 4), ceil(W / 4), dim]``."""
        return self.norm(self.conv(pad_to_multiple(x, 4)).permute(0, 2, 3, 1))


class Merge(nn.Module):
    """A norm, then a convolution of stride 2: 2x2, or 3x3 where patches overlap; NHWC."""

    def __init__(self, in_dim: int, dim: int, overlapped: bool, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(in_dim, **dd)
        self.conv = nn.Conv2d(in_dim, dim, 3 if overlapped else 2, stride=2, padding=1 if overlapped else 0, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, in_dim]`` to ``[B, ceil(H / 2), ceil(W / 2), dim]``."""
        return self.conv(pad_to_multiple(self.norm(x).permute(0, 3, 1, 2), 2)).permute(0, 2, 3, 1)


class PositionEncoding(nn.Module):
    """A depthwise 3x3 convolution, added to its input: the model's only notion of position; NHWC."""

    def __init__(self, dim: int, act: bool, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.activated = act
        self.act = nn.GELU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, dim]`` to the same shape."""
        if torch.jit.is_scripting() or self.activated:
            return x + self.act(self.proj(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return apply_depthwise(self.proj, x.permute(0, 3, 1, 2), residual=True).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Transformer block: attention, then MLP, each after a position encoding and a norm, and dropped by path; NHWC."""

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp_ratio: float,
        ffn: bool,
        cpe_act: bool,
        drop: float,
        drop_path: float,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cpe1 = PositionEncoding(dim, cpe_act, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attention
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.cpe2 = PositionEncoding(dim, cpe_act, **dd)
        if ffn:
            self.norm2 = nn.LayerNorm(dim, **dd)
            self.mlp = PointwiseMlp(dim, int(dim * mlp_ratio), drop, **dd)
            self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        else:
            self.norm2 = self.mlp = self.drop_path2 = None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, dim]`` to the same shape."""
        x = self.cpe1(x)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = self.cpe2(x)
        if self.mlp is not None:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class DaViT(Pyramid):
    """Four stages of alternating window and channel-group attention on maps of 1/4 to 1/32 of the image.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` or ``""``. The classifier's norm follows the pooling.
        embed_dims: Channels per stage.
        depths: Dual blocks per stage; each is a block for every entry of ``attention_types``.
        num_heads: Heads of the windows and groups of the channels, per stage.
        window_size: Height and width of the windows.
        mlp_ratio: Hidden channels of the MLP over its input's.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        attention_types: The blocks of a dual block in their order, ``"spatial"`` or ``"channel"``.
        ffn: Whether blocks have MLPs.
        cpe_act: Whether a GELU follows each depthwise convolution.
        overlapped_patch: Whether the merge between stages is a 3x3 convolution instead of 2x2.
        out_norms: Whether each stage's output gets a norm, as in the published dense models; then ``forward_features``
            ends with the last of them, which stands in for the classifier's norm.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after projections.
        drop_path_rate: Stochastic depth of the last block; blocks before it have proportionally less, each its own
            rate, attention and MLP of a block the same.

    Shape:
        Images ``[B, in_chans, H, W]`` of any size to logits ``[B, num_classes]``.

    Raises:
        ValueError: If an attention type is unknown.
    """

    symbolic_size: Final[bool] = False

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (1, 1, 3, 1),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | tuple[int, int] = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attention_types: Sequence[str] = ("spatial", "channel"),
        ffn: bool = True,
        cpe_act: bool = False,
        overlapped_patch: bool = False,
        out_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        unknown = [kind for kind in attention_types if kind not in ("spatial", "channel")]
        if unknown or not attention_types:
            raise ValueError(f"attention_types must name 'spatial' or 'channel' blocks; got {tuple(attention_types)}")
        norm_layer = nn.LayerNorm
        kinds = tuple(attention_types)
        rates = calculate_drop_path_rates(drop_path_rate, len(kinds) * sum(depths))

        def attention(kind: str, dim: int, heads: int) -> nn.Module:
            if kind == "channel":
                return ChannelGroupAttention2d(dim, heads, qkv_bias, proj_drop_rate, **dd)
            return WindowAttention2d(
                dim, heads, window_size, qkv_bias=qkv_bias, rel_pos_bias=False, proj_drop=proj_drop_rate, **dd
            )

        stages = []
        next_rate = iter(rates)
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            duals = []
            for _ in range(depths[i]):
                blocks = [
                    Block(
                        dim, attention(kind, dim, heads), mlp_ratio, ffn, cpe_act, proj_drop_rate, next(next_rate), **dd
                    )
                    for kind in kinds
                ]
                duals.append(nn.Sequential(*blocks))
            merge = nn.Identity() if i == 0 else Merge(embed_dims[i - 1], dim, overlapped_patch, **dd)
            stages.append(Stage(merge, duals))
        head = ClNormMlpClassifierHead(
            embed_dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=norm_layer, **dd
        )
        super().__init__(
            Stem(in_chans, embed_dims[0], norm_layer, **dd),
            stages,
            channels=embed_dims,
            norm=nn.Identity(),
            out_norms=[norm_layer(dim, **dd) for dim in embed_dims] if out_norms else None,
            head=ClassifierHead(embed_dims[-1], num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd)
            if out_norms
            else head,
            in_chans=in_chans,
            num_classes=num_classes,
        )
        self.init_weights()


def convert_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor | None]:
    """Rename a published state dict to ``model``'s names.

    Reads the authors' classification and dense files; leaves our own names and timm's, which are the same, alone. A
    published RetinaNet may lack the first output norm, which its necks never used: the model's own stays.
    """
    if any(key.startswith("stem.") for key in state):
        return dict(state)
    converted = {}
    for key, value in state.items():
        key = re.sub(r"^patch_embeds\.0\.", "stem.", key)
        key = re.sub(r"^patch_embeds\.(\d+)\.", r"stages.\1.downsample.", key)
        key = re.sub(r"^(stem|stages\.\d+\.downsample)\.proj\.", r"\1.conv.", key)
        key = re.sub(r"^main_blocks\.(\d+)\.", r"stages.\1.blocks.", key)
        key = key.replace(".cpe.0.", ".cpe1.").replace(".cpe.1.", ".cpe2.")
        key = re.sub(r"^norm(\d)\.", r"out_norms.\1.", key)
        key = re.sub(r"^norms\.", "head.norm.", key)
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        converted[key] = value
    if "out_norms.1.weight" in converted and not any(key.startswith("out_norms.0.") for key in converted):
        _logger.warning("the checkpoint has no norm of the first stage's output, which keeps its initial values")
        converted |= dict.fromkeys(key for key in model.state_dict() if key.startswith("out_norms.0."))
    return converted


_TINY = dict(embed_dims=(96, 192, 384, 768), depths=(1, 1, 3, 1), num_heads=(3, 6, 12, 24), drop_path_rate=0.1)
_SMALL = dict(embed_dims=(96, 192, 384, 768), depths=(1, 1, 9, 1), num_heads=(3, 6, 12, 24), drop_path_rate=0.1)
_BASE = dict(embed_dims=(128, 256, 512, 1024), depths=(1, 1, 9, 1), num_heads=(4, 8, 16, 32), drop_path_rate=0.1)
_LARGE = dict(embed_dims=(192, 384, 768, 1536), depths=(1, 1, 9, 1), num_heads=(6, 12, 24, 48), drop_path_rate=0.1)
_HUGE = dict(embed_dims=(256, 512, 1024, 2048), depths=(1, 1, 9, 1), num_heads=(8, 16, 32, 64), drop_path_rate=0.1)
_GIANT = dict(embed_dims=(384, 768, 1536, 3072), depths=(1, 1, 12, 3), num_heads=(12, 24, 48, 96), drop_path_rate=0.1)


def _davit(name: str, pretrained: bool, options: dict, config: dict) -> DaViT:
    return build(DaViT, name, pretrained, convert_checkpoint, **{**config, **options})


# What the published dense models of the family do otherwise, for `head_options_of`: mmdet until 2.18 chose
# candidates of RetinaNet by anchors.
head_options = {"foveate_davit_*": {"retinanet": {"selection": "anchors"}}}
# The published dense settings, for `create_backbone(name, setting=...)`: drop path of the 36-epoch detectors (0.1 in
# those of 12 epochs) and of UPerNet, the same for every size.
dense_settings: dict[str, dict[str, dict]] = {
    name: {
        "detection": {"out_norms": True, "drop_path_rate": 0.2},
        "segmentation": {"out_norms": True, "drop_path_rate": 0.3},
    }
    for name in (
        "foveate_davit_tiny",
        "foveate_davit_small",
        "foveate_davit_base",
        "foveate_davit_large_window12_384",
        "foveate_davit_huge",
        "foveate_davit_giant",
    )
}


def _cfg(**options) -> dict:
    return IMAGENET_CFG | {
        "crop_pct": 0.9,
        "first_conv": "stem.conv",
        "license": "apache-2.0",
        "origin_url": "https://github.com/dingmyu/davit",
        "paper_ids": "arXiv:2204.03645",
        **options,
    }


default_cfgs = cfgs_with_links(
    {
        "foveate_davit_tiny.msft_in1k": _cfg(),
        "foveate_davit_small.msft_in1k": _cfg(),
        "foveate_davit_base.msft_in1k": _cfg(),
        "foveate_davit_large_window12_384.untrained": _cfg(
            input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0, license="mit"
        ),
        "foveate_davit_huge.untrained": _cfg(),
        "foveate_davit_giant.untrained": _cfg(),
    }
)


@register_model
def foveate_davit_tiny(pretrained: bool = False, **kwargs) -> DaViT:
    """Like timm's ``davit_tiny``, with the authors' dense files; 1.6 times as fast on 2 threads of a CPU with AVX-512.

    DaViT-Tiny: 28.4 M parameters, 4.5 GFLOPs.
    """
    return _davit("foveate_davit_tiny", pretrained, kwargs, _TINY)


@register_model
def foveate_davit_small(pretrained: bool = False, **kwargs) -> DaViT:
    """Like timm's ``davit_small``, with the authors' dense files; speed not measured.

    DaViT-Small: 49.7 M parameters, 8.8 GFLOPs.
    """
    return _davit("foveate_davit_small", pretrained, kwargs, _SMALL)


@register_model
def foveate_davit_base(pretrained: bool = False, **kwargs) -> DaViT:
    """Like timm's ``davit_base``, with the authors' dense files; speed not measured.

    DaViT-Base: 88.0 M parameters, 15.5 GFLOPs.
    """
    return _davit("foveate_davit_base", pretrained, kwargs, _BASE)


@register_model
def foveate_davit_large_window12_384(pretrained: bool = False, **kwargs) -> DaViT:
    """Like timm's ``davit_large``, with the authors' dense files; speed not measured.

    DaViT-Large, windows of 12 for 384 pixels: 196.8 M parameters, 103 GFLOPs; without published weights.
    """
    return _davit("foveate_davit_large_window12_384", pretrained, kwargs, {**_LARGE, "window_size": 12})


@register_model
def foveate_davit_huge(pretrained: bool = False, **kwargs) -> DaViT:
    """Like timm's ``davit_huge``, with the authors' dense files; speed not measured.

    DaViT-Huge: 348.9 M parameters, 61.2 GFLOPs; without published weights.
    """
    return _davit("foveate_davit_huge", pretrained, kwargs, _HUGE)


@register_model
def foveate_davit_giant(pretrained: bool = False, **kwargs) -> DaViT:
    """Like timm's ``davit_giant``, with the authors' dense files; speed not measured.

    DaViT-Giant: 1406.5 M parameters, 192.8 GFLOPs; without published weights.
    """
    return _davit("foveate_davit_giant", pretrained, kwargs, _GIANT)
