"""Agent Attention: DeiT, PVT, Swin and CSWin with agent attention instead of their own in the early stages.

Paper: Agent Attention: On the Integration of Softmax and Linear Attention, Han et al., ECCV 2024, arXiv 2312.08874.

Origin: github.com/LeapLabTHU/Agent-Attention, which states no licence of its own; the hosts' code is Apache-2.0 (DeiT,
PVT) and MIT (Swin, CSWin). Written anew on `blocks.AgentAttention2d`; the published classifiers and dense backbones
load through `convert_checkpoint`.

The published classifiers take one square size. Here every model takes any: biases and position embeddings are resampled
as in the published dense models, which are recipes of the same networks with more agents.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from timm.layers import (
    Attention,
    DropPath,
    PatchEmbed,
    calculate_drop_path_rates,
    register_notrace_function,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint, register_model
from timm.models._features import feature_take_indices
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from ..blocks import AgentAttention2d, AgentTokenAttention, CrossShapedAttention2d
from ..blocks.global_attention import resize_bias_table
from ..blocks.pointwise import PointwiseMlp
from ..blocks.pyramid import Block
from ..blocks.window import WindowAttention2d, cut_windows, from_swin_table, join_windows
from ._build import IMAGENET_CFG, build, cfgs_with_links
from ._checkpoint import resampled
from ._pyramid import Pyramid, Stage, _to_format, init_module

__all__ = ["AgentCSWin", "AgentDeiT", "AgentPVT", "AgentSwin"]


@register_notrace_function
def resize_map(table: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Resample a position embedding ``[1, h, w, C]`` to a map's size."""
    if table.shape[1] == height and table.shape[2] == width:
        return table
    table = F.interpolate(table.permute(0, 3, 1, 2), size=[height, width], mode=mode, align_corners=False)
    return table.permute(0, 2, 3, 1)


@register_notrace_function
def check_holds_patch(height: int, width: int, kernel_size: int) -> None:
    """Raise a ValueError if a map is smaller than one patch."""
    if height < kernel_size or width < kernel_size:
        raise ValueError(
            f"the image is too small: a map of {height}x{width} holds no patch of {kernel_size}x{kernel_size}; "
            "images of at least 32x32 pixels are large enough"
        )


class ConvEmbed(nn.Module):
    """Strided convolution, norm, and optionally a position embedding: to NHWC.

    Args:
        in_chans: Channels before.
        dim: Channels after.
        kernel_size: Height and width of the kernel.
        stride: Stride; without padding, what it leaves over at the bottom and right is cut off.
        padding: Padding.
        map_size: Height and width of the maps that the position embedding is learned for; None for no embedding.
        image: Whether the input is NCHW, not NHWC.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        kernel_size: int,
        stride: int,
        padding: int = 0,
        map_size: tuple[int, int] | None = None,
        image: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.image = image
        # What a map must have at least.
        self.least = kernel_size - 2 * padding
        self.conv = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=padding, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, *map_size, dim, **dd)) if map_size is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the position embedding as published: truncated normal, std 0.02."""
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_chans, H, W]``, or ``[B, H, W, in_chans]``, to ``[B, H', W', dim]``."""
        if not self.image:
            x = x.permute(0, 3, 1, 2)
        check_holds_patch(x.shape[2], x.shape[3], self.least)
        x = self.norm(self.conv(x).permute(0, 2, 3, 1))
        if self.pos_embed is not None:
            x = x + resize_map(self.pos_embed, x.shape[1], x.shape[2], "bilinear")
        return x


class AgentPVT(Pyramid):
    """Pyramid vision transformer (PVT v1) with agent attention in place of attention to reduced maps.

    There is no final norm: the classifier reads the mean of the last map.

    Args:
        img_size: Height and width of the images that the biases and position embeddings are learned for; images of any
            other size from 32 pixels on may be given.
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` or ``""``.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        mlp_ratios: Hidden channels of the MLP over its input's, per stage.
        agents: Rows and columns of agents per stage.
        agent_shapes: Rows and columns of agents per stage that the biases are resampled to, as in the published dense
            models; those of ``agents`` by default.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after projections.
        drop_path_rate: Stochastic depth of the last block; blocks before it have proportionally less.

    Shape:
        Images ``[B, in_chans, H, W]`` to logits ``[B, num_classes]``. Each stage cuts off what its patches don't cover.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        agents: Sequence[int] = (3, 4, 7, 7),
        agent_shapes: Sequence[tuple[int, int]] | None = None,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        agent_shapes = _agent_shapes(agents, agent_shapes)
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        height, width = to_2tuple(img_size)
        stem, stages = None, []
        for i, dim in enumerate(embed_dims):
            map_size = (height // (4 * 2**i), width // (4 * 2**i))
            if i == 0:
                stem, downsample = ConvEmbed(in_chans, dim, 4, 4, map_size=map_size, image=True, **dd), nn.Identity()
            else:
                downsample = ConvEmbed(embed_dims[i - 1], dim, 2, 2, map_size=map_size, **dd)
            blocks = [
                Block(
                    dim,
                    AgentAttention2d(
                        dim,
                        num_heads[i],
                        agents[i],
                        map_size,
                        agent_shapes[i],
                        qkv_bias=qkv_bias,
                        proj_drop=proj_drop_rate,
                        **dd,
                    ),
                    mlp_ratios[i],
                    None,
                    proj_drop_rate,
                    drop_path,
                    norm_layer,
                    **dd,
                )
                for drop_path in drop_paths[i]
            ]
            stages.append(Stage(downsample, blocks))
        self._assemble(
            stem,
            stages,
            embed_dims,
            reductions=[4 * 2**i for i in range(len(depths))],
            norm=nn.Identity(),
            out_norms=None,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        self.init_weights()


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


class AgentSwin(Pyramid):
    """Swin transformer with agent attention over the whole map in its first blocks and shifted windows in the others.

    Args:
        img_size: Height and width of the images that the biases are learned for; images of any size may be given.
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` or ``""``.
        embed_dim: Channels of the first stage; each further stage has twice as many.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        agent_blocks: How many of a stage's blocks, from its first, have agent attention.
        agents: Rows and columns of agents per stage.
        agent_shapes: Rows and columns of agents per stage that the biases are resampled to, as in the published dense
            models; those of ``agents`` by default.
        window_size: Height and width of the windows in the other blocks; every other block shifts them by half.
        mlp_ratio: Hidden channels of the MLP over its input's.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        out_norms: Whether this is the dense model: each stage's output gets a norm, agent attention always spans the
            whole map, and windows shift on small maps, too. In the classifier, agent attention stays within maps of the
            training size that lie side by side (224x448 pixels are two), and windows don't shift on a map whose shorter
            side is one window.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after projections.
        drop_path_rate: Stochastic depth of the last block; blocks before it have proportionally less.

    Shape:
        Images ``[B, in_chans, H, W]`` of any size, padded as needed, to logits ``[B, num_classes]``.
    """

    symbolic_size: Final[bool] = False

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        agent_blocks: Sequence[int] = (2, 2, 6, 0),
        agents: Sequence[int] = (3, 4, 7, 7),
        agent_shapes: Sequence[tuple[int, int]] | None = None,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        out_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        norm_layer = nn.LayerNorm
        agent_shapes = _agent_shapes(agents, agent_shapes)
        channels = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        agent_attention = AgentAttention2d if out_norms else TiledAgentAttention2d

        def attention(i: int, j: int) -> nn.Module:
            options = dict(qkv_bias=qkv_bias, proj_drop=proj_drop_rate, **dd)
            if j < agent_blocks[i]:
                map_size = _map_size(img_size if out_norms else _tile(img_size), 4 * 2**i)
                return agent_attention(channels[i], num_heads[i], agents[i], map_size, agent_shapes[i], **options)
            return WindowAttention2d(
                channels[i],
                num_heads[i],
                window_size,
                shift_size=window_size // 2 if j % 2 else 0,
                shift_where="all" if out_norms else "map",
                **options,
            )

        stages = []
        for i, dim in enumerate(channels):
            blocks = [
                Block(dim, attention(i, j), mlp_ratio, None, proj_drop_rate, drop_path, norm_layer, **dd)
                for j, drop_path in enumerate(drop_paths[i])
            ]
            shrink = nn.Identity() if i == 0 else PatchMerging(dim // 2, norm_layer=norm_layer, **dd)
            stages.append(Stage(shrink, blocks))
        self._assemble(
            PatchEmbed(
                None, 4, in_chans, embed_dim, norm_layer=norm_layer, output_fmt="NHWC", dynamic_img_pad=True, **dd
            ),
            stages,
            channels,
            reductions=[4 * 2**i for i in range(len(depths))],
            norm=norm_layer(channels[-1], **dd),
            out_norms=[norm_layer(dim, **dd) for dim in channels] if out_norms else None,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        self.init_weights()


class AgentCSWin(Pyramid):
    """CSWin transformer with agent attention over the whole map in its first blocks, cross-shaped windows in the rest.

    Args:
        img_size: Height and width of the images that the biases are learned for; images of any size may be given.
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` or ``""``.
        embed_dim: Channels of the first stage; each further stage has twice as many.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        agent_blocks: How many of a stage's blocks, from its first, have agent attention.
        agents: Rows and columns of agents per stage.
        agent_shapes: Rows and columns of agents per stage that the biases are resampled to; those of ``agents`` by
            default.
        stripes: Width of the stripes in the other blocks per stage; None for one window, the whole map.
        mlp_ratio: Hidden channels of the MLP over its input's.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after projections.
        drop_path_rate: Stochastic depth of the last block; blocks before it have proportionally less.

    Shape:
        Images ``[B, in_chans, H, W]`` of any size to logits ``[B, num_classes]``.
    """

    symbolic_size: Final[bool] = False

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        agent_blocks: Sequence[int] = (2, 4, 0, 0),
        agents: Sequence[int] = (3, 4, 7, 7),
        agent_shapes: Sequence[tuple[int, int]] | None = None,
        stripes: Sequence[int | None] = (1, 2, 7, None),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        norm_layer = nn.LayerNorm
        agent_shapes = _agent_shapes(agents, agent_shapes)
        channels = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        def attention(i: int, j: int) -> nn.Module:
            options = dict(qkv_bias=qkv_bias, proj_drop=proj_drop_rate, **dd)
            if j < agent_blocks[i]:
                map_size = _map_size(img_size, 4 * 2**i)
                return AgentAttention2d(channels[i], num_heads[i], agents[i], map_size, agent_shapes[i], **options)
            return CrossShapedAttention2d(channels[i], num_heads[i], stripes[i], **options)

        stages = []
        for i, dim in enumerate(channels):
            blocks = [
                Block(dim, attention(i, j), mlp_ratio, None, proj_drop_rate, drop_path, norm_layer, **dd)
                for j, drop_path in enumerate(drop_paths[i])
            ]
            shrink = nn.Identity() if i == 0 else ConvEmbed(dim // 2, dim, 3, 2, 1, **dd)
            stages.append(Stage(shrink, blocks))
        self._assemble(
            ConvEmbed(in_chans, embed_dim, 7, 4, 2, image=True, **dd),
            stages,
            channels,
            reductions=[4 * 2**i for i in range(len(depths))],
            norm=norm_layer(channels[-1], **dd),
            out_norms=None,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        self.init_weights()


class TokenBlock(nn.Module):
    """Transformer block on a class token and a map, with agent attention or, without ``agents``, plain attention."""

    with_agents: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        agents: int | None,
        map_size: tuple[int, int],
        mlp_ratio: float,
        qkv_bias: bool,
        drop: float,
        drop_path: float,
        norm_layer: type[nn.Module],
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.with_agents = agents is not None
        self.norm1 = norm_layer(dim, **dd)
        if agents is not None:
            self.attn = AgentTokenAttention(dim, num_heads, agents, map_size, qkv_bias, drop, **dd)
        else:
            self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, proj_drop=drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = PointwiseMlp(dim, int(dim * mlp_ratio), drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map tokens ``[B, 1 + height * width, dim]`` to the same shape."""
        out = self.norm1(x)
        out = self.attn(out, height, width) if self.with_agents else self.attn(out)
        x = x + self.drop_path1(out)
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class TokenStage(nn.Module):
    """Blocks on a class token and a map."""

    def __init__(self, blocks: Sequence[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map tokens ``[B, 1 + height * width, dim]`` to the same shape."""
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, height, width)
            else:
                x = block(x, height, width)
        return x


class AgentDeiT(Pyramid):
    """Plain transformer on patches of 16 and a class token (DeiT), with agent attention.

    The blocks are grouped into four stages of one resolution, so that intermediate outputs are those of a pyramid.

    The classifier reads the class token. As a map has no place for it, ``forward_features`` returns the map shifted by
    one vector per image, so that its mean is the class token: pooled, the map is what the published classifier reads.
    Intermediate outputs are the patches alone, unshifted.

    Args:
        img_size: Height and width of the images that the biases and the position embedding are learned for; images of
            any size may be given.
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` (the class token, see above) or ``""``.
        patch_size: Height and width of a patch.
        embed_dim: Channels.
        depth: Blocks; a multiple of 4.
        num_heads: Heads.
        agent_blocks: How many of the blocks, from the first, have agent attention.
        agents: Rows and columns of agents.
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
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        agent_blocks: int = 12,
        agents: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if depth % 4:
            raise ValueError(
                f"AgentDeiT groups its blocks into four stages: depth must be a multiple of 4; got {depth}"
            )
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.map_height, self.map_width = _map_size(img_size, patch_size)
        # Whether the output depends on the class token; features without the final norm don't.
        self.reads_class_token = True
        drop_paths = calculate_drop_path_rates(drop_path_rate, depth)
        blocks = [
            TokenBlock(
                embed_dim,
                num_heads,
                agents if i < agent_blocks else None,
                (self.map_height, self.map_width),
                mlp_ratio,
                qkv_bias,
                proj_drop_rate,
                drop_path,
                norm_layer,
                **dd,
            )
            for i, drop_path in enumerate(drop_paths)
        ]
        quarter = depth // 4
        stages = [TokenStage(blocks[i : i + quarter]) for i in range(0, depth, quarter)]
        self._assemble(
            PatchEmbed(None, patch_size, in_chans, embed_dim, output_fmt="NHWC", dynamic_img_pad=True, **dd),
            stages,
            [embed_dim] * 4,
            reductions=[patch_size] * 4,
            norm=norm_layer(embed_dim, **dd),
            out_norms=None,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        # Stages take the map's size beside the tokens, which a Sequential doesn't pass on.
        self.stages = nn.ModuleList(stages)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.map_height * self.map_width, embed_dim, **dd))
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise as published; may be called again, after ``to_empty`` for instance."""
        self.apply(init_module)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that optimizers should not decay."""
        return {"cls_token", "pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return the patterns by which timm groups parameters into layers."""
        matcher = {"stem": r"^stem|^cls_token|^pos_embed"}
        if coarse:
            return matcher | {"blocks": r"^stages\.(\d+)"}
        return matcher | {"blocks": [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def _tokens(self, x: Tensor) -> Tensor:
        """Return class token and patches ``[B, 1 + H * W, C]`` of a map, with their positions."""
        grid = self.pos_embed[:, 1:].unflatten(1, (self.map_height, self.map_width))
        # Bicubic, as the published code resizes a checkpoint for another image size.
        x = x + resize_map(grid, x.shape[1], x.shape[2], "bicubic")
        first = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([first, x.flatten(1, 2)], dim=1)

    def _map(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return the patches of normalised tokens as a map; its mean is the class token if that is read."""
        patches = x[:, 1:]
        if self.reads_class_token:
            patches = patches + (x[:, :1] - patches.mean(1, keepdim=True))
        return patches.unflatten(1, (height, width))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images ``[B, in_chans, H, W]`` to ``[B, H / 16, W / 16, C]``, a map whose mean is the class token."""
        x = self.stem(x)
        height, width = x.shape[1], x.shape[2]
        x = self._tokens(x)
        for stage in self.stages:
            x = stage(x, height, width)
        return self._map(self.norm(x), height, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, in_chans, H, W]`` to logits ``[B, num_classes]``."""
        # As in the parent, but here: FX spares `resize_map` only in files in which it has met a forward.
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the patches after the chosen stages; arguments and result are those of `Pyramid`."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"forward_intermediates returns NCHW or NHWC maps; got output_fmt {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: last + 1] if stop_early else self.stages
        x = self.stem(x)
        height, width = x.shape[1], x.shape[2]
        x = self._tokens(x)
        taps = []
        for i, stage in enumerate(stages):
            x = stage(x, height, width)
            if i in take:
                tap = self.norm(x) if norm and i == len(self.stages) - 1 else x
                taps.append(_to_format(tap[:, 1:].unflatten(1, (height, width)), "NHWC", output_fmt))
        if intermediates_only:
            return taps
        if len(stages) == len(self.feature_info):
            return self._map(self.norm(x), height, width), taps
        return x[:, 1:].unflatten(1, (height, width)), taps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen stages don't need; return their absolute indices."""
        stages = len(self.stages)
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if len(self.stages) < stages or (prune_norm and prune_head):
            self.reads_class_token = False
            last = self.stages[-1].blocks[-1].attn
            if isinstance(last, AgentTokenAttention):
                # What the class token reads from the agents in the last block reaches no output any more.
                last.ca_bias = None
        return take


def _map_size(img_size: int | tuple[int, int], reduction: int) -> tuple[int, int]:
    height, width = to_2tuple(img_size)
    return -(-height // reduction), -(-width // reduction)


def _tile(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return the square that an image is made of side by side, else the image."""
    height, width = to_2tuple(img_size)
    side = min(height, width)
    return (height, width) if height % side or width % side else (side, side)


def _agent_shapes(
    agents: Sequence[int], agent_shapes: Sequence[tuple[int, int]] | None
) -> Sequence[tuple[int, int] | None]:
    if agent_shapes is None:
        return [None] * len(agents)
    if len(agent_shapes) != len(agents):
        raise ValueError(f"agent_shapes must name one for each of the {len(agents)} stages; got {list(agent_shapes)}")
    return agent_shapes


# From the published names to ours.
_SWIN_NAMES = (
    (r"^patch_embed\.", lambda m: "stem."),
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^layers\.", lambda m: "stages."),
    (r"^norm(\d)\.", lambda m: f"out_norms.{m[1]}."),
    (r"\.relative_position_bias_table$", lambda m: ".rpb"),
)
_PVT_NAMES = (
    (r"^patch_embed1\.proj\.", lambda m: "stem.conv."),
    (r"^patch_embed1\.norm\.", lambda m: "stem.norm."),
    (r"^pos_embed1$", lambda m: "stem.pos_embed"),
    (r"^patch_embed(\d)\.proj\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.conv."),
    (r"^patch_embed(\d)\.norm\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.norm."),
    (r"^pos_embed(\d)$", lambda m: f"stages.{int(m[1]) - 1}.downsample.pos_embed"),
    (r"^block(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
)
_CSWIN_NAMES = (
    (r"^stage1_conv_embed\.0\.", lambda m: "stem.conv."),
    (r"^stage1_conv_embed\.2\.", lambda m: "stem.norm."),
    (r"^merge(\d)\.", lambda m: f"stages.{m[1]}.downsample."),
    (r"^stage(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
    (r"\.(qkv|proj)\.", lambda m: f".attn.{m[1]}."),
    (r"\.attns\.0\.([a-z]{2}_bias)$", lambda m: f".attn.{m[1]}"),
    (r"\.attns\.(\d)\.get_v\.", lambda m: f".attn.lepe.{m[1]}."),
)
# Where the biases that belong to a map's size have their rows or columns.
_SPATIAL_DIMS = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}


def _renamed(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a published state dict under ``model``'s names and in its layouts, whatever the image size."""
    if isinstance(model, AgentDeiT):
        quarter = len(model.stages[0].blocks)
        names = (
            (r"^patch_embed\.", lambda m: "stem."),
            (r"^blocks\.(\d+)\.", lambda m: f"stages.{int(m[1]) // quarter}.blocks.{int(m[1]) % quarter}."),
        )
    elif isinstance(model, AgentPVT):
        names = _PVT_NAMES
    elif isinstance(model, AgentCSWin):
        names = _CSWIN_NAMES
    else:
        names = _SWIN_NAMES
    wanted = model.state_dict()
    renamed = {}
    for key, value in state.items():
        if key.endswith((".relative_position_index", ".attn_mask")):
            continue
        if key.endswith("relative_position_bias_table"):
            value = from_swin_table(value)
        for pattern, ours in names:
            key = re.sub(pattern, ours, key)
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        if key.endswith("lepe.0.weight") or key.endswith("lepe.0.bias"):
            # In CSWin's agent blocks the same name stands for the convolution of the values.
            convolution = key.replace("lepe.0", "dwc")
            key = convolution if convolution in wanted else key
        if key.endswith(".pos_embed") and value.ndim == 3:
            side = round(value.shape[1] ** 0.5)
            value = value.unflatten(1, (side, side))
        renamed[key] = value
    for key in [key for key in renamed if ".attn.q." in key]:
        kv = key.replace(".attn.q.", ".attn.kv.")
        if kv in renamed:
            renamed[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat([renamed.pop(key), renamed.pop(kv)])
    return renamed


def _resized(key: str, value: Tensor, wanted: Tensor) -> Tensor:
    """Resample a bias or position embedding of another image size to ``wanted``'s shape, as the published code does."""
    leaf = key.rsplit(".", 1)[-1]
    if value.shape == wanted.shape or value.ndim != wanted.ndim:
        return value
    if leaf in _SPATIAL_DIMS:
        dim = _SPATIAL_DIMS[leaf]
        if all(value.shape[i] == wanted.shape[i] for i in range(5) if i != dim):
            lines = value.movedim(dim, -1)
            resized = F.interpolate(lines.flatten(0, 3)[:, None], size=wanted.shape[dim], mode="linear")
            return resampled(resized.reshape(*lines.shape[:-1], -1).movedim(-1, dim), value, "linear")
    elif leaf == "rpb" and value.shape[0] == wanted.shape[0]:
        return resampled(resize_bias_table(value, list(wanted.shape[1:])), value, "bicubic")
    elif key.endswith(".pos_embed") and value.shape[-1] == wanted.shape[-1]:
        return resampled(resize_map(value, wanted.shape[1], wanted.shape[2], "bicubic"), value, "bicubic")
    return value


def _resized_tokens(pos_embed: Tensor, model: AgentDeiT) -> Tensor:
    """Resample the position embedding of class token and patches ``[1, 1 + side * side, C]`` to ``model``'s map."""
    side = round((pos_embed.shape[1] - 1) ** 0.5)
    if pos_embed.shape == model.pos_embed.shape or side * side != pos_embed.shape[1] - 1:
        return pos_embed
    grid = resize_map(pos_embed[:, 1:].unflatten(1, (side, side)), model.map_height, model.map_width, "bicubic")
    return resampled(torch.cat([pos_embed[:, :1], grid.flatten(1, 2)], dim=1), pos_embed, "bicubic")


def convert_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a published state dict to ``model``'s names, and resample what belongs to another image size.

    Reads the authors' classification and dense files; leaves our own names alone. What the published code recomputes
    (``relative_position_index``, ``attn_mask``) is dropped.
    """
    if not any(key.startswith("stem.") for key in state):
        state = _renamed(state, model)
    wanted = model.state_dict()
    state = {key: _resized(key, value, wanted[key]) if key in wanted else value for key, value in state.items()}
    if isinstance(model, AgentDeiT) and "pos_embed" in state:
        state["pos_embed"] = _resized_tokens(state["pos_embed"], model)
    return state


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


def _deit(name: str, pretrained: bool, options: dict, config: dict) -> AgentDeiT:
    return build(AgentDeiT, name, pretrained, convert_checkpoint, **{**config, **options})


def _pvt(name: str, pretrained: bool, options: dict, config: dict) -> AgentPVT:
    return build(AgentPVT, name, pretrained, convert_checkpoint, **{**config, **options})


def _swin(name: str, pretrained: bool, options: dict, config: dict) -> AgentSwin:
    return build(AgentSwin, name, pretrained, convert_checkpoint, **{**config, **options})


def _cswin(name: str, pretrained: bool, options: dict, config: dict) -> AgentCSWin:
    return build(AgentCSWin, name, pretrained, convert_checkpoint, **{**config, **options})


_PVT_DENSE = dict(agent_shapes=((12, 12), (16, 16), (28, 28), (28, 28)))
_SWIN_DENSE = dict(agent_shapes=((9, 9), (12, 12), (14, 14), (7, 7)), out_norms=True)

# The published dense settings, for `create_backbone(name, recipe=...)`: more agents, and their stochastic depth, for
# detection Mask R-CNN's, or Cascade Mask R-CNN's where that is the only one. RetinaNet's is a recipe of its own.
recipes: dict[str, dict[str, dict]] = {
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
    return _deit("agent_deit_tiny", pretrained, kwargs, _DEIT_TINY)


@register_model
def agent_deit_small(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-Small."""
    return _deit("agent_deit_small", pretrained, kwargs, _DEIT_SMALL)


@register_model
def agent_deit_small_448(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-Small, trained on images of 448 pixels."""
    config = {**_DEIT_SMALL, **dict(img_size=448)}
    return _deit("agent_deit_small_448", pretrained, kwargs, config)


@register_model
def agent_deit_base(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-Base: the first four blocks have agent attention."""
    return _deit("agent_deit_base", pretrained, kwargs, _DEIT_BASE)


@register_model
def agent_pvt_tiny(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-Tiny."""
    return _pvt("agent_pvt_tiny", pretrained, kwargs, _PVT_TINY)


@register_model
def agent_pvt_small(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-Small."""
    return _pvt("agent_pvt_small", pretrained, kwargs, _PVT_SMALL)


@register_model
def agent_pvt_medium(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-Medium."""
    return _pvt("agent_pvt_medium", pretrained, kwargs, _PVT_MEDIUM)


@register_model
def agent_pvt_medium_256(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-Medium, trained on images of 256 pixels."""
    config = {**_PVT_MEDIUM, **dict(img_size=256)}
    return _pvt("agent_pvt_medium_256", pretrained, kwargs, config)


@register_model
def agent_pvt_large(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-Large."""
    return _pvt("agent_pvt_large", pretrained, kwargs, _PVT_LARGE)


@register_model
def agent_swin_tiny(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-Tiny."""
    return _swin("agent_swin_tiny", pretrained, kwargs, _SWIN_TINY)


@register_model
def agent_swin_small(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-Small."""
    return _swin("agent_swin_small", pretrained, kwargs, _SWIN_SMALL)


@register_model
def agent_swin_small_288(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-Small, trained on images of 288 pixels."""
    config = {**_SWIN_SMALL, **dict(img_size=288, window_size=9)}
    return _swin("agent_swin_small_288", pretrained, kwargs, config)


@register_model
def agent_swin_base(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-Base: of the third stage, the first two blocks have agent attention."""
    return _swin("agent_swin_base", pretrained, kwargs, _SWIN_BASE)


@register_model
def agent_swin_base_384(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-Base for images of 384 pixels."""
    config = {**_SWIN_BASE, **dict(img_size=384, window_size=12)}
    return _swin("agent_swin_base_384", pretrained, kwargs, config)


@register_model
def agent_cswin_tiny(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Agent-CSWin-Tiny."""
    return _cswin("agent_cswin_tiny", pretrained, kwargs, _CSWIN_TINY)


@register_model
def agent_cswin_small(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Agent-CSWin-Small."""
    return _cswin("agent_cswin_small", pretrained, kwargs, _CSWIN_SMALL)


@register_model
def agent_cswin_base(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Agent-CSWin-Base."""
    return _cswin("agent_cswin_base", pretrained, kwargs, _CSWIN_BASE)


@register_model
def agent_cswin_base_384(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Agent-CSWin-Base for images of 384 pixels."""
    config = {**_CSWIN_BASE, **dict(img_size=384, stripes=(1, 2, 12, None), drop_path_rate=0.7)}
    return _cswin("agent_cswin_base_384", pretrained, kwargs, config)
