"""What whole dense models have in common: how they get a backbone, and how a checkpoint's entries get into them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...zoo import BackboneError, CheckpointError, create_backbone
from ...zoo._checkpoint import LoadReport
from ...zoo.backbone import Backbone, UnknownModelError, check_name, recipes_of
from ...zoo.weights import locate
from .. import TaskError, nearest
from ..checkpoints import load_weights, without_start

_logger = logging.getLogger(__name__)


class OtherClassesError(CheckpointError):
    """A dense model's file is of another number of classes than asked for.

    Args:
        path: The file.
        held: Its classes.
        wanted: Those asked for.
    """

    def __init__(self, path: str | Path, held: int, wanted: int):
        super().__init__(
            f"{path}: has {held} classes, not {wanted}; leave num_classes out, or start with new classifiers: "
            "reset_classifier=True"
        )
        self.path, self.held = path, held


def has_backbone(state: dict[str, Tensor]) -> bool:
    """Return whether there are any entries of a backbone."""
    return any(key.startswith("backbone.") for key in state)


def is_ours(state: dict[str, Tensor]) -> bool:
    """Return whether the backbone's entries have our names, as in the checkpoints of `foveate train`."""
    return any(key.startswith("backbone.features.") for key in state)


def build_backbone(
    head: str,
    backbone: str | nn.Module,
    recipe: str | None,
    auto: Sequence[str],
    checkpoint: str | Path | None,
    options: dict,
    known_options: Sequence[str],
) -> nn.Module:
    """Return a dense model's backbone: the module itself, or the named one with the maps that dense heads take.

    Args:
        head: The dense model's name, for messages.
        backbone: A timm name, or a module with ``channels``.
        recipe: The named backbone's recipe, None for none, or ``"auto"``.
        auto: The recipes from which ``"auto"`` takes the first that the backbone has; none if it has none of them.
        checkpoint: A published dense model's file, of which the named backbone is read.
        options: Options of the named backbone.
        known_options: Those of the dense model, of which a wrong one may have been meant.

    Raises:
        TaskError: If the module has no ``channels``, the named model no maps, or an option is unknown.
        UnknownModelError: If the name or the recipe is unknown.
        CheckpointError: If the checkpoint can't be read or isn't one of this backbone.
    """
    if not isinstance(backbone, str):
        if not hasattr(backbone, "channels"):
            raise TaskError(f"{type(backbone).__name__} has no `channels`, the channels of each of its maps")
        if recipe not in (None, "auto"):
            raise TaskError(f"recipe {recipe!r} is for a backbone given by name; create_backbone takes it")
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
    if recipe == "auto":
        known = recipes_of(backbone)
        recipe = next((name for name in auto if name in known), None)
    try:
        return create_backbone(backbone, recipe, checkpoint, out_indices=None, **options)
    except BackboneError as error:
        raise TaskError(f"{head} on {backbone}: {error}") from error
    except TypeError as error:
        wrong = next((name for name in options if f"unexpected keyword argument {name!r}" in str(error)), None)
        if wrong is None:
            raise
        raise TaskError(
            f"neither {head} nor {backbone} has an option {wrong!r}{nearest(wrong, known_options)}"
        ) from error


def load_dense(
    model: nn.Module,
    state: dict[str, Tensor],
    path: str | Path,
    backbone_loaded: bool,
    fresh: Callable[[str], bool] = lambda key: False,
) -> LoadReport:
    """Load a whole dense model's entries, under our names: all of them, and no others; report what was done.

    A file without a backbone leaves the model's as it is, and a backbone without weights needs none; both are said.

    Args:
        model: Has ``backbone``.
        state: Entries under our names; those of the backbone may be as published if they are loaded already.
        path: Their file, for messages.
        backbone_loaded: Whether the backbone has its weights already.
        fresh: Tells which entries of the model keep their initial values though the file has them.

    Raises:
        CheckpointError: If entries are missing, unexpected or of another shape.
    """
    given, wanted = has_backbone(state), bool(model.backbone.state_dict())
    if wanted and not given:
        _logger.warning(f"{path}: holds the heads alone; the backbone keeps its weights")
    if given and not wanted:
        _logger.info(f"{path}: left out its backbone, since {type(model.backbone).__name__} has no weights")
    whole = given and wanted and not backbone_loaded
    if not whole:
        state = {key: value for key, value in state.items() if not key.startswith("backbone.")}

    def kept(key: str) -> bool:
        if key.startswith("backbone.") and not whole:
            return True
        # Batch counts play no part where the momentum is fixed; some files lack them.
        if key.endswith("num_batches_tracked") and key not in state:
            return True
        return fresh(key)

    entries = model.state_dict()
    kept_values = {key: value for key, value in entries.items() if kept(key)}
    load_weights(model, state | kept_values, path)
    body = LoadReport(0)
    if not whole and backbone_loaded:
        body = getattr(model.backbone, "load_report", None) or body
    left = {key for key in kept_values if not (backbone_loaded and key.startswith("backbone."))}
    report = LoadReport(
        matched=len(entries) - len(kept_values) + body.matched,
        missing=(*sorted(left), *(f"backbone.features.{key}" for key in body.missing)),
        unexpected=(*sorted(state.keys() & kept_values.keys()), *(f"backbone.{key}" for key in body.unexpected)),
        reshaped=tuple((f"backbone.features.{key}", *change) for key, *change in body.reshaped),
    )
    _logger.info(f"{path}: {report}")
    return report


def freeze_statistics(backbone: nn.Module) -> None:
    """Let a backbone's batch norms use the statistics that they have, until it is put into training mode again."""
    for module in backbone.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def describe_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a config's ``model``, in plain types, what `build_described` needs to build it again from a file."""
    return {
        "model": f"{model['head']} on {model['backbone']}",
        **{key: model[key] for key in ("head", "backbone", "recipe")},
        **{key: without_start(model[key]) for key in ("backbone_kwargs", "kwargs")},
    }


def build_described(
    create: Callable[..., nn.Module], model: Mapping[str, Any], classes: int, kwargs: Mapping
) -> nn.Module:
    """Return the dense model that a config's or a checkpoint's card's ``model`` describes.

    What the description leaves open, such as widths, a ``checkpoint`` tells.

    Args:
        create: `create_detector` or `create_segmenter`.
        model: ``head``, ``backbone``, ``recipe``, ``backbone_kwargs``, and what to start from.
        classes: Number of classes.
        kwargs: Further options of ``create``.

    Raises:
        TaskError: If there is no such head or option, or no weights to start from.
        UnknownModelError: If the backbone or its recipe is unknown.
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
            recipe=model["recipe"],
            checkpoint=model.get("checkpoint"),
            backbone_kwargs=options,
            **kwargs,
        )
    except OtherClassesError as error:
        raise CheckpointError(
            f"{error.path}: has {error.held} classes, the data {classes}; start with new classifiers: "
            "model.kwargs.reset_classifier=True"
        ) from error
    except (TaskError, CheckpointError, UnknownModelError):
        raise
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise TaskError(
            f"{model['backbone']}: {str(error).split('() ')[-1]}; model.kwargs must be options of the head, and "
            "model.backbone_kwargs those of the backbone"
        ) from error
    except (RuntimeError, OSError, ValueError) as error:
        if not options.get("pretrained"):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TaskError(f"{model['backbone']}: its published weights can't be loaded: {reason}") from error
