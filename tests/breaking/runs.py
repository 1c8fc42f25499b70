"""Strange run folders: every command that takes one answers, or refuses it in one line."""

import copy
import shutil
from typing import Any

import torch
from foveate.tasks import engine
from PIL import Image
from trial import Trial, command

SETTINGS = ("classify/nat_atto_digits", "epochs=1", "schedule.warmup_epochs=0", "iterations=2", "batch_size=4")


def run(trial: Trial) -> None:
    whole = trial.folder / "whole"
    engine.train(engine.load_config(SETTINGS[0], SETTINGS[1:]), whole, progress=False)
    image = trial.folder / "image.png"
    Image.new("L", (8, 8), 99).save(image)
    content = torch.load(whole / "last.pth", weights_only=True)
    for number in trial.numbers():
        draw, strange = trial.draw, trial.folder / "strange"
        shutil.rmtree(strange, ignore_errors=True)
        shutil.copytree(whole, strange)
        changed = copy.deepcopy(content)
        for _ in range(draw.randint(1, 3)):
            _change(draw, changed)
        for name in ("last.pth", "best.pth"):
            torch.save(changed, strange / name)
        for name in ("history.json", "config.py", "environment.json"):
            if draw.random() < 0.3:
                (strange / name).write_text(
                    draw.choice(("", "[]", "{", "[{}]", '[{"epoch": 1, "lr": "x"}]', "[1]", "null", "\x1b[31m"))
                )
        if draw.random() < 0.2:
            (strange / draw.choice(("last.pth", "best.pth"))).write_bytes(b"PK\x03\x04" * draw.randint(0, 9))
        best = strange / "best.pth"
        calls = {
            "predict": ("predict", image, "--checkpoint", best, "--output", trial.folder / "out"),
            "eval": ("eval", SETTINGS[0], best, "device=cpu"),
            "resume": ("train", *SETTINGS, "--output", strange, "--resume"),
            "curves": ("curves", strange, "--output", trial.folder / "curves.png"),
            "export": ("export", strange, trial.folder / "x.safetensors"),
            "verify": ("weights", "verify", best, "--images", image),
        }
        name = draw.choice(list(calls))
        trial.check(name, number, lambda call=calls[name]: command(*call))


def _change(draw, tree: Any) -> None:
    """Replace or remove something in nested containers, at any depth."""
    for _ in range(draw.randint(0, 3)):
        inner = [
            value
            for value in (tree.values() if isinstance(tree, dict) else tree)
            if isinstance(value, dict | list) and value
        ]
        if not inner:
            break
        tree = draw.choice(inner)
    key = draw.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
    if draw.random() < 0.3:
        del tree[key]
    else:
        odd = (
            None,
            {},
            [],
            "x",
            "../../x",
            -1,
            10**30,
            float("nan"),
            1.5,
            True,
            torch.zeros(0),
            torch.zeros(2),
            {"a": {}},
            [[]],
            "\x1b[2J",
        )
        tree[key] = draw.choice(odd)
