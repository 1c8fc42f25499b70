"""Any timm model as a backbone of dense prediction: maps out, channels and reductions known."""

import difflib
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import get_pretrained_cfg, is_model, model_entrypoint
from torch import Tensor, nn

from ..kernels.lengths import padding_to
from .checkpoint import Checkpoint
from .library_errors import unknown_option
from .loading import WithoutInit, create_model
from .maps import BackboneError, Maps, dense_indices, measure, said_maps
from .weights import read, table


class UnknownModelError(ValueError):
    """A name or a setting that is not registered; the message names the nearest, or what there is."""


class Backbone(nn.Module):
    """A timm model cut to its features.

    Images that the model doesn't take as they are get zeros on the right and at the bottom, and the maps lose the cells
    beyond the image again.

    Attributes:
        channels: Channels of each map.
        reductions: Stride of each map with respect to the image.
        multiple: Sides of images are padded to multiples of it.
        size: The one ``(height, width)`` to which images are padded; None if the model takes any.
        borderless: Whether the model's maps lack their borders, which are repeated here.
        load_report: What became of a checkpoint's entries, a `LoadReport`; None if there was none.

    Args:
        features: A model made with ``features_only``.
        maps: What its maps are; what ``features`` itself says, by default.
        resample: Whether maps whose stride is no power of two, as those of patches of 14 pixels, are resampled to the
            nearest one.
    """

    def __init__(self, features: nn.Module, maps: Maps | None = None, resample: bool = False):
        super().__init__()
        self.features = features
        self.load_report = getattr(features, "load_report", None)
        maps = said_maps(features) if maps is None else maps
        self.channels = list(maps.channels)
        self._strides = list(maps.strides)
        self.reductions = [2 ** round(math.log2(stride)) if resample else stride for stride in maps.strides]
        self.multiple, self.size = maps.multiple, maps.size
        self._channels_last, self.borderless = maps.channels_last, maps.borderless

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images ``[B, in_chans, H, W]`` to NCHW maps, from the finest to the coarsest.

        Raises:
            BackboneError: If the images are larger than the one size that the model takes.
        """
        size = x.shape[-2:]
        x = self._padded(x)
        maps = self.features(x)
        if self._channels_last:
            maps = [level.permute(0, 3, 1, 2) for level in maps]
        if self.borderless:
            maps = [_with_border(level, stride, x) for level, stride in zip(maps, self._strides, strict=True)]
        if self.reductions != self._strides:
            grids = zip(maps, self._strides, self.reductions, strict=True)
            maps = [_resampled(level, stride, target) for level, stride, target in grids]
        elif self.size is None and self.multiple == 1:
            return maps
        return crop_maps(maps, self.reductions, size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations twice instead of keeping them.

        Raises:
            AttributeError: If the model can't.
        """
        # timm wraps models whose stages are no modules of their own.
        getattr(self.features, "model", self.features).set_grad_checkpointing(enable)

    def _padded(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if self.size is None:
            below, right = padding_to(height, self.multiple), padding_to(width, self.multiple)
        else:
            below, right = self.size[0] - height, self.size[1] - width
            if below < 0 or right < 0:
                raise BackboneError(
                    f"the backbone takes images of up to {self.size[0]}x{self.size[1]} pixels, got {height}x{width}; "
                    f"build it for larger ones: img_size=({max(height, self.size[0])}, {max(width, self.size[1])})"
                )
        return F.pad(x, (0, right, 0, below)) if below or right else x


def crop_maps(maps: Sequence[Tensor], strides: Sequence[int], size: Sequence[int]) -> list[Tensor]:
    """Return NCHW maps without the cells that begin beyond an image of ``size``."""
    return [
        level[..., : -(-size[0] // stride), : -(-size[1] // stride)]
        for level, stride in zip(maps, strides, strict=True)
    ]


def _with_border(level: Tensor, stride: int, x: Tensor) -> Tensor:
    """Return a map ``[B, C, h, w]`` of ``x`` with the cells that unpadded convolutions left out around it."""
    lost = [-(-side // stride) - cells for side, cells in zip(x.shape[-2:], level.shape[-2:], strict=True)]
    top, left = (max(side, 0) // 2 for side in lost)
    return F.pad(level, (left, max(lost[1], 0) - left, top, max(lost[0], 0) - top), mode="replicate")


def _resampled(level: Tensor, stride: int, target: int) -> Tensor:
    """Return a map ``[B, C, h, w]`` on the grid of another stride, which begins at the same corner of the image."""
    if stride == target:
        return level
    # The whole of what the map sees, and a little more: the last cell of the other grid may reach beyond.
    level = F.pad(level, (0, 2, 0, 2), mode="replicate")
    return F.interpolate(level, scale_factor=stride / target, mode="bilinear", recompute_scale_factor=False)


def dense_settings_of(name: str) -> dict[str, dict]:
    """Return the published dense settings of a model by setting; empty if there are none."""
    module = sys.modules[model_entrypoint(name).__module__]
    return getattr(module, "dense_settings", {}).get(name.split(".")[0], {})


def head_options_of(name: str, head: str) -> dict[str, Any]:
    """Return what a family's published dense models do otherwise than others.

    Args:
        name: Model.
        head: A detector's or segmenter's name, whose options they are; of ``"mask2former"`` the published evaluation's
            ``sides``, the short and the long; or ``"images"``, for its ``divisor`` of an image's sides.
    """
    module = sys.modules[model_entrypoint(name).__module__] if is_model(name) else None
    options = getattr(module, "head_options", {})
    return {
        key: value
        for pattern, heads in options.items()
        if fnmatchcase(name, pattern)
        for key, value in heads.get(head, {}).items()
    }


def check_name(name: str) -> None:
    """Raise an UnknownModelError that names the nearest model unless ``name`` is registered, with its tag."""
    model, _, tag = name.partition(".")
    if not is_model(name):
        near = difflib.get_close_matches(model, timm.list_models(), n=1)
        raise UnknownModelError(f"unknown model {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if tag and name not in table():
        try:
            get_pretrained_cfg(name)
        except RuntimeError as error:
            known = timm.list_pretrained(f"{model}.*")
            raise UnknownModelError(
                f"unknown weights {name!r}; {'known: ' + ', '.join(known) if known else f'{model} has none by a name'}"
            ) from error


def takes_options(name: str, options: Mapping[str, Any]) -> bool:
    """Return whether a registered model has such options and gives maps; timm doesn't say, so that one is built."""
    from .published import is_foreign
    from .published_forms import form_in

    _, options = form_in(options)
    try:
        if is_foreign(name):
            measure(name, options)
        else:
            with torch.device("meta"), WithoutInit():
                timm.create_model(name, **{**options, "features_only": True, "pretrained": False})
    except BackboneError:
        return False
    except TypeError as error:
        if unknown_option(error) not in options:
            raise
        return False
    return True


def create_backbone(
    name: str,
    setting: str | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
    out_indices: Sequence[int] | None = (0, 1, 2, 3),
    **kwargs,
) -> Backbone:
    """Create any timm model, ours or theirs, as a backbone that returns NCHW maps.

    The strides and the layout of the maps of timm's own models, and the sizes of images that they take, are measured
    at construction, by forward passes without values. Where a model takes one size alone, ``img_size`` chooses it.

    Args:
        name: Registered name, with an optional tag.
        setting: A published dense setting, such as ``"detection"``; `foveate info NAME` lists a model's.
        checkpoint: Weights: a path, an address, the ``model.tag`` of published ones (`foveate weights list`), or what
            `open_checkpoint` read. A classifier's, a dense backbone's, or a whole detector's or segmenter's, of which
            the backbone is read: ours, and those of mmdet, mmseg, detectron2 and Mask2Former.
        out_indices: Which maps to return. None takes those that dense heads use: the last four of stages that begin at
            stride 4, four at even distances of blocks on one map, or those nearest to strides 4, 8, 16 and 32; and
            resamples maps whose stride is no power of two, such as 14, to the nearest one.
        **kwargs: Options of the model; they win over the setting's. Those of a form are no options of timm's, see
            `published_forms.PublishedBackbone`: ``style``, ``dense``, ``out_norms``. A published file tells them.

    Raises:
        UnknownModelError: If the model or the setting is unknown.
        BackboneError: If timm gives no such maps of it.
        CheckpointError: If the checkpoint can't be had or read, or doesn't give every weight of the backbone.
    """
    # That file's backbones are of the class above.
    from .published import build_filled, is_foreign
    from .published_forms import PublishedBackbone, form_in

    check_name(name)
    if checkpoint is not None and is_foreign(name):
        checkpoint = read(checkpoint)
        create = functools.partial(create_backbone, name, setting, None, out_indices)
        filled = build_filled(create, name, checkpoint, kwargs)
        if filled is not None:
            return filled
    form, kwargs = form_in(kwargs)
    kind = functools.partial(PublishedBackbone, **form) if form else Backbone
    options = {}
    if setting is not None:
        known = dense_settings_of(name)
        if setting not in known:
            raise UnknownModelError(
                f"{name} has no setting {setting!r}; it has {', '.join(map(repr, known)) or 'none'}"
            )
        options = dict(known[setting])
    options |= kwargs
    if form.get("dense") and name.startswith("swin_"):
        options["always_partition"] = True
    if model_entrypoint(name).__module__.startswith(f"{__package__}."):
        # The contract tests hold ours to what they say.
        indices = (-4, -3, -2, -1) if out_indices is None else tuple(out_indices)
        return Backbone(create_model(name, checkpoint, **{"features_only": True, "out_indices": indices} | options))
    free, maps = measure(name, options)
    maps = maps.take(dense_indices(maps) if out_indices is None else out_indices)
    options = {"features_only": True, "out_indices": maps.indices} | free | options
    return kind(create_model(name, checkpoint, **options), maps, resample=out_indices is None)
