"""Smaller and faster ONNX files, measured on held-out images beside float32: int8 and float16.

Classifiers are held to labels; detectors and segmenters to what they answer in float32.

Quantised are convolutions, and products with weights: of attention's products of two activations the conversions cost
more than the product saves, and so they stay in float32. The outputs of products stay in float32 too, which spares a
rounding and a conversion each.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import TaskError
from ..detections import keep_likely
from ..exported import OnnxModel, load_exported
from ..extras import require
from .program import read_program

_QUANTIZED = ("Conv", "Gemm", "MatMul")


def calibrated(source: Path, target: Path, images: Sequence[Tensor]) -> None:
    """Write an ONNX file in int8, with static scales that are measured on images.

    Args:
        source: A file in float32.
        target: Where to write; nothing is there before.
        images: Normalised batches, as the file takes them.

    Raises:
        TaskError: If the file has nothing to quantise.
    """
    onnx = require("onnx")
    quantization = require("onnxruntime.quantization")

    original, model = onnx.load(source), _folded(onnx, source, target.with_name(f"folded-{target.name}"))
    names = _products(model)
    if not names:
        raise TaskError(f"{source}: has no convolution and no product with weights, which are what int8 makes smaller")
    name = model.graph.input[0].name

    class Images(quantization.CalibrationDataReader):
        def __init__(self):
            self.left: Iterator[Tensor] = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            return None if batch is None else {name: batch.numpy()}

    # It advises, by the root logger, to fold the graph, which is done.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        _quantize(quantization, model, target, Images(), names)
    finally:
        logging.disable(before)
    _keep_metadata(onnx, original, target)


def _quantize(quantization: Any, model: Any, target: Path, images: Any, names: list[str]) -> None:
    quantization.quantize_static(
        model,
        str(target),
        images,
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        # Of all operators it would measure every tensor, those masked by infinity too, which have no scale.
        op_types_to_quantize=list(_QUANTIZED),
        nodes_to_quantize=names,
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
    )


def _folded(onnx: Any, source: Path, target: Path) -> Any:
    """Return the model with biases in the products that they follow: left outside, they would keep them from int8."""
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    # Folded constants would be tables of position biases, of a size that grows with the map's.
    onnxruntime.InferenceSession(
        str(source), options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )
    model = onnx.load(target)
    target.unlink()
    return model


def _products(model: Any) -> list[str]:
    """Return the names of the nodes that multiply by weights; nodes without a name get one."""
    # Matrices of more axes are tables, of position biases, of which onnxruntime has no product in integers.
    weights = {value.name: len(value.dims) for value in model.graph.initializer}
    names = []
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"node{index}"
        axes = weights.get(node.input[1], 0) if node.op_type in _QUANTIZED else 0
        if axes == 2 or (axes and node.op_type != "MatMul"):
            names.append(node.name)
    return names


def halved(source: Path, target: Path) -> None:
    """Write an ONNX file of float32 with weights and arithmetic in float16; images and answers stay float32."""
    onnx = require("onnx")
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(source)
    onnx.save(convert_float_to_float16(model, keep_io_types=True), target)
    _keep_metadata(onnx, model, target)


def _keep_metadata(onnx: Any, source: Any, target: Path) -> None:
    written = onnx.load(target)
    del written.metadata_props[:]
    written.metadata_props.extend(source.metadata_props)
    onnx.save(written, target)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute in one thread, as onnxruntime is told to: what is compared has as much of the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def measured(files: dict[str, Path], images: Sequence[Tensor], labels: Sequence[int], rounds: int = 9) -> list[dict]:
    """Return a row for each classifier's file: accuracy, agreement with the first, speed, and size.

    Args:
        files: By what they are called; the first is what the others are compared with.
        images: Held-out ones, normalised, ``[C, H, W]``.
        labels: Their classes.
        rounds: Speed is the median of as many calls, which alternate between the files, in one thread.
    """
    models = {name: _logits(path) for name, path in files.items()}
    answers = {name: [int(model(image[None])[0].argmax()) for image in images] for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            model(images[0][None])
            times[name].append(time.perf_counter() - start)
    first, *_ = files
    seconds = {name: float(np.median(values)) for name, values in times.items()}
    return [
        {
            "file": name,
            "accuracy": float(np.mean([a == b for a, b in zip(answers[name], labels, strict=True)])),
            "agreement": float(np.mean([a == b for a, b in zip(answers[name], answers[first], strict=True)])),
            "images/s": 1 / seconds[name],
            "speed": seconds[first] / seconds[name],
            "MB": path.stat().st_size / 1e6,
        }
        for name, path in files.items()
    ]


def _logits(path: Path) -> Callable[[Tensor], Tensor]:
    """Return what maps an image ``[1, C, H, W]`` to logits, by onnxruntime, or of a .pt2 by torch.compile."""
    if path.suffix == ".onnx":
        network = OnnxModel(path, threads=1)
        (key,) = network.names
        return lambda image: network(image)[key]
    compiled = torch.compile(read_program(path))

    def run(image: Tensor) -> Tensor:
        with torch.no_grad():
            return compiled(image)

    return run


def split(dataset: Any, calibration: int) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Return images to calibrate by, and other ones with their labels to be measured by, of a data set.

    Args:
        dataset: Has items of an image ``[C, H, W]`` and its class.
        calibration: How many to calibrate by, drawn from all classes alike.

    Raises:
        TaskError: If fewer than as many again are left to measure by.
    """
    used, others = _drawn(len(dataset), calibration)
    held_out = [dataset[index] for index in others]
    return (
        [dataset[index][0][None] for index in used],
        [x for x, _ in held_out],
        [y for _, y in held_out],
    )


def split_files(paths: Sequence[Path], calibration: int) -> tuple[list[Path], list[Path]]:
    """Return images to calibrate by, and others to be measured by.

    Raises:
        TaskError: If fewer than as many again are left to measure by.
    """
    used, others = _drawn(len(paths), calibration)
    return [paths[index] for index in used], [paths[index] for index in others]


def _drawn(count: int, calibration: int) -> tuple[list[int], list[int]]:
    """Return the indices of images to calibrate by, and those of the others."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    if count < 2 * calibration:
        raise TaskError(
            f"--data holds {count} images, but {calibration} to calibrate by and as many to measure by are needed; "
            "lower --calibration"
        )
    return order[:calibration], order[calibration:]


def network_inputs(predictor: Any, images: Sequence[Any]) -> list[Tensor]:
    """Return what a file's network is given for images, by the predictor that `load_exported` returns."""
    inputs: list[Tensor] = []
    handle = predictor.model.network.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    predictor(images)
    handle.remove()
    return inputs


@_one_thread()
def compared(files: dict[str, Path], images: Sequence[Any], threshold: float = 0.5) -> list[dict]:
    """Return a row for each detector's or segmenter's file: agreement with the first, speed of a picture, and size.

    Agreement is the share of pixels of the same class; of objects COCO's average precision, of masks if there are any,
    where those that the first finds, of at least the score ``threshold``, are the truth.

    Args:
        files: By what they are called; the first is what the others are compared with.
        images: Pictures, as `read_image` returns them.
        threshold: See above.

    Raises:
        TaskError: If the first finds no object.
    """
    rows, answers = [], {}
    for name, path in files.items():
        predictor = load_exported(path, threads=1)
        start = time.perf_counter()
        answers[name] = predictor(images)
        seconds = (time.perf_counter() - start) / len(images)
        rows.append({"file": name, "images/s": 1 / seconds, "MB": path.stat().st_size / 1e6})
    first, *_ = answers.values()
    for row, others in zip(rows, answers.values(), strict=True):
        row["agreement"] = (
            _objects_agree(first, others, images, threshold)
            if isinstance(first[0], dict)
            else (float(np.mean([np.mean(_classes(a) == _classes(b)) for a, b in zip(first, others, strict=True)])))
        )
        row["speed"] = row["images/s"] / rows[0]["images/s"]
    return rows


def _classes(answer: Tensor) -> np.ndarray:
    """Return the class of every pixel, of label maps ``[H, W]`` or of classes and numbers of segments ``[H, W, 2]``."""
    return (answer if answer.ndim == 2 else answer[..., 0]).numpy()


def _objects_agree(truth: Sequence[dict], detections: Sequence[dict], images: Sequence[Any], threshold: float) -> float:
    from ..metrics.average_precision import measure_ap

    targets = []
    for answer, image in zip(truth, images, strict=True):
        likely = keep_likely(answer, threshold)
        sides = likely["boxes"][:, 2:] - likely["boxes"][:, :2]
        plain = {"iscrowd": torch.zeros(len(sides)), "area": sides.prod(1), "size": (image.height, image.width)}
        targets.append({key: value for key, value in likely.items() if key != "scores"} | plain)
    if not any(len(target["labels"]) for target in targets):
        raise TaskError(f"--data: no object of a score of {threshold:g} is found in float32, to be compared with")
    return measure_ap(detections, targets, "mask" if "masks" in truth[0] else "box")["ap"]
