"""Forms of timm's models: what published dense code computes otherwise than timm's model of the name."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, PatchEmbed
from timm.models.resnet import Bottleneck
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..kernels.lengths import padding_to
from .backbone import Backbone
from .checkpoint import CheckpointError
from .maps import Maps

STYLES = ("pytorch", "caffe")
# Options of a backbone that say in which form it computes; all others are timm's.
FORM_OPTIONS = ("style", "dense", "out_norms", "grid")


class PadsBeforeItRolls(SwinTransformerBlock):
    """timm's Swin block as all published dense code computes it: maps are padded to whole windows, then rolled."""

    def _attn(self, x: Tensor) -> Tensor:
        height, width, channels = x.shape[1:]
        rows, columns = self.window_size
        x = F.pad(x, (0, 0, 0, padding_to(width, columns), 0, padding_to(height, rows)))
        padded = x.shape[1:3]
        down, across = self.shift_size
        rolls = bool(down or across)
        if rolls:
            x = torch.roll(x, (-down, -across), (1, 2))
        windows = window_partition(x, self.window_size).view(-1, self.window_area, channels)
        windows = self.attn(windows, mask=self.get_attn_mask(x) if rolls else None)
        x = window_reverse(windows.view(-1, rows, columns, channels), self.window_size, *padded)
        if rolls:
            x = torch.roll(x, (down, across), (1, 2))
        return x[:, :height, :width].contiguous()


class ResamplesPlainly(VisionTransformer):
    """timm's ViT with mmseg's positions on grids of other sizes: bicubic, and not smoothed before."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            return super()._pos_embed(x)
        prefix = self.num_prefix_tokens
        grid = self.pos_embed[:, prefix:].unflatten(1, self.patch_embed.grid_size)
        positions = torch.cat([self.pos_embed[:, :prefix], _bicubic(grid, x.shape[1:3]).flatten(1, 2)], dim=1)
        tokens = x.flatten(1, 2)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), tokens], dim=1)
        return self.pos_drop(tokens + positions)


class PositionedPatches(PatchEmbed):
    """Patches ``[B, H, W, C]`` with positions of ViTDet, whose table is that of the pretraining's smaller images."""

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, 3, H, W]`` to patches."""
        x = super().forward(x)
        return x + _bicubic(self.pos_embed, x.shape[1:3])


def _bicubic(grid: Tensor, size: Sequence[int]) -> Tensor:
    """Resize positions ``[1, h, w, C]`` to ``size``, (height, width)."""
    if tuple(grid.shape[1:3]) == tuple(size):
        return grid
    resized = F.interpolate(grid.permute(0, 3, 1, 2), size=tuple(size), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1)


class PublishedBackbone(Backbone):
    """A timm model in the form in which the published dense code computes it.

    ResNet of style ``"caffe"`` strides in the first convolution of a bottleneck, not in the second. Swin Transformers
    pad their maps before they roll them, and roll in every second block whatever the map's size. PVTv2 has an eps of
    1e-6 in all norms, as samvit has in ViTDet. ViTs resample positions without smoothing. All but ResNets may normalise
    the maps that they return, while those go on that are not normalised.

    Args:
        features: timm's model, cut to its features.
        style: Of a ResNet: ``"pytorch"`` or ``"caffe"``.
        dense: Whether all but ResNets have the form of the dense code.
        out_norms: Indices of the maps that are normalised.
        grid: Of samvit: side of the grid of positions in patches.

    Raises:
        CheckpointError: If the model has no such form.
    """

    def __init__(
        self,
        features: nn.Module,
        maps: Maps | None = None,
        resample: bool = False,
        style: str | None = None,
        dense: bool = False,
        out_norms: Sequence[int] = (),
        grid: int | None = None,
    ):
        super().__init__(features, maps, resample)
        self._patch = 1
        if style is not None:
            _stride_as(features, style)
        for module in features.modules() if dense else ():
            if type(module) is SwinTransformerBlock:
                # As it is, with another forward: hooks, copies and pickles go on working.
                module.__class__ = PadsBeforeItRolls
                self._patch = 4
            elif type(module) is VisionTransformer:
                module.__class__ = ResamplesPlainly
            elif isinstance(module, nn.LayerNorm) and self._is_of("pvt_v2", "vision_transformer_sam"):
                module.eps = 1e-6
        if grid is not None:
            model = features.model
            model.patch_embed.__class__ = PositionedPatches
            model.patch_embed.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, model.embed_dim))
            model.pos_embed = None
        # timm's ConvNeXt has an eps of 1e-6, Swin of torch's 1e-5.
        eps = 1e-5 if self._patch == 4 else 1e-6
        self.out_norms = nn.ModuleDict({str(index): LayerNorm2d(self.channels[index], eps=eps) for index in out_norms})

    def _is_of(self, *files: str) -> bool:
        names = {f"timm.models.{file}" for file in files}
        return any(type(module).__module__ in names for module in self.features.modules())

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images ``[B, in_chans, H, W]`` to NCHW maps, from the finest to the coarsest."""
        x = F.pad(x, (0, padding_to(x.shape[-1], self._patch), 0, padding_to(x.shape[-2], self._patch)))
        maps = list(super().forward(x))
        for index, norm in self.out_norms.items():
            maps[int(index)] = norm(maps[int(index)])
        return maps


def _stride_as(features: nn.Module, style: str) -> None:
    """Let a ResNet's bottlenecks stride where a style has it."""
    if style not in STYLES:
        raise CheckpointError(f"style is {style!r}; it can be {' or '.join(map(repr, STYLES))}")
    bottlenecks = [module for module in features.modules() if isinstance(module, Bottleneck)]
    if style == "caffe" and not bottlenecks:
        raise CheckpointError("style='caffe' is for ResNets of bottlenecks")
    for block in bottlenecks if style == "caffe" else ():
        if block.conv2.stride != (1, 1):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def form_in(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of a form among those of a backbone, and the others, with what timm needs for the form."""
    form = {name: options[name] for name in FORM_OPTIONS if options.get(name) is not None}
    others = {name: value for name, value in options.items() if name not in FORM_OPTIONS}
    return form, others
