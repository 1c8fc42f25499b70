import json

import pytest
from foveate.tools.cli import main
from PIL import Image


def write_run(folder, losses, **scalars):
    folder.mkdir(parents=True)
    entries = [
        {"epoch": epoch, "lr": 0.1 / epoch, "train/loss": loss, "seconds": 2.0}
        | {name.replace("_", "/", 1): values[epoch - 1] for name, values in scalars.items() if values[epoch - 1] >= 0}
        for epoch, loss in enumerate(losses, start=1)
    ]
    (folder / "history.json").write_text(json.dumps(entries))
    return str(folder)


def test_runs_of_different_length_are_compared(tmp_path, capsys):
    # A negative number stands for an epoch without validation.
    first = write_run(tmp_path / "a" / "run", [2.0, 1.0, 1.5], val_accuracy=[0.5, 0.8, 0.7])
    second = write_run(tmp_path / "b" / "run", [3.0, 2.5], val_accuracy=[-1, 0.6])
    output = tmp_path / "out" / "both.png"
    assert main(["curves", first, second, "--output", str(output)]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    assert [row[0] for row in rows if row[0].endswith(":")] == ["a/run:", "b/run:", "picture:"]
    assert ["train/loss", "1.5", "1.0000", "(2)"] in rows
    assert ["val/accuracy", "0.7", "0.8000", "(2)"] in rows
    assert ["val/accuracy", "0.6", "0.6000", "(2)"] in rows
    with Image.open(output) as picture:
        assert picture.width > picture.height > 200


def test_the_curve_of_a_real_run_shows_what_is_asked_for(digits_run, tmp_path, capsys):
    argv = [
        "curves",
        str(digits_run),
        str(digits_run),
        "--scalars",
        "val/f1",
        "lr",
        "--output",
        str(tmp_path / "c.png"),
    ]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "val/f1" in text
    assert "train/loss" not in text
    assert f"{digits_run.name} (2)" in text


def test_what_is_no_run_is_refused(tmp_path, refused):
    run = write_run(tmp_path / "run", [1.0])
    assert "did you mean 'train/loss'?" in refused("curves", run, "--scalars", "train/los")
    assert "holds no run with an epoch done" in refused("curves", str(tmp_path))
    (tmp_path / "run" / "history.json").write_text('[{"step": 1}]')
    assert "is no history of foveate train" in refused("curves", run)
    assert "too many to tell apart" in refused("curves", *[run] * 17)


@pytest.mark.parametrize("content", ["[", "[]", "{}", "3"])
def test_a_damaged_history_is_named(tmp_path, refused, content):
    (tmp_path / "history.json").write_text(content)
    assert "history.json: is no history" in refused("curves", str(tmp_path))
