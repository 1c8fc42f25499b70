"""Writing a model's file: traced once, written, read again, run and compared, and only then put in place."""

import contextlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.backends import Graph, exporting_to
from ...zoo.library_errors import cause_of, run_fault
from .. import TaskError
from ..checkpoints import write_together, write_whole
from .check import LOOSEST, accepted, as_list, check_inputs, differences
from .modules import output_names
from .onnx_file import OPSETS, run_onnx, write_onnx
from .program import others, run_program, symbolic, trace, write_program

FORMATS = {".onnx": "ONNX", ".pt2": "torch.export", ".safetensors": "safetensors"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# What protocol buffers can hold; the weights of larger models lie in a file beside.
_LARGEST_ONNX = 2 * 10**9


def _quiet(line: str) -> None:
    pass


@dataclass(frozen=True)
class Options:
    """How a model is exported.

    Attributes:
        dynamic_batch: Whether the file takes any number of images at once.
        dynamic_size: Whether it takes images of any height and width.
        opset: Of ONNX's operators, 17 or later.
        grid_sample: Whether points of maps are read by GridSample, which some runtimes compute wrongly, not by gathers.
        tolerance: Greatest difference from the model that is accepted, in standard deviations of an output; of outputs
            whose own rounding is greater, see `check.accepted`.
        external_from: Bytes of weights from which on an ONNX file has them in a file beside, ``NAME.onnx.data``.
        say: Takes lines about what is done.
        called: What messages call the file, if not by its path.
    """

    dynamic_batch: bool = False
    dynamic_size: bool = False
    opset: int = 18
    grid_sample: bool = False
    tolerance: float = 1e-5
    external_from: int = _LARGEST_ONNX
    say: Callable[[str], None] = _quiet
    called: str = ""


def check_exportable(path: str | Path, options: Options | None = None) -> None:
    """Raise a TaskError if ``path`` is of no known format, its packages are missing, or options don't suit it."""
    options, suffix = options or Options(), Path(path).suffix
    if suffix not in FORMATS:
        known = ", ".join(f"{ending} ({name})" for ending, name in FORMATS.items())
        raise TaskError(f"{path}: the ending says the format, which must be {known}")
    if suffix != ".onnx":
        return
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise TaskError(f"ONNX needs the package {', '.join(missing)}: pip install 'foveate[export]'")
    if options.opset not in OPSETS:
        raise TaskError(f"--opset is {options.opset}, but must be {OPSETS[0]} to {OPSETS[-1]}")


def export_model(
    model: nn.Module,
    example: Tensor,
    path: str | Path,
    card: dict[str, Any],
    options: Options | None = None,
) -> dict[str, Any]:
    """Write a model as the ending of ``path`` says, and check what was written.

    Args:
        model: Maps images to a tensor or a tuple of them; in evaluation mode, on the CPU, in float32. See
            `whole_model` and `Pyramid`.
        example: Images ``[B, C, H, W]``; without dynamic options their shape is the only one that the file takes.
        path: File ending in ``.onnx``, ``.pt2`` or ``.safetensors``.
        card: What a user of the file needs to know, in plain types; kept in the file as JSON under ``foveate``.
        options: How it is exported.

    Returns:
        ``difference``, the greatest one in standard deviations of an output, 0 for safetensors; ``outputs``, their
        shapes by name; ``operators`` beyond torch's own, by the package that has them, which a .pt2 needs where it is
        used; ``files``, what was written; ``seconds`` of each step.

    Raises:
        TaskError: If the model can't be exported, or the file's outputs differ by more than the tolerance.
    """
    path, options = Path(path), options or Options()
    check_exportable(path, options)
    facts: dict[str, Any] = {"difference": 0.0, "outputs": {}, "operators": [], "files": [path], "seconds": {}}
    if path.suffix == ".safetensors":
        write_whole(path, lambda file: _write_tensors(model, card, file, path))
        return facts

    def timed(step: str, what: Callable[[], Any]) -> Any:
        options.say(f"{step} ...")
        start = time.perf_counter()
        result = what()
        facts["seconds"][step] = time.perf_counter() - start
        return result

    checks = timed("running the model", lambda: _answers(model, example, options))
    expected = checks[0][1]
    names = output_names(model, len(expected))
    facts["outputs"] = {name: list(value.shape) for name, value in zip(names, expected, strict=True)}
    is_onnx = path.suffix == ".onnx"
    with exporting_to(Graph(is_onnx, options.grid_sample)), symbolic(options.dynamic_size):
        program = timed("tracing it", lambda: trace(model, example, options.dynamic_batch, options.dynamic_size))
    facts["operators"] = [] if is_onnx else others(program)

    def write(folder: Path) -> list[Path]:
        file = folder / path.name
        if is_onnx:
            limits = options.opset, options.external_from
            with symbolic(options.dynamic_size), _of_any_size(model, options):
                files = timed("writing ONNX", lambda: write_onnx(program, names, card, file, *limits))
        else:
            files = timed("writing the program", lambda: write_program(program, card, file))
        called = options.called or str(path)
        run = timed("reading it", lambda: _runner(file, called))
        facts["difference"] = timed("comparing", lambda: _compared(model, run, checks, names, called, options))
        return files

    facts["files"] = write_together(path.parent, path.name, write)
    return facts


@contextlib.contextmanager
def _of_any_size(model: nn.Module, options: Options) -> Iterator[None]:
    """Say of what can't be written that it may be for one size."""
    try:
        yield
    except TaskError as error:
        if not options.dynamic_size:
            raise
        what = type(getattr(model, "model", model)).__name__
        raise TaskError(
            f"{what} can't be exported for images of any size: {error}; export it for one, without --dynamic-size"
        ) from error


def _runner(file: Path, called: str) -> Callable[[Tensor], list[Tensor]]:
    """Return what runs a file; say of one that can't be read what it is called."""
    try:
        return run_onnx(file) if file.suffix == ".onnx" else run_program(file)
    except Exception as error:
        raise TaskError(f"{called}: not written: the file can't be read: {run_fault(error)}") from error


def _answers(model: nn.Module, example: Tensor, options: Options) -> list[tuple[Tensor, list[Tensor]]]:
    """Return images to try a file on, with what the model answers.

    Raises:
        TaskError: If the model itself doesn't take the images, or none of other sizes, and the file is to take them.
    """
    own = getattr(model, "check_inputs", None)
    first, *others = own() if own else check_inputs(example, options.dynamic_batch, options.dynamic_size)
    what = type(getattr(model, "model", model)).__name__

    def answer(images: Tensor) -> tuple[Tensor, list[Tensor]]:
        try:
            with torch.no_grad():
                output = model(images)
        except Exception as error:
            # Published code refuses a size by errors of any type.
            reason = cause_of(error)
            if options.dynamic_size and images is not first:
                raise TaskError(
                    f"{what} can't be exported for images of any size: it takes one size itself ({reason}); "
                    "export it for one, without --dynamic-size"
                ) from error
            raise TaskError(f"{what} does not take images of {_shape(images)}: {reason}") from error
        return images, as_list(output)

    return [answer(images) for images in (first, *others)]


def _shape(images: Tensor) -> str:
    return "x".join(map(str, images.shape))


def _compared(
    model: nn.Module,
    run: Callable[[Tensor], list[Tensor]],
    checks: list[tuple[Tensor, list[Tensor]]],
    names: list[str],
    called: str,
    options: Options,
) -> float:
    """Return the greatest difference of what a file computes; raise if it is above the tolerance."""
    greatest = 0.0
    for images, expected in checks:
        shape = _shape(images)
        # Code that takes another way for some sizes is followed on one of them.
        advice = "; export it for one size, without --dynamic-size" if options.dynamic_size else ""
        try:
            got = run(images)
        except Exception as error:
            what = type(getattr(model, "model", model)).__name__
            raise TaskError(
                f"{called}: not written: {what}'s file can't be run on images of {shape}: {run_fault(error)}{advice}"
            ) from error
        limits, apart = [options.tolerance] * len(names), differences(model, got, expected, options.tolerance)
        if not max(apart) <= options.tolerance:
            limits = accepted(model, images, expected, options.tolerance)
            apart = differences(model, got, expected, LOOSEST * options.tolerance)
        for name, difference, limit in zip(names, apart, limits, strict=True):
            if not difference <= limit:
                raise TaskError(
                    f"{called}: not written: its {name} differs from the model's by {difference:.1e} of its standard "
                    f"deviation, more than {limit:.1e} (--tolerance {options.tolerance:g}, or what its own rounding "
                    f"explains), on images of {shape}{advice}"
                )
            greatest = max(greatest, difference)
    return greatest


def _write_tensors(model: nn.Module, card: dict, file: str, path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    save_file(state, file, {"format": "pt", "foveate": json.dumps(card)})
    written = load_file(file)
    if written.keys() != state.keys() or not all(torch.equal(written[key], state[key]) for key in state):
        raise TaskError(f"{path}: what was written is not what was to be; the disk may be failing")
