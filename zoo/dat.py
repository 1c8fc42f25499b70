"""DAT and DAT++: vision transformers with deformable attention, to points that each map chooses for itself.

Papers:
    * Vision Transformer with Deformable Attention, CVPR 2022, arXiv 2201.00520 (DAT)
    * DAT++: Spatially Dynamic Vision Transformer with Deformable Attention, arXiv 2309.01430 (DAT++)

Origin: github.com/LeapLabTHU/DAT, DAT-Detection and DAT-Segmentation, code and weights Apache-2.0. Written anew on
`blocks.DeformableAttention2d`; the published checkpoints load through `convert_checkpoint`.

The two families alternate local and deformable attention, and share no more than that:

* ``dat_*``: patches, windows and shifted windows in all stages, deformable attention in the last two, where every
  position is a key. The published models take images of their own size only. Here any size works: the tables of the
  position bias are resampled to the map (bicubic, as the authors do it between 224 and 384), and maps that are no
  multiple of the window are padded as in Swin. At its own size the output is the published one.
* ``dat_pp_*``: convolutions for stem, downsampling, position and inside the MLPs, neighborhood attention instead of
  windows, and deformable attention in all stages with few keys. Any size; the tables stay those of 224.
  ``dat_p_tiny``, the paper's step between, has no convolutions.

The published weights were evaluated on images squashed to a square, without regard to their aspect.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Final

import torch
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm2d,
    Mlp,
    calculate_drop_path_rates,
    register_notrace_function,
    to_2tuple,
    trunc_normal_,
)
from timm.models import register_model
from torch import Tensor, nn

from ..blocks import DeformableAttention2d, NeighborhoodAttention2d
from ..blocks.depthwise import apply_depthwise
from ..blocks.pieces import finish_by_pieces
from ..blocks.pointwise import apply_pointwise
from ..blocks.relative_bias import resize_bias_table
from ..blocks.window import WindowAttention2d, from_swin_table
from ._build import IMAGENET_CFG, build, cfgs_with_links
from ._pyramid import Pyramid, Stage

__all__ = ["DAT"]

norm_layer = partial(LayerNorm2d, eps=1e-5)


@register_notrace_function
def check_image_size(height: int, width: int, least: int) -> None:
    """Raise a ValueError if an image has no patch left at the last stage."""
    if height < least or width < least:
        raise ValueError(
            f"the image must be at least {least}x{least}, one patch of the last stage; got {height}x{width}"
        )


class PatchStem(nn.Sequential):
    """Patches of 4x4 pixels, projected, then a norm; NCHW."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__(nn.Conv2d(in_chans, dim, 4, stride=4, **dd), norm_layer(dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, in_chans, H, W]`` to ``[B, dim, H // 4, W // 4]``."""
        check_image_size(x.shape[2], x.shape[3], 32)
        for layer in self:
            x = layer(x)
        return x


class ConvStem(nn.Sequential):
    """Two overlapping 3x3 convolutions of stride 2, each with a norm, and GELU between them; NCHW."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            norm_layer(dim // 2, **dd),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
            norm_layer(dim, **dd),
        )


class ConvMlp(nn.Module):
    """MLP whose hidden channels see their neighbors (DAT++); NCHW."""

    def __init__(self, dim: int, hidden: int, drop: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(dim, hidden, 1, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Conv2d(hidden, dim, 1, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, dim, H, W]`` to the same shape."""
        if torch.jit.is_scripting():
            x = self.fc1(x)
            return self.drop2(self.fc2(self.drop1(self.act(x + self.dwconv(x)))))
        x = apply_pointwise(self.fc1, x)
        out = finish_by_pieces(x.permute(0, 2, 3, 1), self.act, self.drop1, self.fc2, self.dwconv, residual=True)
        if out is not None:
            return self.drop2(out.permute(0, 3, 1, 2))
        x = apply_depthwise(self.dwconv, x, self.act, residual=True)
        return self.drop2(apply_pointwise(self.fc2, self.drop1(x)))


class Block(nn.Module):
    """Transformer block, optionally after a local perception unit; NCHW.

    Args:
        dim: Channels.
        attention: Attention on NHWC maps.
        mlp_ratio: Hidden channels of the MLP over its input's.
        convs: Whether the block has the convolutions of DAT++: before the attention and inside the MLP.
        drop: Dropout rate inside the MLP.
        drop_path: Stochastic depth of both branches.
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp_ratio: float,
        convs: bool,
        drop: float,
        drop_path: float,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = int(dim * mlp_ratio)
        self.lpu = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if convs else None
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attention
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = ConvMlp(dim, hidden, drop, **dd) if convs else Mlp(dim, hidden, drop=drop, use_conv=True, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, dim, H, W]`` to the same shape."""
        if self.lpu is not None:
            x = x + self.lpu(x) if torch.jit.is_scripting() else apply_depthwise(self.lpu, x, residual=True)
        y = self.norm1(x)
        y = self.attn(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x + self.drop_path1(y)
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class DAT(Pyramid):
    """Four stages that alternate local and deformable attention on maps of 1/4 to 1/32 of the image (DAT, DAT++).

    Args:
        img_size: Height and width of the images that the tables of the deformable attention's position bias are made
            for. Images of any size can be used.
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` or ``""``.
        embed_dim: Channels of the first stage; each further stage has twice as many.
        num_heads: Heads per stage.
        stages: Kinds of the blocks of each stage, a letter each: ``L`` windows, ``S`` shifted windows, ``N``
            neighborhoods, ``D`` deformable.
        groups: Groups of the deformable attention per stage, each with points of its own.
        offset_kernels: Kernel of the convolution that predicts the offsets, per stage.
        strides: Every how many positions there is a key, per stage.
        offset_range: Largest offset in cells of the grid of keys; None for free offsets.
        geometry: Geometry of the deformable attention, ``"dat"`` or ``"dat_pp"``.
        window_size: Height and width of the windows.
        kernel_size: Height and width of the neighborhoods.
        mlp_ratio: Hidden channels of the MLP over its input's.
        convs: Whether stem, downsampling and blocks have the convolutions of DAT++.
        out_norms: Whether each stage's output gets a norm, as in the published dense models; then ``forward_features``
            ends with the last of them instead of the classifier's norm.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after projections.
        drop_path_rate: Stochastic depth of the last block; blocks before it have proportionally less.

    Shape:
        Images ``[B, in_chans, H, W]`` of any size, at least 32x32 without ``convs``, to logits ``[B, num_classes]``.

    Raises:
        ValueError: If ``stages`` has an unknown letter.
    """

    output_fmt = "NCHW"
    symbolic_size: Final[bool] = False

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        stages: Sequence[str] = ("ND", "NDND", "NDNDNDNDNDNDNDNDND", "DD"),
        groups: Sequence[int] = (1, 2, 4, 8),
        offset_kernels: Sequence[int] = (9, 7, 5, 3),
        strides: Sequence[int] = (8, 4, 2, 1),
        offset_range: float | None = None,
        geometry: str = "dat_pp",
        window_size: int = 7,
        kernel_size: int = 7,
        mlp_ratio: float = 4.0,
        convs: bool = True,
        out_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        if unknown := set("".join(stages)) - set("LSND"):
            raise ValueError(f"stages are made of L, S, N and D; got {', '.join(map(repr, sorted(unknown)))}")
        depths = [len(kinds) for kinds in stages]
        channels = [embed_dim * 2**i for i in range(len(stages))]
        map_sizes = _map_sizes(img_size, len(stages), convs)
        drop_paths = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)

        def attention(kind: str, i: int) -> nn.Module:
            options = dict(proj_drop=proj_drop_rate, **dd)
            if kind == "N":
                return NeighborhoodAttention2d(channels[i], num_heads[i], kernel_size, **options)
            if kind == "D":
                return DeformableAttention2d(
                    channels[i],
                    num_heads[i],
                    groups[i],
                    offset_kernels[i],
                    strides[i],
                    map_sizes[i],
                    geometry,
                    offset_range,
                    **options,
                )
            # Half a window, rounded up: 4 of 7, where Swin shifts by 3.
            shift = (window_size + 1) // 2 if kind == "S" else 0
            return WindowAttention2d(channels[i], num_heads[i], window_size, shift, **options)

        built = []
        for i, (dim, kinds) in enumerate(zip(channels, stages, strict=True)):
            blocks = [
                Block(dim, attention(kind, i), mlp_ratio, convs, proj_drop_rate, drop_path, **dd)
                for kind, drop_path in zip(kinds, drop_paths[i], strict=True)
            ]
            kernel = dict(kernel_size=3, padding=1) if convs else dict(kernel_size=2)
            shrink = (
                nn.Sequential(nn.Conv2d(dim // 2, dim, stride=2, bias=False, **kernel, **dd), norm_layer(dim, **dd))
                if i > 0
                else nn.Identity()
            )
            built.append(Stage(shrink, blocks))
        super().__init__(
            ConvStem(in_chans, embed_dim, **dd) if convs else PatchStem(in_chans, embed_dim, **dd),
            built,
            channels=channels,
            norm=norm_layer(channels[-1], **dd),
            out_norms=[norm_layer(dim, **dd) for dim in channels] if out_norms else None,
            head=ClassifierHead(channels[-1], num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
        )
        self.convs = convs
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise as published; may be called again, after ``to_empty`` for instance.

        The authors' own code for it never runs, so that linear layers and convolutions have torch's initialisation.
        Tables of position bias are truncated normals: std 0.02 for neighborhoods, 0.01 for the others.
        """
        for module in self.modules():  # parents first: a linear layer's own way is the last word
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, WindowAttention2d):
                trunc_normal_(module.rpb, std=0.01)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resample the tables of the deformable attention's position bias for images of ``img_size``."""
        for stage, map_size in zip(self.stages, _map_sizes(img_size, len(self.stages), self.convs), strict=True):
            for block in stage.blocks:
                if isinstance(block.attn, DeformableAttention2d):
                    block.attn.set_map_size(map_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that optimizers should not decay; the tables of neighborhood attention are decayed."""
        names = set()
        for name, module in self.named_modules():
            if isinstance(module, WindowAttention2d):
                names.add(f"{name}.rpb")
            elif isinstance(module, DeformableAttention2d):
                names.add(f"{name}.rpe_table")
        return names


def _map_sizes(img_size: int | tuple[int, int], count: int, convs: bool) -> list[tuple[int, int]]:
    """Return height and width of each stage's map; convolutions round up, patches down."""
    height, width = to_2tuple(img_size)
    strides = [4 * 2**i for i in range(count)]
    if convs:
        return [(-(-height // stride), -(-width // stride)) for stride in strides]
    return [(height // stride, width // stride) for stride in strides]


# Buffers of the published models, and of early versions of them; all are computed from the shapes.
_BUFFERS = ("relative_position_index", "attn_mask", "reference", "q_grid")

# Published names of a block's parts to ours, with the block's number first.
_BLOCK_NAMES = (
    (r"layer_norms\.(\d+)\.norm", lambda m: f"blocks.{int(m[1]) // 2}.norm{int(m[1]) % 2 + 1}"),
    (r"local_perception_units\.(\d+)", r"blocks.\1.lpu"),
    (r"mlps\.(\d+)\.(?:chunk\.linear|linear)([12])(?:\.0)?", r"blocks.\1.mlp.fc\2"),
    (r"mlps\.(\d+)\.dwc", r"blocks.\1.mlp.dwconv"),
    (r"attns\.(\d+)\.proj_qkv", r"blocks.\1.attn.qkv"),
    (r"attns\.(\d+)\.proj_out", r"blocks.\1.attn.proj"),
    (r"attns\.(\d+)\.proj_([qkv])", r"blocks.\1.attn.\2"),
    (r"attns\.(\d+)\.conv_offset\.0", r"blocks.\1.attn.offset_conv"),
    (r"attns\.(\d+)\.conv_offset\.1\.norm", r"blocks.\1.attn.offset_norm"),
    (r"attns\.(\d+)\.conv_offset\.3", r"blocks.\1.attn.offset_proj"),
    (r"attns\.(\d+)\.relative_position_bias_table", r"blocks.\1.attn.rpb"),
    (r"attns\.(\d+)\.", r"blocks.\1.attn."),
)


def convert_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a published state dict to our names.

    Reads the authors' classification and dense files; leaves our own names alone.
    """
    if any(key.startswith("stem.") for key in state):
        return dict(state)
    converted = {}
    for key, value in state.items():
        if key.endswith(_BUFFERS):
            continue
        if key.endswith("relative_position_bias_table"):
            value = from_swin_table(value)
        elif ".chunk.linear" in key and key.endswith(".weight"):
            value = value[:, :, None, None]
        converted[_rename(key)] = value
    return converted


def resize_entry(key: str, value: Tensor, size: torch.Size, model: nn.Module) -> tuple[Tensor, str] | None:
    """Resample a table made for another size."""
    if key.endswith((".rpb", ".rpe_table")) and value.ndim == 3 and value.shape[0] == size[0]:
        return resize_bias_table(value, size[1:]), "bicubic"
    return None


def _rename(key: str) -> str:
    key = re.sub(r"^patch_proj\.(\d)(?:\.norm)?", r"stem.\1", key)
    key = re.sub(r"^down_projs\.(\d)\.(\d)(?:\.norm)?", lambda m: f"stages.{int(m[1]) + 1}.downsample.{m[2]}", key)
    key = re.sub(r"^cls_norm\.norm", "norm", key)
    key = re.sub(r"^cls_head", "head.fc", key)
    key = re.sub(r"^norms\.(\d)\.norm", r"out_norms.\1", key)
    if match := re.match(r"stages\.\d\.", key):
        for pattern, replacement in _BLOCK_NAMES:
            renamed, count = re.subn("^" + pattern, replacement, key[match.end() :])
            if count:
                return match[0] + renamed
    return key


_V1 = dict(
    geometry="dat",
    offset_range=2.0,
    strides=(1, 1, 1, 1),
    offset_kernels=(9, 7, 5, 3),
    convs=False,
)
_V1_SMALL = dict(embed_dim=96, num_heads=(3, 6, 12, 24), groups=(1, 1, 3, 6), **_V1)
_V1_BASE = dict(embed_dim=128, num_heads=(4, 8, 16, 32), groups=(1, 1, 4, 8), drop_path_rate=0.5, **_V1)
_V1_STAGES_TINY = ("LS", "LS", "LD" * 3, "LD")
_V1_STAGES = ("LS", "LS", "LD" * 9, "LD")

_PP_TINY = dict(embed_dim=64, num_heads=(2, 4, 8, 16), groups=(1, 2, 4, 8), drop_path_rate=0.2)
_PP_SMALL = dict(embed_dim=96, num_heads=(3, 6, 12, 24), groups=(1, 2, 3, 6), drop_path_rate=0.4)
_PP_BASE = dict(embed_dim=128, num_heads=(4, 8, 16, 32), groups=(2, 4, 8, 16), drop_path_rate=0.7)


def _dat(name: str, pretrained: bool, options: dict, config: dict) -> DAT:
    """Build a model of the first paper: windows, and deformable attention with a bounded range in the last stages."""
    return build(DAT, name, pretrained, convert_checkpoint, resize_entry, **{**config, **options})


def _dat_pp(name: str, pretrained: bool, options: dict, config: dict) -> DAT:
    """Build a model of the second paper: neighborhoods, and deformable attention with free offsets in all stages."""
    stages = ("ND", "NDND", "ND" * 9, "DD")
    return build(DAT, name, pretrained, convert_checkpoint, resize_entry, **{"stages": stages, **config, **options})


def _dense(drop_path_rate: float) -> dict:
    return {"out_norms": True, "drop_path_rate": drop_path_rate}


# What the published dense models of the family do otherwise, for `head_options_of`: the pyramid of Mask R-CNN
# alone is extended from its input.
head_options = {"dat_pp_*": {"mask_rcnn": {"extra_convs": "on_input"}}}
# The published dense settings, for `create_backbone(name, setting=...)`; they differ in stochastic depth alone.
# Detection's is that of Mask R-CNN 3x where it was trained, else of Cascade Mask R-CNN; segmentation's is UPerNet's.
dense_settings: dict[str, dict[str, dict]] = {
    "dat_pp_tiny": {"detection": _dense(0.3), "segmentation": _dense(0.3), "semantic_fpn": _dense(0.4)},
    "dat_pp_small": {"detection": _dense(0.5), "segmentation": _dense(0.5), "semantic_fpn": _dense(0.4)},
    "dat_pp_base": {"detection": _dense(0.8), "segmentation": _dense(0.7), "semantic_fpn": _dense(0.7)},
}


def _cfg(paper: str = "2201.00520", **options) -> dict:
    return IMAGENET_CFG | {
        "crop_mode": "squash",
        "first_conv": "stem.0",
        "license": "apache-2.0",
        "origin_url": "https://github.com/LeapLabTHU/DAT",
        "paper_ids": f"arXiv:{paper}",
        **options,
    }


def _pp_cfg(**options) -> dict:
    return _cfg("2309.01430", **options)


_LARGER = dict(input_size=(3, 384, 384), pool_size=(12, 12))

default_cfgs = cfgs_with_links(
    {
        "dat_tiny.leaplab_in1k": _cfg(),
        "dat_small.leaplab_in1k": _cfg(),
        "dat_base.leaplab_in1k": _cfg(),
        # Squashed to 438 pixels before the crop.
        "dat_base_384.leaplab_in1k": _cfg(crop_pct=0.8767, **_LARGER),
        "dat_pp_tiny.leaplab_in1k": _pp_cfg(),
        "dat_pp_small.leaplab_in1k": _pp_cfg(),
        "dat_pp_base.leaplab_in1k": _pp_cfg(),
        "dat_pp_base_384.leaplab_in1k": _pp_cfg(crop_pct=1.0, **_LARGER),
        "dat_p_tiny.untrained": _pp_cfg(notes=("no published weights",)),
    }
)


@register_model
def dat_tiny(pretrained: bool = False, **kwargs) -> DAT:
    """DAT-Tiny."""
    return _dat("dat_tiny", pretrained, kwargs, {**_V1_SMALL, "stages": _V1_STAGES_TINY, "drop_path_rate": 0.2})


@register_model
def dat_small(pretrained: bool = False, **kwargs) -> DAT:
    """DAT-Small."""
    return _dat("dat_small", pretrained, kwargs, {**_V1_SMALL, "stages": _V1_STAGES, "drop_path_rate": 0.3})


@register_model
def dat_base(pretrained: bool = False, **kwargs) -> DAT:
    """DAT-Base."""
    return _dat("dat_base", pretrained, kwargs, {**_V1_BASE, "stages": _V1_STAGES})


@register_model
def dat_base_384(pretrained: bool = False, **kwargs) -> DAT:
    """DAT-Base for images of 384 pixels, windows of 12."""
    return _dat(
        "dat_base_384", pretrained, kwargs, {**_V1_BASE, "stages": _V1_STAGES, "window_size": 12, "img_size": 384}
    )


@register_model
def dat_pp_tiny(pretrained: bool = False, **kwargs) -> DAT:
    """DAT-T++."""
    return _dat_pp("dat_pp_tiny", pretrained, kwargs, _PP_TINY)


@register_model
def dat_pp_small(pretrained: bool = False, **kwargs) -> DAT:
    """DAT-S++."""
    return _dat_pp("dat_pp_small", pretrained, kwargs, _PP_SMALL)


@register_model
def dat_pp_base(pretrained: bool = False, **kwargs) -> DAT:
    """DAT-B++."""
    return _dat_pp("dat_pp_base", pretrained, kwargs, _PP_BASE)


@register_model
def dat_pp_base_384(pretrained: bool = False, **kwargs) -> DAT:
    """DAT-B++ fine-tuned on images of 384 pixels; its tables are still those of 224."""
    return _dat_pp("dat_pp_base_384", pretrained, kwargs, {**_PP_BASE, "drop_path_rate": 0.6})


@register_model
def dat_p_tiny(pretrained: bool = False, **kwargs) -> DAT:
    """DAT-T+: DAT++'s attention without its convolutions, from the paper's ablation; no published weights."""
    return _dat_pp("dat_p_tiny", pretrained, kwargs, {**_PP_TINY, "convs": False})
