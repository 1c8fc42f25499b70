"""Models in the formats of other programs: ONNX, torch.export and safetensors, each checked against the model itself.

A file is written whole or not at all, and only if what it computes is what the model computes.
"""

import copy
import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import TaskError
from .checkpoints import write_whole

FORMATS = {".onnx": "ONNX", ".pt2": "torch.export", ".safetensors": "safetensors"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class Pyramid(nn.Module):
    """The maps that a model's heads would get, as a tuple of ``[B, C_i, H_i, W_i]``.

    Args:
        model: A classifier of timm's, or a detector or segmenter with ``backbone`` and perhaps ``neck``.

    Raises:
        TaskError: If a classifier has no maps.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.dense = hasattr(model, "backbone")
        if not self.dense and not hasattr(model, "forward_intermediates"):
            raise TaskError(f"{type(model).__name__} gives no feature maps; export it without --features")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of normalised images ``[B, C, H, W]``."""
        if not self.dense:
            return tuple(self.model.forward_intermediates(x, intermediates_only=True))
        if hasattr(self.model, "features"):
            return tuple(self.model.features(x))
        return tuple(self.model.neck(self.model.backbone(x)))


class Detections(nn.Module):
    """What a detector finds, in tensors of sizes that don't depend on how much there is in an image.

    Args:
        model: One that `finds_a_fixed_number`.
    """

    OUTPUTS = ("boxes", "scores", "labels")

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes ``[B, D, 4]`` in pixels of normalised images ``[B, C, H, W]``, scores and labels ``[B, D]``."""
        return self.model.find(x)

    @staticmethod
    def aligned(outputs: list[Tensor], expected: list[Tensor], tolerance: float) -> list[Tensor]:
        """Return detections in the order of the expected ones: those of all but equal scores may swap."""
        boxes, scores, labels = outputs
        apart = (boxes[:, None] - expected[0][:, :, None]).abs().amax(-1) / expected[0].abs().max().clamp(min=1e-12)
        apart = apart + (labels[:, None] != expected[2][:, :, None])
        near = (scores[:, None] - expected[1][:, :, None]).abs() <= tolerance * expected[1].max()
        place = apart.masked_fill(~near, float("inf")).argmin(-1)
        return [boxes.gather(1, place[..., None].expand(-1, -1, 4)), scores.gather(1, place), labels.gather(1, place)]


def finds_a_fixed_number(model: nn.Module) -> bool:
    """Return whether a detector finds as many objects in every image, so that it can be exported whole."""
    return hasattr(model, "find")


def check_exportable(model: nn.Module, path: str | Path) -> None:
    """Raise a TaskError if ``path`` is of no known format, its packages are missing or ``model`` can't be exported."""
    suffix = Path(path).suffix
    if suffix not in FORMATS:
        known = ", ".join(f"{ending} ({name})" for ending, name in FORMATS.items())
        raise TaskError(f"{path}: the ending says the format, which must be {known}")
    if suffix == ".onnx":
        missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise TaskError(f"ONNX needs the package {', '.join(missing)}: pip install 'foveate[export]'")
    if suffix != ".safetensors" and hasattr(model, "predict_from_features"):
        raise TaskError(
            f"a whole {type(model).__name__} can't be exported: how many regions it looks at depends on the image; "
            "--features exports its backbone and neck, and .safetensors all weights"
        )


def export_model(
    model: nn.Module,
    example: Tensor,
    path: str | Path,
    card: dict[str, Any],
    tolerance: float = 1e-4,
    dynamic_batch: bool = False,
) -> dict[str, Any]:
    """Write a model as the ending of ``path`` says, and check what was written.

    Args:
        model: Maps a tensor to a tensor or a tuple of them; in evaluation mode, on the CPU, in float32.
        example: An input; its shape is the only one that the exported model takes.
        path: File ending in ``.onnx``, ``.pt2`` or ``.safetensors``.
        card: What a user of the file needs to know, in plain types; kept in the file as JSON under ``foveate``.
        tolerance: Greatest difference that is accepted, relative to the largest output.
        dynamic_batch: Whether the exported model takes any number of images at once.

    Returns:
        ``difference``, the greatest one as a share of the ``largest`` output, 0 for safetensors; ``outputs``, their
        shapes; ``operators`` beyond torch's own, which need foveate where the file is used.

    Raises:
        TaskError: If the model can't be exported, or the file's outputs differ by more than ``tolerance``.
    """
    path = Path(path)
    check_exportable(model, path)
    facts: dict[str, Any] = {"difference": 0.0, "largest": 0.0, "outputs": [], "operators": []}
    if path.suffix == ".safetensors":
        write_whole(path, lambda file: _write_tensors(model, card, file, path))
        return facts
    with torch.no_grad():
        expected = _as_list(model(example))
    # A second input finds what was taken for a constant; with any batch, one of another size.
    generator = torch.Generator().manual_seed(1)
    shape = (example.shape[0] + 2 if dynamic_batch else example.shape[0], *example.shape[1:])
    other = torch.randn(shape, generator=generator)
    with torch.no_grad():
        checks = [(example, expected), (other, _as_list(model(other)))]
    program = _trace(model, example, dynamic_batch)
    facts["outputs"] = [list(output.shape) for output in expected]
    facts["operators"] = sorted(
        {
            str(node.target).split(".")[0]
            for node in program.graph.nodes
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
        }
        - {"aten", "prims"}
    )
    writer = _write_onnx if path.suffix == ".onnx" else _write_program

    names = getattr(model, "OUTPUTS", None)
    if names is None:
        names = ["output"] if len(expected) == 1 else [f"map{level}" for level in range(len(expected))]

    def write(file: str) -> None:
        run = writer(program, names, card, file)
        for images, references in checks:
            outputs = run(images)
            if isinstance(model, Detections):
                outputs = model.aligned(outputs, references, tolerance)
            for output, value in zip(outputs, references, strict=True):
                largest = max(value.abs().max().item(), 1e-12)
                # Not `max`, which passes over NaN.
                difference = (output - value).abs().max().item() / largest
                if not difference <= tolerance:
                    raise TaskError(
                        f"{path}: not written: its outputs differ from the model's by {difference:.1e} of the largest, "
                        f"more than --tolerance {tolerance:g}"
                    )
                facts["difference"] = max(facts["difference"], difference)
                facts["largest"] = max(facts["largest"], largest)

    write_whole(path, write)
    return facts


def _as_list(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, tuple | list) and all(isinstance(value, Tensor) for value in output):
        return list(output)
    raise TaskError(f"the model returns {type(output).__name__}, not tensors; --features exports its feature maps")


def _trace(model: nn.Module, example: Tensor, dynamic_batch: bool) -> torch.export.ExportedProgram:
    shapes, inputs = None, example
    if dynamic_batch:
        shapes = ({0: torch.export.Dim("batch")},)
        # One image would be taken for a constant of 1.
        inputs = example if example.shape[0] > 1 else torch.cat([example, example])
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(copy.deepcopy(model), (inputs,), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        advice = "; it may go without --dynamic-batch" if dynamic_batch else ""
        raise TaskError(f"torch.export can't follow {type(model).__name__}: {_reason(error)}{advice}") from error


def _reason(error: BaseException) -> str:
    """Return the first line of what the first error in a chain says: the later ones only say where it happened."""
    while error.__cause__ is not None:
        error = error.__cause__
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return next((line.strip()[:300] for line in plain.splitlines() if line.strip()), type(error).__name__)


def _write_program(
    program: torch.export.ExportedProgram, names: Sequence[str], card: dict, file: str
) -> Callable[[Tensor], list[Tensor]]:
    """Write the program and return what the written one computes."""
    torch.export.save(program, file, extra_files={"foveate": json.dumps(card)})
    module = torch.export.load(file).module()

    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return _as_list(module(images))

    return run


def _write_onnx(
    program: torch.export.ExportedProgram, names: Sequence[str], card: dict, file: str
) -> Callable[[Tensor], list[Tensor]]:
    """Write the program as ONNX and return what onnxruntime computes of it."""
    import onnxruntime

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        # With gradients, torch 2.14 can't decompose a program whose parameters are reshaped.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            written = torch.onnx.export(
                program, (), input_names=["images"], output_names=list(names), dynamo=True, verbose=False
            )
        written.model.metadata_props["foveate"] = json.dumps(card)
        written.save(file, external_data=False)
    except Exception as error:
        raise TaskError(f"torch.onnx can't write this model: {_reason(error)}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(value) for value in session.run(None, {name: images.numpy()})]


def _write_tensors(model: nn.Module, card: dict, file: str, path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    save_file(state, file, {"format": "pt", "foveate": json.dumps(card)})
    written = load_file(file)
    if written.keys() != state.keys() or not all(torch.equal(written[key], state[key]) for key in state):
        raise TaskError(f"{path}: what was written is not what was to be; the disk may be failing")
