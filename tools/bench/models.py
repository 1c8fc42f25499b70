"""Whole models against peers: inference, what it costs beyond the layers' products, training, precision, compilers."""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

from ...tasks.cost import count_macs, peak_memory, train_once
from ...zoo.backbone import check_name
from ...zoo.maps import cfg_of
from ...zoo.weights import table
from ..timing import QUIET, sample_calmly
from .floor import Floor
from .parts import least_times

QUICK_SECONDS = 100  # after which no round begins; what is under way may take some more


class Case(NamedTuple):
    """What models are called with."""

    batch: int
    size: tuple[int, int]
    device: str
    dtype: torch.dtype


def measure(args: argparse.Namespace) -> list[dict]:
    for name in (*args.models, *args.peers):
        check_name(name)
    sizes = args.sizes or [(args.size, args.size)]
    cases = [
        Case(batch, size, args.device, getattr(torch, args.dtype))
        for size in sizes
        for batch in args.batches or [args.batch]
    ]
    extras = () if args.quick else args.also
    rounds = min(args.rounds, 3) if args.quick else args.rounds
    deadline = time.monotonic() + QUICK_SECONDS if args.quick else None
    rows = [row for case in cases for row in bench_models(args.models, args.peers, case, rounds, extras, deadline)]
    plot(rows, args.output / "models.png")
    return rows


def bench_models(
    names: Sequence[str],
    peers: Sequence[str],
    case: Case,
    rounds: int,
    extras: Sequence[str] = (),
    deadline: float | None = None,
) -> list[dict]:
    """Time models and their peers in turn; ratios are to the first peer.

    What can be re-parameterised for inference is, before it is timed and its multiply-adds are counted. The same matrix
    product runs beside every call, and what a busy moment disturbed is measured again: ``machine moved`` is what is
    left, as `timing.sample_calmly` says.

    Args:
        names: Models.
        peers: Models to compare with; the first is the measure.
        case: What they are called with.
        rounds: How many alternating calls.
        extras: Of `bench.EXTRAS`, what to measure too: forward time over that of the model's own linear and convolution
            operators; training steps (forward, backward, a step of SGD) beside the peer's; forward in bfloat16, by
            torch.compile and with inductor's freezing of weights beside that of the model, and beside the peer's; peak
            memory of inference in MB; milliseconds for one image; the least milliseconds by `parts.KINDS`, on a CPU.
            Floor, memory and parts are of a training step too if both are asked for.
        deadline: As in `timing.sample`.

    Returns:
        A row for each model. ``MACs/s times PEER`` is of multiply-adds per second: what the machine gets done, whatever
        the model's size. ``spread`` is the middle half of the samples, over their median.
    """
    every = list(dict.fromkeys((*names, *peers)))
    models = {name: _prepare(name, case) for name in every}
    images = torch.randn(case.batch, 3, *case.size, device=case.device, dtype=case.dtype)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, model in models.items():
        print(f"{name}: getting ready ...", file=sys.stderr, flush=True)  # compilers take minutes
        calls |= {(name, what): call for what, call in _inference(model, images, extras)}
    with torch.inference_mode():
        samples, moved = sample_calmly(calls, rounds, case.device, deadline)
    trainees = {}
    if "train" in extras:
        trainees = {name: _prepare(name, case, train=True) for name in every}
        steps = {(name, what): call for name in every for what, call in _training(trainees[name], images, extras)}
        trained, also = sample_calmly(steps, rounds, case.device, deadline)
        samples, moved = samples | trained, max(moved, also)
    if moved > QUIET:
        print(
            f"the machine was not quiet: beside what was measured the same matrix product took up to {moved:.0%} "
            "longer; ratios of this run say little",
            file=sys.stderr,
        )
    seconds = {key: statistics.median(times) for key, times in samples.items()}
    shape = (3, *case.size)
    macs = {name: count_macs(copy.deepcopy(model).to("meta").float(), shape) for name, model in models.items()}
    return [
        _row(name, peers[0], case, models[name], seconds, macs)
        | {"spread": f"{_spread(samples[name, 'forward']):.0%}", "machine moved": f"{moved:.0%}"}
        | _beside(name, peers[0], case, seconds, extras)
        | (_parts(models[name], trainees.get(name), images) if "parts" in extras and case.device == "cpu" else {})
        for name in every
    ]


def _prepare(name: str, case: Case, train: bool = False) -> nn.Module:
    fixed = {"img_size": case.size} if cfg_of(name).fixed_input_size else {}
    model = timm.create_model(name, **fixed).to(case.device, case.dtype)
    return model.train() if train else reparameterize_model(model.eval(), inplace=True)


def _inference(model: nn.Module, images: Tensor, extras: Sequence[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "forward", lambda: model(images)
    if "floor" in extras:
        yield "floor", Floor(model, images)
    if "latency" in extras:
        yield "latency", lambda one=images[:1]: model(one)
    if "bfloat16" in extras:
        half, halves = copy.deepcopy(model).bfloat16(), images.bfloat16()
        yield "bfloat16", lambda: half(halves)
    for what in ("compile", "freeze"):
        if what in extras:
            yield what, _compiled(copy.deepcopy(model), images, freezing=what == "freeze")


def _compiled(model: nn.Module, images: Tensor, freezing: bool) -> Callable[[], object]:
    from torch._inductor import config

    compiled = torch.compile(model)
    with config.patch(freezing=freezing), torch.inference_mode():
        compiled(images)
    return lambda: compiled(images)


def _training(model: nn.Module, images: Tensor, extras: Sequence[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        train_once(model, images)
        optimizer.step()
        optimizer.zero_grad()

    yield "train", step
    if "floor" in extras:
        yield "training floor", Floor(model, images, train=True)


def _row(
    name: str, peer: str, case: Case, model: nn.Module, seconds: dict[tuple[str, str], float], macs: dict[str, float]
) -> dict:
    ratio = seconds[peer, "forward"] / seconds[name, "forward"]
    return {
        "model": name,
        "batch": case.batch,
        "size": case.size[0] if case.size[0] == case.size[1] else f"{case.size[0]}x{case.size[1]}",
        "M parameters": round(sum(p.numel() for p in model.parameters()) / 1e6, 1),
        "GMACs": round(macs[name] / 1e9, 3),
        "images/s": round(case.batch / seconds[name, "forward"], 2),
        f"times {peer}": round(ratio, 3),
        f"MACs/s times {peer}": round(ratio * macs[name] / macs[peer], 3),
    }


def _beside(
    name: str, peer: str, case: Case, seconds: dict[tuple[str, str], float], extras: Sequence[str]
) -> dict[str, float]:
    """Return the cells of what was measured beside inference."""
    forward, cells = seconds[name, "forward"], {}
    if "floor" in extras:
        cells["over floor"] = round(forward / seconds[name, "floor"], 3)
    if "train" in extras:
        cells[f"training steps times {peer}"] = round(seconds[peer, "train"] / seconds[name, "train"], 3)
        cells["training step over forward"] = round(seconds[name, "train"] / forward, 2)
        if "floor" in extras:
            cells["training step over floor"] = round(seconds[name, "train"] / seconds[name, "training floor"], 3)
    for what in ("bfloat16", "compile", "freeze"):
        if what in extras:
            cells[f"{what} times forward"] = round(forward / seconds[name, what], 3)
            cells[f"{what} times {peer}'s"] = round(seconds[peer, what] / seconds[name, what], 3)
    if "memory" in extras:
        fixed = {"img_size": case.size} if cfg_of(name).fixed_input_size else {}
        cells["peak MB"] = round(peak_memory(name, *case, **fixed) / 2**20)
        if "train" in extras:
            cells["training step's peak MB"] = round(peak_memory(name, *case, train=True, **fixed) / 2**20)
    if "latency" in extras:
        cells["ms for one image"] = round(seconds[name, "latency"] * 1e3, 2)
    return cells


def _parts(model: nn.Module, trainee: nn.Module | None, images: Tensor) -> dict[str, float]:
    cells = _least_ms(least_times(model, images), "least ms")
    if trainee is not None:
        cells |= _least_ms(least_times(trainee, images, train=True), "training, least ms")
    return cells


def _least_ms(seconds: dict[str, float], of: str) -> dict[str, float]:
    return {f"{part}, {of}": round(least * 1e3, 1) for part, least in seconds.items()}


def _spread(times: list[float]) -> float:
    if len(times) < 2:
        return 0.0
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return (third - first) / statistics.median(times)


def plot(rows: list[dict], path: Path) -> None:
    """Draw speed against the authors' accuracy, and if there are several sizes time and memory against these."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["model"] for row in rows))
    pixels = {row["size"]: _pixels(row["size"]) for row in rows}
    panels = ["ms an image", "peak MB"] if len(pixels) > 1 else ["top-1"]
    panels = [panel for panel in panels if panel != "peak MB" or panel in rows[0]]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4), layout="constrained", squeeze=False)
    for panel, axis in zip(panels, axes[0], strict=True):
        for name in names:
            mine = [row for row in rows if row["model"] == name and row["batch"] == rows[0]["batch"]]
            if panel == "top-1":
                if (accuracy := stated_accuracy(name)) is not None:
                    axis.plot(mine[0]["images/s"], accuracy, "o")
                    axis.annotate(name, (mine[0]["images/s"], accuracy), fontsize=7)
                continue
            values = [1e3 / row["images/s"] if panel == "ms an image" else row[panel] for row in mine]
            axis.plot([pixels[row["size"]] for row in mine], values, marker="o", label=name)
        if panel == "top-1":
            axis.set(xlabel="images/s", ylabel="ImageNet-1k top-1, the authors'")
        else:
            axis.set(xscale="log", yscale="log", xlabel="pixels", ylabel=panel)
            axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _pixels(size: int | str) -> int:
    height, _, width = str(size).partition("x")
    return int(height) * int(width or height)


def stated_accuracy(name: str) -> float | None:
    """Return the top-1 accuracy that the authors state of a model's default weights, if it is of our table."""
    tag = cfg_of(name).tag
    weights = table().get(f"{name}.{tag}") if tag else None
    return weights.stated.get("top-1") if weights else None
