"""Compare the attentions of foveate on equal terms: same host, same recipe, only the attention differs.

Each trains foveate_host_atto on the bundled digits and is measured on the held-out ones; then inference of the host is
timed, all attentions alternating in one process, and its peak memory taken in a fresh process for each. The table is
printed and written as markdown, csv and a picture.
"""

import argparse
from functools import partial
from pathlib import Path

from .arguments import at_least

HOST = "foveate_host_atto"
RECIPE = "classify/host_atto_digits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("attentions", nargs="*", metavar="ATTENTION", help="all by default")
    parser.add_argument("--epochs", type=at_least(0), help="the recipe's by default; 0 compares the cost alone")
    parser.add_argument("--seed", type=int, default=0, help="of the training; %(default)s by default")
    parser.add_argument(
        "--sizes",
        type=at_least(1),
        nargs="+",
        default=[224, 512],
        help="sides of the images for the cost, in pixels; 224 512 by default",
    )
    parser.add_argument(
        "--batch", type=at_least(1), default=4, help="images at once, for the cost; %(default)s by default"
    )
    parser.add_argument(
        "--rounds",
        type=at_least(1),
        default=5,
        help="times are medians over so many alternating calls; %(default)s by default",
    )
    parser.add_argument("--device", default="cpu", help="where to train and time; %(default)s by default")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="folder; %(default)s by default")


def run(args: argparse.Namespace) -> None:
    """Compare."""
    import timm
    import torch

    from ..blocks.create import list_attentions
    from ..tasks import TaskError, nearest
    from ..tasks.cost import count_macs, peak_memory
    from .tables import as_markdown, save_table
    from .timing import alternate, machine

    names = args.attentions or list_attentions()
    for name in names:
        if name not in list_attentions():
            raise TaskError(f"unknown attention {name!r}{nearest(name, list_attentions())}")

    rows = {name: {"attention": name} for name in names}
    if args.epochs != 0:
        for name in names:
            rows[name] |= _train(name, args)
    models = {name: timm.create_model(HOST, attention=name).eval().to(args.device) for name in names}
    with torch.device("meta"):
        on_meta = {name: timm.create_model(HOST, attention=name).eval() for name in names}
    for name, model in models.items():
        rows[name]["M parameters"] = round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
    for size in args.sizes:
        print(f"measuring at {size} pixels", flush=True)
        images = torch.randn(args.batch, 3, size, size, device=args.device)
        with torch.inference_mode():
            calls = {name: partial(model, images) for name, model in models.items()}
            times = alternate(calls, args.rounds, args.device)
        for name in names:
            rows[name] |= {
                f"GMACs at {size}": round(count_macs(on_meta[name], (3, size, size)) / 1e9, 2),
                f"images/s at {size}": round(args.batch / times[name], 1),
                f"peak MB at {size}": round(
                    peak_memory(HOST, args.batch, size, args.device, attention=name) / 2**20, 1
                ),
            }
    title = (
        f"{HOST} on {machine(args.device)}; batch {args.batch}, medians of {args.rounds} alternating calls; peak "
        "memory is what inference adds to the model's."
    )
    table = list(rows.values())
    save_table(table, args.output, "compare", title)
    _draw(table, args.sizes, args.output / "compare.png")
    print(title, as_markdown(table), f"written to {args.output}", sep="\n\n")


def _train(name: str, args: argparse.Namespace) -> dict:
    """Train the host with an attention, or take what an earlier comparison trained by the same settings."""
    from ..tasks import engine

    overrides = [f"model.kwargs.attention={name}", f"seed={args.seed}", f"device={args.device}"]
    if args.epochs is not None:
        overrides += [f"epochs={args.epochs}", f"schedule.warmup_epochs={min(1, args.epochs - 1)}"]
    config = engine.load_config(RECIPE, overrides)
    print(f"training {HOST} with {name} attention, {config['epochs']} epochs", flush=True)
    output = args.output / name
    result = engine.train(config, output, resume=(output / "last.pth").exists(), progress=False)
    history = result["history"]
    return {
        "held-out accuracy": round(history[-1]["val/accuracy"], 4),
        "seconds to train": round(sum(entry["seconds"] for entry in history)),
    }


def _draw(rows: list[dict], sizes: list[int], path: Path) -> None:
    """Draw a panel of bars for accuracy, and for speed and memory at each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from ..tasks.pictures.figures import BLUE, ORANGE

    columns = [name for name in ("held-out accuracy",) if name in rows[0]]
    columns += [f"{what} at {size}" for what in ("images/s", "peak MB") for size in sizes]
    figure, panels = pyplot.subplots(
        1, len(columns), figsize=(2.6 * len(columns) + 1, 0.36 * len(rows) + 1.2), sharey=True, layout="constrained"
    )
    names = [row["attention"] for row in rows]
    for axes, column in zip([panels] if len(columns) == 1 else panels, columns, strict=True):
        values = [row[column] for row in rows]
        bars = axes.barh(names, values, color=ORANGE if "accuracy" in column else BLUE)
        axes.bar_label(bars, [f"{value:g}" for value in values], padding=2, fontsize=8)
        axes.set_title(column, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.22)
        if "accuracy" in column:
            # All are near to one: the axis shows where they differ, and says so.
            axes.set_xlim(min(values) - 0.02, 1.0 + 0.01)
            axes.set_title(f"{column} (axis cut)", fontsize=10)
    figure.axes[0].invert_yaxis()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
