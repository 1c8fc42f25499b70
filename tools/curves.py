"""Draw the learning curves of one run or compare those of several, and print where each run stands.

A RUN is the folder of `foveate train`; it may still be going on. Losses and metrics that the runs share get one panel
each, over epochs; metrics are fractions.
"""

import argparse
import json
from pathlib import Path

# So many curves can be told apart.
MOST = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folders of runs")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/curves.png"), help="PNG to write; %(default)s by default"
    )
    parser.add_argument(
        "--scalars",
        metavar="NAME",
        nargs="+",
        help="what to draw, such as train/loss val/accuracy lr; losses, the leading metrics and lr by default",
    )


def run(args: argparse.Namespace) -> None:
    """Draw and print."""
    from ..tasks import TaskError, nearest
    from ..tasks.pictures.figures import draw_curves

    if len(args.runs) > MOST:
        raise TaskError(f"{len(args.runs)} runs are too many to tell apart; draw at most {MOST}")
    histories = dict(zip(_label(args.runs), map(read_history, args.runs), strict=True))
    known = list(dict.fromkeys(key for history in histories.values() for entry in history for key in entry))
    known = [key for key in known if key != "epoch"]
    for name in args.scalars or ():
        if name not in known:
            raise TaskError(f"no run has a scalar {name!r}{nearest(name, known)}")
    scalars = args.scalars or _choose(known)
    draw_curves(histories, scalars, args.output)
    _print(histories, scalars)
    print(f"picture: {args.output}")


def read_history(folder: Path) -> list[dict]:
    """Return a run's history, an entry for each epoch, or raise a TaskError if there is none."""
    from ..tasks import TaskError

    path = folder / "history.json" if folder.is_dir() else folder
    if not path.is_file():
        raise TaskError(f"{folder}: holds no run with an epoch done (history.json); a run is a folder of foveate train")
    try:
        history = json.loads(path.read_text())
        if not history or not all(isinstance(entry.get("epoch"), int) for entry in history):
            raise ValueError("no epochs")
        if not all(isinstance(value, int | float | None) for entry in history for value in entry.values()):
            raise ValueError("no numbers")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        raise TaskError(f"{path}: is no history of foveate train") from None
    return history


def _label(runs: list[Path]) -> list[str]:
    """Return the shortest ends of the folders' paths that tell the runs apart; the same run given twice is numbered."""
    parts = [path.resolve().parts for path in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(set(parts)):
            break
    return [label if label not in labels[:place] else f"{label} ({place + 1})" for place, label in enumerate(labels)]


def _choose(known: list[str]) -> list[str]:
    """Return losses, up to four held-out metrics, and the learning rate."""
    metrics = [key for key in known if key.startswith("val/") and key != "val/loss"]
    return [key for key in ("train/loss", "val/loss", *metrics[:4], "lr") if key in known]


def _print(histories: dict[str, list[dict]], scalars: list[str]) -> None:
    """Print each run's last value of every scalar, and of held-out ones the best with its epoch."""
    width = max(map(len, [*scalars, "scalar"]))
    for label, history in histories.items():
        seconds = sum(entry.get("seconds", 0) for entry in history)
        epochs = history[-1]["epoch"]
        print(f"{label}: {epochs} epoch{'s' * (epochs != 1)}, {seconds:.0f} s")
        print(f"  {'scalar':<{width}}  {'last':>10}  best (epoch)")
        for name in scalars:
            values = [(entry[name], entry["epoch"]) for entry in history if entry.get(name) is not None]
            if not values:
                continue
            best = ""
            if name != "lr":
                value, epoch = min(values) if name.endswith("loss") else max(values, key=lambda pair: pair[0])
                best = f"{value:.4f} ({epoch})"
            print(f"  {name:<{width}}  {values[-1][0]:>10.4g}  {best}".rstrip())
