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

from .arguments import at_least

RECIPE = "classify/nat_atto_digits"
SHOWN = 40
PICTURES = {
    "gallery.png": "predictions: the mistakes first, then digits that were right",
    "confusion.png": "which digit was taken for which",
    "curve.png": "loss and accuracy over the epochs",
    "neighborhood.png": "which keys two queries see, and their attention weights",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder; %(default)s by default")
    parser.add_argument("--epochs", type=at_least(1), help="passes over the 1400 digits; the recipe's by default")
    parser.add_argument("--seed", type=int, default=0, help="of the training; %(default)s by default")
    parser.add_argument(
        "--device", default="auto", help="auto (CUDA if there is one), cpu, cuda:1, ...; %(default)s by default"
    )


def run(args: argparse.Namespace) -> None:
    """Run the demo."""
    from ..tasks import engine
    from ..tasks.classify import Predictor
    from ..tasks.data.classification import Digits
    from ..tasks.data.images import read_image
    from ..tasks.devices import choose_device

    began = time.monotonic()
    output, run_folder = args.output, args.output / "run"
    config = engine.load_config(RECIPE, _overrides(args))

    print(f"1/4 training nat_atto on 1400 digits, {config['epochs']} epochs")
    # The demo makes its folder anew, but only one that it made itself.
    if (run_folder / "last.pth").exists():
        for name in ("last.pth", "best.pth"):
            (run_folder / name).unlink(missing_ok=True)
    result = engine.train(config, run_folder)
    trained = result["history"][-1]["val/accuracy"]

    print("2/4 evaluating the saved checkpoint in a fresh process")
    measured = _evaluate(run_folder / "config.py", result["last"], output / "metrics.json", trained)

    print("3/4 predicting on held-out images")
    held_out = Digits("val")
    paths = _write_images(held_out, output)
    predictor = Predictor.from_checkpoint(result["last"], choose_device(args.device))
    images = [read_image(path, predictor.channels, predictor.white) for path in paths]
    rankings = predictor(images)
    guesses = [held_out.classes.index(ranking[0][0]) for ranking in rankings]
    wrong = [index for index, guess in enumerate(guesses) if guess != held_out.targets[index]]

    print("4/4 drawing")
    right = [index for index in range(len(guesses)) if index not in set(wrong)]
    _draw_gallery(held_out, images, rankings, wrong, right, measured, output / "gallery.png")
    _draw_others(held_out, guesses, result["history"], predictor, images[right[0]], output)

    print(f"\nheld-out accuracy after training:     {trained:.4f}")
    print(f"the checkpoint, in a fresh process:   {measured:.4f}  (the same)")
    print(f"on PNG files, as a user would:        {1 - len(wrong) / len(guesses):.4f}")
    print(f"took {time.monotonic() - began:.0f} s; everything is in {output}:")
    for name, what in PICTURES.items():
        print(f"  {name:<17} {what}")
    print("  heldout/          the 397 held-out digits as PNG files")
    print("  cells.png         a 16-bit micrograph, which segment/upernet_nat_atto_nuclei holds out")
    print("  run/              config.py, history.json, best.pth, last.pth")
    print(f"next: foveate predict {output / 'heldout'} --checkpoint {run_folder / 'best.pth'}")


def _overrides(args: argparse.Namespace) -> list[str]:
    overrides = [f"seed={args.seed}", f"device={args.device}"]
    if args.epochs is not None:
        warmup = min(1, args.epochs - 1)
        overrides += [f"epochs={args.epochs}", f"schedule.warmup_epochs={max(0, warmup)}"]
    return overrides


def _evaluate(config: Path, checkpoint: Path, metrics: Path, trained: float) -> float:
    """Return the accuracy of a checkpoint in a process that knows only its file; it must be that of the training."""
    from ..tasks import TaskError

    command = [sys.executable, "-m", "foveate", "eval", str(config), str(checkpoint), "--json", str(metrics)]
    fresh = subprocess.run(command, capture_output=True, text=True, check=False)
    if fresh.returncode:
        raise TaskError(f"the evaluation in a fresh process failed: {fresh.stderr.strip() or fresh.stdout.strip()}")
    measured = json.loads(metrics.read_text())["accuracy"]
    if measured != trained:
        raise TaskError(f"the checkpoint does not reproduce: {trained} while training, {measured} when read again")
    return measured


def _write_images(held_out, output: Path) -> list[Path]:
    """Write the held-out digits as PNG files, whose paths are returned, and the held-out half of the micrograph."""
    from PIL import Image

    from ..tasks.checkpoints import write_whole
    from ..tasks.data.samples import load_nuclei_half

    paths = [
        output / "heldout" / f"{index:03d}_is_{held_out.classes[label]}.png"
        for index, label in enumerate(held_out.targets)
    ]
    for index, path in enumerate(paths):
        write_whole(path, held_out.image(index).save)
    # For the commands on segmentation and detection: their recipes hold this half out.
    write_whole(output / "cells.png", Image.fromarray(load_nuclei_half("val")[0]).save)
    return paths


def _draw_gallery(
    held_out, images: list, rankings: list, wrong: list[int], right: list[int], accuracy: float, path: Path
) -> None:
    """Draw every mistake, as far as there is space, and digits that were right."""
    from ..tasks.pictures.classes import draw_gallery

    shown = wrong[: SHOWN // 2]
    shown += right[: SHOWN - len(shown)]
    draw_gallery(
        [images[index] for index in shown],
        [held_out.classes[held_out.targets[index]] for index in shown],
        [rankings[index] for index in shown],
        path,
        f"Held-out digits: {len(right)} of {len(images)} right ({accuracy:.1%}); shown are "
        f"{min(len(wrong), SHOWN // 2)} of {len(wrong)} mistakes, then others",
    )


def _draw_others(held_out, guesses: list[int], history: list[dict], predictor, image, output: Path) -> None:
    """Draw what was taken for what, the learning curve, and what two queries of an image see."""
    from ..tasks.metrics.confusion import confuse_labels
    from ..tasks.pictures.attention import picture
    from ..tasks.pictures.classes import draw_confusion
    from ..tasks.pictures.figures import draw_curve, save_figure

    taken = confuse_labels(held_out.targets, guesses, len(held_out.classes))
    draw_confusion(taken, held_out.classes, output / "confusion.png")
    draw_curve(history, "accuracy", output / "curve.png")
    inputs = predictor.rule.transform()(image)[None].to(predictor.device)
    # One query in the middle, and one at a border, where the window shifts instead of shrinking.
    height, width = inputs.shape[2:]
    places = [(0.55 * width, 0.45 * height), (0.98 * width, 0.02 * height)]
    figure = picture(predictor.model, inputs, places, layers=["stages.[01].*"], image=image)
    save_figure(figure, output / "neighborhood.png")
