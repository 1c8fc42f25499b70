"""The package's own weights: in what is installed, small, read without a network, as good as their rows say."""

import json
import subprocess
import sys
from pathlib import Path

import foveate
import pytest
import timm
import torch
from foveate.tasks.data.classification import Digits
from foveate.tasks.data.samples import load_nuclei_half
from foveate.tools.cli import main
from foveate.zoo import weights
from PIL import Image

ROOT = Path(__file__).parents[2]
ROWS = {name: entry for name, entry in weights.table().items() if entry.state == "shipped"}


@pytest.fixture(autouse=True)
def without_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_each_has_its_row_and_its_card_and_all_are_small():
    assert set(ROWS) >= {"nat_atto.foveate_digits", "nat_atto.foveate_mask_rcnn_nuclei"}
    files = {path.name: path for path in weights.SHIPPED.iterdir()}
    assert set(files) == {f"{name}.{ending}" for name in ROWS for ending in ("md", "safetensors")}
    assert sum(path.stat().st_size for path in files.values()) <= 5_000_000
    for name, entry in ROWS.items():
        (source,) = entry.sources
        card = files[f"{name}.md"].read_text()
        assert source.size == source.path.stat().st_size
        assert weights.sha256_of(source.path) == source.sha256
        assert source.sha256 in card
        assert all(f"{metric} {value:.2f}" in card for metric, value in entry.checked.measured.items())
        assert entry.checked.measured
        assert entry.license == "mit"


def test_a_row_that_is_made_again_stays_in_its_place(load_script, tmp_path, monkeypatch):
    script = load_script(".ci/shipped.py")
    table = weights.SHIPPED.parent / "weights.json"
    monkeypatch.setattr(script, "TABLE", tmp_path / "weights.json")
    script.TABLE.write_text(table.read_text())
    assert set(script.MODELS) == set(ROWS)
    for name, entry in ROWS.items():
        measured = {metric: value + 1 for metric, value in entry.checked.measured.items()}
        script.write_row(name, entry.sources[0].path, entry.data, entry.head, measured)
        before, after = json.loads(table.read_text()), json.loads(script.TABLE.read_text())
        assert list(after) == list(before)
        assert after[name]["checked"]["measured"] == measured
        assert after[name].keys() == before[name].keys()
        assert after[name]["sources"] == before[name]["sources"]
    script.TABLE.write_text(json.dumps(before).replace("{", "{\n", 1))
    script.MODELS["new.row"] = script.MODELS["nat_atto.foveate_digits"]
    script.write_row("new.row", entry.sources[0].path, "digits", None, {"top-1": 90.0})
    assert list(json.loads(script.TABLE.read_text())) == ["new.row", *before]


def test_what_is_built_for_a_wheel_holds_them(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "built")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    folder = tmp_path / "built" / "foveate" / "zoo"
    assert {path.name for path in (folder / "shipped").iterdir()} == {path.name for path in weights.SHIPPED.iterdir()}
    assert (folder / "states.csv").is_file()


def test_pretrained_atto_knows_digits():
    model = timm.create_model("nat_atto", pretrained=True).eval()
    cfg = model.pretrained_cfg
    assert (cfg["input_size"], cfg["num_classes"], cfg["mean"]) == ((3, 32, 32), 10, (0.69,) * 3)
    assert "nat_atto.foveate_digits" in timm.list_models(pretrained=True)
    held_out = Digits("val")
    predictor = foveate.load("nat_atto.foveate_digits").predictor
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in predictor.model.state_dict().items())
    answers = predictor([held_out.image(index) for index in range(len(held_out))])
    named = [held_out.classes.index(answer[0][0]) for answer in answers]
    right = sum(label == guess for label, guess in zip(held_out.targets, named, strict=True))
    stated = ROWS["nat_atto.foveate_digits"].checked.measured["top-1"]
    # A digit or two may fall to the other side where another machine rounds otherwise.
    assert 100 * right / len(held_out) == pytest.approx(stated, abs=0.6)


@pytest.mark.parametrize("name", [name for name, entry in ROWS.items() if entry.head])
def test_cells_are_predicted_by_name(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(load_nuclei_half("val")[0]).save("cells.png")
    assert main(["predict", "cells.png", "--model", name]) == 0
    assert "nucle" in capsys.readouterr().out
    assert {path.name for path in Path("runs/predict").iterdir()} >= {"cells.png", "predictions.json"}


def test_a_damaged_one_is_refused(monkeypatch, tmp_path):
    name = "nat_atto.foveate_digits"
    content = bytearray(ROWS[name].sources[0].path.read_bytes())
    content[-1] ^= 1
    (tmp_path / f"{name}.safetensors").write_bytes(content)
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    with pytest.raises(weights.WeightsError, match="install foveate again"):
        weights.locate(name)
