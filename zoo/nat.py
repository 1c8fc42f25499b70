"""NAT, DiNAT and their relatives: hierarchical and isotropic vision transformers with neighborhood attention.

Papers:
    * Neighborhood Attention Transformer, CVPR 2023, arXiv 2204.07143 (NAT, vitrpb)
    * Dilated Neighborhood Attention Transformer, arXiv 2209.15001 (DiNAT, DiNAT_s, isotropic variants)

Origin: github.com/SHI-Labs/Neighborhood-Attention-Transformer, code and weights MIT. Written anew on
`blocks.NeighborhoodAttention2d`; the published checkpoints, the authors' and the hub's transformers format, load
through `convert_checkpoint`.

A dilation is no part of the weights: ``dilations`` may be changed on any checkpoint, and the dense settings do. All but
``vitrpb`` take images of any size; maps smaller than a neighborhood are padded inside the attention.
"""

import re
from collections.abc import Sequence

import torch
from timm.layers import ClassifierHead, PatchEmbed, calculate_drop_path_rates, to_2tuple
from timm.models import register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from ..blocks import GlobalAttention2d, NeighborhoodAttention2d
from ..blocks.pyramid import Block, ConvDownsample, ConvStem
from ..blocks.relative_bias import resize_bias_table
from ._build import IMAGENET_CFG, build, cfgs_with_links
from ._pyramid import Pyramid, Stage

__all__ = ["NAT", "IsotropicNAT"]


class NAT(Pyramid):
    """Four stages of neighborhood attention on maps of 1/4 to 1/32 of the image (NAT, DiNAT, DiNAT_s).

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` or ``""``.
        embed_dim: Channels of the first stage; each further stage has twice as many.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        kernel_size: Width of the neighborhoods.
        dilations: A dilation for every block, ``[[1, 8, 1], ...]``; all 1 by default.
        mlp_ratio: Hidden channels of the MLP over its input's.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        layer_scale: Initial scale of each residual branch; none by default.
        patchwise: Whether stem and downsampling are Swin's patches (DiNAT_s) instead of convolutions.
        out_norms: Whether each stage's output gets a norm, as in the published dense models; then ``forward_features``
            ends with the last of them instead of the classifier's norm.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after projections.
        drop_path_rate: Stochastic depth of the last block; blocks before it have proportionally less.

    Shape:
        Images ``[B, in_chans, H, W]`` of any size to logits ``[B, num_classes]``.

    Raises:
        ValueError: If ``dilations`` does not name one for every block.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        patchwise: bool = False,
        out_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        if dilations is None:
            dilations = [[1] * depth for depth in depths]
        if [len(stage) for stage in dilations] != list(depths):
            raise ValueError(
                f"dilations must name one for each block of depths {list(depths)}; "
                f"got {[len(stage) for stage in dilations]} of them"
            )
        norm_layer = nn.LayerNorm
        channels = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        if patchwise:
            stem = PatchEmbed(
                None, 4, in_chans, embed_dim, norm_layer=norm_layer, output_fmt="NHWC", dynamic_img_pad=True, **dd
            )
            downsample = PatchMerging
        else:
            stem = ConvStem(in_chans, embed_dim, norm_layer, **dd)
            downsample = ConvDownsample
        stages = []
        for i, dim in enumerate(channels):
            blocks = [
                Block(
                    dim,
                    NeighborhoodAttention2d(
                        dim, num_heads[i], kernel_size, dilation, qkv_bias, proj_drop=proj_drop_rate, **dd
                    ),
                    mlp_ratio,
                    layer_scale,
                    proj_drop_rate,
                    drop_path,
                    norm_layer,
                    **dd,
                )
                for dilation, drop_path in zip(dilations[i], drop_paths[i], strict=True)
            ]
            shrink = nn.Identity() if i == 0 else downsample(dim // 2, norm_layer=norm_layer, **dd)
            stages.append(Stage(shrink, blocks))
        super().__init__(
            stem,
            stages,
            channels=channels,
            norm=norm_layer(channels[-1], **dd),
            out_norms=[norm_layer(dim, **dd) for dim in channels] if out_norms else None,
            head=ClassifierHead(channels[-1], num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
        )
        self.init_weights()


class IsotropicNAT(Pyramid):
    """Plain transformer on patches of 16 with neighborhood attention, or global with the same bias (vitrpb).

    The blocks are grouped into four stages of one resolution, so that intermediate outputs are those of a pyramid.

    Args:
        img_size: Height and width of the images; matters for global attention only, whose bias table belongs to it.
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` or ``""``.
        patch_size: Height and width of a patch.
        embed_dim: Channels.
        depth: Blocks; a multiple of 4.
        num_heads: Heads.
        kernel_size: Width of the neighborhoods; None for global attention.
        dilations: A dilation for every block; all 1 by default.
        mlp_ratio: Hidden channels of the MLP over its input's.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after projections.
        drop_path_rate: Stochastic depth of the last block; blocks before it have proportionally less.

    Shape:
        Images ``[B, in_chans, H, W]``, padded to a multiple of the patch size, to logits ``[B, num_classes]``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        kernel_size: int | None = 7,
        dilations: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        dilations = [1] * depth if dilations is None else list(dilations)
        if len(dilations) != depth or depth % 4:
            raise ValueError(
                f"depth must be a multiple of 4, with a dilation for each block; got {depth} and {len(dilations)}"
            )
        norm_layer = nn.LayerNorm
        map_size = _map_size(img_size, patch_size)
        drop_paths = calculate_drop_path_rates(drop_path_rate, depth)

        def attention(dilation: int) -> nn.Module:
            if kernel_size is None:
                return GlobalAttention2d(embed_dim, num_heads, map_size, qkv_bias, proj_drop_rate, **dd)
            return NeighborhoodAttention2d(
                embed_dim, num_heads, kernel_size, dilation, qkv_bias, proj_drop=proj_drop_rate, **dd
            )

        blocks = [
            Block(embed_dim, attention(dilation), mlp_ratio, None, proj_drop_rate, drop_path, norm_layer, **dd)
            for dilation, drop_path in zip(dilations, drop_paths, strict=True)
        ]
        quarter = depth // 4
        super().__init__(
            PatchEmbed(
                None,
                patch_size,
                in_chans,
                embed_dim,
                norm_layer=norm_layer,
                output_fmt="NHWC",
                dynamic_img_pad=True,
                **dd,
            ),
            [Stage(nn.Identity(), blocks[i : i + quarter]) for i in range(0, depth, quarter)],
            channels=[embed_dim] * 4,
            reductions=[patch_size] * 4,
            norm=norm_layer(embed_dim, **dd),
            head=ClassifierHead(embed_dim, num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
        )
        self.patch_size = patch_size
        self.init_weights()

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resample the bias tables of global attention for images of ``img_size``; nothing else depends on it."""
        for module in self.modules():
            if isinstance(module, GlobalAttention2d):
                module.set_map_size(_map_size(img_size, self.patch_size))


def _map_size(img_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    height, width = to_2tuple(img_size)
    return -(-height // patch_size), -(-width // patch_size)


# From the hub's transformers format to the authors'.
_HUB_NAMES = (
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.norm.", "patch_embed.norm."),
    ("encoder.levels.", "levels."),
    (".layers.", ".blocks."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".attention.self.", ".attn."),
    (".attention.output.dense.", ".attn.proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
)


def _from_hub(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a checkpoint of transformers' NAT or DiNAT to the authors' names."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        key = key.removeprefix("nat.").removeprefix("dinat.")
        for hub, replacement in _HUB_NAMES:
            key = key.replace(hub, replacement)
        if key.startswith("layernorm."):
            key = key.replace("layernorm.", "norm.")
        elif key.startswith("classifier."):
            key = key.replace("classifier.", "head.")
        elif match := re.fullmatch(r"hidden_states_norms\.stage(\d)\.(\w+)", key):
            key = f"norm{int(match[1]) - 1}.{match[2]}"
        if key.endswith("layer_scale_parameters"):
            stem = key.removesuffix("layer_scale_parameters")
            renamed[stem + "gamma1"], renamed[stem + "gamma2"] = value.unbind(0)
        else:
            renamed[key] = value
    for key in [key for key in renamed if ".attn.query." in key]:
        parts = [renamed.pop(key.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        renamed[key.replace(".query.", ".qkv.")] = torch.cat(parts)
    return renamed


def convert_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a published state dict to ``model``'s names.

    Reads the authors' classification and dense files and the hub's transformers format; leaves our own names alone.
    """
    if any(key.startswith("stem.") for key in state):
        return dict(state)
    if any("patch_embeddings.projection" in key for key in state):
        state = _from_hub(state)
    isotropic = isinstance(model, IsotropicNAT)
    quarter = len(model.stages[0].blocks)
    converted = {}
    for key, value in state.items():
        if key.endswith("relative_position_index"):
            continue
        key = key.replace("patch_embed.", "stem.")
        if isotropic:
            key = re.sub(
                r"^layers\.(\d+)", lambda m: f"stages.{int(m[1]) // quarter}.blocks.{int(m[1]) % quarter}", key
            )
        key = re.sub(r"^(?:levels|layers)\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", key)
        key = re.sub(r"^(?:levels|layers)\.", "stages.", key)
        key = re.sub(r"\.gamma([12])$", r".ls\1.gamma", key)
        key = re.sub(r"^norm(\d)\.", r"out_norms.\1.", key)
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        converted[key] = value
    return converted


def resize_entry(key: str, value: Tensor, size: torch.Size, model: nn.Module) -> tuple[Tensor, str] | None:
    """Resample a bias table of another kernel size."""
    return (resize_bias_table(value, size[1:]), "bicubic") if key.endswith(".rpb") and value.ndim == 3 else None


# The published schedules: in every stage blocks alternate between no dilation and the next one of the stage's list.
_SCHEDULES = {
    "224": ((8,), (4,), (2,), (1,)),
    "384": ((13,), (6,), (3,), (1,)),
    "detection": ((28,), (7, 14), (3, 5, 7), (3,)),
    "ade20k_512": ((16,), (4, 8), (2, 3, 4), (2,)),
    "ade20k_640": ((20,), (5, 10), (2, 3, 4, 5, 2, 3, 4, 5, 5), (2,)),
    "mask2former": ((14,), (4, 7), (2, 3, 2, 3, 2, 3, 2, 3, 3), (1,)),
    "oneformer_1280": ((28,), (7, 14), (3, 5, 5, 7, 3, 5, 5, 7, 7), (3,)),
    "oneformer_cityscapes": ((18,), (5, 9), (2, 3, 4), (2,)),
}


def _alternate(schedule: str, depths: Sequence[int]) -> list[list[int]]:
    """Return the dilation of every block of a model with ``depths`` under a published schedule."""
    dilations = []
    for steps, depth in zip(_SCHEDULES[schedule], depths, strict=True):
        # A stage of two blocks has one dilated block, and the published models give it the widest dilation.
        steps = steps[-1:] if depth == 2 else steps
        dilations.append([1 if j % 2 == 0 else steps[j // 2 % len(steps)] for j in range(depth)])
    return dilations


_MINI = dict(embed_dim=64, depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0, drop_path_rate=0.2)
_TINY = dict(embed_dim=64, depths=(3, 4, 18, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0, drop_path_rate=0.2)
_SMALL = dict(embed_dim=96, depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), mlp_ratio=2.0, drop_path_rate=0.3)
_BASE = dict(embed_dim=128, depths=(3, 4, 18, 5), num_heads=(4, 8, 16, 32), mlp_ratio=2.0, drop_path_rate=0.5)
_LARGE = dict(embed_dim=192, depths=(3, 4, 18, 5), num_heads=(6, 12, 24, 48), mlp_ratio=2.0, drop_path_rate=0.35)
_S_TINY = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), mlp_ratio=4.0, patchwise=True)
_S_SMALL = dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), mlp_ratio=4.0, patchwise=True)
_S_BASE = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), mlp_ratio=4.0, patchwise=True)
_S_LARGE = dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), mlp_ratio=4.0, patchwise=True)
_ISO_SMALL = dict(embed_dim=384, num_heads=12, drop_path_rate=0.1)
_ISO_BASE = dict(embed_dim=768, num_heads=24, drop_path_rate=0.4)


def _nat(name: str, pretrained: bool, options: dict, config: dict) -> NAT:
    return build(NAT, name, pretrained, convert_checkpoint, resize_entry, **{**config, **options})


def _dinat(name: str, pretrained: bool, options: dict, config: dict, schedule: str = "224") -> NAT:
    dilations = _alternate(schedule, config["depths"])
    return build(
        NAT, name, pretrained, convert_checkpoint, resize_entry, **{"dilations": dilations, **config, **options}
    )


def _isotropic(name: str, pretrained: bool, options: dict, config: dict) -> IsotropicNAT:
    return build(IsotropicNAT, name, pretrained, convert_checkpoint, resize_entry, **{**config, **options})


def _dense(drop_path_rate: float, depths: Sequence[int] | None = None, schedule: str | None = None, **options) -> dict:
    dilations = {} if schedule is None else {"dilations": _alternate(schedule, depths)}
    return {"out_norms": True, "drop_path_rate": drop_path_rate, **dilations, **options}


# The published dense settings, for `create_backbone(name, setting=...)`. Detection's stochastic depth is that of Mask
# R-CNN where it was trained, else of Cascade Mask R-CNN.
dense_settings: dict[str, dict[str, dict]] = {
    "nat_atto": {"detection": _dense(0.0), "segmentation": _dense(0.0)},
    "nat_mini": {"detection": _dense(0.2), "segmentation": _dense(0.2)},
    "nat_tiny": {"detection": _dense(0.2), "segmentation": _dense(0.3)},
    "nat_small": {"detection": _dense(0.35), "segmentation": _dense(0.5)},
    "nat_base": {"detection": _dense(0.5), "segmentation": _dense(0.5)},
}
for _name, _config, _detection, _segmentation in (
    ("dinat_mini", _MINI, 0.2, 0.2),
    ("dinat_tiny", _TINY, 0.2, 0.3),
    ("dinat_small", _SMALL, 0.35, 0.5),
    ("dinat_base", _BASE, 0.6, 0.5),
    ("dinat_s_tiny", _S_TINY, 0.2, 0.3),
    ("dinat_s_small", _S_SMALL, 0.35, 0.3),
    ("dinat_s_base", _S_BASE, 0.6, 0.3),
):
    dense_settings[_name] = {
        "detection": _dense(_detection, _config["depths"], "detection"),
        "segmentation": _dense(_segmentation, _config["depths"], "ade20k_512"),
    }
for _name in ("dinat_s_large", "dinat_s_large_384"):
    dense_settings[_name] = {
        "detection": _dense(0.6, _S_LARGE["depths"], "detection"),
        "segmentation": _dense(0.3, _S_LARGE["depths"], "ade20k_640"),
    }
for _name in ("dinat_large", "dinat_large_384", "dinat_large_384_11x11"):
    dense_settings[_name] = {
        "detection": _dense(0.6, _LARGE["depths"], "detection", kernel_size=7),
        "segmentation": _dense(0.3, _LARGE["depths"], "ade20k_640", kernel_size=7),
        "mask2former": _dense(0.3, _LARGE["depths"], "mask2former", kernel_size=11),
        "oneformer": _dense(0.3, _LARGE["depths"], "ade20k_640", kernel_size=11),
        "oneformer_1280": _dense(0.3, _LARGE["depths"], "oneformer_1280", kernel_size=11),
        "oneformer_cityscapes": _dense(0.3, _LARGE["depths"], "oneformer_cityscapes", kernel_size=7),
    }


def _cfg(paper: str = "2204.07143", **options) -> dict:
    return IMAGENET_CFG | {
        "first_conv": "stem.proj.0",
        "license": "mit",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        "paper_ids": f"arXiv:{paper}",
        **options,
    }


def _dinat_cfg(**options) -> dict:
    return _cfg("2209.15001", **options)


_LARGER = dict(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)
_PATCHES = dict(first_conv="stem.proj")
_PLAIN = dict(first_conv="stem.proj", pool_size=(14, 14))
# Trained here on grey digits, given as three channels.
_DIGITS = dict(
    input_size=(3, 32, 32),
    pool_size=(1, 1),
    num_classes=10,
    label_names=tuple("0123456789"),
    crop_pct=1.0,
    mean=(0.69,) * 3,
    std=(0.38,) * 3,
)

default_cfgs = cfgs_with_links(
    {
        "nat_atto.foveate_digits": _cfg(origin_url="", **_DIGITS),
        "nat_mini.shi_in1k": _cfg(),
        "nat_tiny.shi_in1k": _cfg(),
        "nat_small.shi_in1k": _cfg(),
        "nat_base.shi_in1k": _cfg(),
        "dinat_mini.shi_in1k": _dinat_cfg(),
        "dinat_tiny.shi_in1k": _dinat_cfg(),
        "dinat_small.shi_in1k": _dinat_cfg(),
        "dinat_base.shi_in1k": _dinat_cfg(),
        "dinat_large.shi_in22k_ft_in1k": _dinat_cfg(),
        "dinat_large.shi_in22k": _dinat_cfg(num_classes=21841),
        "dinat_large_384.shi_in22k_ft_in1k": _dinat_cfg(**_LARGER),
        "dinat_large_384_11x11.shi_in22k_ft_in1k": _dinat_cfg(**_LARGER),
        "dinat_large_384_11x11.shi_in22k": _dinat_cfg(num_classes=21841, **_LARGER),
        "dinat_s_tiny.shi_in1k": _dinat_cfg(**_PATCHES),
        "dinat_s_small.shi_in1k": _dinat_cfg(**_PATCHES),
        "dinat_s_base.shi_in1k": _dinat_cfg(**_PATCHES),
        "dinat_s_large.shi_in22k_ft_in1k": _dinat_cfg(**_PATCHES),
        "dinat_s_large.shi_in22k": _dinat_cfg(num_classes=21841, **_PATCHES),
        "dinat_s_large_384.shi_in22k_ft_in1k": _dinat_cfg(**_PATCHES | _LARGER),
        "nat_isotropic_small.shi_in1k": _dinat_cfg(**_PLAIN),
        "nat_isotropic_base.shi_in1k": _dinat_cfg(**_PLAIN),
        "dinat_isotropic_small.shi_in1k": _dinat_cfg(**_PLAIN),
        "dinat_isotropic_base.shi_in1k": _dinat_cfg(**_PLAIN),
        "vitrpb_small.shi_in1k": _dinat_cfg(fixed_input_size=True, **_PLAIN),
        "vitrpb_base.shi_in1k": _dinat_cfg(fixed_input_size=True, **_PLAIN),
    }
)


@register_model
def nat_atto(pretrained: bool = False, **kwargs) -> NAT:
    """NAT for demos and tests, 0.5 M parameters, kernel 3; ours. Its weights, in this package, tell digits."""
    config = dict(embed_dim=16, depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8), mlp_ratio=2.0, kernel_size=3)
    return _nat("nat_atto", pretrained, kwargs, config)


@register_model
def nat_mini(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Mini."""
    return _nat("nat_mini", pretrained, kwargs, _MINI)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Tiny."""
    return _nat("nat_tiny", pretrained, kwargs, _TINY)


@register_model
def nat_small(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Small; unlike DiNAT-Small it has layer scale."""
    return _nat("nat_small", pretrained, kwargs, {**_SMALL, "layer_scale": 1e-5})


@register_model
def nat_base(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Base."""
    return _nat("nat_base", pretrained, kwargs, {**_BASE, "layer_scale": 1e-5})


@register_model
def dinat_mini(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Mini."""
    return _dinat("dinat_mini", pretrained, kwargs, _MINI)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Tiny."""
    return _dinat("dinat_tiny", pretrained, kwargs, _TINY)


@register_model
def dinat_small(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Small."""
    return _dinat("dinat_small", pretrained, kwargs, _SMALL)


@register_model
def dinat_base(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Base."""
    return _dinat("dinat_base", pretrained, kwargs, {**_BASE, "layer_scale": 1e-5})


@register_model
def dinat_large(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Large."""
    return _dinat("dinat_large", pretrained, kwargs, _LARGE)


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Large for images of 384 pixels."""
    return _dinat("dinat_large_384", pretrained, kwargs, _LARGE, "384")


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Large for images of 384 pixels, kernel 11."""
    return _dinat("dinat_large_384_11x11", pretrained, kwargs, {**_LARGE, "kernel_size": 11})


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT_s-Tiny: DiNAT's attention in Swin's skeleton."""
    return _dinat("dinat_s_tiny", pretrained, kwargs, {**_S_TINY, "drop_path_rate": 0.2})


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT_s-Small: DiNAT's attention in Swin's skeleton."""
    return _dinat("dinat_s_small", pretrained, kwargs, {**_S_SMALL, "drop_path_rate": 0.3})


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT_s-Base: DiNAT's attention in Swin's skeleton."""
    return _dinat("dinat_s_base", pretrained, kwargs, {**_S_BASE, "drop_path_rate": 0.5})


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT_s-Large: DiNAT's attention in Swin's skeleton."""
    return _dinat("dinat_s_large", pretrained, kwargs, {**_S_LARGE, "drop_path_rate": 0.35})


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT_s-Large for images of 384 pixels."""
    return _dinat("dinat_s_large_384", pretrained, kwargs, {**_S_LARGE, "drop_path_rate": 0.35}, "384")


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs) -> IsotropicNAT:
    """Isotropic NAT-Small."""
    return _isotropic("nat_isotropic_small", pretrained, kwargs, _ISO_SMALL)


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs) -> IsotropicNAT:
    """Isotropic NAT-Base."""
    return _isotropic("nat_isotropic_base", pretrained, kwargs, _ISO_BASE)


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs) -> IsotropicNAT:
    """Isotropic DiNAT-Small: every other block has dilation 2."""
    return _isotropic("dinat_isotropic_small", pretrained, kwargs, {**_ISO_SMALL, "dilations": (1, 2) * 6})


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs) -> IsotropicNAT:
    """Isotropic DiNAT-Base: every other block has dilation 2."""
    return _isotropic("dinat_isotropic_base", pretrained, kwargs, {**_ISO_BASE, "dilations": (1, 2) * 6})


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs) -> IsotropicNAT:
    """ViT-Small with relative position bias: the isotropic models' baseline."""
    return _isotropic("vitrpb_small", pretrained, kwargs, {**_ISO_SMALL, "kernel_size": None})


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs) -> IsotropicNAT:
    """ViT-Base with relative position bias: the isotropic models' baseline."""
    return _isotropic("vitrpb_base", pretrained, kwargs, {**_ISO_BASE, "kernel_size": None})
