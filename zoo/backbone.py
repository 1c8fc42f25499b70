"""Any timm model as a backbone of dense prediction: maps out, channels and reductions known."""

import difflib
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
from timm.models import get_pretrained_cfg, is_model, model_entrypoint
from torch import Tensor, nn

from .loading import create_model
from .weights import locate

# What lets timm's models of a fixed input size take any; each model has one of these options, or none.
_FREE_SIZE = ({"strict_img_size": False}, {"dynamic_img_size": True})


class UnknownModelError(ValueError):
    """A name or a setting that is not registered; the message names the nearest, or what there is."""


class Backbone(nn.Module):
    """A timm model cut to its features.

    Attributes:
        channels: Channels of each map.
        reductions: Stride of each map with respect to the image.
        load_report: What became of a checkpoint's entries, a `LoadReport`; None if there was none.
    """

    def __init__(self, features: nn.Module):
        super().__init__()
        self.features = features
        self.load_report = getattr(features, "load_report", None)
        self.channels = list(features.feature_info.channels())
        self.reductions = list(features.feature_info.reduction())
        # timm's Swin transformers and a few others say so.
        self._channels_last = getattr(features, "output_fmt", "NCHW") == "NHWC"

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images ``[B, in_chans, H, W]`` to NCHW maps, from the finest to the coarsest."""
        maps = self.features(x)
        return [level.permute(0, 3, 1, 2) for level in maps] if self._channels_last else maps


def dense_settings_of(name: str) -> dict[str, dict]:
    """Return the published dense settings of a model by setting; empty if there are none."""
    module = sys.modules[model_entrypoint(name).__module__]
    return getattr(module, "dense_settings", {}).get(name.split(".")[0], {})


def check_name(name: str) -> None:
    """Raise an UnknownModelError that names the nearest model unless ``name`` is registered."""
    if not is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=1)
        raise UnknownModelError(f"unknown model {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def create_backbone(
    name: str,
    setting: str | None = None,
    checkpoint: str | Path | None = None,
    out_indices: Sequence[int] = (0, 1, 2, 3),
    **kwargs,
) -> Backbone:
    """Create any timm model, ours or theirs, as a backbone that returns NCHW maps.

    Args:
        name: Registered name, with an optional tag.
        setting: A published dense setting, such as ``"detection"``; `foveate info NAME` lists a model's.
        checkpoint: Weights: a path, an address, or the ``model.tag`` of published ones (`foveate weights list`). A
            classifier's, a dense backbone's, or a whole detector's or segmentor's, of which the backbone is read: ours,
            and those of mmdet, mmseg, detectron2 and Mask2Former.
        out_indices: Which maps to return.
        **kwargs: Options of the model; they win over the setting's. Those of a form are no options of timm's, see
            `published.PublishedBackbone`: ``style``, ``dense``, ``out_norms``. A published file tells them.

    Raises:
        UnknownModelError: If the model or the setting is unknown.
        CheckpointError: If the checkpoint can't be had or read, or doesn't give every weight of the backbone.
    """
    # That file's backbones are of the class above.
    from .published import PublishedBackbone, build_filled, form_in, is_foreign

    check_name(name)
    if checkpoint is not None and is_foreign(name):
        checkpoint = locate(checkpoint)
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
    options |= {"features_only": True, "out_indices": tuple(out_indices)} | kwargs
    if form.get("dense") and name.startswith("swin_"):
        options["always_partition"] = True
    free = _FREE_SIZE if get_pretrained_cfg(name).fixed_input_size and "img_size" not in options else ()
    for freedom in free:
        try:
            return kind(create_model(name, checkpoint, **freedom | options))
        except TypeError as error:
            if f"unexpected keyword argument {next(iter(freedom))!r}" not in str(error):
                raise
    return kind(create_model(name, checkpoint, **options))
