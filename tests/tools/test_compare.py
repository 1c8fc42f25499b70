"""`foveate compare`: one table and one picture of several attentions."""

import csv

import pytest
from foveate.tools.cli import main


def test_compares_what_was_asked_for(tmp_path, capsys):
    arguments = ["compare", "window", "--epochs", "1", "--sizes", "64", "--rounds", "1", "--batch", "1"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    (row,) = csv.DictReader((tmp_path / "compare.csv").open())
    assert row["attention"] == "window"
    assert 0.3 < float(row["held-out accuracy"]) <= 1
    assert float(row["images/s at 64"]) > 0
    assert float(row["GMACs at 64"]) == pytest.approx(0.04, abs=0.01)
    assert (tmp_path / "compare.png").stat().st_size > 5000
    assert "| window |" in capsys.readouterr().out


def test_an_unknown_attention_is_refused_before_anything_is_trained(capsys):
    assert main(["compare", "windw"]) == 2
    assert "did you mean 'window'" in capsys.readouterr().err
