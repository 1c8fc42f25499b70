"""InLine attention: DeiT, PVT, Swin and CSWin with linear attention instead of their own in the early stages.

Paper: Bridging the Divide: Reconsidering Softmax and Linear Attention, Han et al., NeurIPS 2024, arXiv 2412.06590.

Origin: github.com/LeapLabTHU/InLine, which states no license; the hosts' code is Apache-2.0 (DeiT, PVT) and MIT (Swin,
CSWin). Written from the paper, on `blocks.InLineAttention2d` and the networks of `hosts`; the published classifiers
load through `convert_checkpoint`.

The published classifiers but PVT's take one square size; here every model takes any, and InLine attention always spans
the whole map. The paper's detectors and segmenters were never published: the dense settings are ours, a norm for each
output of Swin and PVT's maps as they are.
"""

import re
from collections.abc import Sequence

from timm.models import register_model
from torch import Tensor, nn

from ..blocks.inline import InLineAttention2d, InLineTokenAttention
from ._build import IMAGENET_CFG, build, cfgs_with_links
from .hosts.checkpoints import published_names, resize_positions
from .hosts.cswin import CSWin
from .hosts.deit import DeiT
from .hosts.pvt import PVT
from .hosts.swin import Swin

__all__ = ["InLineCSWin", "InLineDeiT", "InLinePVT", "InLineSwin"]


class InLineDeiT(DeiT):
    """DeiT with InLine attention.

    Args:
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop_rate: Dropout after projections.
        **host: Further options of `DeiT`.

    Shape:
        Images ``[B, in_chans, H, W]``, padded to a multiple of the patch size, to logits ``[B, num_classes]``.
    """

    def __init__(self, qkv_bias: bool = True, proj_drop_rate: float = 0.0, device=None, dtype=None, **host):
        dd = {"device": device, "dtype": dtype}

        def attention(stage: int, block: int, dim: int, num_heads: int, map_size: tuple[int, int]) -> nn.Module:
            return InLineTokenAttention(dim, num_heads, qkv_bias, proj_drop_rate, **dd)

        super().__init__(attention, qkv_bias=qkv_bias, proj_drop_rate=proj_drop_rate, **host, **dd)


class InLinePVT(PVT):
    """PVT with InLine attention in place of attention to reduced maps.

    Args:
        num_heads: Heads per stage.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop_rate: Dropout after projections.
        **host: Further options of `PVT`.

    Shape:
        Images ``[B, in_chans, H, W]`` to logits ``[B, num_classes]``. Each stage cuts off what its patches don't cover.
    """

    def __init__(
        self,
        num_heads: Sequence[int] = (2, 4, 10, 16),
        qkv_bias: bool = True,
        proj_drop_rate: float = 0.0,
        device=None,
        dtype=None,
        **host,
    ):
        dd = {"device": device, "dtype": dtype}

        def attention(stage: int, block: int, dim: int, num_heads: int, map_size: tuple[int, int]) -> nn.Module:
            return InLineAttention2d(dim, num_heads, qkv_bias, proj_drop=proj_drop_rate, **dd)

        super().__init__(attention, num_heads=num_heads, proj_drop_rate=proj_drop_rate, **host, **dd)


class InLineSwin(Swin):
    """Swin transformer with InLine attention over the whole map in its first blocks, shifted windows in the others.

    Args:
        inline_blocks: How many of a stage's blocks, from its first, have InLine attention.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop_rate: Dropout after projections.
        **host: Further options of `Swin`.

    Shape:
        Images ``[B, in_chans, H, W]`` of any size, padded as needed, to logits ``[B, num_classes]``.
    """

    def __init__(
        self,
        inline_blocks: Sequence[int] = (2, 2, 6, 0),
        qkv_bias: bool = True,
        proj_drop_rate: float = 0.0,
        device=None,
        dtype=None,
        **host,
    ):
        dd = {"device": device, "dtype": dtype}

        def attention(stage: int, block: int, dim: int, num_heads: int, map_size: tuple[int, int]) -> nn.Module | None:
            if block >= inline_blocks[stage]:
                return None
            return InLineAttention2d(dim, num_heads, qkv_bias, proj_drop=proj_drop_rate, **dd)

        super().__init__(attention, qkv_bias=qkv_bias, proj_drop_rate=proj_drop_rate, **host, **dd)


class InLineCSWin(CSWin):
    """CSWin transformer with InLine attention over the whole map in its first blocks, cross-shaped windows in the rest.

    Its InLine blocks keep the host's convolution of the values, and make their kernels from the map before the norm.

    Args:
        inline_blocks: How many of a stage's blocks, from its first, have InLine attention.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop_rate: Dropout after projections.
        **host: Further options of `CSWin`.

    Shape:
        Images ``[B, in_chans, H, W]`` of any size to logits ``[B, num_classes]``.
    """

    def __init__(
        self,
        inline_blocks: Sequence[int] = (2, 4, 0, 0),
        qkv_bias: bool = True,
        proj_drop_rate: float = 0.0,
        device=None,
        dtype=None,
        **host,
    ):
        dd = {"device": device, "dtype": dtype}

        def attention(stage: int, block: int, dim: int, num_heads: int, map_size: tuple[int, int]) -> nn.Module | None:
            if block >= inline_blocks[stage]:
                return None
            options = dict(lepe=True, takes_input=True, proj_drop=proj_drop_rate)
            return InLineAttention2d(dim, num_heads, qkv_bias, **options, **dd)

        super().__init__(attention, qkv_bias=qkv_bias, proj_drop_rate=proj_drop_rate, **host, **dd)


def convert_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a published state dict to ``model``'s names.

    Leaves our own names alone. What the published code recomputes is dropped.
    """
    if any(key.startswith("stem.") for key in state):
        return dict(state)
    model_state = model.state_dict()
    return {_block_name(key, model_state): value for key, value in published_names(state, model).items()}


def _block_name(key: str, model_state: dict[str, Tensor]) -> str:
    """Return a name of CSWin's InLine blocks, which have one branch, as ours; other names as they are."""
    key = re.sub(r"\.attns\.0\.(residual\.\d\.)", r".attn.\1", key)
    branch = key.replace(".lepe.0.", ".lepe.")
    return branch if branch in model_state else key


_DEIT_TINY = dict(embed_dim=192, num_heads=6, drop_path_rate=0.1)
_DEIT_SMALL = dict(img_size=288, embed_dim=320, num_heads=10, drop_path_rate=0.1)
_DEIT_BASE = dict(img_size=448, embed_dim=384, num_heads=12, drop_path_rate=0.1)
_PVT_TINY = dict(depths=(2, 2, 2, 2), drop_path_rate=0.1)
_PVT_SMALL = dict(depths=(3, 4, 6, 3), drop_path_rate=0.1)
_PVT_MEDIUM = dict(depths=(3, 4, 18, 3), drop_path_rate=0.3)
_PVT_LARGE = dict(depths=(3, 8, 27, 3), drop_path_rate=0.3)
_SWIN_TINY = dict(embed_dim=96, depths=(2, 2, 6, 2), inline_blocks=(2, 2, 6, 0), drop_path_rate=0.2)
_SWIN_SMALL = dict(embed_dim=96, depths=(2, 2, 18, 2), inline_blocks=(2, 2, 0, 0), drop_path_rate=0.3)
_SWIN_BASE = dict(
    embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), inline_blocks=(2, 2, 2, 0), drop_path_rate=0.5
)
_SWIN_BASE_384 = {**_SWIN_BASE, **dict(img_size=384, window_size=12)}
_CSWIN_TINY = dict(embed_dim=64, depths=(2, 4, 18, 1), inline_blocks=(2, 4, 0, 0), drop_path_rate=0.2)
_CSWIN_SMALL = dict(embed_dim=64, depths=(3, 6, 29, 2), inline_blocks=(3, 6, 0, 0), drop_path_rate=0.4)
_CSWIN_BASE = dict(
    embed_dim=96, depths=(3, 6, 29, 2), num_heads=(4, 8, 16, 32), inline_blocks=(3, 6, 0, 0), drop_path_rate=0.5
)
_CSWIN_BASE_384 = {**_CSWIN_BASE, **dict(img_size=384, stripes=(1, 2, 12, None), drop_path_rate=0.7)}


def _create(cls: type[nn.Module], name: str, pretrained: bool, options: dict, config: dict) -> nn.Module:
    return build(cls, name, pretrained, convert_checkpoint, resize_positions, **{**config, **options})


# Dense settings for `create_backbone(name, setting=...)`, ours, after Agent Attention's.
dense_settings: dict[str, dict[str, dict]] = {
    name: {task: dict(drop_path_rate=rate) for task in ("detection", "segmentation")}
    for name, rate in (
        ("inline_pvt_tiny", 0.1),
        ("inline_pvt_small", 0.1),
        ("inline_pvt_medium", 0.2),
        ("inline_pvt_large", 0.3),
    )
} | {
    name: {
        "detection": dict(out_norms=True, drop_path_rate=detection),
        "segmentation": dict(out_norms=True, drop_path_rate=segmentation),
    }
    for name, detection, segmentation in (
        ("inline_swin_tiny", 0.1, 0.3),
        ("inline_swin_small", 0.1, 0.3),
        ("inline_swin_base", 0.4, 0.5),
    )
}


def _cfg(size: int = 224, reduction: int = 32, **options) -> dict:
    return IMAGENET_CFG | {
        "input_size": (3, size, size),
        "pool_size": (size // reduction, size // reduction),
        "crop_mode": "squash",
        "first_conv": "stem.proj",
        "origin_url": "https://github.com/LeapLabTHU/InLine",
        "paper_ids": "arXiv:2412.06590",
        **options,
    }


_CONV = dict(first_conv="stem.conv")

default_cfgs = cfgs_with_links(
    {
        "inline_deit_tiny.leaplab_in1k": _cfg(reduction=16),
        "inline_deit_small.leaplab_in1k": _cfg(288, reduction=16),
        "inline_deit_base.leaplab_in1k": _cfg(448, reduction=16),
        "inline_pvt_tiny.leaplab_in1k": _cfg(**_CONV),
        "inline_pvt_small.leaplab_in1k": _cfg(**_CONV),
        "inline_pvt_medium.leaplab_in1k": _cfg(**_CONV),
        "inline_pvt_large.leaplab_in1k": _cfg(**_CONV),
        "inline_swin_tiny.leaplab_in1k": _cfg(),
        "inline_swin_small.leaplab_in1k": _cfg(),
        "inline_swin_base.leaplab_in1k": _cfg(),
        "inline_swin_base_384.untrained": _cfg(384, crop_pct=1.0),
        "inline_cswin_tiny.leaplab_in1k": _cfg(**_CONV),
        "inline_cswin_small.leaplab_in1k": _cfg(**_CONV),
        "inline_cswin_base.leaplab_in1k": _cfg(**_CONV),
        "inline_cswin_base_384.untrained": _cfg(384, **_CONV),
    }
)


@register_model
def inline_deit_tiny(pretrained: bool = False, **kwargs) -> InLineDeiT:
    """InLine-DeiT-Tiny."""
    return _create(InLineDeiT, "inline_deit_tiny", pretrained, kwargs, _DEIT_TINY)


@register_model
def inline_deit_small(pretrained: bool = False, **kwargs) -> InLineDeiT:
    """InLine-DeiT-Small, 320 channels wide, for images of 288 pixels."""
    return _create(InLineDeiT, "inline_deit_small", pretrained, kwargs, _DEIT_SMALL)


@register_model
def inline_deit_base(pretrained: bool = False, **kwargs) -> InLineDeiT:
    """InLine-DeiT-Base, 384 channels wide, for images of 448 pixels."""
    return _create(InLineDeiT, "inline_deit_base", pretrained, kwargs, _DEIT_BASE)


@register_model
def inline_pvt_tiny(pretrained: bool = False, **kwargs) -> InLinePVT:
    """InLine-PVT-Tiny."""
    return _create(InLinePVT, "inline_pvt_tiny", pretrained, kwargs, _PVT_TINY)


@register_model
def inline_pvt_small(pretrained: bool = False, **kwargs) -> InLinePVT:
    """InLine-PVT-Small."""
    return _create(InLinePVT, "inline_pvt_small", pretrained, kwargs, _PVT_SMALL)


@register_model
def inline_pvt_medium(pretrained: bool = False, **kwargs) -> InLinePVT:
    """InLine-PVT-Medium."""
    return _create(InLinePVT, "inline_pvt_medium", pretrained, kwargs, _PVT_MEDIUM)


@register_model
def inline_pvt_large(pretrained: bool = False, **kwargs) -> InLinePVT:
    """InLine-PVT-Large."""
    return _create(InLinePVT, "inline_pvt_large", pretrained, kwargs, _PVT_LARGE)


@register_model
def inline_swin_tiny(pretrained: bool = False, **kwargs) -> InLineSwin:
    """InLine-Swin-Tiny."""
    return _create(InLineSwin, "inline_swin_tiny", pretrained, kwargs, _SWIN_TINY)


@register_model
def inline_swin_small(pretrained: bool = False, **kwargs) -> InLineSwin:
    """InLine-Swin-Small."""
    return _create(InLineSwin, "inline_swin_small", pretrained, kwargs, _SWIN_SMALL)


@register_model
def inline_swin_base(pretrained: bool = False, **kwargs) -> InLineSwin:
    """InLine-Swin-Base: of the third stage, the first two blocks have InLine attention."""
    return _create(InLineSwin, "inline_swin_base", pretrained, kwargs, _SWIN_BASE)


@register_model
def inline_swin_base_384(pretrained: bool = False, **kwargs) -> InLineSwin:
    """InLine-Swin-Base for images of 384 pixels; without published weights."""
    return _create(InLineSwin, "inline_swin_base_384", pretrained, kwargs, _SWIN_BASE_384)


@register_model
def inline_cswin_tiny(pretrained: bool = False, **kwargs) -> InLineCSWin:
    """InLine-CSWin-Tiny."""
    return _create(InLineCSWin, "inline_cswin_tiny", pretrained, kwargs, _CSWIN_TINY)


@register_model
def inline_cswin_small(pretrained: bool = False, **kwargs) -> InLineCSWin:
    """InLine-CSWin-Small."""
    return _create(InLineCSWin, "inline_cswin_small", pretrained, kwargs, _CSWIN_SMALL)


@register_model
def inline_cswin_base(pretrained: bool = False, **kwargs) -> InLineCSWin:
    """InLine-CSWin-Base."""
    return _create(InLineCSWin, "inline_cswin_base", pretrained, kwargs, _CSWIN_BASE)


@register_model
def inline_cswin_base_384(pretrained: bool = False, **kwargs) -> InLineCSWin:
    """InLine-CSWin-Base for images of 384 pixels; without published weights."""
    return _create(InLineCSWin, "inline_cswin_base_384", pretrained, kwargs, _CSWIN_BASE_384)
