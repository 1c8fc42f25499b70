"""Train a model as a recipe says.

Writes to the output folder: config.py (complete), environment.json (versions, revision, the command that does it
again), log.txt, history.json and history.csv, last.pth (to continue from), best.pth (to evaluate and predict with),
curves.png, pictures of predictions, and report.html, which holds them and can be sent. Under torchrun, every process
trains on its share of the data:
torchrun --nproc-per-node 2 -m foveate train RECIPE
"""

import argparse
import shlex
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", help="recipe, such as classify/nat_atto_digits, or a Python file, which is run"
    )
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", default=[], help="such as epochs=3 optimizer.lr=1e-3"
    )
    parser.add_argument("--output", type=Path, help="folder of the run; runs/RECIPE by default")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder, exactly")
    parser.add_argument("--print-config", action="store_true", help="print the complete config and do nothing")


def run(args: argparse.Namespace) -> None:
    """Train."""
    from ..tasks import engine

    config = engine.load_config(args.config, args.overrides)
    if args.print_config:
        print(engine.format_config(config), end="")
        return
    output = args.output or Path("runs") / Path(args.config).stem
    try:
        result = engine.train(config, output, resume=args.resume)
    except KeyboardInterrupt:
        if (output / "last.pth").is_file() and engine.is_main_process():
            print(f"continue with --output {shlex.quote(str(output))} --resume", file=sys.stderr)
        raise
    if not engine.is_main_process():
        return
    metric = result["metric"]
    print(f"best held-out {metric}: {result['metrics'][metric]:.4f}")
    pictures = [name for name, _ in result["pictures"]]
    files = [
        "config.py",
        "environment.json",
        "log.txt",
        "history.json",
        *pictures,
        "report.html",
        "best.pth",
        "last.pth",
    ]
    print(f"run: {output} ({', '.join(name for name in files if (output / name).is_file())})")
