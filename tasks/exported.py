"""Exported models behind the predictors of their tasks: onnxruntime computes, the rest is as with torch.

A file has said how images become its input (`export.metadata`), so that the same code resizes, names, draws and writes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..zoo.checkpoint import CheckpointError
from . import TaskError
from .checkpoints import taken_as_said
from .dense.detect.transform import DetectorTransform, resize
from .export.onnx_file import open_session
from .extras import require

_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(uint8)": torch.uint8}


class OnnxModel(nn.Module):
    """An ONNX file as a module: what onnxruntime computes of a batch of images, by the names of the outputs.

    Attributes:
        card: What the file says of itself, under ``foveate``.
        names: Of its outputs.
        shape: Of its input; what is not a number may be any.
        dtype: Of its input; outputs in half precision are returned in float32.

    Args:
        path: The file.
        threads: That onnxruntime uses; as many as torch by default.

    Raises:
        CheckpointError: If the file can't be read, or says nothing of itself.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        super().__init__()
        require("onnxruntime")
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{path}: no such file")
        try:
            self.session = open_session(self.path, threads or torch.get_num_threads())
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{path}: onnxruntime can't read it: {reason}") from error
        card = self.session.get_modelmeta().custom_metadata_map.get("foveate")
        if card is None:
            raise CheckpointError(f"{path}: doesn't say how it is to be used; `foveate export` writes files that do")
        with taken_as_said(path):
            self.card: dict[str, Any] = json.loads(card)
            (source,) = self.session.get_inputs()
            self.names = [output.name for output in self.session.get_outputs()]
            self.shape, self.dtype, self._source = list(source.shape), _DTYPES[source.type], source.name
            if not isinstance(self.card, dict) or len(self.shape) != 4:
                raise ValueError("its card is no object, or its input no batch of images")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the images; None if they may have any."""
        height, width = self.shape[2:] if self.card.get("layout") != "hwc" else self.shape[1:3]
        return (height, width) if isinstance(height, int) and isinstance(width, int) else None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs for a batch; one that the file's own exceeds is filled up, and cut again."""
        count, least = len(images), self.shape[0]
        if isinstance(least, int) and count < least:
            images = torch.cat([images, images[-1:].expand(least - count, *images.shape[1:])])
        images = images.to(self.dtype).contiguous().numpy()
        outputs = [torch.from_numpy(value)[:count] for value in self.session.run(None, {self._source: images})]
        outputs = [value.float() if value.dtype == torch.float16 else value for value in outputs]
        return dict(zip(self.names, outputs, strict=True))


class _Classifier(nn.Module):
    def __init__(self, network: OnnxModel):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        (logits,) = self.network(x).values()
        return logits


class _Detector(nn.Module):
    """Answers as a detector does, from images ``[3, H, W]`` to what is in them in their own pixels."""

    def __init__(self, network: OnnxModel, rule: dict[str, Any]):
        super().__init__()
        self.network = network
        # Of a file of one size, each image is made to fit, and the rest is padding.
        fixed = {"divisor": 1} if network.size is None else {"divisor": 1, "min_size": None}
        self.transform = DetectorTransform(**rule | fixed)
        self.eval()

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        return [self._detect(image) for image in images]

    def _detect(self, image: Tensor) -> dict[str, Tensor]:
        batch, _, ((height, width),) = self.transform([_fitted(image, self.network.size)])
        batch = _padded(batch, self.network.size)
        answers = {name: value[0] for name, value in self.network(batch).items()}
        count = int(answers.pop("count"))
        return in_own_pixels(
            {name: value[:count] for name, value in answers.items()}, (height, width), image.shape[-2:]
        )


class _Segmenter(nn.Module):
    """Answers as a segmenter's ``predict`` does, of single images that are normalised."""

    def __init__(self, network: OnnxModel, things: Sequence[bool]):
        super().__init__()
        self.network = network
        if network.names != ["labels"]:
            self.things = [label for label, thing in enumerate(things) if thing]

    def predict(self, images: Sequence[Tensor], output_size: tuple[int, int], **how: Any) -> list[Any]:
        (image,) = images
        size = image.shape[-2:]
        answers = {name: value[0] for name, value in self.network(_padded(image[None], self.network.size)).items()}
        if "labels" in answers and answers["labels"].dim() == 2:
            return [_at(answers["labels"][: size[0], : size[1]], output_size)]
        count = int(answers.pop("count"))
        if "segments" in answers:
            segments = _at(answers["segments"][: size[0], : size[1]], output_size)
            infos = [
                {"id": index + 1, "category_id": int(label)}
                for index, label in enumerate(answers["category_ids"][:count])
            ]
            return [{"segments": segments, "segments_info": infos}]
        return [in_own_pixels({name: value[:count] for name, value in answers.items()}, size, output_size)]


def in_own_pixels(objects: dict[str, Tensor], size: tuple[int, int], original: tuple[int, int]) -> dict[str, Tensor]:
    """Return objects found in an image of ``size`` as objects of the original: boxes scaled, masks cut and resized."""
    height, width = size
    factor = objects["boxes"].new_tensor([original[1] / width, original[0] / height] * 2)
    limit = objects["boxes"].new_tensor([original[1], original[0]] * 2)
    objects = {**objects, "boxes": (objects["boxes"] * factor).clamp(min=0).minimum(limit)}
    if "masks" in objects:
        masks = objects["masks"][:, :height, :width].float()
        if len(masks) and (height, width) != tuple(original):
            masks = F.interpolate(masks[:, None], size=tuple(original), mode="bilinear", align_corners=False)[:, 0]
        objects["masks"] = masks >= 0.5
    return objects


def _at(labels: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(labels[None, None].float(), size=size, mode="nearest-exact")[0, 0].to(labels.dtype)


def _fitted(image: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Return an image that is as large as a size allows, at its own ratio; as it is if it may have any."""
    if size is None:
        return image
    factor = min(size[0] / image.shape[-2], size[1] / image.shape[-1])
    return resize(image, tuple(max(int(side * factor + 0.5), 1) for side in image.shape[-2:]))


def _padded(batch: Tensor, size: tuple[int, int] | None) -> Tensor:
    if size is None or tuple(batch.shape[-2:]) == size:
        return batch
    return F.pad(batch, (0, size[1] - batch.shape[-1], 0, size[0] - batch.shape[-2]))


def load_exported(path: str | Path, threads: int | None = None) -> Any:
    """Return the predictor of an ONNX file that `foveate export` wrote, as `load_predictor` does of a checkpoint.

    Args:
        path: The file.
        threads: That onnxruntime uses; as many as torch by default.

    Raises:
        CheckpointError: If it can't be read or says too little of itself.
        TaskError: If its answer is feature maps, or its images aren't square where they have to be.
    """
    network = OnnxModel(path, threads)
    with taken_as_said(path):
        return _predictor_of(network)


def _predictor_of(network: OnnxModel) -> Any:
    card, path = network.card, network.path
    task, how = card.get("task"), card.get("preprocessing")
    if card.get("output") == "feature maps":
        raise TaskError(f"{path}: gives feature maps, which are no answer; export it without --features")
    if how is None or task not in ("classify", "detect", "segment"):
        raise CheckpointError(f"{path}: doesn't say how images become its input; export it again")
    rule, classes, white = how["rule"], card["classes"], {"white": card["white"]} if "white" in card else {}
    if task == "classify":
        predictor = _classify(network, rule, classes, white)
    elif task == "detect":
        from .detect import Predictor

        predictor = Predictor(_Detector(network, rule), classes, "cpu", **white)
    else:
        predictor = _segment(network, rule, classes, white)
    predictor.card = card
    return predictor


def _classify(network: OnnxModel, rule: dict[str, Any], classes: list[str], white: dict[str, int]) -> Any:
    from .classify import Predictor
    from .data.classification import InputRule

    size = network.size
    if size is not None and size[0] != size[1]:
        raise TaskError(f"{network.path}: takes {size[0]}x{size[1]} images; only square inputs are predicted from")
    count = network.session.get_outputs()[0].shape[-1]
    if not classes or (isinstance(count, int) and count != len(classes)):
        raise ValueError(f"it names {len(classes)} classes and tells {count} apart")
    rule = InputRule(**rule | ({"size": size[0]} if size else {}))
    several = network.card.get("multi_label", False)
    predictor = Predictor(_Classifier(network), rule, classes, "cpu", **white, multi_label=several)
    # Its batches and images may have any size, or one.
    predictor.together = False
    if network.dtype == torch.uint8:
        # The file resizes and normalises by itself.
        chw = network.card["layout"] == "chw"

        def pixels(image: Image.Image) -> Tensor:
            x = torch.from_numpy(np.array(image)).view(*image.size[::-1], -1)
            return x.permute(2, 0, 1) if chw else x

        predictor.transform = pixels
    return predictor


def _segment(network: OnnxModel, rule: dict[str, Any], classes: list[str], white: dict[str, int]) -> Any:
    from .data.segmentation import InputRule
    from .segment import Predictor

    card, size = network.card, network.size
    output = card.get("output") if card.get("output") in ("instance", "panoptic") else "semantic"
    if size is not None:
        rule = rule | {"short": min(size), "long": max(size), "divisor": 1}
    test = {"mode": "whole", "crop_size": None, "stride": None, "scales": (1.0,), "flip": False}
    model = _Segmenter(network, card["things"])
    return Predictor(model, InputRule(**rule), classes, card["things"], output, test, "cpu", **white)
