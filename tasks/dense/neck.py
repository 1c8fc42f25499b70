"""The feature pyramid between a backbone and a dense head, in the published variants."""

import re
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from .. import TaskError

_SOURCES = ("on_input", "on_output")
_PUBLISHED = re.compile(r"neck\.(lateral|fpn)_convs\.(\d+)\.conv\.(weight|bias)")


def convert_pyramid(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the ``neck.*`` entries of a published detector or segmentor to those of a `FeaturePyramid` ``neck``.

    All other entries stay as they are.
    """
    found = {key: match.groups() for key in state if (match := _PUBLISHED.fullmatch(key))}
    levels = len({level for kind, level, _ in found.values() if kind == "lateral"})

    def renamed(kind: str, level: str, leaf: str) -> str:
        if kind == "lateral":
            return f"neck.inner_blocks.{level}.0.{leaf}"
        # The convolutions of the coarser levels are numbered on from those of the outputs.
        beyond = int(level) - levels
        return f"neck.layer_blocks.{level}.0.{leaf}" if beyond < 0 else f"neck.extra_blocks.convs.{beyond}.{leaf}"

    return {renamed(*found[key]) if key in found else key: value for key, value in state.items()}


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

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map the backbone's maps ``[B, C_i, H_i, W_i]`` to outputs ``[B, C, H_j, W_j]``, from the finest on.

        Raises:
            TaskError: If the number of maps isn't that of ``in_channels``.
        """
        if len(maps) != self.maps:
            raise TaskError(f"the pyramid takes {self.maps} maps, got {len(maps)}")
        return list(super().forward({str(level): x for level, x in enumerate(maps[self.start_level :])}).values())
