"""Between a backbone and a dense head: feature pyramids in the published variants, and what makes pyramids of any maps.

Heads take maps of strides 4, 8, 16 and 32. A backbone of stages gives them, and a feature pyramid network joins them.
A backbone of one stride, as plain vision transformers are, gets ViTDet's simple feature pyramid or mmseg's
MultiLevelNeck; one of other strides gets the missing maps from the nearest of its own.
"""

import math
import re
from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from ...zoo.maps import sources_of
from .. import TaskError

STRIDES = (4, 8, 16, 32)
_GROUPS = 32
_SOURCES = ("on_input", "on_output")
_PUBLISHED = re.compile(r"neck\.(lateral|fpn)_convs\.(\d+)\.conv\.(weight|bias)")


def convert_pyramid(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the ``neck.*`` entries of a published detector or segmenter to those of a `FeaturePyramid` ``neck``.

    All other entries stay as they are.
    """
    groups = {key: match.groups() for key in state if (match := _PUBLISHED.fullmatch(key))}
    levels = len({level for kind, level, _ in groups.values() if kind == "lateral"})

    def renamed(kind: str, level: str, leaf: str) -> str:
        if kind == "lateral":
            return f"neck.inner_blocks.{level}.0.{leaf}"
        # The convolutions of the coarser levels are numbered on from those of the outputs.
        beyond = int(level) - levels
        return f"neck.layer_blocks.{level}.0.{leaf}" if beyond < 0 else f"neck.extra_blocks.convs.{beyond}.{leaf}"

    return {renamed(*groups[key]) if key in groups else key: value for key, value in state.items()}


class _Pooled(ExtraFPNBlock):
    """Coarser levels that repeat every second pixel of the coarsest output."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        for _ in range(self.count):
            results.append(F.max_pool2d(results[-1], kernel_size=1, stride=2))
        return results, [*names, *(f"pooled{index}" for index in range(self.count))]


class _Convolved(ExtraFPNBlock):
    """Coarser levels by strided convolutions, one upon the other, with ``relu`` before all but the first."""

    def __init__(self, in_channels: int, out_channels: int, count: int, source: str, relu: bool):
        super().__init__()
        self.source = source
        self.relu = relu
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels if index == 0 else out_channels, out_channels, 3, stride=2, padding=1)
            for index in range(count)
        )

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        level = x[-1] if self.source == "on_input" else results[-1]
        for index, conv in enumerate(self.convs):
            level = conv(level.relu() if self.relu and index else level)
            results.append(level)
        return results, [*names, *(f"convolved{index}" for index in range(len(self.convs)))]


class FeaturePyramid(FeaturePyramidNetwork):
    """Feature pyramid network (Lin et al. 2017): list of maps in, list of maps with equal channels out.

    The published dense heads use these variants: Mask R-CNN and Cascade, five outputs of which the last is pooled;
    RetinaNet, ``start_level=1`` and two convolutions on the input, with a ReLU between in detectron2; DAT++ with Mask
    R-CNN, one convolution on the input; Semantic FPN, four outputs.

    Attributes:
        channels: Channels of each output.

    Args:
        in_channels: Channels of the backbone's maps, from the finest to the coarsest.
        out_channels: Channels of every output.
        num_outs: Number of outputs; those beyond the backbone's maps are coarser by two each.
        start_level: The first of the backbone's maps that is used.
        extra_convs: How the coarser outputs are made: ``None`` pools the last output, ``"on_input"`` convolves the
            backbone's last map, ``"on_output"`` the last output.
        extra_relu: Whether a ReLU precedes all of those convolutions but the first, as in detectron2's RetinaNet.
        scaling: Makes the maps of ``in_channels`` of those that the backbone gives; none by default.

    Raises:
        TaskError: If the variant doesn't exist.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        num_outs: int = 5,
        start_level: int = 0,
        extra_convs: str | None = None,
        extra_relu: bool = False,
        scaling: "ScaledMaps | None" = None,
    ):
        used = list(in_channels)[start_level:]
        extra = num_outs - len(used)
        if not used or extra < 0:
            raise TaskError(
                f"a pyramid of {num_outs} outputs can't start at map {start_level} of {len(in_channels)}; "
                "it has at least one output for every map from there on"
            )
        if extra_convs not in (None, *_SOURCES):
            raise TaskError(f"extra_convs is {extra_convs!r}; it can be None, {' or '.join(map(repr, _SOURCES))}")
        if extra == 0:
            blocks = None
        elif extra_convs is None:
            blocks = _Pooled(extra)
        else:
            blocks = _Convolved(
                used[-1] if extra_convs == "on_input" else out_channels, out_channels, extra, extra_convs, extra_relu
            )
        super().__init__(used, out_channels, blocks)
        self.start_level = start_level
        self.maps = len(in_channels)
        self.channels = [out_channels] * num_outs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.scaling = scaling

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map the backbone's maps ``[B, C_i, H_i, W_i]`` to outputs ``[B, C, H_j, W_j]``, from the finest on.

        Raises:
            TaskError: If the number of maps isn't that of ``in_channels``.
        """
        if self.scaling is not None:
            maps = self.scaling(maps)
        if len(maps) != self.maps:
            raise TaskError(f"the pyramid takes {self.maps} maps, got {len(maps)}")
        return list(super().forward({str(level): x for level, x in enumerate(maps[self.start_level :])}).values())


def _rescaling(dim: int, stride: int, target: int) -> tuple[list[nn.Module], int]:
    """Return ViTDet's layers from a map of ``stride`` to one of ``target``, and its channels.

    Each doubling is a deconvolution that halves the channels, each halving a max pooling.
    """
    layers: list[nn.Module] = []
    doublings = round(math.log2(stride / target))
    for step in range(doublings):
        if step > 0:
            layers += [LayerNorm2d(dim, eps=1e-6), nn.GELU()]
        layers.append(nn.ConvTranspose2d(dim, max(dim // 2, 1), 2, stride=2))
        dim = max(dim // 2, 1)
    # At odd sides the last cells count as well.
    layers += [nn.MaxPool2d(2, 2, ceil_mode=True) for _ in range(-doublings)]
    return layers, dim


class _NormedConv(nn.Conv2d):
    """A convolution without bias and a norm over the channels, named as detectron2 does."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int):
        super().__init__(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = LayerNorm2d(channels, eps=1e-6)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's pyramid (arXiv 2203.16527, section 3): each level from the backbone's last map alone.

    Entries have detectron2's names: ``simfp_2`` is the level of stride 4, ``simfp_5`` that of 32.

    Attributes:
        channels: Channels of each output.
        reductions: Stride of each output.

    Args:
        in_channels: Channels of the backbone's last map.
        stride: Its stride, a power of two: 16 in the paper.
        out_channels: Channels of every output.
        strides: Strides of the levels.
        num_extra: How many coarser outputs follow.
        extra_convs: How these are made: ``None`` repeats every second pixel of the last level, as published;
            ``"on_output"`` convolves the last level.
        extra_relu: Whether a ReLU precedes all of those convolutions but the first.

    Raises:
        TaskError: If the variant doesn't exist.

    Shape:
        Maps ``[B, C_i, H_i, W_i]``, of which the last counts, to outputs ``[B, C, H_j, W_j]``, from the finest on.
    """

    def __init__(
        self,
        in_channels: int,
        stride: int = 16,
        out_channels: int = 256,
        strides: Sequence[int] = STRIDES,
        num_extra: int = 0,
        extra_convs: str | None = None,
        extra_relu: bool = False,
    ):
        super().__init__()
        if extra_convs not in (None, "on_output"):
            raise TaskError(
                f"extra_convs is {extra_convs!r}; on a simple feature pyramid it can be None or 'on_output'"
            )
        self._names = []
        for target in strides:
            layers, width = _rescaling(in_channels, stride, target)
            layers += [_NormedConv(width, out_channels, 1), _NormedConv(out_channels, out_channels, 3)]
            self._names.append(f"simfp_{round(math.log2(target))}")
            self.add_module(self._names[-1], nn.Sequential(*layers))
        self.extra_blocks = None
        if num_extra and extra_convs is None:
            self.extra_blocks = _Pooled(num_extra)
        elif num_extra:
            self.extra_blocks = _Convolved(out_channels, out_channels, num_extra, extra_convs, extra_relu)
        self.channels = [out_channels] * (len(strides) + num_extra)
        self.reductions = [*strides, *(strides[-1] * 2 ** (step + 1) for step in range(num_extra))]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map the backbone's maps to the pyramid."""
        levels = [getattr(self, name)(maps[-1]) for name in self._names]
        if self.extra_blocks is not None:
            levels, _ = self.extra_blocks(levels, list(maps), list(self._names))
        return levels


class ScaledMaps(nn.Module):
    """Maps of the wanted strides from those of other strides: each from the nearest, by ViTDet's layers.

    Attributes:
        channels: Channels of each output.
        reductions: Stride of each output.

    Args:
        in_channels: Channels of the backbone's maps, from the finest to the coarsest.
        in_strides: Their strides, powers of two.
        strides: Strides of the outputs.

    Shape:
        Maps ``[B, C_i, H_i, W_i]`` to outputs ``[B, C_j, H_j, W_j]``, from the finest on.
    """

    def __init__(self, in_channels: Sequence[int], in_strides: Sequence[int], strides: Sequence[int] = STRIDES):
        super().__init__()
        self.sources = sources_of(in_strides, strides)
        self.reductions, self.channels, self.levels = list(strides), [], nn.ModuleList()
        for place, target in zip(self.sources, strides, strict=True):
            layers, width = _rescaling(in_channels[place], in_strides[place], target)
            self.levels.append(nn.Sequential(*layers))
            self.channels.append(width)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map the backbone's maps to those of the wanted strides."""
        return [level(maps[place]) for level, place in zip(self.levels, self.sources, strict=True)]


class _GroupNormedConv(nn.Module):
    """A convolution without bias and a group norm, named as mmcv does."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, stride, kernel_size // 2, bias=False)
        self.gn = nn.GroupNorm(_GROUPS, channels)
        nn.init.xavier_uniform_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.gn(self.conv(x))


class ChannelMapper(nn.Module):
    """mmdet's neck of DETRs: every map to equal channels by itself, and coarser ones from the backbone's last.

    Entries have mmdet's names.

    Attributes:
        channels: Channels of each output.
        reductions: Stride of each output.

    Args:
        in_channels: Channels of the backbone's maps, from the finest to the coarsest.
        in_strides: Their strides, powers of two.
        strides: Strides of the outputs. Up to 32 each is made of the map of that stride, or of the nearest scaled to
            it; one beyond 32 is a strided convolution of the coarsest of these, or of the one before it.
        out_channels: Channels of every output, a multiple of 32.

    Raises:
        TaskError: If ``out_channels`` isn't.

    Shape:
        Maps ``[B, C_i, H_i, W_i]`` to outputs ``[B, C, H_j, W_j]``, from the finest on.
    """

    def __init__(
        self, in_channels: Sequence[int], in_strides: Sequence[int], strides: Sequence[int], out_channels: int = 256
    ):
        super().__init__()
        if out_channels % _GROUPS:
            raise TaskError(f"channels is {out_channels}; the neck's group norms take multiples of {_GROUPS}")
        own = [stride for stride in strides if stride <= STRIDES[-1]]
        self.scaling = ScaledMaps(in_channels, in_strides, own)
        self.convs = nn.ModuleList(_GroupNormedConv(width, out_channels, 1) for width in self.scaling.channels)
        widths = [self.scaling.channels[-1], *[out_channels] * (len(strides) - len(own))]
        self.extra_convs = nn.ModuleList(
            _GroupNormedConv(width, out_channels, 3, stride=2) for width in widths[: len(strides) - len(own)]
        )
        self.maps = len(in_channels)
        self.channels, self.reductions = [out_channels] * len(strides), list(strides)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map the backbone's maps to those of the wanted strides.

        Raises:
            TaskError: If the number of maps isn't that of ``in_channels``.
        """
        if len(maps) != self.maps:
            raise TaskError(f"the neck takes {self.maps} maps, got {len(maps)}")
        maps = self.scaling(maps)
        levels = [conv(x) for conv, x in zip(self.convs, maps, strict=True)]
        coarser = maps[-1]
        for conv in self.extra_convs:
            coarser = conv(coarser)
            levels.append(coarser)
        return levels


class _Conv(nn.Module):
    """A convolution, named as mmcv does."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2)
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class MultiLevelNeck(nn.Module):
    """mmseg's neck of plain vision transformers: maps of four blocks, resized to four strides between convolutions.

    Entries have mmseg's names.

    Attributes:
        channels: Channels of each output.
        reductions: Stride of each output.

    Args:
        in_channels: Channels of the four maps.
        stride: Their stride: 16 in the published models.
        out_channels: Channels of every output; those of the maps by default.

    Raises:
        TaskError: If there are not four maps.

    Shape:
        Four maps ``[B, C_i, H, W]`` to outputs ``[B, C, H_j, W_j]`` of strides 4, 8, 16 and 32.
    """

    def __init__(self, in_channels: Sequence[int], stride: int = 16, out_channels: int | None = None):
        super().__init__()
        if len(in_channels) != len(STRIDES):
            raise TaskError(f"MultiLevelNeck takes {len(STRIDES)} maps, the backbone gives {len(in_channels)}")
        width = in_channels[0] if out_channels is None else out_channels
        self.scales = [stride / target for target in STRIDES]
        self.lateral_convs = nn.ModuleList(_Conv(channels, width, 1) for channels in in_channels)
        self.convs = nn.ModuleList(_Conv(width, width, 3) for _ in STRIDES)
        self.channels, self.reductions = [width] * len(STRIDES), list(STRIDES)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map the maps of four blocks to four strides."""
        levels = zip(maps, self.lateral_convs, self.convs, self.scales, strict=True)
        return [
            conv(F.interpolate(lateral(x), scale_factor=scale, mode="bilinear")) for x, lateral, conv, scale in levels
        ]


def detector_neck(
    backbone: nn.Module,
    channels: int,
    num_outs: int,
    start_level: int,
    extra_convs: str | None,
    extra_relu: bool = False,
) -> nn.Module:
    """Return the pyramid of a detector on any backbone: of strides ``4 * 2**start_level`` on.

    Maps of strides 4, 8, 16 and 32 get a feature pyramid network, those of one stride a simple feature pyramid, all
    others a feature pyramid network on maps scaled to these strides.

    Args:
        backbone: Has ``channels``, and perhaps ``reductions``; without them its maps are of 1/4 to 1/32.
        channels: Channels of every output.
        num_outs: Number of outputs.
        start_level: The first of the four strides that is used.
        extra_convs: See `FeaturePyramid`.
        extra_relu: See `FeaturePyramid`.

    Raises:
        TaskError: If the backbone's maps are no powers of two apart, or without strides and not four.
    """
    strides = list(getattr(backbone, "reductions", STRIDES))
    _check_maps(backbone, strides)
    if strides == list(STRIDES):
        return FeaturePyramid(backbone.channels, channels, num_outs, start_level, extra_convs, extra_relu)
    if len(set(strides)) == 1:
        levels = STRIDES[start_level:]
        # The backbone's map is no level of the pyramid, on which coarser ones could be built.
        extra = None if extra_convs is None else "on_output"
        beyond = num_outs - len(levels)
        return SimpleFeaturePyramid(backbone.channels[-1], strides[-1], channels, levels, beyond, extra, extra_relu)
    scaling = ScaledMaps(backbone.channels, strides)
    return FeaturePyramid(scaling.channels, channels, num_outs, start_level, extra_convs, extra_relu, scaling)


def channel_mapper(backbone: nn.Module, channels: int, num_levels: int) -> ChannelMapper:
    """Return the neck of a DETR on any backbone: ``num_levels`` maps, the coarsest of stride 64.

    Args:
        backbone: Has ``channels``, and perhaps ``reductions``; without them its maps are of 1/4 to 1/32.
        channels: Channels of every output.
        num_levels: Number of outputs, 2 to 5.

    Raises:
        TaskError: If there is no such number of levels, or the backbone's maps are no powers of two apart, or without
            strides and not four.
    """
    strides = [*STRIDES, 2 * STRIDES[-1]]
    if not 2 <= num_levels <= len(strides):
        raise TaskError(f"num_levels is {num_levels}; it can be 2 to {len(strides)}")
    in_strides = list(getattr(backbone, "reductions", STRIDES))
    _check_maps(backbone, in_strides)
    return ChannelMapper(backbone.channels, in_strides, strides[-num_levels:], channels)


SEGMENTER_NECKS = {"multilevel": MultiLevelNeck, "simple": SimpleFeaturePyramid, "scaled": ScaledMaps}


# The heads that take the coarsest map alone.
_ONE_MAP = ("deeplabv3", "ham_net")


def segmenter_neck(head: str, backbone: nn.Module, neck: str | None) -> nn.Module | None:
    """Return what makes the maps that a segmenter's head takes of those that any backbone gives; None if nothing need.

    Args:
        head: The segmenter's name.
        backbone: Has ``channels``, and perhaps ``reductions``; without them its maps are taken as they are.
        neck: ``"multilevel"`` (mmseg's MultiLevelNeck), ``"simple"`` (ViTDet's simple feature pyramid), ``"scaled"``
            (the nearest maps, scaled), None, or ``"auto"``. Auto leaves maps of strides 4, 8, 16 and 32 as they are,
            for UperNet and Semantic FPN also those that begin at stride 4, and for DeepLabV3 and HamNet, which take one
            map, all; maps of one stride get MultiLevelNeck under UperNet and the simple feature pyramid under all
            others; all else is scaled.

    Raises:
        TaskError: If there is no such neck, or it doesn't suit the backbone or the head.
    """
    if neck not in (None, "auto", *SEGMENTER_NECKS):
        raise TaskError(f"neck is {neck!r}; it can be 'auto', None, {' or '.join(map(repr, SEGMENTER_NECKS))}")
    known = hasattr(backbone, "reductions")
    strides = list(getattr(backbone, "reductions", STRIDES))
    single = len(set(strides)) == 1
    needs_all = head in ("mask2former", "oneformer")
    if neck == "auto":
        if not known or head in _ONE_MAP or strides == list(STRIDES) or (strides[0] == STRIDES[0] and not needs_all):
            neck = None
        elif single:
            neck = "multilevel" if head == "upernet" and len(strides) == len(STRIDES) else "simple"
        else:
            neck = "scaled"
    if neck is None:
        if known and needs_all and (len(strides) != len(STRIDES)):
            raise TaskError(f"{head} takes four maps, the backbone gives {len(strides)}; use neck='auto'")
        return None
    if not known:
        raise TaskError(f"neck {neck!r} needs the strides of the backbone's maps; give it `reductions`")
    _check_maps(backbone, strides)
    if neck == "scaled":
        return ScaledMaps(backbone.channels, strides)
    if not single:
        raise TaskError(
            f"neck {neck!r} is for maps of one stride; the backbone's are {', '.join(map(str, strides))}: use 'scaled'"
        )
    if neck == "multilevel":
        return MultiLevelNeck(backbone.channels, strides[-1])
    return SimpleFeaturePyramid(backbone.channels[-1], strides[-1])


def _check_maps(backbone: nn.Module, strides: Sequence[int]) -> None:
    """Raise a TaskError unless a backbone's maps are as many as its strides, which are powers of two."""
    name = type(backbone).__name__
    if len(backbone.channels) != len(strides):
        raise TaskError(
            f"{name} returns {len(backbone.channels)} maps, and of {len(strides)} the strides are known; a backbone "
            "without `reductions` returns four, of strides 4, 8, 16 and 32"
        )
    if any(stride < 1 or 2 ** round(math.log2(stride)) != stride for stride in strides):
        raise TaskError(
            f"{name} returns maps of strides {', '.join(map(str, strides))}; heads are built on powers of two: "
            "create_backbone(..., out_indices=None) resamples others"
        )
