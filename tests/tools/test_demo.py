import json

import numpy as np
import pytest
from foveate.tools.cli import main
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


@pytest.mark.heavy
def test_the_demo_reaches_97_percent(tmp_path):
    assert main(["demo", "--output", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["accuracy"] >= 0.97
