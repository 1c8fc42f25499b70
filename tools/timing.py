"""Times that can be compared: calls that alternate in one process, medians, and the machine that they are of."""

import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

SAMPLE_SECONDS = 0.02


def alternate(
    calls: dict[str, Callable[[], object]], rounds: int, device: str, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Return the median seconds of a call of each, as `sample` measures them."""
    return {name: statistics.median(samples) for name, samples in sample(calls, rounds, device, clock=clock).items()}


def sample(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    device: str,
    deadline: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Call everything in turn, ``rounds`` times over, and return the seconds of a call of each, round by round.

    Whatever is timed is called once before, so that it finds its own data in the caches, and a short call is repeated
    until it has taken ``SAMPLE_SECONDS``, as timeit does. No round begins after the ``deadline``, a time of
    `time.monotonic`, but the first. The ``clock`` may be that of the process, where all is done in one thread.
    """

    def seconds(call: Callable[[], object], number: int = 1) -> float:
        start = clock()
        for _ in range(number):
            call()
        if device != "cpu":
            torch.accelerator.synchronize()
        return (clock() - start) / number

    for call in calls.values():  # compile, plan, warm up
        seconds(call)
    numbers = {name: max(1, round(SAMPLE_SECONDS / seconds(call))) for name, call in calls.items()}
    times = {name: [] for name in calls}
    for round_ in range(rounds):
        if round_ and deadline is not None and time.monotonic() > deadline:
            break
        for name, call in calls.items():
            seconds(call)
            times[name].append(seconds(call, numbers[name]))
    return times


def run_pass(function: Callable[..., Tensor], inputs: list[Tensor], backward: bool) -> None:
    """Call a function as inference does, or with the gradients of all its inputs."""
    if backward:
        torch.autograd.grad(function(*inputs).sum(), inputs)
    else:
        with torch.inference_mode():
            function(*inputs)


def machine(device: str) -> str:
    """Describe what the numbers were measured on."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
