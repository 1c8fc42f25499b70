"""Agent Attention: DeiT, PVT, Swin and CSWin with agent attention instead of their own in the early stages.

Paper: Agent Attention: On the Integration of Softmax and Linear Attention, Han et al., ECCV 2024, arXiv 2312.08874.

Origin: github.com/LeapLabTHU/Agent-Attention, which states no license of its own; the hosts' code is Apache-2.0 (DeiT,
PVT) and MIT (Swin, CSWin). Written anew on `blocks.AgentAttention2d` and the networks of `hosts`; the published
classifiers and dense backbones load through `convert_checkpoint`.

The published classifiers take one square size. Here every model takes any: biases and position embeddings are resampled
as in the published dense models, which are dense settings of the same networks with more agents.
"""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from timm.models import register_model
from torch import Tensor, nn

from ..blocks import AgentAttention2d, AgentTokenAttention
from ..blocks.window import cut_windows, join_windows
from ._build import IMAGENET_CFG, build, cfgs_with_links
from .hosts.checkpoints import published_names, resize_positions
from .hosts.cswin import CSWin
from .hosts.deit import DeiT
from .hosts.pvt import PVT
from .hosts.swin import Swin

__all__ = ["AgentCSWin", "AgentDeiT", "AgentPVT", "AgentSwin"]


class AgentDeiT(DeiT):
    """DeiT with agent attention.

    Args:
        img_size: Height and width of the images that the biases and the position embedding are learned for; images of
            any size may be given.
        agent_blocks: How many of the blocks, from the first, have agent attention.
        agents: Rows and columns of agents.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop_rate: Dropout after projections.
        **host: Further options of `DeiT`.

    Shape:
        Images ``[B, in_chans, H, W]``, padded to a multiple of the patch size, to logits ``[B, num_classes]``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        agent_blocks: int = 12,
        agents: int = 7,
        qkv_bias: bool = True,
        proj_drop_rate: float = 0.0,
        device=None,
        dtype=None,
        **host,
    ):
        dd = {"device": device, "dtype": dtype}

        def attention(stage: int, block: int, dim: int, num_heads: int, map_size: tuple[int, int]) -> nn.Module | None:
            if block >= agent_blocks:
                return None
            return AgentTokenAttention(dim, num_heads, agents, map_size, qkv_bias, proj_drop_rate, **dd)

        super().__init__(attention, img_size, qkv_bias=qkv_bias, proj_drop_rate=proj_drop_rate, **host, **dd)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen stages don't need; return their absolute indices."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        last = self.stages[-1].blocks[-1].attn
        if not self.reads_class_token and isinstance(last, AgentTokenAttention):
            # What the class token reads from the agents in the last block reaches no output any more.
            last.ca_bias = None
        return take


class AgentPVT(PVT):
    """PVT with agent attention in place of attention to reduced maps.

    Args:
        img_size: Height and width of the images that the biases and position embeddings are learned for; images of any
            other size from 32 pixels on may be given.
        agents: Rows and columns of agents per stage.
        agent_shapes: Rows and columns of agents per stage that the biases are resampled to, as in the published dense
            models; those of ``agents`` by default.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop_rate: Dropout after projections.
        **host: Further options of `PVT`.

    Shape:
        Images ``[B, in_chans, H, W]`` to logits ``[B, num_classes]``. Each stage cuts off what its patches don't cover.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        agents: Sequence[int] = (3, 4, 7, 7),
        agent_shapes: Sequence[tuple[int, int]] | None = None,
        qkv_bias: bool = True,
        proj_drop_rate: float = 0.0,
        device=None,
        dtype=None,
        **host,
    ):
        options = dict(qkv_bias=qkv_bias, proj_drop=proj_drop_rate, device=device, dtype=dtype)
        shapes = _agent_shapes(agents, agent_shapes)

        def attention(stage: int, block: int, dim: int, num_heads: int, map_size: tuple[int, int]) -> nn.Module:
            return AgentAttention2d(dim, num_heads, agents[stage], map_size, shapes[stage], **options)

        super().__init__(attention, img_size, proj_drop_rate=proj_drop_rate, device=device, dtype=dtype, **host)


@register_notrace_function
def cut_tiles(x: Tensor, tile_height: int, tile_width: int) -> Tensor:
    """Cut a map ``[B, H, W, C]`` that is a row or column of whole tiles into them; return any other map as it is."""
    height, width = x.shape[1], x.shape[2]
    row = height == tile_height and width > tile_width and width % tile_width == 0
    column = width == tile_width and height > tile_height and height % tile_height == 0
    if row or column:
        x = cut_windows(x, tile_height, tile_width, 0, 0).unflatten(1, (tile_height, tile_width))
    return x


@register_notrace_function
def join_tiles(x: Tensor, height: int, width: int) -> Tensor:
    """Undo `cut_tiles` for a map of ``height x width``."""
    if x.shape[1] == height and x.shape[2] == width:
        return x
    return join_windows(x.flatten(1, 2), height, width, x.shape[1], x.shape[2], 0, 0)


class TiledAgentAttention2d(AgentAttention2d):
    """Agent attention in which training maps side by side attend each for itself, as in the published Swin classifier.

    That classifier's window is the whole map of a square image, so that 224x448 pixels are two windows. A map of any
    other size attends as a whole.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``x`` ``[B, H, W, dim]``."""
        height, width = x.shape[1], x.shape[2]
        tiles = self._attend(cut_tiles(x, self.ah_bias.shape[3], self.aw_bias.shape[4]))
        return join_tiles(tiles, height, width)


class AgentSwin(Swin):
    """Swin transformer with agent attention over the whole map in its first blocks and shifted windows in the others.

    Args:
        img_size: Height and width of the images that the biases are learned for; images of any size may be given.
        agent_blocks: How many of a stage's blocks, from its first, have agent attention.
        agents: Rows and columns of agents per stage.
        agent_shapes: Rows and columns of agents per stage that the biases are resampled to, as in the published dense
            models; those of ``agents`` by default.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        out_norms: Whether this is the dense model, as in `Swin`; there agent attention always spans the whole map. In
            the classifier it stays within maps of the training size that lie side by side (224x448 pixels are two).
        proj_drop_rate: Dropout after projections.
        **host: Further options of `Swin`.

    Shape:
        Images ``[B, in_chans, H, W]`` of any size, padded as needed, to logits ``[B, num_classes]``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        agent_blocks: Sequence[int] = (2, 2, 6, 0),
        agents: Sequence[int] = (3, 4, 7, 7),
        agent_shapes: Sequence[tuple[int, int]] | None = None,
        qkv_bias: bool = True,
        out_norms: bool = False,
        proj_drop_rate: float = 0.0,
        device=None,
        dtype=None,
        **host,
    ):
        options = dict(qkv_bias=qkv_bias, proj_drop=proj_drop_rate, device=device, dtype=dtype)
        shapes = _agent_shapes(agents, agent_shapes)
        kind = AgentAttention2d if out_norms else TiledAgentAttention2d

        def attention(stage: int, block: int, dim: int, num_heads: int, map_size: tuple[int, int]) -> nn.Module | None:
            if block >= agent_blocks[stage]:
                return None
            return kind(dim, num_heads, agents[stage], map_size, shapes[stage], **options)

        shared = dict(qkv_bias=qkv_bias, proj_drop_rate=proj_drop_rate, device=device, dtype=dtype)
        super().__init__(attention, img_size, out_norms=out_norms, **shared, **host)


class AgentCSWin(CSWin):
    """CSWin transformer with agent attention over the whole map in its first blocks, cross-shaped windows in the rest.

    Args:
        img_size: Height and width of the images that the biases are learned for; images of any size may be given.
        agent_blocks: How many of a stage's blocks, from its first, have agent attention.
        agents: Rows and columns of agents per stage.
        agent_shapes: Rows and columns of agents per stage that the biases are resampled to; those of ``agents`` by
            default.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop_rate: Dropout after projections.
        **host: Further options of `CSWin`.

    Shape:
        Images ``[B, in_chans, H, W]`` of any size to logits ``[B, num_classes]``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        agent_blocks: Sequence[int] = (2, 4, 0, 0),
        agents: Sequence[int] = (3, 4, 7, 7),
        agent_shapes: Sequence[tuple[int, int]] | None = None,
        qkv_bias: bool = True,
        proj_drop_rate: float = 0.0,
        device=None,
        dtype=None,
        **host,
    ):
        options = dict(qkv_bias=qkv_bias, proj_drop=proj_drop_rate, device=device, dtype=dtype)
        shapes = _agent_shapes(agents, agent_shapes)

        def attention(stage: int, block: int, dim: int, num_heads: int, map_size: tuple[int, int]) -> nn.Module | None:
            if block >= agent_blocks[stage]:
                return None
            return AgentAttention2d(dim, num_heads, agents[stage], map_size, shapes[stage], **options)

        shared = dict(qkv_bias=qkv_bias, proj_drop_rate=proj_drop_rate, device=device, dtype=dtype)
        super().__init__(attention, img_size, **shared, **host)


def _agent_shapes(
    agents: Sequence[int], agent_shapes: Sequence[tuple[int, int]] | None
) -> Sequence[tuple[int, int] | None]:
    if agent_shapes is None:
        return [None] * len(agents)
    if len(agent_shapes) != len(agents):
        raise ValueError(f"agent_shapes must name one for each of the {len(agents)} stages; got {list(agent_shapes)}")
    return agent_shapes


# In CSWin's blocks the attention has no name of its own in the published files.
_CSWIN_BIASES = (r"\.attns\.0\.([a-z]{2}_bias)$", lambda m: f".attn.{m[1]}")
# Where the biases that belong to a map's size have their rows or columns.
_SPATIAL_DIMS = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}


def _renamed(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a published state dict under ``model``'s names and in its layouts, whatever the image size."""
    model_state = model.state_dict()
    renamed = {}
    for key, value in published_names(state, model).items():
        key = re.sub(*_CSWIN_BIASES, key)
        if key.endswith(("lepe.0.weight", "lepe.0.bias")):
            # In CSWin's agent blocks the same name stands for the convolution of the values.
            convolution = key.replace("lepe.0", "dwc")
            key = convolution if convolution in model_state else key
        renamed[key] = value
    return renamed


def convert_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a published state dict to ``model``'s names.

    Reads the authors' classification and dense files; leaves our own names alone. What the published code recomputes
    (``relative_position_index``, ``attn_mask``) is dropped.
    """
    return dict(state) if any(key.startswith("stem.") for key in state) else _renamed(state, model)


def resize_entry(key: str, value: Tensor, size: torch.Size, model: nn.Module) -> tuple[Tensor, str] | None:
    """Resample what was made for another size of images: biases of agents along their axis, and positions."""
    dim = _SPATIAL_DIMS.get(key.rsplit(".", 1)[-1])
    if dim is None or value.ndim != len(size):
        return resize_positions(key, value, size, model)
    if any(value.shape[i] != size[i] for i in range(5) if i != dim):
        return None
    lines = value.movedim(dim, -1)
    resized = F.interpolate(lines.flatten(0, 3)[:, None], size=size[dim], mode="linear")
    return resized.reshape(*lines.shape[:-1], -1).movedim(-1, dim), "linear"


_DEIT_TINY = dict(embed_dim=192, num_heads=3)
_DEIT_SMALL = dict(embed_dim=384, num_heads=6, drop_path_rate=0.1)
_DEIT_BASE = dict(embed_dim=768, num_heads=12, agent_blocks=4, agents=9, drop_path_rate=0.3)
_PVT_TINY = dict(depths=(2, 2, 2, 2), drop_path_rate=0.1)
_PVT_SMALL = dict(depths=(3, 4, 6, 3), drop_path_rate=0.1)
_PVT_MEDIUM = dict(depths=(3, 4, 18, 3), drop_path_rate=0.3)
_PVT_LARGE = dict(depths=(3, 8, 27, 3), drop_path_rate=0.3)
_SWIN_TINY = dict(embed_dim=96, depths=(2, 2, 6, 2), agent_blocks=(2, 2, 6, 0), drop_path_rate=0.2)
_SWIN_SMALL = dict(embed_dim=96, depths=(2, 2, 18, 2), agent_blocks=(2, 2, 0, 0), drop_path_rate=0.3)
_SWIN_BASE = dict(
    embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), agent_blocks=(2, 2, 2, 0), drop_path_rate=0.5
)
_CSWIN_TINY = dict(embed_dim=64, depths=(2, 4, 18, 1), agent_blocks=(2, 4, 0, 0), drop_path_rate=0.2)
_CSWIN_SMALL = dict(embed_dim=64, depths=(3, 6, 29, 2), agent_blocks=(3, 6, 0, 0), drop_path_rate=0.4)
_CSWIN_BASE = dict(
    embed_dim=96, depths=(3, 6, 29, 2), num_heads=(4, 8, 16, 32), agent_blocks=(3, 6, 0, 0), drop_path_rate=0.5
)


def _create(cls: type[nn.Module], name: str, pretrained: bool, options: dict, config: dict) -> nn.Module:
    return build(cls, name, pretrained, convert_checkpoint, resize_entry, **{**config, **options})


_PVT_DENSE = dict(agent_shapes=((12, 12), (16, 16), (28, 28), (28, 28)))
_SWIN_DENSE = dict(agent_shapes=((9, 9), (12, 12), (14, 14), (7, 7)), out_norms=True)

# The published dense settings, for `create_backbone(name, setting=...)`: more agents, and their stochastic depth, for
# detection Mask R-CNN's, or Cascade Mask R-CNN's where that is the only one. RetinaNet's is a setting of its own.
dense_settings: dict[str, dict[str, dict]] = {
    name: {
        "detection": dict(**_PVT_DENSE, drop_path_rate=detection),
        "retinanet": dict(**_PVT_DENSE, drop_path_rate=retinanet),
        "segmentation": dict(**_PVT_DENSE, drop_path_rate=segmentation),
    }
    for name, detection, retinanet, segmentation in (
        ("agent_pvt_tiny", 0.1, 0.1, 0.1),
        ("agent_pvt_small", 0.2, 0.1, 0.1),
        ("agent_pvt_medium", 0.1, 0.2, 0.2),
        ("agent_pvt_large", 0.2, 0.3, 0.1),
    )
} | {
    name: {
        "detection": dict(**_SWIN_DENSE, drop_path_rate=detection),
        "segmentation": dict(**_SWIN_DENSE, drop_path_rate=segmentation),
    }
    for name, detection, segmentation in (
        ("agent_swin_tiny", 0.1, 0.3),
        ("agent_swin_small", 0.1, 0.3),
        ("agent_swin_base", 0.4, 0.5),
    )
}


def _cfg(size: int = 224, reduction: int = 32, **options) -> dict:
    return IMAGENET_CFG | {
        "input_size": (3, size, size),
        "pool_size": (size // reduction, size // reduction),
        "crop_mode": "squash",
        "first_conv": "stem.proj",
        "origin_url": "https://github.com/LeapLabTHU/Agent-Attention",
        "paper_ids": "arXiv:2312.08874",
        **options,
    }


_CONV = dict(first_conv="stem.conv")
_WHOLE = dict(crop_pct=1.0)

default_cfgs = cfgs_with_links(
    {
        "agent_deit_tiny.leaplab_in1k": _cfg(reduction=16),
        "agent_deit_small.leaplab_in1k": _cfg(reduction=16),
        "agent_deit_small_448.leaplab_in1k": _cfg(448, reduction=16),
        "agent_deit_base.leaplab_in1k": _cfg(reduction=16),
        "agent_pvt_tiny.leaplab_in1k": _cfg(**_CONV),
        "agent_pvt_small.leaplab_in1k": _cfg(**_CONV),
        "agent_pvt_medium.leaplab_in1k": _cfg(**_CONV),
        "agent_pvt_medium_256.leaplab_in1k": _cfg(256, **_CONV),
        "agent_pvt_large.leaplab_in1k": _cfg(**_CONV),
        "agent_swin_tiny.leaplab_in1k": _cfg(),
        "agent_swin_small.leaplab_in1k": _cfg(),
        "agent_swin_small_288.leaplab_in1k": _cfg(288, **_WHOLE),
        "agent_swin_base.leaplab_in1k": _cfg(),
        "agent_swin_base_384.leaplab_in1k": _cfg(384, **_WHOLE),
        "agent_cswin_tiny.leaplab_in1k": _cfg(**_CONV),
        "agent_cswin_small.leaplab_in1k": _cfg(**_CONV),
        "agent_cswin_base.leaplab_in1k": _cfg(**_CONV),
        "agent_cswin_base_384.leaplab_in1k": _cfg(384, **_CONV),
    }
)


@register_model
def agent_deit_tiny(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-Tiny."""
    return _create(AgentDeiT, "agent_deit_tiny", pretrained, kwargs, _DEIT_TINY)


@register_model
def agent_deit_small(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-Small."""
    return _create(AgentDeiT, "agent_deit_small", pretrained, kwargs, _DEIT_SMALL)


@register_model
def agent_deit_small_448(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-Small, trained on images of 448 pixels."""
    config = {**_DEIT_SMALL, **dict(img_size=448)}
    return _create(AgentDeiT, "agent_deit_small_448", pretrained, kwargs, config)


@register_model
def agent_deit_base(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-Base: the first four blocks have agent attention."""
    return _create(AgentDeiT, "agent_deit_base", pretrained, kwargs, _DEIT_BASE)


@register_model
def agent_pvt_tiny(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-Tiny."""
    return _create(AgentPVT, "agent_pvt_tiny", pretrained, kwargs, _PVT_TINY)


@register_model
def agent_pvt_small(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-Small."""
    return _create(AgentPVT, "agent_pvt_small", pretrained, kwargs, _PVT_SMALL)


@register_model
def agent_pvt_medium(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-Medium."""
    return _create(AgentPVT, "agent_pvt_medium", pretrained, kwargs, _PVT_MEDIUM)


@register_model
def agent_pvt_medium_256(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-Medium, trained on images of 256 pixels."""
    config = {**_PVT_MEDIUM, **dict(img_size=256)}
    return _create(AgentPVT, "agent_pvt_medium_256", pretrained, kwargs, config)


@register_model
def agent_pvt_large(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-Large."""
    return _create(AgentPVT, "agent_pvt_large", pretrained, kwargs, _PVT_LARGE)


@register_model
def agent_swin_tiny(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-Tiny."""
    return _create(AgentSwin, "agent_swin_tiny", pretrained, kwargs, _SWIN_TINY)


@register_model
def agent_swin_small(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-Small."""
    return _create(AgentSwin, "agent_swin_small", pretrained, kwargs, _SWIN_SMALL)


@register_model
def agent_swin_small_288(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-Small, trained on images of 288 pixels."""
    config = {**_SWIN_SMALL, **dict(img_size=288, window_size=9)}
    return _create(AgentSwin, "agent_swin_small_288", pretrained, kwargs, config)


@register_model
def agent_swin_base(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-Base: of the third stage, the first two blocks have agent attention."""
    return _create(AgentSwin, "agent_swin_base", pretrained, kwargs, _SWIN_BASE)


@register_model
def agent_swin_base_384(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-Base for images of 384 pixels."""
    config = {**_SWIN_BASE, **dict(img_size=384, window_size=12)}
    return _create(AgentSwin, "agent_swin_base_384", pretrained, kwargs, config)


@register_model
def agent_cswin_tiny(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Agent-CSWin-Tiny."""
    return _create(AgentCSWin, "agent_cswin_tiny", pretrained, kwargs, _CSWIN_TINY)


@register_model
def agent_cswin_small(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Agent-CSWin-Small."""
    return _create(AgentCSWin, "agent_cswin_small", pretrained, kwargs, _CSWIN_SMALL)


@register_model
def agent_cswin_base(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Agent-CSWin-Base."""
    return _create(AgentCSWin, "agent_cswin_base", pretrained, kwargs, _CSWIN_BASE)


@register_model
def agent_cswin_base_384(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Agent-CSWin-Base for images of 384 pixels."""
    config = {**_CSWIN_BASE, **dict(img_size=384, stripes=(1, 2, 12, None), drop_path_rate=0.7)}
    return _create(AgentCSWin, "agent_cswin_base_384", pretrained, kwargs, config)
