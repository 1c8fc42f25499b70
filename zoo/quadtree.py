"""QuadTree: PVTv2's pyramid with attention that refines, level by level, the tokens worth a closer look.

Paper: QuadTree Attention for Vision Transformers, ICLR 2022, arXiv 2201.02767.

Origin: github.com/Tangshitao/QuadTreeAttention, code and weights MIT. Written anew on `blocks.QuadTreeAttention2d`; the
published checkpoints, of classifiers, detectors and segmenters, load through `convert_checkpoint`.

The published detectors and segmenters are fine-tuned from the classifiers with two settings changed, neither of which
is part of the weights: every query hands down 32 tokens instead of 8, and the value branches have a ReLU instead of a
GELU. They are the dense settings ``"detection"`` and ``"segmentation"``, and the options ``topk`` and ``value_act``.

Images may have any size. The published models take only those whose stages halve evenly (height and width modulo 32 in
0, 29, 30, 31) and that have at least ``topk`` tokens at 1/32; there, results are theirs. For all others two rules are
ours: the attention pads its map by repeating the last row and column and cuts its output, and chooses all tokens where
there are fewer than ``topk``.
"""

import re
from collections.abc import Sequence
from typing import Final

import torch
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates
from timm.models import register_model
from timm.models.pvt_v2 import OverlapPatchEmbed
from torch import Tensor, nn

from ..blocks import QuadTreeAttention2d
from ..blocks.depthwise_mlp import DepthwiseMlp
from ..blocks.initialize import init_linear
from ._build import IMAGENET_CFG, build, cfgs_with_links
from ._pyramid import Pyramid, Stage

__all__ = ["QuadTree"]


class Downsample(OverlapPatchEmbed):
    """PVTv2's overlapping patches as a step between stages: 3x3 of stride 2, then a norm; NHWC."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__(3, 2, in_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, in_dim]`` to ``[B, ceil(H / 2), ceil(W / 2), dim]``."""
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Block(nn.Module):
    """Transformer block: QuadTree attention and an MLP with a depthwise convolution, each after a norm; NHWC."""

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
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attention
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = DepthwiseMlp(dim, int(dim * mlp_ratio), drop=drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, dim]`` to the same shape."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class QuadTree(Pyramid):
    """Four stages of QuadTree attention on maps of 1/4 to 1/32 of the image, with pyramids of 4, 3, 2 and 1 levels.

    Every stage ends with a norm, whose output is the stage's feature map and what the next stage takes.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` or ``""``.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        mlp_ratios: Hidden channels of the MLP over its input's, per stage.
        levels: Levels of the token pyramid per stage.
        topk: Tokens that each query hands down, for all levels or for each, coarse to fine.
        kind: Type of the attention, ``"B"`` or ``"A"``.
        value_act: Activation of type B's value branches, ``"gelu"`` or ``"relu"``.
        qkv_bias: Whether the projections to queries, keys and values have a bias.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after projections.
        drop_path_rate: Stochastic depth of the last block; blocks before it have proportionally less.

    Shape:
        Images ``[B, in_chans, H, W]`` of any size to logits ``[B, num_classes]``.
    """

    symbolic_size: Final[bool] = False

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        levels: Sequence[int] = (4, 3, 2, 1),
        topk: int | Sequence[int] = 8,
        kind: str = "B",
        value_act: str = "gelu",
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(embed_dims):
            blocks = [
                Block(
                    dim,
                    QuadTreeAttention2d(
                        dim, num_heads[i], levels[i], topk, kind, value_act, qkv_bias, proj_drop_rate, **dd
                    ),
                    mlp_ratios[i],
                    proj_drop_rate,
                    drop_path,
                    **dd,
                )
                for drop_path in drop_paths[i]
            ]
            shrink = nn.Identity() if i == 0 else Downsample(embed_dims[i - 1], dim, **dd)
            stages.append(Stage(shrink, blocks, nn.LayerNorm(dim, eps=1e-6, **dd)))
        super().__init__(
            OverlapPatchEmbed(7, 4, in_chans, embed_dims[0], **dd),
            stages,
            channels=list(embed_dims),
            norm=nn.Identity(),
            head=ClassifierHead(embed_dims[-1], num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise as published; may be called again, after ``to_empty`` for instance."""
        self.apply(_init_weights)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        init_linear(module)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        module.reset_parameters()
    elif isinstance(module, QuadTreeAttention2d):
        # `apply` visits children first, so the attention's own rules win.
        module.reset_parameters()


# Order matters: whole names before their parts.
_NAMES = (
    (r"^patch_embed1\.", "stem."),
    (r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
    (r"^block(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
    (r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"\.attn\.py_att\.weight$", ".attn.level_weights"),
    (r"\.attn\.py_att\.get_vs\.", ".attn.lepe."),
    (r"\.attn\.value_branchs\.", ".attn.value_branches."),
    (r"\.attn\.v_proj\.", ".attn.v."),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
)


def convert_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a published state dict to our names, and join the projections to queries and keys.

    Reads the authors' classification and dense files; leaves our own names alone.
    """
    if any(key.startswith("stem.") for key in state):
        return dict(state)
    converted = {}
    for key, value in state.items():
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        if key.endswith(("_proj.weight", ".v.weight")) and value.ndim == 4:
            value = value.flatten(1)  # the published projections are 1x1 convolutions
        converted[key] = value
    for query in [key for key in converted if ".attn.q_proj." in key]:
        key = query.replace(".q_proj.", ".k_proj.")
        if key in converted:
            converted[query.replace(".q_proj.", ".qk.")] = torch.cat([converted.pop(query), converted.pop(key)])
    return converted


_SMALL = dict(embed_dims=(32, 64, 160, 256), depths=(2, 2, 2, 2), drop_path_rate=0.1)
_B1 = dict(depths=(2, 2, 2, 2), drop_path_rate=0.1)
_B2 = dict(depths=(3, 4, 6, 3), drop_path_rate=0.1)
_B3 = dict(depths=(3, 4, 18, 3), drop_path_rate=0.3)
_B4 = dict(depths=(3, 8, 27, 3), drop_path_rate=0.3)


def _quadtree(name: str, pretrained: bool, options: dict, config: dict) -> QuadTree:
    return build(QuadTree, name, pretrained, convert_checkpoint, **{**config, **options})


# What the published dense models of the family do otherwise, for `head_options_of`: the segmenters' images
# are stretched.
head_options = {"quadtree_*": {"images": {"divisor": 32}}}
# The published dense settings, for `create_backbone(name, setting=...)`.
_DENSE = dict(topk=32, value_act="relu", drop_path_rate=0.1)
dense_settings: dict[str, dict[str, dict]] = {
    f"quadtree_b{i}": {"detection": dict(_DENSE), "segmentation": dict(_DENSE)} for i in range(5)
}

_CFG = IMAGENET_CFG | {
    "first_conv": "stem.proj",
    "license": "mit",
    "origin_url": "https://github.com/Tangshitao/QuadTreeAttention",
    "paper_ids": "arXiv:2201.02767",
}

default_cfgs = cfgs_with_links(
    {
        **{f"quadtree_b{i}.tang_in1k": _CFG for i in range(5)},
        "quadtree_a_b0.untrained": _CFG | {"notes": ("no weights were published",)},
    }
)


@register_model
def quadtree_b0(pretrained: bool = False, **kwargs) -> QuadTree:
    """QuadTree-B-b0."""
    return _quadtree("quadtree_b0", pretrained, kwargs, _SMALL)


@register_model
def quadtree_b1(pretrained: bool = False, **kwargs) -> QuadTree:
    """QuadTree-B-b1."""
    return _quadtree("quadtree_b1", pretrained, kwargs, _B1)


@register_model
def quadtree_b2(pretrained: bool = False, **kwargs) -> QuadTree:
    """QuadTree-B-b2."""
    return _quadtree("quadtree_b2", pretrained, kwargs, _B2)


@register_model
def quadtree_b3(pretrained: bool = False, **kwargs) -> QuadTree:
    """QuadTree-B-b3."""
    return _quadtree("quadtree_b3", pretrained, kwargs, _B3)


@register_model
def quadtree_b4(pretrained: bool = False, **kwargs) -> QuadTree:
    """QuadTree-B-b4."""
    return _quadtree("quadtree_b4", pretrained, kwargs, _B4)


@register_model
def quadtree_a_b0(pretrained: bool = False, **kwargs) -> QuadTree:
    """QuadTree-A-b0: type A attention, without published weights."""
    return _quadtree("quadtree_a_b0", pretrained, kwargs, {**_SMALL, "kind": "A"})
