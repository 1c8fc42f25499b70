"""What whole dense models have in common: how they get a backbone, and how a checkpoint's entries get into them."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.models import is_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...zoo import BackboneError, CheckpointError, create_backbone
from ...zoo.backbone import Backbone, UnknownModelError, check_name, dense_settings_of
from ...zoo.checkpoint import Checkpoint, LoadReport, absent_counters, load
from ...zoo.library_errors import call_fault, first_line, unknown_option
from ...zoo.maps import cfg_of
from ...zoo.published import (
    TOLD_OPTIONS,
    Layout,
    Origin,
    is_foreign,
    layout_of,
    likely_model,
    origin_of,
    refuse_unknown_backbone,
    without_constants,
)
from ...zoo.weights import locate
from .. import TaskError, nearest
from ..checkpoints import without_start

_logger = logging.getLogger(__name__)


class OtherClassesError(CheckpointError):
    """A dense model's file is of another number of classes than asked for.

    Args:
        path: The file.
        classes: Its classes.
        expected: Those asked for.
    """

    def __init__(self, path: str | Path, classes: int, expected: int):
        super().__init__(
            f"{path}: has {classes} classes, not {expected}; leave num_classes out, or start with new classifiers: "
            "reset_classifier=True"
        )
        self.path, self.classes = path, classes


@dataclasses.dataclass
class DenseFile:
    """A dense model's file.

    Attributes:
        checkpoint: What was read of it.
        state: Its entries.
        origin: Where it comes from, if from one of the known libraries.
        constants: Names of entries that nobody learned, which are left out.
        likely: Name of timm's model that its backbone is, as far as widths and depths tell.
    """

    checkpoint: Checkpoint
    state: dict[str, Tensor]
    origin: Origin | None
    constants: tuple[str, ...] = ()
    likely: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "DenseFile":
        """Return what a checkpoint holds.

        Raises:
            CheckpointError: If it holds no state dict.
        """
        origin = origin_of(checkpoint)
        state, constants = without_constants(checkpoint.state) if origin else (checkpoint.state, [])
        return cls(checkpoint, state, origin, tuple(constants))

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.checkpoint.path

    @property
    def card(self) -> dict[str, Any]:
        """What it says of its model, if foveate wrote it; else empty."""
        return self.checkpoint.card or {}

    def layout(self, backbone: str | nn.Module) -> Layout | None:
        """Return how the file names the entries of a named backbone of timm's, if they must be translated."""
        translates = isinstance(backbone, str) and is_model(backbone) and is_foreign(backbone)
        if self.origin is None or not translates:
            return None
        refuse_unknown_backbone(self.state, self.path)
        layout = layout_of(self.state)
        self.likely = None if layout is None else likely_model(layout, self.state)
        return layout

    def held_form(self) -> dict[str, Any]:
        """Return the options of the backbone's form, of a file that foveate wrote."""
        options = self.card.get("backbone_kwargs") or {}
        return {name: options[name] for name in TOLD_OPTIONS if name in options}


def has_backbone(state: dict[str, Tensor]) -> bool:
    """Return whether there are any entries of a backbone."""
    return any(key.startswith("backbone.") for key in state)


def is_ours(state: dict[str, Tensor]) -> bool:
    """Return whether the backbone's entries have our names, as in the checkpoints of `foveate train`."""
    return any(key.startswith("backbone.features.") for key in state)


def build_backbone(
    head: str,
    backbone: str | nn.Module,
    setting: str | None,
    auto: Sequence[str],
    checkpoint: Checkpoint | None,
    options: dict,
    known_options: Sequence[str],
) -> nn.Module:
    """Return a dense model's backbone: the module itself, or the named one with the maps that dense heads take.

    Args:
        head: The dense model's name, for messages.
        backbone: A timm name, or a module with ``channels``.
        setting: The named backbone's setting, None for none, or ``"auto"``.
        auto: Those from which ``"auto"`` takes the first that the backbone has; none if it has none of them.
        checkpoint: A published dense model's file, of which the named backbone is read.
        options: Options of the named backbone.
        known_options: Those of the dense model, of which a wrong one may have been meant.

    Raises:
        TaskError: If the module has no ``channels``, the named model no maps, or an option is unknown.
        UnknownModelError: If the name or the setting is unknown.
        CheckpointError: If the checkpoint can't be read or isn't one of this backbone.
    """
    if not isinstance(backbone, str):
        if not hasattr(backbone, "channels"):
            raise TaskError(f"{type(backbone).__name__} has no `channels`, the channels of each of its maps")
        if setting not in (None, "auto"):
            raise TaskError(f"setting {setting!r} is for a backbone given by name; create_backbone takes it")
        if options:
            wrong = next(iter(options))
            raise TaskError(f"{head} has no option {wrong!r}{nearest(wrong, known_options)}")
        if checkpoint is not None and isinstance(backbone, Backbone):
            raise CheckpointError(
                f"{checkpoint}: is a published model, whose backbone is read if it is given by name; or read it with "
                "create_backbone, and give here a file without the backbone"
            )
        return backbone
    check_name(backbone)
    if setting == "auto":
        known = dense_settings_of(backbone)
        setting = next((name for name in auto if name in known), None)
    try:
        return create_backbone(backbone, setting, checkpoint, out_indices=None, **options)
    except BackboneError as error:
        raise TaskError(f"{head} on {backbone}: {error}") from error
    except TypeError as error:
        if (wrong := unknown_option(error)) not in options:
            raise
        raise TaskError(
            f"neither {head} nor {backbone} has an option {wrong!r}{nearest(wrong, known_options)}"
        ) from error


def load_dense(
    model: nn.Module,
    file: DenseFile,
    backbone_loaded: bool,
    fresh: Callable[[str], bool] = lambda key: False,
) -> LoadReport:
    """Load a whole dense model's entries, under our names: all of them, and no others; report what was done.

    A file without a backbone leaves the model's as it is, and a backbone without weights needs none; both are said.

    Args:
        model: Has ``backbone``.
        file: Has its entries under our names; those of the backbone may be as published if they are loaded already.
        backbone_loaded: Whether the backbone has its weights already.
        fresh: Tells which entries of the model keep their initial values though the file has them.

    Raises:
        CheckpointError: If entries are missing, unexpected or of another shape.
    """
    path, state = file.path, file.state
    in_file, in_model = has_backbone(state), bool(model.backbone.state_dict())
    if in_model and not in_file:
        _logger.warning(f"{path}: holds the heads alone; the backbone keeps its weights")
    if in_file and not in_model:
        _logger.info(f"{path}: left out its backbone, since {type(model.backbone).__name__} has no weights")
    whole = in_file and in_model and not backbone_loaded
    if not whole:
        state = {key: value for key, value in state.items() if not key.startswith("backbone.")}

    # Batch counts play no part where the momentum is fixed.
    counters = set(absent_counters(state, model))
    of_backbone = {key for key in model.state_dict() if key.startswith("backbone.") and not whole}
    initial = [key for key in model.state_dict() if key in counters or key in of_backbone or fresh(key)]
    hint = "" if file.likely is None else f"; the file's backbone is {file.likely} by its widths and depths"
    own = load(model, state, path, initial, hint=hint)
    body = LoadReport(0)
    if not whole and backbone_loaded:
        body = getattr(model.backbone, "load_report", None) or body
    left = {key for key in initial if not (backbone_loaded and key.startswith("backbone."))}
    report = LoadReport(
        matched=own.matched + body.matched,
        missing=(*sorted(left), *(f"backbone.features.{key}" for key in body.missing)),
        unexpected=(*file.constants, *own.unexpected, *(f"backbone.{key}" for key in body.unexpected)),
        reshaped=tuple((f"backbone.features.{key}", *change) for key, *change in body.reshaped),
    )
    _logger.info(f"{path}: {report}")
    return report


def normalization_of(source: str | None, name: str) -> dict[str, tuple[float, ...]]:
    """Return the ``mean`` and ``std`` that a config's ``data.normalization`` asks for; none if it asks for none.

    Args:
        source: ``"backbone"``: those with which timm says that the weights were trained; ``"data"``: those that
            `data.statistics` measures, which is for the caller to do; or None.
        name: The model, a timm name.

    Raises:
        TaskError: If ``source`` is another.
        UnknownModelError: If the model is unknown.
    """
    if source in (None, "data"):
        return {}
    if source != "backbone":
        raise TaskError(f"data.normalization is {source!r}, but must be backbone, data or None")
    check_name(name)
    cfg = cfg_of(name)
    return {"mean": tuple(cfg.mean), "std": tuple(cfg.std)}


def freeze_stages(backbone: nn.Module, count: int) -> list[nn.Module]:
    """Let a backbone's first stages, and what precedes them, not learn; return their modules.

    Args:
        backbone: A `Backbone` of a model of stages, one after the other, as timm's ResNets, Swin Transformers and
            ConvNeXt are.
        count: How many stages; 0 for none.

    Raises:
        TaskError: If the backbone has no such stages, or not as many.
    """
    if count == 0:
        return []
    features = getattr(backbone, "features", backbone)
    # timm's lists of features: what is returned after which child.
    returned = getattr(features, "return_layers", None)
    stages = [name for name, _ in features.named_children() if name in (returned or {})]
    if not 0 < count <= len(stages):
        has = f"has {len(stages)}" if stages else "has no stages that timm tells apart"
        raise TaskError(f"model.frozen_stages is {count}, but the backbone {has}")
    frozen = []
    for name, module in features.named_children():
        frozen.append(module.requires_grad_(False))
        if name == stages[count - 1]:
            break
    return frozen


def freeze_statistics(backbone: nn.Module) -> None:
    """Let a backbone's batch norms use the statistics that they have, until it is put into training mode again."""
    for module in backbone.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def described(options: Mapping[str, Any], body_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model that was built from a published file needs to be built again from another file of it."""
    form = {name: body_options[name] for name in TOLD_OPTIONS if name in body_options}
    return {"backbone_kwargs": form, "kwargs": dict(options)}


def with_told(model: Mapping[str, Any], built: nn.Module) -> dict[str, Any]:
    """Return a config's or a card's ``model`` with what a published file has told of the model that was built of it."""
    told = getattr(built, "told", None) or {}
    return {**model, **{key: {**options, **model[key]} for key, options in told.items()}}


def describe_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a config's ``model``, in plain types, what `build_described` needs to build it again from a file."""
    return {
        "model": f"{model['head']} on {model['backbone']}",
        **{key: model[key] for key in ("head", "backbone", "setting")},
        **{key: without_start(model[key]) for key in ("backbone_kwargs", "kwargs")},
    }


def build_described(
    create: Callable[..., nn.Module], model: Mapping[str, Any], classes: int, kwargs: Mapping
) -> nn.Module:
    """Return the dense model that a config's or a checkpoint's card's ``model`` describes.

    What the description leaves open, such as widths, a ``checkpoint`` tells.

    Args:
        create: `create_detector` or `create_segmenter`.
        model: ``head``, ``backbone``, ``setting``, ``backbone_kwargs``, and what to start from.
        classes: Number of classes.
        kwargs: Further options of ``create``.

    Raises:
        TaskError: If there is no such head or option, or no weights to start from.
        UnknownModelError: If the backbone or its setting is unknown.
        CheckpointError: If a checkpoint can't be read or isn't one of this model.
    """
    options = dict(model["backbone_kwargs"])
    if model.get("backbone_checkpoint") is not None:
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(locate(model["backbone_checkpoint"]))}}
    elif model.get("pretrained"):
        options["pretrained"] = True
    try:
        return create(
            model["head"],
            model["backbone"],
            num_classes=classes,
            setting=model["setting"],
            checkpoint=model.get("checkpoint"),
            backbone_kwargs=options,
            **kwargs,
        )
    except OtherClassesError as error:
        raise CheckpointError(
            f"{error.path}: has {error.classes} classes, the data {classes}; start with new classifiers: "
            "model.kwargs.reset_classifier=True"
        ) from error
    except (TaskError, CheckpointError, UnknownModelError):
        raise
    except TypeError as error:
        if unknown_option(error) is None:
            raise
        raise TaskError(
            f"{model['backbone']}: {call_fault(error)}; model.kwargs must be options of the head, and "
            "model.backbone_kwargs those of the backbone"
        ) from error
    except (RuntimeError, OSError, ValueError) as error:
        if not options.get("pretrained"):
            raise
        raise TaskError(f"{model['backbone']}: its published weights can't be loaded: {first_line(error)}") from error
