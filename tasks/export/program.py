"""torch.export's files (.pt2): the same bytes for the same model, and nothing in them to execute."""

import contextlib
import copy
import importlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ...zoo.library_errors import cause_of, fixed_size
from .. import TaskError
from .check import as_list
from .metadata import plain_metadata
from .sizes import restate_sizes

# Of a node, what says where in the source it came from.
_ORIGINS = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


@contextlib.contextmanager
def symbolic(dynamic_size: bool) -> Iterator[None]:
    """Where sizes are any, let torch ask of no size whether it is 0 or 1: sympy is slow at it, and most of tracing."""
    import torch.fx.experimental._config as config

    before, config.backed_size_oblivious = config.backed_size_oblivious, dynamic_size or config.backed_size_oblivious
    try:
        yield
    finally:
        config.backed_size_oblivious = before


def trace(model: nn.Module, example: Tensor, dynamic_batch: bool, dynamic_size: bool) -> torch.export.ExportedProgram:
    """Follow a model with ``example``; with dynamic sizes, whatever the number of images, their height and width.

    Raises:
        TaskError: If it can't be followed.
    """
    shapes, inputs = None, example
    axes = {}
    if dynamic_batch:
        axes[0] = torch.export.Dim.DYNAMIC
        # One image would be taken for a constant of 1.
        inputs = example if example.shape[0] > 1 else torch.cat([example, example])
    if dynamic_size:
        axes |= dict.fromkeys(getattr(model, "size_axes", (2, 3)), torch.export.Dim.DYNAMIC)
    if axes:
        shapes = (axes,)
    traced = copy.deepcopy(model)
    if dynamic_size:
        restate_sizes(traced)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(traced, (inputs,), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        what = type(getattr(model, "model", model)).__name__
        if dynamic_size:
            reason = fixed_size(error) or cause_of(error)
            raise TaskError(
                f"{what} can't be exported for images of any size: {reason}; export it for one, without --dynamic-size"
            ) from error
        advice = "; it may go without --dynamic-batch" if dynamic_batch else ""
        raise TaskError(f"torch.export can't follow {what}: {cause_of(error)}{advice}") from error


# Of namespaces of operators, what has to be imported for them where it is called otherwise.
_MODULES = {"quantized_decomposed": "torch.ao.quantization.fx._decomposed"}


def others(program: torch.export.ExportedProgram) -> list[str]:
    """Return what has a program's operators, other than torch itself: modules to import before it is loaded."""
    spaces = {
        str(node.target).split(".")[0]
        for node in program.graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    }
    return sorted(_MODULES.get(space, space) for space in spaces - {"aten", "prims"})


def write_program(program: torch.export.ExportedProgram, card: dict, file: Path) -> list[Path]:
    """Write a program and its card, without what tells where it was made."""
    for node in program.graph.nodes:
        for key in _ORIGINS:
            node.meta.pop(key, None)
    program._example_inputs = None
    # Of a file by name, the archive would hold the name.
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=plain_metadata(card))
    file.write_bytes(buffer.getbuffer())
    return [file]


def read_program(file: Path) -> nn.Module:
    """Read a program as a module."""
    # torch's own, but registered only so.
    importlib.import_module(_MODULES["quantized_decomposed"])
    return torch.export.load(file).module()


def run_program(file: Path) -> Callable[[Tensor], list[Tensor]]:
    """Read a program; return what maps images to its outputs."""
    module = read_program(file)

    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return as_list(module(images))

    return run
