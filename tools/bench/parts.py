"""Where the time of a pass goes: the least time of each of its operators over some runs, by what they do."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...tasks.cost import train_once

# Of an operator's name, what says what it does; the first that fits. What fits none passes over its tensors.
KINDS = {
    "products": ("linear", "addmm", "::mm", "conv", "foveate::depthwise"),
    "attention": ("foveate::", "scaled_dot_product", "matmul", "bmm", "softmax"),
    "norms": ("norm",),
}
PASSES = "passes"


class _Stopwatch(TorchDispatchMode):
    """The operators that torch runs inside of it, in their order, and how many seconds each took."""

    def __init__(self):
        super().__init__()
        self.operators: list[tuple[str, float]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - start
        if not func.is_view:
            self.operators.append((func.name(), seconds))
        return out


def kind_of(operator: str) -> str:
    """Return what an operator of this name does: a name of `KINDS`, or that it passes over its tensors."""
    return next((kind for kind, parts in KINDS.items() if any(part in operator for part in parts)), PASSES)


def least_times(model: nn.Module, images: Tensor, runs: int = 10, train: bool = False) -> dict[str, float]:
    """Return the seconds of a pass on a CPU, and those of its operators by `kind_of`.

    Of each operator it is the least time over the runs, which other programs disturbed least; so is the whole, ``all``,
    of runs that nobody watches. ``between`` is what the operators don't account for: Python, views, dispatch.

    Args:
        model: In evaluation mode, or in training mode if gradients are wanted.
        images: What it is called with.
        runs: How many.
        train: Whether the pass goes on to the gradients of all parameters, which are left at none.
    """

    def run() -> None:
        train_once(model, images) if train else model(images)

    with torch.inference_mode(not train):
        whole, watched = [], []
        for _ in range(runs):
            model.zero_grad()
            whole.append(_seconds(run))
        for _ in range(runs):
            model.zero_grad()
            with _Stopwatch() as stopwatch:
                run()
            watched.append(stopwatch.operators)
    model.zero_grad()
    parts = dict.fromkeys((*KINDS, PASSES), 0.0)
    for same in zip(*watched, strict=True):
        parts[kind_of(same[0][0])] += min(taken for _, taken in same)
    return {"all": min(whole), **parts, "between": min(whole) - sum(parts.values())}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
