"""Any timm model with weights: all that it has comes from them, or an error names what is missing.

The models of this package convert and check a file themselves (`checkpoint.fit`). timm loads its own leniently as soon
as a model is cut to its features or has other classes; here it is watched, and what it left out is told.
"""

import contextlib
import contextvars
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import model_entrypoint
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode

from .checkpoint import Checkpoint, CheckpointError, LoadReport, backbone_of, check_classes, faults_of, load
from .library_errors import load_fault
from .maps import cfg_of
from .weights import read

# Options of timm's features, which the whole model doesn't know.
_OF_FEATURES = ("features_only", "out_indices", "feature_cls")
# What timm's and our own wrappers of features put before a model's names.
_WRAPPERS = ("", "features.", "features.model.", "features.body.", "model.", "body.")
# Where files keep a classifier whose name in timm is another.
_CLASSIFIERS = ("head.fc", "head", "fc", "classifier")
_METHODS = ("add_", "clamp_", "erfinv_", "fill_", "mul_", "normal_", "uniform_", "zero_")
_DRAWS = {getattr(Tensor, method) for method in _METHODS}


class WithoutInit(TorchFunctionMode):
    """Skips the initialisation of weights that have no storage, which does nothing, slowly."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _DRAWS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def create_model(name: str, checkpoint: str | Path | Checkpoint | None = None, **options: Any) -> nn.Module:
    """Create a timm model, ours or theirs, as `timm.create_model` does, but load its weights completely or not at all.

    Args:
        name: Registered name, with an optional tag.
        checkpoint: Weights: a path, an address, the ``model.tag`` of published ones, or what `open_checkpoint` read. A
            classifier's, or a dense model's, of which the backbone is read. timm's own options that name a file are
            understood too.
        **options: Of timm's factory and of the model.

    Returns:
        The model. If it has weights, its ``load_report`` says what became of them.

    Raises:
        CheckpointError: If the weights can't be had or read, are not those of this model, or are named twice.
    """
    overlay = dict(options.pop("pretrained_cfg_overlay", None) or {})
    files = [file for file in (checkpoint, options.pop("checkpoint_path", None), overlay.pop("file", None)) if file]
    if len(files) > 1:
        raise CheckpointError(f"{name}: its weights are named twice, {files[0]} and {files[1]}; give one of them")
    checkpoint = read(files[0]) if files else None
    with _naming(None if checkpoint is None else checkpoint.path):
        if model_entrypoint(name).__module__.startswith(f"{__package__}."):
            if checkpoint is not None:
                options["pretrained"] = True
                overlay["file"] = checkpoint
            model = timm.create_model(name, pretrained_cfg_overlay=overlay, **options)
            if hasattr(getattr(model, "model", None), "load_report"):
                model.load_report = _of_features(model.model.load_report, model)
            return model
        if checkpoint is not None:
            return _from_file(name, checkpoint, overlay, options)
        with _watch() as loads:
            model = timm.create_model(name, pretrained_cfg_overlay=overlay, **options)
        if loads:
            missing = _Load(*loads[-1]).missing_in(model)
            _refuse(name, model, _needed(model, missing, {}, set()), [])
            model.load_report = LoadReport(len(model.state_dict()) - len(missing), tuple(missing))
        return model


@contextlib.contextmanager
def _naming(path: Path | None) -> Iterator[None]:
    """Let an error begin with the file that it is about."""
    try:
        yield
    except CheckpointError as error:
        if path is None or str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error


def _from_file(name: str, checkpoint: Checkpoint, overlay: dict, options: dict) -> nn.Module:
    """Return a model of timm's own with a file's weights."""
    options = {key: value for key, value in options.items() if key != "pretrained"}
    features = bool(options.get("features_only"))
    whole = _whole(name, {key: value for key, value in options.items() if key not in _OF_FEATURES})
    whole_state, classes, explicit = whole.state_dict(), getattr(whole, "num_classes", None), "num_classes" in options
    _refuse_published(name, checkpoint)
    state = _under_own_names(backbone_of(checkpoint.state), whole_state)
    classifier, file_classes = _classifier_of(name, state)
    if not features and classes is not None:
        options["num_classes"] = classes
    # A classifier of other classes is not the file's to give.
    fresh = classifier if not features and file_classes != classes else set()
    own = {key for key, value in state.items() if key in whole_state and value.shape == whole_state[key].shape} - fresh
    strange = _strange(state, whole_state, classifier)

    model = timm.create_model(name, pretrained_cfg_overlay=overlay, **options)
    inner = _inner_names(model, whole_state)
    missing = [key for key in inner if inner[key] not in own]
    needed = _needed(model, missing, inner, fresh)
    if not strange and not needed:
        given = {key: state[inner[key]] for key in inner if inner[key] in own}
        load(model, given, checkpoint.path, initial=missing, refusal=_refusal(name))
    else:
        # Of an older format, another size or number of channels: timm knows how to convert it.
        loaded = {"state_dict": dict(state), "source": None, "num_classes": file_classes or int(features)}
        converted = _converted(name, pretrained_cfg_overlay=overlay | loaded, **options)
        if isinstance(converted, Exception):
            _refuse(name, model, needed, strange)
            raise CheckpointError(f"{_refusal(name)}: {load_fault(converted)}") from converted
        model, watched = converted
        missing = watched.missing_in(model)
        # What the conversion made up counts as learned.
        strange = _strange({key: state.get(key, torch.empty(0)) for key in watched.unexpected}, whole_state, classifier)
        _refuse(name, model, _needed(model, missing, inner, fresh), strange)
        for module in (model, getattr(model, "model", None), getattr(model, "body", None)):
            if isinstance(cfg := getattr(module, "pretrained_cfg", None), dict):
                cfg.pop("state_dict", None)
                cfg["num_classes"] = file_classes or cfg_of(name).num_classes
    if not features:
        check_classes(name, file_classes, classes, explicit)
    arrived = {inner[key] for key in inner.keys() - set(missing)}
    reshaped = [
        (key, tuple(state[of].shape), tuple(whole_state[of].shape), "timm's rule")
        for key, of in inner.items()
        if of in arrived & state.keys() and state[of].shape != whole_state[of].shape
    ]
    unused = sorted(key for key in state if key in classifier | whole_state.keys() and key not in arrived)
    model.load_report = LoadReport(len(arrived), tuple(missing), tuple(unused), tuple(reshaped))
    return model


def _refuse_published(name: str, checkpoint: Checkpoint) -> None:
    """Raise a CheckpointError if a file is a dense model's of mm's or detectron2's: its backbone may need a form."""
    # That file builds backbones, of models that this one loads.
    from .published import layout_of, origin_of

    if layout_of(checkpoint.state) is not None and origin_of(checkpoint) is not None:
        raise CheckpointError(
            f"{checkpoint}: is a dense model's; its backbone is read by create_backbone({name!r}, checkpoint=...), "
            "which gives it the form in which it was trained"
        )


def _whole(name: str, options: dict) -> nn.Module:
    """Return a model as it is before it is cut, without storage where its constructor allows that."""
    try:
        with torch.device("meta"), WithoutInit():
            return timm.create_model(name, **options)
    except (RuntimeError, NotImplementedError):
        return timm.create_model(name, **options)


def _flat(name: str) -> str:
    """Return a name as timm's list of features has it, up to what else it flattens."""
    return name.replace(".", "_")


def _inner_names(model: nn.Module, whole_state: dict[str, Tensor]) -> dict[str, str]:
    """Return the names of a model's entries in the whole model that it was cut from."""
    known = {_flat(name): name for name in whole_state}
    prefix = next((f"{part}." for part in ("model", "body") if set(dict(model.named_children())) == {part}), "")
    return {key: known.get(_flat(key.removeprefix(prefix)), key) for key in model.state_dict()}


def _under_own_names(state: dict[str, Tensor], whole_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the traces of a wrapper of features, if it has any."""
    known = {_flat(name): name for name in whole_state}
    prefixes = [prefix for prefix in _WRAPPERS if all(key.startswith(prefix) for key in state)]
    best = max(prefixes, key=lambda prefix: sum(_flat(key.removeprefix(prefix)) in known for key in state))
    stripped = {key.removeprefix(best): value for key, value in state.items()}
    return {known.get(_flat(key), key): value for key, value in stripped.items()}


def _classifier_of(name: str, state: dict[str, Tensor]) -> tuple[set[str], int | None]:
    """Return the names of a model's and of a file's classifier, and how many classes the file has, if it has one."""
    layers = cfg_of(name).classifier or ()
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    classifier = next((layer for layer in (*layers, *_CLASSIFIERS) if f"{layer}.weight" in state), None)
    names = {f"{layer}.{leaf}" for layer in (*layers, *filter(None, [classifier])) for leaf in ("weight", "bias")}
    return names, None if classifier is None else len(state[f"{classifier}.weight"])


def classes_of(name: str, checkpoint: Checkpoint) -> int | None:
    """Return how many classes a file of a model has a classifier for; None without one."""
    return _classifier_of(name, backbone_of(checkpoint.state))[1]


def _needed(model: nn.Module, missing: list[str], inner: dict[str, str], fresh: set[str]) -> list[str]:
    """Return which of the missing entries a model can't do without: counts and indices aren't learned."""
    entries = model.state_dict()
    return [key for key in missing if entries[key].is_floating_point() and inner.get(key, key) not in fresh]


def _strange(state: dict[str, Tensor], whole_state: dict[str, Tensor], classifier: set[str]) -> list[str]:
    """Return the learned entries of a file that are of no part of the model."""
    return [key for key in state if key not in whole_state and key not in classifier and state[key].is_floating_point()]


def _refuse(name: str, model: nn.Module, missing: list[str], strange: list[str]) -> None:
    """Raise a CheckpointError that names the missing and the strange entries, if there are any."""
    if missing or strange:
        total = sum(value.is_floating_point() for value in model.state_dict().values())
        raise CheckpointError(
            f"{_refusal(name)}: {total - len(missing)} of {total} entries match, "
            f"{faults_of(missing=missing, unexpected=strange)}; names other than timm's are not translated here; "
            "whole files of mmdet, mmseg and detectron2 are for create_detector, create_segmenter and create_backbone"
        )


def _refusal(name: str) -> str:
    return f"the checkpoint is not one of {name}"


def _of_features(report: LoadReport, model: nn.Module) -> LoadReport:
    """Return the report on a model of ours for the features that it was cut to."""
    left = model.state_dict()
    missing = tuple(f"model.{key}" for key in report.missing if f"model.{key}" in left)
    reshaped = tuple((f"model.{key}", *change) for key, *change in report.reshaped if f"model.{key}" in left)
    return LoadReport(len(left) - len(missing), missing, report.unexpected, reshaped)


class _Load:
    """A call of `load_state_dict` on a whole model.

    Attributes:
        missing: Entries of the model that the state dict didn't give.
        unexpected: Entries of the state dict that there was no place for.
    """

    def __init__(self, root: nn.Module, keys: Any):
        self._root = root
        self.missing, self.unexpected = list(keys.missing_keys), list(keys.unexpected_keys)

    def missing_in(self, model: nn.Module) -> list[str]:
        """Return the missing entries that are still there in a model cut from the root, by its names."""
        entries = self._root.state_dict(keep_vars=True)
        missing = {id(entries[key]) for key in self.missing if key in entries}
        return [key for key, value in model.state_dict(keep_vars=True).items() if id(value) in missing]


# The calls of `load_state_dict` in this thread, while somebody watches.
_LOADS: contextvars.ContextVar[list[tuple[nn.Module, Any]] | None] = contextvars.ContextVar("loads", default=None)


def _note(module: nn.Module, keys: Any) -> None:
    if (loads := _LOADS.get()) is not None:
        loads.append((module, keys))


@contextlib.contextmanager
def _watch() -> Iterator[list[tuple[nn.Module, Any]]]:
    """Note what is loaded into models that are built meanwhile, the root last: timm only logs what is missing."""
    loads: list[tuple[nn.Module, Any]] = []
    hooks: dict[nn.Module, Any] = {}

    def attach(module: nn.Module, name: str, child: nn.Module | None) -> None:
        if _LOADS.get() is loads and module not in hooks:
            hooks[module] = module.register_load_state_dict_post_hook(_note)

    token = _LOADS.set(loads)
    handle = register_module_module_registration_hook(attach)
    try:
        yield loads
    finally:
        handle.remove()
        _LOADS.reset(token)
        for hook in hooks.values():
            hook.remove()


def _converted(name: str, **options: Any) -> tuple[nn.Module, _Load] | Exception:
    """Return a model that timm loaded from a state dict of whatever format it knows, with what it left out, or why not.

    Its conversions meet files of any kind, and fail on them in any way.
    """
    try:
        with silence("timm.models._builder"), _watch() as loads:
            model = timm.create_model(name, pretrained=True, **options)
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
        return error
    return model, _Load(*loads[-1])


@contextlib.contextmanager
def silence(name: str) -> Iterator[None]:
    """Keep what a logger would say to itself."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
