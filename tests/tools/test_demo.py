import json
import re
from pathlib import Path

import numpy as np
import pytest
from foveate.tasks.data.samples import load_nuclei_half
from foveate.tools.cli import EXAMPLES, main
from PIL import Image

PICTURES = ("gallery.png", "confusion.png", "curve.png", "neighborhood.png")


def test_the_demo_reproduces_its_number_and_draws(tmp_path, capsys):
    argv = ["demo", "--output", str(tmp_path / "demo"), "--epochs", "2", "--seed", "1"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    history = json.loads((tmp_path / "demo" / "run" / "history.json").read_text())
    fresh = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert fresh["accuracy"] == history[-1]["val/accuracy"]
    assert text.count(f"{fresh['accuracy']:.4f}") >= 3
    for name in PICTURES:
        with Image.open(tmp_path / "demo" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10
        assert name in text
    assert len(list((tmp_path / "demo" / "heldout").iterdir())) == 397
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    left = set(re.findall(r"runs/demo/([\w./]+)", readme + EXAMPLES))
    assert {"heldout", "cells.png"} <= left
    assert all((tmp_path / "demo" / name).exists() for name in left)
    # As it is bundled, with 16 bits.
    with Image.open(tmp_path / "demo" / "cells.png") as cells:
        assert np.array_equal(np.asarray(cells), load_nuclei_half("val")[0])


@pytest.mark.heavy
def test_the_demo_reaches_97_percent(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    assert json.loads(Path("runs/demo/metrics.json").read_text())["accuracy"] >= 0.97
    capsys.readouterr()
    # What README runs next, of which the last words say what comes of it.
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    lines = re.findall(r"^foveate (.*runs/demo/.*--model nat_atto.*?)   .*$", readme, re.MULTILINE)
    assert len(lines) == 3
    assert [main(line.split()) for line in lines] == [0, 0, 0]
