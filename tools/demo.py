"""Train nat_atto on the bundled handwritten digits, evaluate it in a fresh process, predict, and draw what happened.

1,400 digits train, 397 others are held out and only measured. The reported number is that of the last epoch, not of
the best one, which would have been chosen on the held-out digits.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

RECIPE = "classify/nat_atto_digits"
SHOWN = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder; %(default)s by default")
    parser.add_argument("--epochs", type=int, help="passes over the 1400 digits; the recipe's by default")
    parser.add_argument("--seed", type=int, default=0, help="of the training; %(default)s by default")
    parser.add_argument(
        "--device", default="auto", help="auto (CUDA if there is one), cpu, cuda:1, ...; %(default)s by default"
    )


def run(args: argparse.Namespace) -> None:
    """Run the demo."""
    from PIL import Image

    from ..tasks import TaskError, engine
    from ..tasks.checkpoints import write_whole
    from ..tasks.classify import Predictor
    from ..tasks.data.classification import Digits
    from ..tasks.data.images import read_image
    from ..tasks.data.samples import load_nuclei_half
    from ..tasks.devices import choose_device
    from ..tasks.pictures.classes import draw_confusion, draw_gallery
    from ..tasks.pictures.figures import draw_curve, draw_neighborhoods

    began = time.monotonic()
    output = args.output
    # The demo makes its folder anew, but only one that it made itself.
    run_folder = output / "run"
    if (run_folder / "last.pth").exists():
        for name in ("last.pth", "best.pth"):
            (run_folder / name).unlink(missing_ok=True)
    overrides = [f"seed={args.seed}", f"device={args.device}"]
    if args.epochs is not None:
        warmup = min(1, args.epochs - 1)
        overrides += [f"epochs={args.epochs}", f"schedule.warmup_epochs={max(0, warmup)}"]
    config = engine.load_config(RECIPE, overrides)

    print(f"1/4 training nat_atto on 1400 digits, {config['epochs']} epochs")
    result = engine.train(config, run_folder)
    trained = result["history"][-1]["val/accuracy"]

    print("2/4 evaluating the saved checkpoint in a fresh process")
    metrics_file = output / "metrics.json"
    command = [sys.executable, "-m", "foveate", "eval", str(run_folder / "config.py"), str(result["last"])]
    fresh = subprocess.run([*command, "--json", str(metrics_file)], capture_output=True, text=True, check=False)
    if fresh.returncode:
        raise TaskError(f"the evaluation in a fresh process failed: {fresh.stderr.strip() or fresh.stdout.strip()}")
    measured = json.loads(metrics_file.read_text())["accuracy"]
    if measured != trained:
        raise TaskError(f"the checkpoint does not reproduce: {trained} while training, {measured} when read again")

    print("3/4 predicting on held-out images")
    held_out = Digits("val")
    truths = [held_out.classes[label] for label in held_out.targets]
    paths = [output / "heldout" / f"{index:03d}_is_{truth}.png" for index, truth in enumerate(truths)]
    for index, path in enumerate(paths):
        write_whole(path, held_out.image(index).save)
    predictor = Predictor.from_checkpoint(result["last"], choose_device(args.device))
    images = [read_image(path, predictor.channels, predictor.white) for path in paths]
    rankings = predictor(images)
    wrong = [index for index, ranking in enumerate(rankings) if ranking[0][0] != truths[index]]

    # A picture for the commands on segmentation and detection: the half of the micrograph that their recipes hold out.
    cells = Image.fromarray(load_nuclei_half("val")[0])
    write_whole(output / "cells.png", cells.save)

    print("4/4 drawing")
    # Every mistake, as far as there is room, and digits that were right.
    right = [index for index in range(len(truths)) if index not in set(wrong)]
    shown = wrong[: SHOWN // 2]
    shown += right[: SHOWN - len(shown)]
    pictures = {
        "gallery.png": "predictions: the mistakes first, then digits that were right",
        "confusion.png": "which digit was taken for which",
        "curve.png": "loss and accuracy over the epochs",
        "neighborhood.png": "which keys two queries see, and their attention weights",
    }
    draw_gallery(
        [images[index] for index in shown],
        [truths[index] for index in shown],
        [rankings[index] for index in shown],
        output / "gallery.png",
        f"Held-out digits: {len(truths) - len(wrong)} of {len(truths)} right ({measured:.1%}); shown are "
        f"{min(len(wrong), SHOWN // 2)} of {len(wrong)} mistakes, then others",
    )
    guesses = [held_out.classes.index(ranking[0][0]) for ranking in rankings]
    draw_confusion(held_out.targets, guesses, held_out.classes, output / "confusion.png")
    draw_curve(result["history"], "accuracy", output / "curve.png")
    inputs = predictor.rule.transform()(images[right[0]])[None].to(predictor.device)
    # One query in the middle, and one at a border, where the window shifts instead of shrinking.
    queries = ((0.45, 0.55), (0.02, 0.98))
    draw_neighborhoods(images[right[0]], predictor.model, inputs, queries, output / "neighborhood.png")

    print(f"\nheld-out accuracy after training:     {trained:.4f}")
    print(f"the checkpoint, in a fresh process:   {measured:.4f}  (the same)")
    print(f"on PNG files, as a user would:        {1 - len(wrong) / len(truths):.4f}")
    print(f"took {time.monotonic() - began:.0f} s; everything is in {output}:")
    for name, what in pictures.items():
        print(f"  {name:<17} {what}")
    print("  heldout/          the 397 held-out digits as PNG files")
    print("  cells.png         a 16-bit micrograph, which segment/upernet_nat_atto_nuclei holds out")
    print("  run/              config.py, history.json, best.pth, last.pth")
    print(f"next: foveate predict {output / 'heldout'} --checkpoint {run_folder / 'best.pth'}")
