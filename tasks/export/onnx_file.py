"""ONNX files: written by torch.onnx, stripped of where they were made, checked, run by onnxruntime."""

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...zoo.library_errors import cause_of, untranslated
from .. import TaskError
from ..extras import require
from .metadata import plain_metadata

OPSETS = range(17, 24)
# Bytes that a constant may have whatever it is folded from.
_SMALL = 2**15
_NAMES = ("torch.onnx", "onnxscript", "onnx_ir")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _NAMES]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _in_linear_time() -> Iterator[None]:
    """Leave out the rules of onnxscript that look for pairs of nodes (two Slices that are a Split).

    For each it goes through the whole graph at every node: of thousands of nodes that is most of an export.
    """
    rewriter = require("onnxscript.rewriter")
    name = "_DEFAULT_REWRITE_RULES"
    before = getattr(rewriter, name, None)
    try:
        if before is not None:
            patterns = [getattr(rule, "_target_pattern", None) for rule in before]
            pairs = [not getattr(pattern, "has_single_output_node", True) for pattern in patterns]
            setattr(rewriter, name, tuple(rule for rule, pair in zip(before, pairs, strict=True) if not pair))
        yield
    finally:
        if before is not None:
            setattr(rewriter, name, before)


def _may_fold(node: Any) -> bool | None:
    """Leave to the runtime what would be a larger table in the file than what it is computed from; else None.

    Such are the biases of a map's positions, gathered from a few or made by an MLP of their distances.
    """
    (output, *more), inputs = node.outputs, [value.const_value for value in node.inputs if value is not None]
    if more or output.shape is None or output.dtype is None or not output.shape.is_static():
        return None
    size = math.prod(output.shape.numpy()) * output.dtype.itemsize
    return False if size > max(_SMALL, sum(value.nbytes for value in inputs)) else None


def write_onnx(
    program: torch.export.ExportedProgram,
    names: Sequence[str],
    card: dict,
    file: Path,
    opset: int,
    external_from: int,
) -> list[Path]:
    """Write a program as ONNX; return the file, and the one of its weights if there is one.

    Raises:
        TaskError: If it can't be.
    """
    try:
        # With gradients, torch 2.14 can't decompose a program whose parameters are reshaped.
        with _silent(), _in_linear_time(), torch.no_grad():
            written = torch.onnx.export(
                program,
                (),
                input_names=["images"],
                output_names=list(names),
                opset_version=max(opset, 18),
                dynamo=True,
                verbose=False,
                custom_translation_table=_translations(opset),
                optimize=False,
            )
            require("onnxscript.optimizer").optimize_ir(written.model, should_fold=_may_fold)
    except Exception as error:
        reason = untranslated(error) or cause_of(error)
        raise TaskError(f"torch.onnx can't write this model: {reason}; .pt2 holds all that torch has") from error
    model = written.model
    if opset < 18:
        _lower(model)
    _strip(model)
    model.metadata_props.update(plain_metadata(card))
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    external = weights >= external_from
    written.save(str(file), external_data=external)
    beside = file.with_name(file.name + ".data")
    return [file, beside] if external else [file]


def _translations(opset: int) -> dict[Any, Callable]:
    """Return how operators of ours, and torch's GELU, are written in ONNX's."""
    from onnxscript import opset18 as op

    def suppress(boxes, scores, threshold: float):
        most = op.Constant(value_ints=[2**62])
        survivors = op.NonMaxSuppression(boxes, op.Unsqueeze(scores, [1]), most, threshold, -0.5)
        place = op.Gather(survivors, [0, 2], axis=1)
        ones = op.CastLike(op.Squeeze(op.Slice(op.Add(op.Mul(place, [0]), [1]), [0], [1], [1]), [1]), scores)
        return op.Greater(op.ScatterND(op.Mul(scores, 0.0), place, ones), 0.5)

    def gelu(x, approximate: str = "none"):
        if approximate == "tanh":
            inner = op.Mul(op.Add(x, op.Mul(op.Mul(op.Mul(x, x), x), 0.044715)), math.sqrt(2 / math.pi))
            return op.Mul(op.Mul(x, op.Add(op.Tanh(inner), 1.0)), 0.5)
        # In this order onnxruntime has an operator of its own for it, in torch's it hasn't.
        return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, math.sqrt(2))), 1.0)), 0.5)

    translations = {torch.ops.foveate.suppress.default: suppress}
    return translations if opset >= 20 else translations | {torch.ops.aten.gelu.default: gelu}


# What opset 18 can do and 17 can't; and the reductions, whose axes became an input.
_NEW_IN_18 = ("BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad", "Col2Im", "GroupNormalization")
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_DROPPED = {"Resize": ("antialias", "keep_aspect_ratio_policy"), "Split": ("num_outputs",)}


def _lower(model: Any) -> None:
    """Write a model of opset 18 in the operators of opset 17.

    Raises:
        TaskError: If it needs an operator that 17 lacks.
    """
    from onnx_ir import AttrInt64s

    for node in model.graph.all_nodes():
        kind = node.op_type
        atomic = node.attributes.get("reduction")
        newer = kind in _NEW_IN_18 or (atomic is not None and atomic.as_string() in ("max", "min"))
        if newer or (kind == "Pad" and len(node.inputs) > 3 and node.inputs[3] is not None):
            raise TaskError(f"opset 17 has no such {kind} as this model needs; --opset 18 has")
        if kind.startswith("Reduce") and kind[6:] in _REDUCTIONS and len(node.inputs) > 1:
            axes = node.inputs[1]
            if axes is not None:
                if axes.const_value is None:
                    raise TaskError(f"opset 17 has no {kind} with axes that are computed; --opset 18 has")
                node.attributes["axes"] = AttrInt64s("axes", axes.const_value.numpy().tolist())
            node.resize_inputs(1)
            node.attributes.pop("noop_with_empty_axes", None)
            if axes is not None and not axes.uses():
                model.graph.initializers.pop(axes.name, None)
        for name in _DROPPED.get(kind, ()):
            node.attributes.pop(name, None)
    model.graph.opset_imports[""] = 17


def _strip(model: Any) -> None:
    """Remove what tells where and how a graph was made."""
    graphs = [model.graph, *model.functions.values()]
    for graph in graphs:
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in (*graph.inputs, *graph.outputs):
            value.metadata_props.clear()
        for node in graph.all_nodes() if hasattr(graph, "all_nodes") else graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in getattr(graph, "initializers", {}).values():
            value.metadata_props.clear()


def open_session(file: Path, threads: int = 0) -> Any:
    """Return onnxruntime's session of a file on the CPU; 0 threads: as many as it likes.

    It prints nothing: errors are raised.
    """
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run_onnx(file: Path) -> Callable[[Tensor], list[Tensor]]:
    """Open a file by onnxruntime; return what maps images to its outputs."""
    session = open_session(file)
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(value) for value in session.run(None, {name: images.numpy()})]
