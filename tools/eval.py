"""Measure a checkpoint of `foveate train` on the held-out data of a config.

Without a CONFIG, by the settings that the checkpoint itself holds: they are data, and nothing of them is run.
"""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="[CONFIG]", help="recipe, or a Python file, which is run; such as the run's config.py"
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="best.pth or last.pth of a run")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="such as device=cpu batch_size=16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the metrics there")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="also write report.html there, with pictures and a row a class"
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate."""
    from ..tasks import TaskError, engine
    from ..tasks.checkpoints import read_checkpoint, taken_as_said, write_whole
    from ..tasks.predictors import is_file
    from ..zoo.checkpoint import open_checkpoint

    if is_file(args.config) and Path(args.config).suffix != ".py":
        overrides = [*filter(None, [args.checkpoint]), *args.overrides]
        opened = open_checkpoint(args.config)
        with taken_as_said(opened):
            config = engine.config_of(read_checkpoint(opened), opened.path, overrides)
        metrics, _, _ = engine.evaluate(config, opened, report=args.output)
    elif args.checkpoint is None:
        raise TaskError("CHECKPOINT is required, such as best.pth of a run; a checkpoint alone is measured as it says")
    else:
        config = engine.load_config(args.config, args.overrides)
        metrics, _, _ = engine.evaluate(config, args.checkpoint, report=args.output)
    if not engine.is_main_process():
        return
    for name, value in metrics.items():
        print(f"{name:<14} {value:.4f}")
    if args.json:
        text = json.dumps(metrics, indent=1)
        write_whole(args.json, lambda file: Path(file).write_text(text))
