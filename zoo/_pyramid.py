"""What every backbone of stages shares: timm's contract, written once over ``stem``, ``stages``, ``norm``, ``head``."""

import operator
from collections.abc import Sequence
from typing import Final

import torch
from timm.layers import ClNormMlpClassifierHead, Format, nhwc_to
from timm.models import checkpoint, register_notrace_function
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.fx.proxy import Proxy, TraceError

from ..blocks.initialize import init_linear


class Stage(nn.Module):
    """Blocks on one resolution, after an optional downsampling and before an optional norm.

    Args:
        downsample: Module that halves the map, or identity.
        blocks: Modules from map to map.
        norm: Norm of the stage's output, which the next stage takes (PVT); none by default.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module | None = None):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if norm is None else norm
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, C]`` (or NCHW, as the family works) to the stage's output."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for block in self.blocks:
                x = checkpoint(block, x)
        else:
            x = self.blocks(x)
        return self.norm(x)


def init_module(module: nn.Module) -> None:
    """Initialise linear layers by `init_linear`, and all else by its own ``reset_parameters``."""
    if isinstance(module, nn.Linear):
        init_linear(module)
    elif hasattr(module, "reset_parameters"):
        module.reset_parameters()


class Pyramid(nn.Module):
    """A backbone of stages with the whole contract of a timm model.

    A family's constructor makes the parts and hands them to this one. Everything else is here: features, intermediates,
    pruning, the classifier's reset, gradient checkpointing, parameter groups.

    Args:
        stem: From images ``[B, in_chans, H, W]`` to the first stage's input.
        stages: Modules from map to map.
        channels: Of each stage's output.
        norm: Of the last stage's output; identity where the head has it.
        head: One of timm's, which pools and classifies maps in ``output_fmt``.
        in_chans: Channels of the images.
        num_classes: Classes of the head; 0 for none.
        out_norms: Makes the model the published dense one: norms of the stages' outputs, which `forward_intermediates`
            applies, and of which the last stands in for ``norm``.
        reductions: Of each stage's output: pixels of the image to a position, on a side; 4, 8, 16, 32 by default.
    """

    output_fmt = "NHWC"
    # Whether one graph of `torch.compile` may serve every size; the arithmetic of windows and token pyramids on symbols
    # takes it minutes.
    symbolic_size: Final[bool] = True

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        channels: Sequence[int],
        norm: nn.Module,
        head: nn.Module,
        in_chans: int,
        num_classes: int,
        out_norms: Sequence[nn.Module] | None = None,
        reductions: Sequence[int] | None = None,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = channels[-1]
        if reductions is None:
            reductions = [4 * 2**i for i in range(len(channels))]
        self.feature_info = [
            {"num_chs": channel, "reduction": reduction, "module": f"stages.{i}"}
            for i, (channel, reduction) in enumerate(zip(channels, reductions, strict=True))
        ]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.out_norms = nn.ModuleList(out_norms) if out_norms is not None else None
        self.norm = norm if out_norms is None else nn.Identity()
        self.head = head

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise as published; may be called again, after ``to_empty`` for instance."""
        self.apply(init_module)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that optimizers should not decay: the tables of relative position bias."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return the patterns by which timm groups parameters into layers."""
        return {
            "stem": r"^stem",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (99999,)),
                (r"^norm|^out_norms", (99999,)),
            ],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier's linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; ``num_classes=0`` removes it, ``global_pool=""`` keeps the map."""
        self.num_classes = num_classes
        # timm's heads take channels, device and dtype as arguments only since 1.0.29.
        self.head.in_features = self.head.num_features = self.num_features
        self.head.reset(num_classes, global_pool)
        parameter = next(self.parameters())
        self.head.to(parameter.device, parameter.dtype).train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images ``[B, in_chans, H, W]`` to the last stage's normalised map, in ``output_fmt``."""
        settle_size(x, self.symbolic_size)
        x = self.stages(self.stem(x))
        if self.out_norms is not None:
            return self.out_norms[-1](x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the map and classify it, or stop before the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, in_chans, H, W]`` to logits ``[B, num_classes]``."""
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
        """Return the outputs of the chosen stages.

        Args:
            x: Images ``[B, in_chans, H, W]``.
            indices: Stages to return: the last n, a list, or all.
            norm: Whether to apply the final norm to the last stage's output. Output norms are always applied.
            stop_early: Whether to stop after the last chosen stage.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: Whether to return the list alone.

        Returns:
            The list of maps, after the final map in ``self.output_fmt`` unless ``intermediates_only``.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"forward_intermediates returns NCHW or NHWC maps; got output_fmt {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: last + 1] if stop_early else self.stages
        settle_size(x, self.symbolic_size)
        x = self.stem(x)
        taps = []
        for i, stage in enumerate(stages):
            x = stage(x)
            if i not in take:
                continue
            if self.out_norms is not None:
                tap = self.out_norms[i](x)
            else:
                tap = self.norm(x) if norm and i == len(self.stages) - 1 else x
            taps.append(to_format(tap, self.output_fmt, output_fmt))
        if intermediates_only:
            return taps
        if len(stages) == len(self.feature_info):
            x = self.norm(x) if self.out_norms is None else self.out_norms[-1](x)
        return x, taps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen stages don't need; return their absolute indices."""
        take, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if self.out_norms is not None:
            for i in range(len(self.out_norms)):
                if i not in take:
                    self.out_norms[i] = nn.Identity()
            self.out_norms = self.out_norms[: last + 1]
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            if isinstance(self.head, ClNormMlpClassifierHead):
                # A norm that follows the pooling is the classifier's, and sized for the last stage.
                self.head.norm = nn.Identity()
            self.reset_classifier(0, "")
        return take


@torch.jit.ignore
def settle_size(x: Tensor, symbolic: bool) -> None:
    """Make `torch.compile` take the height and width of ``x`` ``[B, C, H, W]`` as numbers, one graph for each size.

    With ``symbolic`` they may stay symbols.

    Raises:
        TraceError: If `torch.fx` traces other than by timm, whose tracer takes this function, and all whose course
            depends on sizes, as one node.
    """
    if isinstance(x, Proxy):
        raise TraceError(
            "torch.fx and torchvision's create_feature_extractor cannot trace foveate's models; use timm's "
            "create_model(..., features_only=True), with feature_cls='fx' for a graph, or forward_intermediates"
        )
    if not symbolic and torch.compiler.is_dynamo_compiling():
        # An index is a number; dynamo then guards on it.
        operator.index(x.shape[2])
        operator.index(x.shape[3])


register_notrace_function(settle_size)


def to_format(x: Tensor, source: str, target: str) -> Tensor:
    """Return a map in format ``source`` in ``target``, ``"NCHW"`` or ``"NHWC"``."""
    if source == target:
        return x
    return nhwc_to(x, Format.NCHW) if target == "NCHW" else x.permute(0, 2, 3, 1)
