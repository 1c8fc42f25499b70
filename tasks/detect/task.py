"""Detection and instance segmentation as the engine sees them: data, model, losses, predictions and metrics."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from .. import TaskError
from ..data.formats import open_objects, resolve
from ..data.occurrence import check_classes, draw_weights
from ..data.statistics import describe_normalization, measure_normalization
from ..dense.build import (
    build_described,
    describe_model,
    freeze_stages,
    freeze_statistics,
    normalization_of,
    with_told,
)
from ..dense.detect.detector import DETECTORS, create_detector
from ..dense.detect.transform import DetectorTransform
from ..detections import to_plain
from ..metrics.classes import measure_objects


class Detect:
    """Detection, described by a config.

    Attributes:
        train_set: Training images with objects.
        val_set: Held-out images with objects.
        metric: The metric by which the best checkpoint is chosen.
        shown: The metrics that a line of progress names.
    """

    # Every key a config may have, with its default; `engine.keys` says what they mean.
    DEFAULTS: ClassVar[dict] = {
        "model": {
            "head": "mask_rcnn",
            "backbone": None,
            "setting": "auto",
            "pretrained": False,
            "backbone_checkpoint": None,
            "checkpoint": None,
            "norm_eval": False,
            "frozen_stages": 0,
            "backbone_kwargs": {},
            "kwargs": {},
        },
        "data": {
            "name": "coco",
            "root": None,
            "train": {"annotations": "annotations/instances_train2017.json", "images": "train2017", "split": "train"},
            "val": {"annotations": "annotations/instances_val2017.json", "images": "val2017", "split": "val"},
            "classes": None,
            "num_classes": None,
            "channels": 3,
            "white": None,
            "broken": "refuse",
            "keep_empty": True,
            "repeat": 1,
            "image_column": None,
            "objects_column": None,
            "holdout": 0.2,
            "holdout_seed": 0,
            "balance": 0.0,
            "normalization": None,
            "mosaic": 0.0,
            "copy_paste": 0.0,
            "augment": {},
        },
    }
    FREE = ("model.backbone_kwargs", "model.kwargs", "data.augment")  # dicts with keys of their own
    OPTIONAL: ClassVar[dict] = {
        "model.backbone": str,
        "model.setting": str,
        "model.backbone_checkpoint": str,
        "model.checkpoint": str,
        "data.root": str,
        "data.classes": tuple,
        "data.num_classes": int,
        "data.white": int,
        "data.normalization": str,
        "data.image_column": str,
        "data.objects_column": str,
    }

    def __init__(self, config: dict):
        data, self._said = resolve(config["data"], "objects")
        self.model = dict(config["model"])
        if self.model["backbone"] is None:
            raise TaskError("model.backbone is not set; `foveate list` shows what there is")
        told = normalization_of(data["normalization"], self.model["backbone"])
        if data["channels"] != 3:
            # Published numbers are of colours.
            told = {}
            self.model["backbone_kwargs"] = {**self.model["backbone_kwargs"], "in_chans": data["channels"]}
        self.model["kwargs"] = told | dict(self.model["kwargs"])
        if self.model["head"] not in (*DETECTORS, "auto"):
            raise TaskError(f"model.head is {self.model['head']!r}, but must be auto or one of {', '.join(DETECTORS)}")
        measures = data["normalization"] == "data" or (data["channels"] != 3 and "mean" not in self.model["kwargs"])
        chooses = self.model["head"] == "auto"
        needs_masks = None if chooses else DETECTORS[self.model["head"]].needs_masks
        self.train_set, self.val_set = open_objects(data, needs_masks, config["damaged_images"] == "skip")
        if measures:
            measured = measure_normalization(self.train_set.image, len(self.train_set.records))
            self._said.append(describe_normalization(measured))
            self.model["kwargs"] = {**self.model["kwargs"], **measured}
        if chooses:
            with_masks = all(record.instances.masks is not None for record in self.train_set.records)
            self.model["head"] = "mask_rcnn" if with_masks else "faster_rcnn"
            self._said.append(f"objects {'with' if with_masks else 'without'} masks: {self.model['head']}")
        if data["balance"]:
            shown, classes = self.train_set.occurring(), len(self.train_set.classes)
            self.train_set.weights = draw_weights(shown, classes, data["balance"], data["repeat"])
        self.with_masks = DETECTORS[self.model["head"]].needs_masks
        self.train_set.mosaic, self.train_set.copy_paste = data["mosaic"], data["copy_paste"]
        if data["copy_paste"] and not self.with_masks:
            raise TaskError(
                f"data.copy_paste cuts objects out by their masks; {self.model['head']} has none: set it to 0"
            )
        self.metric = "mask_ap" if self.with_masks else "box_ap"
        self.shown = [f"{kind}_{name}" for kind in self._kinds() for name in ("ap", "ap50")]
        self._source = data["root"] or data["name"]
        self.classes = list(self.train_set.classes)
        # Resized images need only be normalised and padded.
        self._frozen: list[nn.Module] = []
        self._are_resized = data["augment"].get("shorts") is not None

    def _kinds(self) -> tuple[str, ...]:
        return ("box", "mask") if self.with_masks else ("box",)

    def build_model(self) -> nn.Module:
        """Return the detector, initialised or with the weights the config starts from."""
        model = build_detector(self.model, len(self.classes))
        self.model = with_told(self.model, model)
        self._frozen = freeze_stages(model.backbone, self.model["frozen_stages"])
        return model

    def check_data(self, training: bool = True) -> list[str]:
        """Return what is to be said of the data before they are measured by, and with ``training`` trained on.

        Raises:
            TaskError: If there is no object, or only crowds.
        """
        lines = list(self._said)
        for part, samples in (("training", self.train_set), ("validation", self.val_set))[not training :]:
            lines += check_classes(part, samples.occurring(), self.classes, self._source, "object")
        return lines

    def loss(self, model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the losses of a batch; the engine adds them."""
        for module in [model.backbone] if self.model["norm_eval"] else self._frozen:
            freeze_statistics(module)
        if not self._are_resized:
            return model(images, targets)
        options = {name: getattr(model.transform, name) for name in ("mean", "std", "divisor", "channel_order")}
        batch, targets, sizes = DetectorTransform(min_size=None, **options)(images, targets)
        return model.losses_from_features(model.backbone(batch), targets, sizes)

    def predict(self, model: nn.Module, images: list[Tensor]) -> list[dict[str, Any]]:
        """Return boxes, labels and scores of every image, best first, and its masks as run lengths."""
        return [detect_image(model, image) for image in images]

    def measure(self, predictions: list[dict], targets: list[dict]) -> dict[str, float]:
        """Return COCO's measures of boxes, and of masks, as fractions; those with nothing to find are left out."""
        from ..metrics.average_precision import NUMBERS, measure_ap

        metrics = {}
        for kind in self._kinds():
            measured = measure_ap(predictions, targets, kind)
            metrics |= {f"{kind}_{name}": measured[name] for name in NUMBERS if measured[name] >= 0}
        return metrics

    def measure_classes(self, predictions: list[dict], targets: list[dict]) -> list[dict[str, Any]]:
        """Return the average precision of each class, of boxes and of masks, and its objects."""
        return measure_objects(predictions, targets, self.classes, self._kinds())

    def draw(
        self, predictions: list[dict], targets: list[dict], folder: Path, epoch: int, indices: list[int]
    ) -> list[tuple[str, str]]:
        """Draw truths beside predictions, and precision by recall; return files and what they show.

        Args:
            predictions: Of held-out images.
            targets: Their truths.
            folder: Where pictures go.
            epoch: After which the predictions were made.
            indices: Which of the held-out images they are.
        """
        from ..metrics.average_precision import measure_ap
        from ..metrics.confusion import confuse_objects, worst_of
        from ..pictures.classes import draw_confusion
        from ..pictures.objects import draw_comparison, draw_precision

        taken, scores = confuse_objects(predictions, targets, len(self.classes), "box")
        worst = worst_of(scores)
        shown = [(indices[place], targets[place], predictions[place]) for place in worst]
        rows = [(self.val_set.image(index), target, prediction) for index, target, prediction in shown]
        title = f"held-out images with the lowest F1, epoch {epoch}"
        draw_comparison(rows, self.classes, folder / "predictions.png", title)
        draw_confusion(taken, [*self.classes, "nothing"], folder / "confusion.png", "found and missed objects")
        curves = {kind: measure_ap(predictions, targets, kind) for kind in self._kinds()}
        draw_precision(curves, folder / "precision.png")
        return [
            ("predictions.png", "the worst predictions beside the truth"),
            ("confusion.png", "which classes are taken for which"),
            ("precision.png", "precision by recall"),
        ]

    def draw_inputs(self, items: list[tuple[Tensor, dict]], path: Path, title: str, train: bool) -> None:
        """Draw items of a data set, of training or not, with their boxes and masks; ``title`` says what is shown."""
        from ..pictures.objects import draw_inputs

        draw_inputs(items, self.classes, path, title)

    def card(self) -> dict:
        """Return, in plain types, what prediction needs besides the weights."""
        return detector_card(self.model, self.classes) | {"white": self.train_set.white}


def detector_card(model: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """Return, in plain types, what prediction needs of a detector besides the weights."""
    return {"task": "detect", "classes": list(classes), **describe_model(model)}


def build_detector(model: dict[str, Any], classes: int) -> nn.Module:
    """Return the detector that ``model`` describes, as in `Detect.DEFAULTS`.

    Raises:
        TaskError: If there is no such head or option, or no weights to start from.
        UnknownModelError: If the backbone or its setting is unknown.
        CheckpointError: If a checkpoint can't be read or isn't one of this model.
    """
    if model["kwargs"].get("torchvision_outputs"):
        raise TaskError("model.kwargs.torchvision_outputs: a run counts labels from 0; set it on the trained model")
    # The sizes of images are the run's own say; how they are normalised, a file that it starts from may tell.
    of_file = ("mean", "std", "channel_order") if model.get("checkpoint") else ()
    parameters = inspect.signature(DetectorTransform).parameters
    transform = {name: option.default for name, option in parameters.items() if name not in of_file}
    transform |= DETECTORS[model["head"]].TRANSFORM
    return build_described(create_detector, model, classes, transform | model["kwargs"])


def build_again(model: Mapping[str, Any], card: Mapping[str, Any]) -> nn.Module:
    """Return the model that a run started from, as in `Detect.DEFAULTS`, with what its card tells of it."""
    return build_detector({**model, **{key: card[key] for key in ("head", "kwargs")}}, len(card["classes"]))


def detect_image(model: nn.Module, image: Tensor) -> dict[str, Any]:
    """Return a detector's answer for an image ``[3, H, W]``, by itself: sharing a batch would move its last bits."""
    return to_plain(model([image])[0])
