"""DeiT, the plain vision transformer, as a host.

Paper: Training data-efficient image transformers, Touvron et al., ICML 2021, arXiv 2012.12877. Origin:
github.com/facebookresearch/deit, Apache-2.0.
"""

from collections.abc import Sequence
from functools import partial

import torch
from timm.layers import Attention, ClassifierHead, DropPath, PatchEmbed, calculate_drop_path_rates, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ...blocks.pointwise import PointwiseMlp
from ...blocks.position import resize_map
from .._pyramid import Pyramid, init_module, settle_size, to_format
from . import ChooseAttention
from .swin import map_size_of


class TokenBlock(nn.Module):
    """Transformer block on a class token and a map.

    Args:
        dim: Channels.
        attention: Maps tokens, height and width to tokens; or timm's `Attention`, which knows of tokens alone.
        mlp_ratio: Hidden channels of the MLP over its input's.
        drop: Dropout rate of the MLP.
        drop_path: Rate at which a branch is dropped.
        norm_layer: Norm before each branch.
    """

    knows_map: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        norm_layer: type[nn.Module],
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.knows_map = not isinstance(attention, Attention)
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attention
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = PointwiseMlp(dim, int(dim * mlp_ratio), drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map tokens ``[B, 1 + height * width, dim]`` to the same shape."""
        out = self.norm1(x)
        out = self.attn(out, height, width) if self.knows_map else self.attn(out)
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


class DeiT(Pyramid):
    """Plain transformer on patches of 16 and a class token, whose blocks attend as they are told, or else plainly.

    The blocks are grouped into four stages of one resolution, so that intermediate outputs are those of a pyramid.

    The classifier reads the class token. As a map has no place for it, ``forward_features`` returns the map shifted by
    one vector per image, so that its mean is the class token: pooled, the map is what the published classifier reads.
    Intermediate outputs are the patches alone, unshifted.

    Args:
        attention: What attends, mapping tokens ``[B, 1 + H * W, C]``, H and W to tokens; see `hosts`. All blocks are
            counted as those of stage 0.
        img_size: Height and width of the images that the position embedding is learned for; images of any size may be
            given.
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` (the class token, see above) or ``""``.
        patch_size: Height and width of a patch.
        embed_dim: Channels.
        depth: Blocks; a multiple of 4.
        num_heads: Heads.
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
        attention: ChooseAttention,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        if depth % 4:
            raise ValueError(f"DeiT groups its blocks into four stages: depth must be a multiple of 4; got {depth}")
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        map_size = map_size_of(img_size, patch_size)
        drop_paths = calculate_drop_path_rates(drop_path_rate, depth)
        blocks = [
            TokenBlock(
                embed_dim,
                attention(0, i, embed_dim, num_heads, map_size)
                or Attention(embed_dim, num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop_rate, **dd),
                mlp_ratio,
                proj_drop_rate,
                drop_path,
                norm_layer,
                **dd,
            )
            for i, drop_path in enumerate(drop_paths)
        ]
        quarter = depth // 4
        stages = [TokenStage(blocks[i : i + quarter]) for i in range(0, depth, quarter)]
        super().__init__(
            PatchEmbed(None, patch_size, in_chans, embed_dim, output_fmt="NHWC", dynamic_img_pad=True, **dd),
            stages,
            channels=[embed_dim] * 4,
            reductions=[patch_size] * 4,
            norm=norm_layer(embed_dim, **dd),
            head=ClassifierHead(embed_dim, num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
        )
        self.map_height, self.map_width = map_size
        # Whether the output depends on the class token; features without the final norm don't.
        self.reads_class_token = True
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
        settle_size(x, self.symbolic_size)
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
                taps.append(to_format(tap[:, 1:].unflatten(1, (height, width)), "NHWC", output_fmt))
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
        return take
