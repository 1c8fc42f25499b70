"""VAN and MSCAN: a pyramid of large kernel attention, and the backbone of SegNeXt, which has strips in its place.

Papers: Visual Attention Network, Guo et al., arXiv 2202.09741; SegNeXt: Rethinking Convolutional Attention Design for
Semantic Segmentation, Guo et al., NeurIPS 2022, arXiv 2209.08575.

Origin: github.com/Visual-Attention-Network, VAN-Classification, VAN-Segmentation and SegNeXt, Apache-2.0 with the
request to contact the authors for commercial use. Written anew on `blocks.LargeKernelAttention2d`; files of the
authors, of mmpretrain, mmseg and transformers load through `convert_checkpoint`.

A stage ends with a norm, whose output is both a feature and the next stage's input. Classifiers were trained with norms
of eps 1e-6, as were the dense models of the spring of 2022 (Semantic FPN, Light-Ham and HamNet on VAN); later dense
models, and MSCAN, have 1e-5: the dense settings set it.

No classifier of MSCAN was published. Ours is a composition: VAN's tail, the mean of the last map and a linear layer,
with VAN's eps; the published backbones fit it, and a new classifier starts from them.

VAN's classifiers of ImageNet-1k expect images normalised by a mean and std of 0.5; those of ImageNet-22k, the authors'
only files of b4 to b6, and all dense models ImageNet's statistics. An ImageNet-1k file of b4 came by way of mmpretrain.
"""

import re
from collections.abc import Sequence

import torch
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, LayerScale2d, calculate_drop_path_rates
from timm.models import register_model
from torch import Tensor, nn

from ..blocks.depthwise import apply_depthwise
from ..blocks.initialize import init_linear
from ..blocks.large_kernel import LargeKernelAttention2d
from ..blocks.layout import channels_last
from ..blocks.pieces import finish_by_pieces, may_take_pieces, sum_over_channels
from ..blocks.pointwise import apply_pointwise
from ..blocks.pyramid import BatchNormDownsample, BatchNormStem
from ..kernels.backends import channels_come_last
from ._build import IMAGENET_CFG, build, cfgs_with_links
from ._pyramid import Pyramid, Stage

__all__ = ["VAN"]


class ConvFeedForward(nn.Module):
    """Two 1x1 convolutions with a 3x3 depthwise one and a GELU between them; NCHW."""

    def __init__(self, dim: int, hidden: int, drop: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(dim, hidden, 1, **dd)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self._takes_pieces(x):
            return self._forward_in_pieces(x)
        if torch.jit.is_scripting():
            return self.drop(self.fc2(self.drop(self.act(self.conv(self.fc1(x))))))
        x = apply_pointwise(self.fc1, x)
        out = finish_by_pieces(x.permute(0, 2, 3, 1), self.act, self.drop, self.fc2, self.conv)
        if out is not None:
            return out.permute(0, 3, 1, 2)
        x = self.drop(apply_depthwise(self.conv, x, self.act))
        return self.drop(apply_pointwise(self.fc2, x))

    @torch.jit.ignore
    def _takes_pieces(self, x: Tensor) -> bool:
        """Return whether hidden maps are so large that their way to memory and back costs more than the products."""
        if self.training or not may_take_pieces(x, self.fc1, self.conv, self.act, self.fc2, self.drop):
            return False
        large = x.shape[2] * x.shape[3] > _LARGE_MAP and channels_come_last(x)
        return large and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")

    @torch.jit.ignore
    def _forward_in_pieces(self, x: Tensor) -> Tensor:
        x = sum_over_channels(x.permute(0, 2, 3, 1), self.fc1, self.conv, self.act, self.fc2, _PIECE)
        return x.permute(0, 3, 1, 2)


# Positions beyond which hidden maps are taken in pieces of so many channels.
_LARGE_MAP, _PIECE = 1024, 128


class Block(nn.Module):
    """Large kernel attention and a feed-forward network, each after a batch norm and with a scale; NCHW."""

    def __init__(self, dim: int, gate: str, mlp_ratio: float, drop: float, drop_path: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.attn = LargeKernelAttention2d(dim, gate, channels_first=True, **dd)
        self.ls1 = LayerScale2d(dim, _LAYER_SCALE, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.mlp = ConvFeedForward(dim, int(dim * mlp_ratio), drop, **dd)
        self.ls2 = LayerScale2d(dim, _LAYER_SCALE, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


_LAYER_SCALE = 0.01


class Stem(nn.Module):
    """VAN's: a 7x7 convolution of stride 4, then a norm; NCHW."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_chans, dim, 7, stride=4, padding=3, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, in_chans, H, W]`` to ``[B, dim, ceil(H / 4), ceil(W / 4)]``, channels last in memory."""
        return self.norm(self.conv(channels_last(x)))


class VAN(Pyramid):
    """Four stages of large kernel attention on maps of 1/4 to 1/32 of the image.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` or ``""``.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        mlp_ratios: Hidden channels of the feed-forward network over its input's, per stage.
        mscan: Whether this is MSCAN: strips in the attention, and a stem of two convolutions.
        norm_eps: Of the norms after each stage.
        output_stride: Of the last map, 8, 16 or 32: stages that would go beyond keep the size of their input. Their
            kernels are not dilated for it, as in the published HamNet.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout in the feed-forward networks.
        drop_path_rate: Stochastic depth of the last block; blocks before it have proportionally less.

    Shape:
        Images ``[B, in_chans, H, W]`` of any size, down to a pixel, to logits ``[B, num_classes]``.

    Raises:
        ValueError: If there is no such output stride.
    """

    output_fmt = "NCHW"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 4, 2),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        mscan: bool = False,
        norm_eps: float = 1e-6,
        output_stride: int = 32,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32; got {output_stride}")
        dd = {"device": device, "dtype": dtype}
        gate = "strips" if mscan else "dilated"
        reductions = [min(4 * 2**i, output_stride) for i in range(len(depths))]
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(embed_dims):
            blocks = [Block(dim, gate, mlp_ratios[i], proj_drop_rate, drop_path, **dd) for drop_path in drop_paths[i]]
            downsample = nn.Identity()
            if i > 0:
                downsample = BatchNormDownsample(embed_dims[i - 1], dim, reductions[i] // reductions[i - 1], **dd)
            stages.append(Stage(downsample, blocks, LayerNorm2d(dim, eps=norm_eps, **dd)))
        super().__init__(
            (BatchNormStem if mscan else Stem)(in_chans, embed_dims[0], **dd),
            stages,
            channels=embed_dims,
            reductions=reductions,
            norm=nn.Identity(),
            head=ClassifierHead(embed_dims[-1], num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise as published; may be called again, after ``to_empty`` for instance."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                height, width = module.kernel_size
                fan_out = height * width * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                init_linear(module)
            elif isinstance(module, LayerScale2d):
                nn.init.constant_(module.gamma, _LAYER_SCALE)
            elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.reset_parameters()


def convert_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a published state dict to ``model``'s names; leaves our own names alone.

    Reads the authors' names, those of mmpretrain and mmseg, and those of transformers, whose own final norm is left out
    since nothing there uses it.
    """
    if any(key.startswith("stem.") for key in state):
        return dict(state)
    gate = _STRIPS if isinstance(model.stem, BatchNormStem) else _DILATED
    converted = {}
    for key, value in state.items():
        if key.startswith("van.layernorm."):
            continue
        key = _from_transformers(key)
        # mmpretrain's names, and mmseg's, which differ in the depthwise convolution alone.
        key = re.sub(r"^(patch_embed\d)\.projection\.", r"\1.proj.", key).replace("head.fc.", "head.")
        key = re.sub(r"^blocks(\d)\.", r"block\1.", key).replace(".mlp.dwconv.dwconv.", ".mlp.dwconv.")
        key = key.replace(".DW_conv.", ".conv0.").replace(".DW_D_conv.", ".conv_spatial.")
        converted[_renamed(key, gate)] = value
    return converted


# Of the gate, which the authors call spatial_gating_unit.
_DILATED = {"conv0": "local", "conv_spatial": "dilated", "conv1": "mix"}
_STRIPS = {"conv0": "local", "conv3": "mix"} | {
    f"conv{i}_{j + 1}": f"{kind}.{i}" for i in range(3) for j, kind in enumerate(("rows", "columns"))
}
_LAYERS = {
    "attn.proj_1": "attn.proj1",
    "attn.proj_2": "attn.proj2",
    "mlp.dwconv": "mlp.conv",
}
# transformers' names of what is in a block.
_TRANSFORMERS = {
    "pre_normomalization": "norm1",
    "post_normalization": "norm2",
    "attention.pre_projection.conv": "attn.proj_1",
    "attention.post_projection": "attn.proj_2",
    "attention.attention_layer.attention.depth_wise": "attn.spatial_gating_unit.conv0",
    "attention.attention_layer.attention.depth_wise_dilated": "attn.spatial_gating_unit.conv_spatial",
    "attention.attention_layer.attention.point_wise": "attn.spatial_gating_unit.conv1",
    "mlp.in_dense": "mlp.fc1",
    "mlp.depth_wise": "mlp.dwconv",
    "mlp.out_dense": "mlp.fc2",
}


def _from_transformers(key: str) -> str:
    """Return the authors' name of an entry of transformers' files; others as they are."""
    if key.startswith("classifier."):
        return key.replace("classifier.", "head.")
    match = re.fullmatch(r"van\.encoder\.stages\.(\d)\.(.+)\.(\w+)", key)
    if not match:
        return key
    stage, layer, leaf = int(match[1]) + 1, match[2], match[3]
    if inner := re.fullmatch(r"layers\.(\d+)\.(.+)", layer):
        block = f"block{stage}.{inner[1]}"
        if inner[2] in ("attention_scaling", "mlp_scaling"):
            return f"{block}.layer_scale_{1 if inner[2] == 'attention_scaling' else 2}"
        return f"{block}.{_TRANSFORMERS.get(inner[2], inner[2])}.{leaf}"
    names = {
        "embeddings.convolution": f"patch_embed{stage}.proj",
        "embeddings.normalization": f"patch_embed{stage}.norm",
        "normalization": f"norm{stage}",
    }
    return f"{names.get(layer, layer)}.{leaf}"


def _renamed(key: str, gate: dict[str, str]) -> str:
    """Return our name of an entry with the authors'."""
    if match := re.fullmatch(r"patch_embed1\.proj\.(\d)\.(\w+)", key):
        layer = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2"}.get(match[1], match[1])
        return f"stem.{layer}.{match[2]}"
    if match := re.fullmatch(r"patch_embed(\d)\.(proj|norm)\.(\w+)", key):
        stage, layer = int(match[1]) - 1, {"proj": "conv", "norm": "norm"}[match[2]]
        return f"{f'stages.{stage}.downsample' if stage else 'stem'}.{layer}.{match[3]}"
    if match := re.fullmatch(r"block(\d)\.(\d+)\.layer_scale_(\d)", key):
        return f"stages.{int(match[1]) - 1}.blocks.{match[2]}.ls{match[3]}.gamma"
    if match := re.fullmatch(r"block(\d)\.(\d+)\.(.+)\.(\w+)", key):
        layer = match[3]
        if layer.startswith("attn.spatial_gating_unit."):
            part = layer.removeprefix("attn.spatial_gating_unit.")
            layer = f"attn.gate.{gate.get(part, part)}"
        return f"stages.{int(match[1]) - 1}.blocks.{match[2]}.{_LAYERS.get(layer, layer)}.{match[4]}"
    if match := re.fullmatch(r"norm(\d)\.(\w+)", key):
        return f"stages.{int(match[1]) - 1}.norm.{match[2]}"
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)


_B0 = dict(embed_dims=(32, 64, 160, 256), depths=(3, 3, 5, 2), drop_path_rate=0.1)
_B1 = dict(embed_dims=(64, 128, 320, 512), depths=(2, 2, 4, 2), drop_path_rate=0.1)
_B2 = dict(embed_dims=(64, 128, 320, 512), depths=(3, 3, 12, 3), drop_path_rate=0.1)
_B3 = dict(embed_dims=(64, 128, 320, 512), depths=(3, 5, 27, 3), drop_path_rate=0.2)
_B4 = dict(embed_dims=(64, 128, 320, 512), depths=(3, 6, 40, 3), drop_path_rate=0.2)
_B5 = dict(embed_dims=(96, 192, 480, 768), depths=(3, 3, 24, 3), drop_path_rate=0.2)
_B6 = dict(embed_dims=(96, 192, 384, 768), depths=(6, 6, 90, 6), drop_path_rate=0.3)


def _van(name: str, pretrained: bool, options: dict, config: dict) -> VAN:
    return build(VAN, name, pretrained, convert_checkpoint, **{**config, **options})


def _van_settings(upernet: float, semantic_fpn: float | None = None, ham: float | None = None) -> dict[str, dict]:
    """Return VAN's dense settings from the stochastic depth of UPerNet, Semantic FPN and Hamburger's heads."""
    now = {"norm_eps": 1e-5, "drop_path_rate": upernet}
    before = {"norm_eps": 1e-6, "drop_path_rate": upernet if semantic_fpn is None else semantic_fpn}
    hams = {"norm_eps": 1e-6, "drop_path_rate": upernet if ham is None else ham}
    return {
        "detection": now,
        "segmentation": now,
        "semantic_fpn": before,
        "light_ham": hams,
        "ham_net": {**hams, "output_stride": 8},
    }


def _mscan_settings(drop_path_rate: float) -> dict[str, dict]:
    dense = {"norm_eps": 1e-5, "drop_path_rate": drop_path_rate}
    return {"detection": dense, "segmentation": dense}


# What the published dense models of the family do otherwise, for `head_options_of`: SegNeXt's images are stretched.
head_options = {"mscan_*": {"images": {"divisor": 32}}}
# The published dense settings, for `create_backbone(name, setting=...)`. Segmentation is UPerNet of VAN, SegNeXt of
# MSCAN; the other heads on VAN are older. No detector was published: that setting is segmentation's.
dense_settings: dict[str, dict[str, dict]] = {
    "van_b0": _van_settings(0.1, 0.2, 0.1),
    "van_b1": _van_settings(0.1, 0.2, 0.1),
    "van_b2": _van_settings(0.1, 0.2, 0.1),
    "van_b3": _van_settings(0.3, 0.3, 0.25),
    "van_b4": _van_settings(0.4, 0.4, 0.3),
    "van_b5": _van_settings(0.4),
    "van_b6": _van_settings(0.5),
    "mscan_t": _mscan_settings(0.1),
    "mscan_s": _mscan_settings(0.1),
    "mscan_b": _mscan_settings(0.1),
    "mscan_l": _mscan_settings(0.3),
}


def _cfg(**options) -> dict:
    return IMAGENET_CFG | {
        "first_conv": "stem.conv",
        "license": "apache-2.0",
        "origin_url": "https://github.com/Visual-Attention-Network/VAN-Classification",
        "paper_name": "Visual Attention Network",
        "paper_ids": "arXiv:2202.09741",
        **options,
    }


# What the authors evaluated with: timm's settings for ViT.
_IN1K = dict(crop_pct=0.9, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def _mscan_cfg(**options) -> dict:
    return _cfg(
        first_conv="stem.conv1",
        origin_url="https://github.com/Visual-Attention-Network/SegNeXt",
        paper_name="SegNeXt: Rethinking Convolutional Attention Design for Semantic Segmentation",
        paper_ids="arXiv:2209.08575",
        **options,
    )


default_cfgs = cfgs_with_links(
    {
        "van_b0.mcg_in1k": _cfg(**_IN1K),
        "van_b1.mcg_in1k": _cfg(**_IN1K),
        "van_b2.mcg_in1k": _cfg(**_IN1K),
        "van_b3.mcg_in1k": _cfg(**_IN1K),
        "van_b4.mcg_in1k": _cfg(**_IN1K),
        "van_b4.mcg_in22k": _cfg(num_classes=21841),
        "van_b5.untrained": _cfg(),
        "van_b5.mcg_in22k": _cfg(num_classes=21841),
        "van_b6.untrained": _cfg(),
        "van_b6.mcg_in22k": _cfg(num_classes=21841),
        "mscan_t.mcg_in1k": _mscan_cfg(**_IN1K),
        "mscan_s.mcg_in1k": _mscan_cfg(**_IN1K),
        "mscan_b.mcg_in1k": _mscan_cfg(**_IN1K),
        "mscan_l.mcg_in1k": _mscan_cfg(**_IN1K),
    }
)


@register_model
def van_b0(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B0 (tiny): 4.1 M parameters."""
    return _van("van_b0", pretrained, kwargs, _B0)


@register_model
def van_b1(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B1 (small): 13.9 M parameters."""
    return _van("van_b1", pretrained, kwargs, _B1)


@register_model
def van_b2(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B2 (base): 26.6 M parameters."""
    return _van("van_b2", pretrained, kwargs, _B2)


@register_model
def van_b3(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B3 (large): 44.8 M parameters."""
    return _van("van_b3", pretrained, kwargs, _B3)


@register_model
def van_b4(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B4 (huge): 60.3 M parameters."""
    return _van("van_b4", pretrained, kwargs, _B4)


@register_model
def van_b5(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B5: 90.0 M parameters with 1000 classes; published with ImageNet-22k's."""
    return _van("van_b5", pretrained, kwargs, _B5)


@register_model
def van_b6(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B6: 199.8 M parameters with 1000 classes; published with ImageNet-22k's."""
    return _van("van_b6", pretrained, kwargs, _B6)


@register_model
def mscan_t(pretrained: bool = False, **kwargs) -> VAN:
    """MSCAN-T, the backbone of SegNeXt-T; its classifier is our composition, 4.2 M parameters."""
    return _van("mscan_t", pretrained, kwargs, {**_B0, "mscan": True})


@register_model
def mscan_s(pretrained: bool = False, **kwargs) -> VAN:
    """MSCAN-S, the backbone of SegNeXt-S; its classifier is our composition, 14.0 M parameters."""
    return _van("mscan_s", pretrained, kwargs, {**_B1, "mscan": True})


@register_model
def mscan_b(pretrained: bool = False, **kwargs) -> VAN:
    """MSCAN-B, the backbone of SegNeXt-B; its classifier is our composition, 26.8 M parameters."""
    return _van("mscan_b", pretrained, kwargs, {**_B2, "mscan": True})


@register_model
def mscan_l(pretrained: bool = False, **kwargs) -> VAN:
    """MSCAN-L, the backbone of SegNeXt-L; its classifier is our composition, 45.1 M parameters."""
    return _van("mscan_l", pretrained, kwargs, {**_B3, "mscan": True})
