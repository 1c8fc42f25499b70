"""How an operator chooses among its backends: a table of them, and a request obeyed or refused with the reason.

An operator's table stands in its own file, in order of preference, and a new backend is one row of it.
"""

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

_logger = logging.getLogger(__name__)

_HAS_FLAG = hasattr(torch.compiler, "_is_exporting_flag")


def _none(problem: Any) -> str | None:
    return None


class Backend(NamedTuple):
    """One way to compute an operator. A problem is a checked call, as the operator's backends take it."""

    run: Any  # takes the problem; where operators share a table, a function for each
    obstacle: Callable[[Any], str | None] = _none  # why it cannot run, or None
    drawback: Callable[[Any], str | None] = _none  # why it is not chosen unless asked for, or None


def choose(operator: str, backends: Mapping[str, Backend], problem: Any, requested: str | None) -> str:
    """Return the requested backend if it can run; without a request, the first that can and has no drawback.

    Raises:
        ValueError: If there is no such backend, or it cannot run; the message says why.
    """
    if requested is not None:
        check_name(operator, backends, requested)
        if reason := backends[requested].obstacle(problem):
            raise ValueError(f"{operator}'s backend {requested!r} cannot run here: {reason}")
        return requested
    for name, backend in backends.items():
        reason = backend.obstacle(problem) or backend.drawback(problem)
        if reason is None:
            return name
        if not torch.compiler.is_compiling():  # some versions of torch can't trace a logger
            _logger.debug("%s: not %s: %s", operator, name, reason)
    raise AssertionError(f"one backend of {operator} runs everywhere")


def report(operator: str, backends: Mapping[str, Backend], problem: Any, requested: str | None) -> dict[str, str]:
    """Return every backend in order of preference, with ``"chosen"``, ``"can run"`` or the reason against it."""
    preferred = choose(operator, backends, problem, requested)
    return {name: backend.obstacle(problem) or "can run" for name, backend in backends.items()} | {preferred: "chosen"}


def check_name(operator: str, backends: Mapping[str, Backend], name: str) -> None:
    """Raise a ValueError if the operator has no such backend."""
    if name not in backends:
        raise ValueError(f"{operator} has no backend {name!r}; it has {', '.join(map(repr, backends))}")


def is_exporting() -> bool:
    """Return whether torch.export follows the model."""
    # The public function says so of torch.compile too in torch 2.9.
    return torch.compiler._is_exporting_flag if _HAS_FLAG else torch.compiler.is_exporting()


def exporting() -> bool:
    """Return whether a graph is made for other runtimes, which must consist of torch's own operators."""
    return is_exporting() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


class Graph(NamedTuple):
    """What a graph that is made for other runtimes may consist of."""

    onnx: bool = False  # whether it becomes ONNX, which has operators that torch lacks
    grid_sample: bool = False  # whether points of maps are read by GridSample, and not by gathers


_PLAIN = Graph()
_graph: contextvars.ContextVar[Graph] = contextvars.ContextVar("graph", default=_PLAIN)


@contextlib.contextmanager
def exporting_to(graph: Graph) -> Iterator[None]:
    """Say what the graphs that are made inside of the context may consist of."""
    token = _graph.set(graph)
    try:
        yield
    finally:
        _graph.reset(token)


def graph() -> Graph:
    """Return what the graph that is being made may consist of."""
    return _graph.get()


def export_obstacle() -> str | None:
    """Return why an operator of ours cannot run while a graph is made for other runtimes, or None."""
    return "an exported graph must consist of torch's own operators" if exporting() else None


def in_forward_mode() -> bool:
    """Return whether derivatives are carried along by dual numbers (`torch.autograd.forward_ad`, `torch.func.jvp`)."""
    return forward_ad._current_level >= 0


@torch.compiler.assume_constant_result  # a compiler enters the transforms that it traces, and guards those around it
def is_transforming() -> bool:
    """Return whether `torch.func` transforms what is called, or derivatives are carried along."""
    return in_forward_mode() or torch._C._functorch.peek_interpreter_stack() is not None


@torch.compiler.assume_constant_result
def transform_obstacle() -> str | None:
    """Return why an operator of `torch.library` cannot run where `torch.func` differentiates, or None."""
    if not is_transforming():
        return None
    kinds = {interpreter.key() for interpreter in retrieve_all_functorch_interpreters()}
    # An operator of torch.library passes a dual number's value on, and drops its derivative without a word.
    if in_forward_mode() or kinds & {TransformType.Grad, TransformType.Jvp}:
        return "torch.func and dual numbers differentiate no operator of torch.library"
    return None


def function_obstacle() -> str | None:
    """Return why a `torch.autograd.Function`, whose gradients are ours, cannot run, whatever it is given, or None."""
    if torch.compiler.is_compiling():  # asked first: what follows can't be traced
        return "a compiler chooses itself"
    if reason := export_obstacle():
        return reason
    return "torch.func and dual numbers take torch's plain operators" if is_transforming() else None


def channels_come_last(x: Tensor) -> bool:
    """Return whether a map ``[B, C, H, W]`` lies in memory as `torch.channels_last` says, and not as it is written.

    Asked of the strides, which `torch.vmap` answers.
    """
    channels, height, width = x.shape[1:]
    if channels == 1 or height * width == 1:
        return False
    return x.stride() == (channels * height * width, 1, channels * width, channels)


def default_scale(query: Tensor) -> float:
    """Return the factor on the scores of queries ``[..., dim]``, ``dim ** -0.5``; scores over no channels are all 0."""
    return query.shape[-1] ** -0.5 if query.shape[-1] else 1.0


def contiguous_rows(x: Tensor) -> Tensor:
    """Return ``x``, or a copy of it, whose last axis lies without gaps."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
