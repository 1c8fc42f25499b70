"""What a few minutes on a GPU are for: our kernels and whole models in bfloat16, the most telling comparisons first."""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from ...zoo.library_errors import first_line
from ..tables import as_markdown, save_table
from . import title_of
from .kernels import GPU_SHAPES, bench_kernels
from .models import Case, bench_models

MODELS = ("nat_tiny", "biformer_small", "dat_pp_tiny", "quadtree_b2", "agent_swin_tiny", "foveate_davit_tiny")
EXTRAS = ("train", "compile", "memory")
BATCH, SIDE = 128, 224
DTYPE = torch.bfloat16


class Part(NamedTuple):
    """What is measured in one piece, and the table that its rows belong to."""

    table: str
    name: str
    measure: Callable[[], list[dict]]


def measure(args: argparse.Namespace) -> list[dict]:
    """Measure part by part, write every table again after each, and return a row on each part.

    No part begins after ``args.minutes``; one that fails leaves the others as they are.
    """
    deadline = time.monotonic() + 60 * args.minutes
    tables: dict[str, list[dict]] = {}
    states = []
    for part in parts(args):
        began = time.monotonic()
        state = "left out: the time is up" if began >= deadline else _add(part, tables)
        if state == "measured":
            save_table(tables[part.table], args.output, part.table, title_of(args))
        seconds = round(time.monotonic() - began, 1)
        states.append({"table": part.table, "part": part.name, "state": state, "seconds": seconds})
        print(f"{part.table}, {part.name}: {state}, {seconds} s", flush=True)
    for name, rows in tables.items():
        print(name, as_markdown(rows), "", sep="\n\n")
    return states


def parts(args: argparse.Namespace) -> Iterator[Part]:
    """Yield what is to be measured: each kernel forward, each model, then each kernel with its gradients."""
    options = {"rounds": args.rounds, "device": args.device, "dtype": DTYPE}

    def kernels(backward: bool) -> Iterator[Part]:
        for shape in GPU_SHAPES:
            name = "{}x{}x{}x{}x{} k{}".format(*shape)
            for bias in (True, False):
                settings = {"flex": bias and not args.no_flex, "backward": backward, "bias": bias}
                call = partial(bench_kernels, [shape], **settings, **options)
                yield Part(
                    "gpu_kernels", f"{name}{'' if bias else ', no bias'}{', gradients' if backward else ''}", call
                )

    yield from kernels(backward=False)
    case = Case(BATCH, (SIDE, SIDE), args.device, DTYPE)
    for model in MODELS:
        yield Part("gpu_models", model, partial(bench_models, [model], args.peers, case, args.rounds, EXTRAS))
    yield from kernels(backward=True)


def _add(part: Part, tables: dict[str, list[dict]]) -> str:
    """Add a part's rows to its table, whose rows all name the same columns, and return how it went."""
    try:
        rows = part.measure()
    except Exception as error:  # compilers and drivers fail in any way, and the time on the device isn't to be lost
        return f"failed: {type(error).__name__}: {first_line(error)}"
    rows = tables.get(part.table, []) + rows
    columns = dict.fromkeys(name for row in rows for name in row)
    tables[part.table] = [{name: row.get(name, "-") for name in columns} for row in rows]
    return "measured"
