"""Times that can be compared: calls that alternate in one process, medians, and the machine that they are of."""

import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

SAMPLE_SECONDS = 0.02
# The time of one and the same product may move by so much on a quiet machine.
QUIET = 0.05
_PRODUCT = 768  # its matrices' side


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

    stopwatch = _Stopwatch(calls, device, clock)
    times = {name: [] for name in calls}
    for round_ in range(rounds):
        if round_ and deadline is not None and time.monotonic() > deadline:
            break
        for name in calls:
            times[name].append(stopwatch(name))
    return times


def sample_calmly(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    device: str,
    deadline: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, list[float]], float]:
    """Do what `sample` does, but leave out the moments in which the machine was busy with something else.

    One and the same matrix product is timed before and after each call. A sample beside a product that took more than
    ``QUIET`` longer than the quick ones do is left out, and there are up to three times as many rounds until each
    call has ``rounds`` calm samples. What hasn't by then keeps those beside the quickest products.

    Returns:
        The samples, and by how much the slowest product beside one of them lay above the quick ones.
    """
    product = torch.randn(_PRODUCT, _PRODUCT, device=device)
    stopwatch = _Stopwatch({"": lambda: product @ product, **calls}, device, clock)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}  # a product's seconds, and the call's
    products = [stopwatch("")]
    for round_ in tqdm(range(3 * rounds), "rounds at most", leave=False, disable=None):
        if round_ and deadline is not None and time.monotonic() > deadline:
            break
        for name in calls:
            seconds = stopwatch(name)
            products.append(stopwatch(""))
            samples[name].append((max(products[-2:]), seconds))
        limit = (1 + QUIET) * _quick(products)
        if all(sum(beside <= limit for beside, _ in each) >= rounds for each in samples.values()):
            break
    calmest = {name: sorted(each)[:rounds] for name, each in samples.items()}
    slowest = max(beside for each in calmest.values() for beside, _ in each)
    return {name: [seconds for _, seconds in each] for name, each in calmest.items()}, slowest / _quick(products) - 1


def _quick(times: list[float]) -> float:
    """Return what the quickest tenth stays below: the quickest of all may be a moment of a faster clock."""
    return statistics.quantiles([*times, *times], n=10, method="inclusive")[0]


class _Stopwatch:
    """Seconds of calls, each called once before, and short ones repeated."""

    def __init__(self, calls: dict[str, Callable[[], object]], device: str, clock: Callable[[], float]):
        self.calls, self.device, self.clock = calls, device, clock
        for call in calls.values():  # compile, plan, warm up
            self._seconds(call)
        self.numbers = {name: max(1, round(SAMPLE_SECONDS / self._seconds(call))) for name, call in calls.items()}

    def __call__(self, name: str) -> float:
        self._seconds(self.calls[name])
        return self._seconds(self.calls[name], self.numbers[name])

    def _seconds(self, call: Callable[[], object], number: int = 1) -> float:
        start = self.clock()
        for _ in range(number):
            call()
        if self.device != "cpu":
            torch.accelerator.synchronize()
        return (self.clock() - start) / number


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
