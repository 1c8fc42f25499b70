"""What a file of weights holds: a classifier, a detector, a segmenter, or a dense backbone alone; loaded strictly."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...tasks.checkpoints import renamed, with_white
from ...tasks.classify import Predictor, create_classifier
from ...tasks.predictors import dense_head_of, is_published, load_dense, load_predictor, load_published
from ...zoo import CheckpointError, create_backbone, list_models, weights
from ...zoo.backbone import check_name, dense_settings_of
from ...zoo.checkpoint import Checkpoint
from ...zoo.loading import classes_of, input_of
from ...zoo.published import likely_model_of
from ...zoo.variants import Variant, variants_of

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class File:
    """A file of weights, and what it says of itself.

    Attributes:
        checkpoint: What was read of it.
        sha256: Of its bytes.
        card: What foveate wrote of the model; None in other files.
        note: What `foveate weights convert` wrote of the file; empty in other files.
        entry: Row of the published weights that it is; None if it is none of them.
    """

    checkpoint: Checkpoint
    sha256: str
    card: dict[str, Any] | None
    note: dict[str, str]
    entry: weights.Weights | None

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.checkpoint.path

    @property
    def model(self) -> str | None:
        """Name of the model, or of the backbone."""
        card = self.card or {}
        named = card.get("backbone") or card.get("model") or self.note.get("model")
        return named or (self.entry.model if self.entry else None)

    def check(self, option: str, given: str | None, known: str | None) -> None:
        """Raise a CheckpointError if an option contradicts what the file says of itself."""
        if given and known and given.split(".")[0] != known.split(".")[0]:
            raise CheckpointError(f"{self.path}: is of {known}, as it says itself, not of {given}; leave out {option}")

    def variants(self) -> list[Variant]:
        """Return the models of ours that the file fits."""
        return variants_of(self.checkpoint, list_models())


def read_file(reference: str) -> File:
    """Return a file by its path, its address or the name of published weights.

    Raises:
        CheckpointError: If it can't be had or read.
    """
    checkpoint = weights.read(reference)
    note, card = renamed(checkpoint.metadata), checkpoint.card
    entry = weights.table().get(reference) or weights.table().get(note.get("weights"))
    card = with_white(card, checkpoint.content) if card else None
    return File(checkpoint, weights.sha256_of(checkpoint.path), card, note, entry)


class Contents:
    """A model from a file, with what predicts by it.

    Attributes:
        file: Where it comes from.
        name: Name of the classifier, or of the backbone.
        predictor: What answers with the model.
        head: Name of a dense model's head.
        setting: Dense setting of a backbone alone.
    """

    task: str
    setting: str | None = None

    def __init__(self, file: File, name: str, predictor: Any, head: str = ""):
        self.file, self.name, self.predictor, self.head = file, name, predictor, head

    @property
    def model(self) -> nn.Module:
        return self.predictor.model

    @property
    def title(self) -> str:
        return f"{self.name}, {self.head}" if self.head else self.name

    def move(self, device: torch.device) -> None:
        """Let the model run on a device."""
        self.model.to(device)
        if self.predictor:
            self.predictor.device = device

    def report(self) -> str:
        """Return what was loaded, in one line."""
        report = getattr(self.model, "load_report", None)
        return str(report or f"{len(self.model.state_dict())} entries matched")

    def state(self) -> dict:
        """Return the model's state dict, with the names under which it is read again."""
        return self.model.state_dict()

    def card(self) -> dict[str, Any]:
        """Return what a file shall say of the model, so that every command that takes a file knows it."""
        return self.predictor.card

    def obstacle(self) -> str | None:
        """Return why the model says nothing about a photo, or None if it does."""
        return None

    def answer(self, image) -> str:
        """Return what the model says about a photo."""
        (answer,) = self.predictor([image])
        return self.predictor.headline(answer)


class Classifier(Contents):
    """A classifier with whatever classes it has."""

    task = "classify"

    def obstacle(self) -> str | None:
        return None if self.predictor.classes else "the model has no classifier"

    def answer(self, image) -> str:
        (ranking,) = self.predictor([image])
        return "; ".join(f"{name} {share:.1%}" for name, share in ranking)


class Detector(Contents):
    """A detector."""

    task = "detect"

    def answer(self, image) -> str:
        (detections,) = self.predictor([image])
        rows = zip(
            detections["labels"].tolist(), detections["scores"].tolist(), detections["boxes"].tolist(), strict=True
        )
        best = [
            f"{self.predictor.classes[label]} {score:.1%} at {' '.join(f'{edge:.0f}' for edge in box)}"
            for label, score, box in rows
        ]
        return "; ".join(best[:5]) or "nothing found"


class Segmenter(Contents):
    """A segmenter."""

    task = "segment"


class Backbone(Contents):
    """A dense backbone alone."""

    task = "backbone"

    def __init__(self, file: File, name: str, setting: str | None):
        super().__init__(file, name, predictor=None)
        self.setting = setting
        self._model = create_backbone(name, setting, file.checkpoint).eval()

    @property
    def model(self) -> nn.Module:
        return self._model

    def state(self) -> dict:
        return getattr(self.model.features, "model", self.model.features).state_dict()

    def card(self) -> dict[str, Any]:
        return {"task": "backbone", "model": self.name, "setting": self.setting}

    def obstacle(self) -> str | None:
        return "a backbone alone gives maps, no classes"


def load_contents(reference: str, model: str | None = None, setting: str | None = None) -> Contents:
    """Return the model that a file holds, loaded completely.

    Args:
        reference: A path, an address or the name of published weights.
        model: Name of the model, where the file doesn't tell.
        setting: Dense setting of a backbone alone; the model's first if None.

    Raises:
        CheckpointError: If the file can't be had or read, fits no model, fits several, or is of another than was said.
        UnknownModelError: If there is no such model.
    """
    if model:
        check_name(model)
    file = read_file(reference)
    file.check("--model", model, file.model)
    file.check("--setting", setting, file.note.get("setting"))
    name = file.model or model or _likely_model(file)
    try:
        return _load(file, name, setting or file.note.get("setting"))
    except CheckpointError as error:
        others = [variant.model for variant in file.variants() if variant.model != name]
        if not others:
            raise
        raise CheckpointError(f"{error}; the file is one of {' or '.join(others)}") from error


def _likely_model(file: File) -> str:
    names = [variant.model for variant in file.variants()] or list(filter(None, [likely_model_of(file.checkpoint)]))
    if not names:
        raise CheckpointError(f"{file.path}: fits no model of foveate; if it is one of timm's, name it by --model")
    if len(names) > 1:
        raise CheckpointError(f"{file.path}: fits {' and '.join(names)} alike; say by --model which it is")
    return names[0]


def _load(file: File, name: str, setting: str | None) -> Contents:
    task, head = dense_head_of(file.checkpoint) or ("classify", "")
    kind = {"classify": Classifier, "detect": Detector, "segment": Segmenter}[task]
    if file.card and file.card.get("task") != "backbone":
        return kind(file, name, load_predictor(file.checkpoint), head)
    if head:
        published = file.entry and is_published(file.entry.name)
        if published:
            return kind(file, name, load_published(file.entry.name, weights=file.checkpoint), head)
        return kind(file, name, load_dense(head, name, file.checkpoint), head)
    is_own = name in list_models()
    fitting = variants_of(file.checkpoint, [name]) if is_own else []
    classes = fitting[0].classes if fitting else classes_of(name, file.checkpoint)
    if (fitting and fitting[0].dense) or (not is_own and not classes):
        return Backbone(file, name, setting or next(iter(dense_settings_of(name)), None))
    # Loaded with the classifier and the channels that it has, whatever they are.
    how = input_of(name, file.checkpoint)
    if how:
        rule = how["pretrained_cfg_overlay"]
        _logger.warning(
            f"{file.path}: channels of its images: {how['in_chans']}; it doesn't say how they are normalised, taken as "
            f"mean {rule['mean'][0]:.4g} and std {rule['std'][0]:.4g}"
        )
    model = create_classifier(name, classes, checkpoint=file.checkpoint, **how).eval()
    return Classifier(file, name, Predictor.from_model(name, model))
