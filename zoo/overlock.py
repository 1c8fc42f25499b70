"""OverLoCK: an overview of the whole image first, then a closer look that it guides, by context-mixing convolutions.

Paper: OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels, Lou and Yu, CVPR 2025,
arXiv 2502.20087.

Origin: github.com/LMMMEng/OverLoCK (Apache-2.0). Written anew on `blocks.contmix`; the published classifiers, in both
their forms, and the backbones of the published detectors and segmenters load through `convert_checkpoint`.

The large static kernels are trained as several dilated ones beside each other. `OverLoCK.fuse`, or timm's
`reparameterize_model`, turns them into one each, exactly; a file in that form turns the model that it is loaded into.
"""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, SelectAdaptivePool2d, calculate_drop_path_rates, trunc_normal_
from timm.models import checkpoint, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..blocks.contmix import (
    ChannelAffine,
    GatedContextMixing,
    GlobalResponseNorm,
    ResidualDepthwise,
    ResponseMlp,
    rename_published,
    squeeze_excite,
)
from ..blocks.dilated_reparam import DilatedReparamConv, merge_state, rename_branches
from ..blocks.layout import channels_last
from ..blocks.losses import report_logits, wants_logits
from ._build import IMAGENET_CFG, build, cfgs_with_links
from ._pyramid import Pyramid, Stage, settle_size, to_format

__all__ = ["OverLoCK"]

# Of the six stages, those whose outputs are the features; the fourth is the overview, beside the others.
_LEVELS = (0, 1, 4, 5)


class RepBlock(nn.Module):
    """A large static kernel and an MLP as one branch, after a depthwise convolution; NCHW."""

    def __init__(
        self, dim: int, kernel_size: int, scaled: bool, drop_path: float, inference_mode: bool, device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dwconv = ResidualDepthwise(dim, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-6, **dd)
        self.large = DilatedReparamConv(dim, kernel_size, inference_mode, **dd)
        self.bn = nn.BatchNorm2d(dim, **dd)
        self.se = squeeze_excite(dim, **dd)
        self.mlp = ResponseMlp(dim, 4 * dim, dim, **dd)
        self.ls = ChannelAffine(dim, **dd) if scaled else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(x)
        branch = self.mlp(self.se(self.bn(self.large(self.norm(x)))))
        # The scale is the shortcut's.
        return self.ls(x) + self.drop_path(branch)


class FocusBlock(nn.Module):
    """Context mixing and an MLP on features with the context beside them, which is reminded of the overview; NCHW.

    Args:
        dim: Channels of the features.
        context_dim: Channels of the context, which follow them.
        groups: As in `blocks.contmix.ContextMixing`.
        kernel_size: Of the large kernels.
        reminded: Whether the overview is added to the context; not in the first block, whose context it is.
        drop_path: Rate of stochastic depth.
        inference_mode: Whether the static large kernel is one convolution.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        groups: int,
        kernel_size: int,
        reminded: bool,
        drop_path: float,
        inference_mode: bool,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.reminded = reminded
        both = dim + context_dim
        self.x_scale = ChannelAffine(context_dim, **dd) if reminded else nn.Identity()
        self.h_scale = ChannelAffine(context_dim, **dd) if reminded else nn.Identity()
        self.dwconv1 = ResidualDepthwise(both, **dd)
        self.norm1 = LayerNorm2d(both, eps=1e-6, **dd)
        self.fusion = nn.Sequential(
            nn.Conv2d(both, both, 3, padding=1, groups=both, **dd),
            nn.BatchNorm2d(both, **dd),
            nn.GELU(),
            nn.Conv2d(both, dim, 1, **dd),
            GlobalResponseNorm(dim, **dd),
        )
        self.mixer = GatedContextMixing(
            dim, context_dim, both, groups, kernel_size, inference_mode=inference_mode, **dd
        )
        self.ls1 = ChannelAffine(both, **dd)
        self.dwconv2 = ResidualDepthwise(both, **dd)
        self.norm2 = LayerNorm2d(both, eps=1e-6, **dd)
        self.mlp = ResponseMlp(both, 3 * dim, both, **dd)
        self.ls2 = ChannelAffine(both, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, z: Tensor, overview: Tensor) -> Tensor:
        """Map features and context ``[B, dim + context_dim, H, W]`` to the same; the overview is of their size."""
        if self.reminded:
            context = self.x_scale(z[:, self.dim :]) + self.h_scale(overview)
            z = torch.cat([z[:, : self.dim], context], 1)
        z = self.dwconv1(z)
        normed = self.norm1(z)
        fused = self.fusion(normed)
        mixed = self.mixer(fused, normed[:, : self.dim], normed[:, self.dim :], fused)
        z = self.ls1(z) + self.drop_path(mixed)
        z = self.dwconv2(z)
        return self.ls2(z) + self.drop_path(self.mlp(self.norm2(z)))


class FocusDownsample(nn.Module):
    """Halve features and context, each by a convolution of its own; NCHW."""

    def __init__(self, dim: int, out_dim: int, context_dim: int, device=None, dtype=None):
        super().__init__()
        self.dim = dim
        self.x_proj = _downsample(dim, out_dim, device, dtype)
        self.h_proj = _downsample(context_dim, context_dim, device, dtype)

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([self.x_proj(z[:, : self.dim]), self.h_proj(z[:, self.dim :])], 1)


class FocusStage(nn.Module):
    """Focus blocks on one resolution, after an optional downsampling."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, z: Tensor, overview: Tensor) -> Tensor:
        """Map features with their context, and the overview at the stage's resolution, to the stage's output."""
        z = self.downsample(z)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                z = checkpoint(block, z, overview)
            else:
                z = block(z, overview)
        return z


class OverviewOut(nn.Module):
    """What the overview adds to the last map of a detector; NCHW."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = LayerNorm2d(dim, eps=1e-6, **dd)
        self.proj = nn.Conv2d(dim, out_dim, 1, **dd)
        self.scale = ChannelAffine(out_dim, 1e-5, **dd)

    def forward(self, overview: Tensor) -> Tensor:
        return self.scale(self.proj(self.norm(overview)))


class Head(nn.Module):
    """A 1x1 convolution to ``hidden`` channels before the pooling, and the classifier after it.

    Without pooling and classes the map passes as it is.
    """

    def __init__(self, dim: int, hidden: int, num_classes: int, pool_type: str, drop_rate: float, **dd):
        super().__init__()
        self.in_features = self.num_features = dim
        self.hidden = hidden
        self.conv = nn.Conv2d(dim, hidden, 1, bias=False, **dd)
        self.bn = nn.BatchNorm2d(hidden, **dd)
        self.act = nn.SiLU()
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, **dd)

    @torch.jit.ignore
    def reset(self, num_classes: int, pool_type: str | None = None, **dd) -> None:
        """Replace the classifier; ``pool_type=""`` is for maps, without classes; None for pooling as it is.

        Classes bring the published mean where there is no pooling.
        """
        if pool_type is None and num_classes and not self.pooled:
            pool_type = "avg"
        if pool_type is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
            self.pooled = bool(pool_type)
        if num_classes and not self.pooled:
            raise ValueError("a classifier needs pooling; choose num_classes=0 or global_pool='avg'")
        self.fc = nn.Linear(self.hidden, num_classes, **dd) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if not self.pooled:
            return x
        x = self.drop(self.global_pool(self.act(self.bn(self.conv(x)))))
        return x if pre_logits else self.fc(x)


def _convolution(in_dim: int, out_dim: int, stride: int, device=None, dtype=None) -> list[nn.Module]:
    dd = {"device": device, "dtype": dtype}
    return [nn.Conv2d(in_dim, out_dim, 3, stride, 1, bias=False, **dd), nn.BatchNorm2d(out_dim, **dd)]


def _downsample(in_dim: int, out_dim: int, device=None, dtype=None) -> nn.Sequential:
    return nn.Sequential(*_convolution(in_dim, out_dim, 2, device, dtype))


def _stem(in_chans: int, dim: int, device=None, dtype=None) -> nn.Sequential:
    half = dim // 2
    layers: list[nn.Module] = []
    for i, o, stride in ((in_chans, half, 2), (half, half, 1), (half, dim, 2), (dim, dim, 1)):
        layers += [*_convolution(i, o, stride, device, dtype), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class OverLoCK(Pyramid):
    """Three stages, from which an overview is taken, and two that look closer with it; maps of 1/4 to 1/32.

    Features with the context beside them are the third and fourth map, so that these have more channels than
    ``embed_dims`` says: a quarter of the last one's more.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier, ``"avg"`` or ``""``.
        embed_dims: Channels at 1/4, 1/8, 1/16 and 1/32.
        depths: Blocks at 1/4, 1/8, 1/16, and of the overview at 1/32.
        focus_depths: Focus blocks at 1/16 and 1/32.
        groups: Groups of dynamic kernels at 1/16 and 1/32; twice what the authors' configurations say.
        kernel_sizes: Of the large kernels at 1/4, 1/8, 1/16 and 1/32.
        head_dim: Channels before the classifier.
        aux_head: Whether there is a classifier of the overview, too, which exists for training: its logits are reported
            as ``"aux"`` (`blocks.losses`), while the output stays what it is.
        aux_weight: Weight of its loss.
        out_norms: Whether to build the published dense form, with a norm for every map; that of the second is what
            later stages take.
        overview_out: Whether the normed overview is added to the last of these, as in the published detectors.
        inference_mode: Whether to begin in the re-parameterised form.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; blocks before it have proportionally less.

    Shape:
        Images ``[B, in_chans, H, W]`` of any size to logits ``[B, num_classes]``.
    """

    output_fmt = "NCHW"
    symbolic_size = False

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (56, 112, 256, 336),
        depths: Sequence[int] = (2, 2, 3, 2),
        focus_depths: Sequence[int] = (6, 2),
        groups: Sequence[int] = (8, 12),
        kernel_sizes: Sequence[int] = (17, 15, 13, 7),
        head_dim: int = 1024,
        aux_head: bool = False,
        aux_weight: float = 0.4,
        out_norms: bool = False,
        overview_out: bool = False,
        inference_mode: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        context_dim = embed_dims[-1] // 4
        channels = [*embed_dims[:2], embed_dims[2] + context_dim, embed_dims[3] + context_dim]
        drop_paths = calculate_drop_path_rates(drop_path_rate, [*depths, *focus_depths], stagewise=True)
        stages: list[nn.Module] = []
        for i, (dim, kernel_size) in enumerate(zip(embed_dims, kernel_sizes, strict=True)):
            blocks = [RepBlock(dim, kernel_size, i > 1, drop_path, inference_mode, **dd) for drop_path in drop_paths[i]]
            stages.append(Stage(nn.Identity() if i == 0 else _downsample(embed_dims[i - 1], dim, **dd), blocks))
        for i, dim in enumerate(embed_dims[2:]):
            blocks = [
                FocusBlock(dim, context_dim, groups[i], kernel_sizes[2 + i], i + j > 0, drop_path, inference_mode, **dd)
                for j, drop_path in enumerate(drop_paths[4 + i])
            ]
            downsample = nn.Identity() if i == 0 else FocusDownsample(embed_dims[2], dim, context_dim, **dd)
            stages.append(FocusStage(downsample, blocks))
        norms: list[nn.Module] = [LayerNorm2d(dim, eps=1e-6, **dd) for dim in channels]
        if overview_out:
            norms.append(OverviewOut(embed_dims[-1], channels[-1], **dd))
        super().__init__(
            _stem(in_chans, embed_dims[0], **dd),
            stages,
            channels=channels,
            reductions=[4, 8, 16, 32],
            norm=nn.Identity(),
            out_norms=norms if out_norms else None,
            head=Head(channels[-1], head_dim, num_classes, global_pool, drop_rate, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
        )
        self.stages = nn.ModuleList(stages)  # no chain, as which TorchScript would compile it
        self.context = nn.Conv2d(embed_dims[-1], context_dim, 1, **dd)
        self.aux_head = None
        if aux_head:
            dim = embed_dims[-1]
            self.aux_head = nn.Sequential(
                nn.BatchNorm2d(dim, **dd), SelectAdaptivePool2d(flatten=True), nn.Linear(dim, num_classes, **dd)
            )
        self.aux_weight = aux_weight
        self.head_hidden_size = head_dim
        for info, stage in zip(self.feature_info, _LEVELS, strict=True):
            info["module"] = f"stages.{stage}"
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise as published, convolutions and linear layers from a truncated normal of std 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()

    @torch.jit.ignore
    def fuse(self) -> "OverLoCK":
        """Turn every large static kernel into one convolution, in place; what is computed in evaluation stays."""
        for module in self.modules():
            if isinstance(module, DilatedReparamConv):
                module.reparameterize()
        return self

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return the patterns by which timm groups parameters into layers."""
        matcher = super().group_matcher(coarse)
        extra = [(r"^context|^aux_head", (3, 99999))]
        return matcher if coarse else matcher | {"blocks": [*matcher["blocks"], *extra]}

    def _look(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map the second stage's output to the fifth's, the context for the sixth, and the overview."""
        x = self.stages[2](x)
        overview = self.stages[3](x)
        context = self.context(overview)
        wide = F.interpolate(context, size=[x.shape[2], x.shape[3]], mode="bilinear")
        z = self.stages[4](torch.cat([x, wide], 1), wide)
        return z, context, overview

    def _report(self, overview: Tensor) -> Tensor:
        """Report the auxiliary head's logits; return a zero that ties its weights to a loss that is not to have them.

        Processes that train together (DDP) wait for every weight's gradient.
        """
        logits = self.aux_head(overview)
        if wants_logits():
            report_logits("aux", logits, self.aux_weight)
        return 0 * logits.mean()

    def _normed(self, z: Tensor, overview: Tensor) -> Tensor:
        """Return the last map as the published dense forms have it."""
        z = self.out_norms[3](z)
        return z + self.out_norms[4](overview) if len(self.out_norms) > 4 else z

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images ``[B, in_chans, H, W]`` to the last stage's map ``[B, C, H / 32, W / 32]``."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - it understands no condition beside this one
            if len(self.stages) <= _LEVELS[-1]:
                return self.forward_intermediates(x, indices=[0])[0]  # of a pruned model
        settle_size(x, self.symbolic_size)
        x = self.stages[1](self.stages[0](self.stem(channels_last(x))))
        if self.out_norms is not None:
            x = self.out_norms[1](x)
        z, context, overview = self._look(x)
        z = self.stages[5](z, context)
        if self.out_norms is not None:
            z = self._normed(z, overview)
        if not torch.jit.is_scripting():  # noqa: SIM102
            if self.aux_head is not None and self.training:
                z = z + self._report(overview)
        return z

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, in_chans, H, W]`` to logits ``[B, num_classes]``."""
        # As inherited; but timm's tracer looks for the functions that it leaves alone in the file of a forward.
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
        """Return the chosen of the four maps; as in `Pyramid`, but that there is no final norm."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"forward_intermediates returns NCHW or NHWC maps; got output_fmt {output_fmt!r}")
        take, last = feature_take_indices(len(self.feature_info), indices)
        # Of a pruned model, the last that is left.
        last = last if stop_early else sum(stage < len(self.stages) for stage in _LEVELS) - 1
        settle_size(x, self.symbolic_size)
        dense = self.out_norms is not None
        x = self.stages[0](self.stem(channels_last(x)))
        maps = [self.out_norms[0](x) if dense and 0 in take else x]
        if last > 0:
            x = self.stages[1](x)
            x = self.out_norms[1](x) if dense else x
            maps.append(x)
        if last > 1:
            x, context, overview = self._look(x)
            maps.append(self.out_norms[2](x) if dense and 2 in take else x)
        if last > 2:
            x = self.stages[5](x, context)
            x = self._normed(x, overview) if dense else x
            maps.append(x)
        taps = [to_format(maps[i], "NCHW", output_fmt) for i in take]
        return taps if intermediates_only else (x, taps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen maps don't need; return their absolute indices."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        cut = last < len(self.feature_info) - 1
        self.stages = self.stages[: _LEVELS[last] + 1]
        if last < 2:
            self.context = nn.Identity()
        if self.out_norms is not None:
            for i in range(len(self.feature_info)):
                # The second is on the way to the others.
                if i > last or (i not in take and i != 1):
                    self.out_norms[i] = nn.Identity()
            if cut:
                self.out_norms = self.out_norms[: last + 1]
        if prune_head or cut:
            self.aux_head = None
            self.head.conv = self.head.bn = self.head.act = nn.Identity()
            self.num_features = self.feature_info[last]["num_chs"]
            self.head.hidden = self.head_hidden_size = self.num_features
            self.reset_classifier(0, "")
        return take

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the auxiliary one; ``num_classes=0`` removes both."""
        super().reset_classifier(num_classes, global_pool)
        if self.aux_head is not None:
            old = self.aux_head[2]
            layer = nn.Linear(old.in_features, num_classes, device=old.weight.device, dtype=old.weight.dtype)
            self.aux_head[2] = layer.train(self.training)
            if num_classes == 0:
                self.aux_head = None


_BASE_BLOCKS = {
    r"^proj\.0\.": "norm.",
    r"^proj\.1\.": "large.",
    r"^proj\.2\.": "bn.",
    r"^proj\.3\.proj\.1\.": "se.fc1.",
    r"^proj\.3\.proj\.3\.": "se.fc2.",
    r"^proj\.4\.": "mlp.fc1.",
    r"^proj\.6\.": "mlp.dw.conv.",
    r"^proj\.7\.": "mlp.grn.",
    r"^proj\.8\.": "mlp.fc2.",
    r"^dwconv\.": "dwconv.conv.",
}
_OTHERS = {
    r"^patch_embed1\.": "stem.",
    r"^patch_embed(\d)\.": lambda match: f"stages.{int(match[1]) - 1}.downsample.",
    r"^patch_embedx\.": "stages.5.downsample.",
    r"^high_level_proj\.": "context.",
    r"^head\.0\.": "head.conv.",
    r"^head\.1\.": "head.bn.",
    r"^head\.4\.": "head.fc.",
    r"^extra_norm\.4\.": "out_norms.4.norm.",
    r"^extra_norm\.": "out_norms.",
    r"^h_proj\.0\.": "out_norms.4.proj.",
    r"^h_proj\.1\.": "out_norms.4.scale.",
}


def _rename(key: str) -> str:
    if match := re.match(r"blocks(\d)\.(\d+)\.(.*)", key):
        stage, block, leaf = match.groups()
        for pattern, name in _BASE_BLOCKS.items():
            leaf = re.sub(pattern, name, leaf)
        return f"stages.{int(stage) - 1}.blocks.{block}.{leaf}"
    if match := re.match(r"sub_blocks(\d)\.(\d+)\.(.*)", key):
        stage, block, leaf = match.groups()
        return f"stages.{int(stage) + 1}.blocks.{block}.{rename_published(leaf, 'mixer')}"
    for pattern, name in _OTHERS.items():
        key = re.sub(pattern, name, key)
    return key


def convert_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor | None]:
    """Rename a published state dict to ``model``'s names; leaves our own names alone.

    A re-parameterised file re-parameterises the model; of a file in the training form, a re-parameterised model gets
    what its branches amount to. An auxiliary head that the model has not is left out.
    """
    if not any(key.startswith("stages.") for key in state):
        state = rename_branches({_rename(key): value for key, value in state.items()})
    converted = dict(state)
    for classifier in ("head.fc.weight", "aux_head.2.weight"):
        if classifier in converted:
            converted[classifier] = converted[classifier].flatten(1)
    if model.aux_head is None:
        converted = {key: value for key, value in converted.items() if not key.startswith("aux_head.")}
    if any(key.endswith("lk_origin.bias") for key in converted):
        model.fuse()
    elif any(key.endswith("lk_origin.bias") for key in model.state_dict()):
        converted = merge_state(converted)
    # Files of dense models lack what comes before a classifier.
    if model.out_norms is not None and not any(key.startswith("head.") for key in converted):
        converted |= dict.fromkeys(key for key in model.state_dict() if key.startswith(("head.conv.", "head.bn.")))
    return converted


_XT = dict(embed_dims=(56, 112, 256, 336), depths=(2, 2, 3, 2), focus_depths=(6, 2), groups=(8, 12), drop_path_rate=0.1)
_T = dict(
    embed_dims=(64, 128, 256, 512), depths=(4, 4, 6, 2), focus_depths=(12, 2), groups=(8, 16), drop_path_rate=0.15
)
_S = dict(
    embed_dims=(64, 128, 320, 512), depths=(6, 6, 8, 3), focus_depths=(16, 3), groups=(16, 32), drop_path_rate=0.4
)
_B = dict(
    embed_dims=(80, 160, 384, 576), depths=(8, 8, 10, 4), focus_depths=(20, 4), groups=(12, 18), drop_path_rate=0.5
)


def _overlock(name: str, pretrained: bool, options: dict, config: dict) -> OverLoCK:
    return build(OverLoCK, name, pretrained, convert_checkpoint, **{**config, **options})


def _cfg(crop_pct: float, **options) -> dict:
    return IMAGENET_CFG | {
        "crop_pct": crop_pct,
        "first_conv": "stem.0",
        "license": "apache-2.0",
        "origin_url": "https://github.com/LMMMEng/OverLoCK",
        "paper_ids": "arXiv:2502.20087",
        **options,
    }


default_cfgs = cfgs_with_links(
    {
        f"overlock_{size}.{tag}": _cfg(crop_pct)
        for size, crop_pct in (("xt", 0.925), ("t", 0.95), ("s", 0.95), ("b", 0.975))
        for tag in ("lmmm_in1k", "lmmm_in1k_reparam")
    }
)


def _dense(detection: float, segmentation: float) -> dict[str, dict]:
    return {
        "detection": {"out_norms": True, "overview_out": True, "drop_path_rate": detection},
        "segmentation": {"out_norms": True, "drop_path_rate": segmentation},
    }


# Stochastic depth of COCO's 1x and of ADE20K's schedule; the smallest was not published in these forms.
dense_settings: dict[str, dict[str, dict]] = {
    "overlock_xt": _dense(0.1, 0.1),
    "overlock_t": _dense(0.2, 0.2),
    "overlock_s": _dense(0.4, 0.3),
    "overlock_b": _dense(0.6, 0.5),
}


@register_model
def overlock_xt(pretrained: bool = False, **kwargs) -> OverLoCK:
    """OverLoCK-XT: 16.5 M parameters re-parameterised."""
    return _overlock("overlock_xt", pretrained, kwargs, _XT)


@register_model
def overlock_t(pretrained: bool = False, **kwargs) -> OverLoCK:
    """OverLoCK-T: 33.5 M parameters re-parameterised."""
    return _overlock("overlock_t", pretrained, kwargs, _T)


@register_model
def overlock_s(pretrained: bool = False, **kwargs) -> OverLoCK:
    """OverLoCK-S: 56.2 M parameters re-parameterised."""
    return _overlock("overlock_s", pretrained, kwargs, _S)


@register_model
def overlock_b(pretrained: bool = False, **kwargs) -> OverLoCK:
    """OverLoCK-B: 94.9 M parameters re-parameterised."""
    return _overlock("overlock_b", pretrained, kwargs, _B)
