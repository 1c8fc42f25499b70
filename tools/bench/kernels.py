"""Neighborhood attention by every backend, fused and unfused, against FlexAttention and a gather of every window."""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ...kernels import na2d, na2d_av, na2d_qk, neighborhood_backends, unfused_neighborhood_backends
from ...kernels.neighborhood.reference import window_tables
from ...kernels.neighborhood.window import Axis, axis_ranges
from ...tasks.cost import memory_growth
from ...zoo.library_errors import first_line
from ..timing import alternate, run_pass

# Batch, height, width, heads, head dim, kernel size: NAT's first stage alone and batched, and larger maps.
SHAPES = (
    (1, 56, 56, 2, 32, 7),
    (4, 56, 56, 2, 32, 7),
    (1, 128, 128, 4, 32, 7),
    (1, 64, 64, 4, 64, 13),
)
# The same for GPUs, which small batches leave idle.
GPU_SHAPES = (
    (64, 56, 56, 2, 32, 7),
    (64, 14, 14, 8, 32, 7),
    (8, 128, 128, 4, 32, 7),
    (8, 64, 64, 4, 64, 13),
)
SIDES = (28, 56, 84, 112)
CUDNN = "cudnn (masked)"
# What `floor_of` measures.
FLOOR = ("exponentials", "turns")


def measure(args: argparse.Namespace) -> list[dict]:
    on_cpu = args.device == "cpu"
    dtype = getattr(torch, args.dtype)
    options = {"rounds": args.rounds, "device": args.device, "backward": args.backward, "dtype": dtype}
    shapes = SHAPES if on_cpu else GPU_SHAPES
    rows = bench_kernels(shapes, flex=not args.no_flex, **options)
    plain = bench_kernels(shapes[:1], flex=False, bias=False, **options)  # FlexAttention's columns stay as they are
    rows += [{name: row.get(name, "-") for name in rows[0]} for row in plain]
    sizes = [(1 if on_cpu else 64, side, side, 2, 32, 7) for side in SIDES]
    # A GPU's kernel of FlexAttention is compiled for minutes at so many sizes.
    sweep = bench_kernels(sizes, flex=on_cpu and not args.no_flex, **options)
    plot(sweep, args.output / "kernels.png", "Neighborhood attention, kernel 7, 2 heads of 32")
    return rows


def flex_attention_of(
    axes: tuple[Axis, Axis], rpb: Tensor | None, device: str, compiled: bool
) -> Callable[..., Tensor]:
    """Return FlexAttention on ``[B, H, W, heads, dim]`` with neighborhood windows and bias.

    Compiled it is the best that torch itself has; eager, with all scores in memory, it is NATTEN 0.21's path on CPUs.
    """
    height, width = (axis.length for axis in axes)
    kernel_size = axes[0].kernel_size
    first_rows, first_columns = (torch.from_numpy(axis_ranges(axis)[0]).to(device, torch.int32) for axis in axes)

    def visible(batch, head, query, key):
        row = key // width - first_rows[query // width]
        column = key % width - first_columns[query % width]
        return (row >= 0) & (row < kernel_size) & (column >= 0) & (column < kernel_size)

    def biased(score, batch, head, query, key):
        row = (key // width - query // width + kernel_size - 1).clamp(0, 2 * kernel_size - 2)
        column = (key % width - query % width + kernel_size - 1).clamp(0, 2 * kernel_size - 2)
        return score + rpb[head, row, column]

    tokens = height * width
    mask = create_block_mask(visible, None, None, tokens, tokens, device=device)
    # Every shape is compiled for itself, as if it were the only one.
    torch.compiler.reset()
    function = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def run(query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Tensor:  # the bias is in the scores' function
        flat = [x.flatten(1, 2).transpose(1, 2) for x in (query, key, value)]
        out = function(*flat, score_mod=None if rpb is None else biased, block_mask=mask)
        return out.transpose(1, 2).unflatten(1, (height, width))

    return run


def gather_of(axes: tuple[Axis, Axis], device: str) -> Callable[..., Tensor]:
    """Return the usual formulation in plain torch: copy every window, then softmax over it; its indices made once."""
    tokens, entries = (torch.from_numpy(table).to(device) for table in window_tables(axes))

    def run(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None = None) -> Tensor:
        spatial = query.shape[1:3]
        query, key, value = (x.flatten(1, 2) for x in (query, key, value))
        scores = torch.einsum("bnhd,bnkhd->bnhk", query * query.shape[-1] ** -0.5, key[:, tokens])
        if rpb is not None:
            scores = scores + rpb.flatten(1)[:, entries].transpose(0, 1).to(scores.dtype)
        out = torch.einsum("bnhk,bnkhd->bnhd", scores.softmax(-1), value[:, tokens])
        return out.unflatten(1, spatial)

    return run


def masked_attention_of(axes: tuple[Axis, Axis], like: Tensor, backends: Sequence[SDPBackend]) -> Callable[..., Tensor]:
    """Return torch's attention of all tokens to all under a mask of the windows, which is in memory; without bias."""
    tokens, _ = (torch.from_numpy(table).to(like.device) for table in window_tables(axes))
    mask = like.new_full((len(tokens), len(tokens)), -torch.inf).scatter_(1, tokens, 0.0)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        flat = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
        with sdpa_kernel(backends):
            out = F.scaled_dot_product_attention(*flat, attn_mask=mask)
        return out.transpose(1, 2).reshape(query.shape)

    return run


def bench_kernels(
    shapes: Sequence[tuple[int, ...]],
    rounds: int,
    device: str,
    flex: bool,
    backward: bool,
    dtype: torch.dtype,
    bias: bool = True,
) -> list[dict]:
    """Time one call of every path, and of its peers, at every shape, with relative position bias or without.

    Memory is what one call adds at its peak, its results included. FlexAttention has no gradient on CPUs. On a GPU the
    memory floor is the time of copying as many bytes as a call must read and write, and cuDNN is among the peers for
    half precision without bias. On a CPU the floor of a forward pass is `floor_of` beside the products of the pairs at
    the rate of a large matrix product.
    """
    matmul = matmul_rate(device, 15, dtype)
    copies = 0.0 if device == "cpu" else copy_rate(device, 15)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    flex = flex and not (backward and device == "cpu")
    rows = []
    for batch, height, width, heads, dim, kernel_size in shapes:
        query, key, value = torch.randn(3, batch, height, width, heads, dim, device=device, dtype=dtype).unbind()
        rpb = torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1, device=device) if bias else None
        has_natten = neighborhood_backends(query, key, value, kernel_size)["natten"] == "can run"  # without bias only
        functions = _ours(query, key, value, kernel_size, rpb)
        expected = _neighborhood(kernel_size, "reference", query, key, value, rpb)
        inputs = [x.requires_grad_(backward) for x in (query, key, value, rpb) if x is not None]
        axes = (Axis(height, kernel_size), Axis(width, kernel_size))
        peers = {"gather": gather_of(axes, device)}
        if flex:
            peers["flex (compiled)"] = flex_attention_of(axes, rpb, device, compiled=True)
            if batch * heads * (height * width) ** 2 <= 2**27:  # all scores, some times over
                peers["flex (eager)"] = flex_attention_of(axes, rpb, device, compiled=False)
        if device != "cpu" and not bias and dtype != torch.float32:
            peers |= _cudnn_of(axes, query, key, value)
        functions |= peers
        calls, memory = {}, {}
        for name, function in functions.items():
            calls[name] = partial(run_pass, function, inputs, backward)
            with torch.inference_mode():
                torch.testing.assert_close(function(*inputs), expected, atol=tolerance, rtol=tolerance)
            calls[name]()
            memory[name] = memory_growth(calls[name], device)
        on_cpu = device == "cpu" and not backward
        times = alternate(calls | (floor_of(query, kernel_size) if on_cpu else {}), rounds, device)
        beside = [times.pop(part) for part in FLOOR] if on_cpu else []
        flexes = ["flex (compiled)", "flex (eager)"] if flex else []
        shown = ["gather", *flexes, *(["natten"] if has_natten else []), *([CUDNN] if CUDNN in peers else [])]
        # Useful work: a query-key pair costs a multiply-add per channel, for the score and again for the value.
        useful = batch * height * width * heads * kernel_size**2 * dim * 4 * (3.5 if backward else 1)
        # Forward reads three maps and writes one; backward reads these four and a gradient, and writes three.
        moved = query.nbytes * (12 if backward else 4)
        for name, seconds in times.items():
            rate = useful / seconds / 1e9
            rows.append(
                {
                    "shape": f"{batch}x{height}x{width}x{heads}x{dim} k{kernel_size}",
                    "pass": "forward+backward" if backward else "forward",
                    "dtype": str(dtype).removeprefix("torch."),
                    "bias": "yes" if bias else "no",
                    "path": name,
                    "ms": round(seconds * 1e3, 3),
                    "useful GFLOP/s": round(rate, 1),
                    "of matmul": f"{rate / matmul:.0%}",
                    "peak MB": round(memory[name] / 2**20, 1),
                    **({} if device == "cpu" else {"over memory floor": round(seconds * copies / moved, 1)}),
                    **({"over floor": round(seconds / (sum(beside) + useful / matmul / 1e9), 2)} if on_cpu else {}),
                    **{f"times {peer}": round(times[peer] / seconds, 1) if peer in times else "-" for peer in shown},
                }
            )
    return rows


def _ours(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int, rpb: Tensor | None
) -> dict[str, Callable[..., Tensor]]:
    """Return what of ours can run, fused and unfused; FlexAttention is among the peers, compiled for a shape alone."""
    fused = neighborhood_backends(query, key, value, kernel_size, rpb=rpb)
    unfused = unfused_neighborhood_backends(query, key, kernel_size)
    can_run = ("chosen", "can run")
    functions = {
        name: partial(_neighborhood, kernel_size, name)
        for name, answer in fused.items()
        if answer in can_run and name not in ("reference", "flex")
    }
    return functions | {
        f"unfused, {name}": partial(_unfused, kernel_size, name)
        for name, answer in unfused.items()
        if answer in can_run and name != "reference"
    }


def _neighborhood(
    kernel_size: int, backend: str, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None = None
) -> Tensor:
    return na2d(query, key, value, kernel_size, rpb=rpb, backend=backend)


def _unfused(
    kernel_size: int, backend: str, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None = None
) -> Tensor:
    """Scores, torch's softmax, and sums of values: what NATTEN's users composed."""
    scores = na2d_qk(query * query.shape[-1] ** -0.5, key, kernel_size, rpb=rpb, backend=backend)
    return na2d_av(scores.softmax(-1), value, kernel_size, backend=backend)


def _cudnn_of(axes: tuple[Axis, Axis], query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[..., Tensor]]:
    """Return cuDNN's attention under a mask of the windows by its name, or nothing where it takes no such call."""
    run = masked_attention_of(axes, query, [SDPBackend.CUDNN_ATTENTION])
    try:
        with torch.inference_mode():
            run(query, key, value)
    except RuntimeError as error:
        print(f"cuDNN is left out: {first_line(error)}", file=sys.stderr)
        return {}
    return {CUDNN: run}


def floor_of(query: Tensor, kernel_size: int) -> dict[str, Callable[[], object]]:
    """Return what neighborhood attention costs a CPU beside its products, each alone and by torch: `FLOOR`.

    The exponential of every score, in a buffer that stays in the cache; and each map turned once, channels to rows, as
    any kernel must whose vectors are products of channels: queries, keys, values, and the output back.
    """
    scores, weights = torch.randn(2, 2**14)
    pieces = -(-query.shape[:-1].numel() * kernel_size**2 // len(scores))

    def exponentials() -> None:
        for _ in range(pieces):
            torch.exp2(scores, out=weights)

    def turns() -> None:
        for _ in range(4):
            query.detach().permute(0, 3, 4, 1, 2).contiguous()

    return dict(zip(FLOOR, (exponentials, turns), strict=True))


@functools.cache
def copy_rate(device: str, rounds: int) -> float:
    """Return the bytes a second that a copy of a gibibyte reads and writes."""
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / alternate({"copy": lambda: target.copy_(source)}, rounds, device)["copy"]


@functools.cache
def matmul_rate(device: str, rounds: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the GFLOP/s of a product of two square matrices: what the machine can do."""
    side = 1024 if device == "cpu" else 8192
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / alternate({"matmul": lambda: a @ a}, rounds, device)["matmul"] / 1e9


def plot(rows: list[dict], path: Path, title: str) -> None:
    """Draw milliseconds against the side of the map, a line for each path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name in dict.fromkeys(row["path"] for row in rows):
        mine = [row for row in rows if row["path"] == name]
        sides = [int(row["shape"].split("x")[1]) for row in mine]
        axes.plot(sides, [row["ms"] for row in mine], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="side of the map, tokens", ylabel="ms", title=title)
    axes.set_xticks(SIDES, map(str, SIDES), minor=False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
