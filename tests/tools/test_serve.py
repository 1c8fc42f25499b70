"""What was exported, used: by foveate predict, with its metadata, its own preprocessing, quantised."""

import json

import numpy as np
import pytest
import torch
from foveate.tasks.data.classification import Digits, InputRule
from foveate.tasks.export.preprocess import FromImages
from foveate.tools.cli import main
from PIL import Image

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    held_out = Digits("val")
    for index in range(8):
        held_out.image(index).resize((41, 50 - index)).save(folder / f"{index}.png")
    return folder


def _answers(model, images, output, **options):
    argv = ["predict", str(images), "--model", str(model), "--output", str(output), *options.get("more", ())]
    assert main(argv) == 0
    entries = json.loads((output / "predictions.json").read_text())
    pictures = [np.asarray(Image.open(entry["picture"])) for entry in entries]
    return [entry["classes"] for entry in entries], pictures


@pytest.mark.parametrize("preprocess", [None, "hwc", pytest.param("chw", marks=pytest.mark.heavy)])
def test_an_onnx_file_answers_as_the_checkpoint(digits_run, images, tmp_path, preprocess):
    file = tmp_path / "digits.onnx"
    assert main(["export", str(digits_run), str(file), *(("--preprocess", preprocess) if preprocess else ())]) == 0
    expected, drawn = _answers(digits_run / "best.pth", images, tmp_path / "torch")
    got, pictures = _answers(file, images, tmp_path / "onnx")
    for one, other in zip(expected, got, strict=True):
        assert [row["class"] for row in one] == [row["class"] for row in other]
        assert [row["probability"] for row in one] == pytest.approx([row["probability"] for row in other], abs=2e-3)
    # A bar may be a pixel longer.
    assert all(np.mean(a != b) < 0.01 for a, b in zip(drawn, pictures, strict=True))
    metadata = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    assert metadata["task"] == "classify"
    assert json.loads(metadata["mean"]) == [0.69]
    assert json.loads(metadata["classes"])[3] == "3"
    assert "resize, bicubic" in metadata["resize"]
    assert json.loads(metadata["foveate"])["preprocessing"]["rule"]["size"] == 32


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(32, 32), (100, 75), (33, 41), (240, 181), (20, 45)])
def test_resize_in_the_graph_is_pillows(interpolation, size):
    rule = InputRule(32, 3, (0.0,) * 3, (1 / 255,) * 3, interpolation, 0.875)
    image = torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = rule.transform()(Image.fromarray(image[0].numpy()))
    got = FromImages(torch.nn.Identity(), rule)(image)[0]
    difference = (got - expected).abs()
    # Sums that lie halfway between two levels are rounded twice.
    assert difference.max() < 2.01
    assert (difference > 1.01).float().mean() < 1e-3


def test_what_cant_be_written_is_refused(refused, digits_run, tmp_path):
    assert "--size and --preprocess" in refused(
        "export", str(digits_run), str(tmp_path / "a.onnx"), "--preprocess", "hwc", "--size", "32"
    )
    (tmp_path / "other.onnx").write_bytes(b"none")
    image = str(tmp_path / "x.png")
    Image.new("L", (8, 8)).save(image)
    assert "onnxruntime can't read it" in refused("predict", image, "--model", str(tmp_path / "other.onnx"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    held_out = Digits("val")
    for index in range(60):
        file = root / str(held_out.targets[index]) / f"{index}.png"
        file.parent.mkdir(exist_ok=True)
        held_out.image(index).save(file)
    return root


@pytest.mark.parametrize("how", [["--int8"], pytest.param(["--dtype", "float16"], marks=pytest.mark.heavy)])
def test_a_smaller_file_is_measured_and_refused_if_it_loses_too_much(
    digits_run, folder, images, tmp_path, capsys, refused, monkeypatch, how
):
    file = tmp_path / "small.onnx"
    argv = ["export", str(digits_run), str(file), *how, "--data", str(folder), "--calibration", "20"]
    assert main([*argv, "--max-drop", "0.1"]) == 0
    text = capsys.readouterr().out
    assert "| file | accuracy | agreement | images/s | speed | MB |" in text
    assert "On 40 held-out images" in text
    model = onnxruntime.InferenceSession(file)
    assert json.loads(model.get_modelmeta().custom_metadata_map["foveate"])["task"] == "classify"
    answers, _ = _answers(file, images, tmp_path / "out")
    expected, _ = _answers(digits_run / "best.pth", images, tmp_path / "torch")
    assert sum(a[0]["class"] == b[0]["class"] for a, b in zip(answers, expected, strict=True)) >= 7
    file.unlink()
    rows = [{"accuracy": 0.9}, {"accuracy": 0.7}]
    monkeypatch.setattr("foveate.tasks.export.quantize.measured", lambda *args: rows)
    assert "loses 0.2000 of accuracy, more than --max-drop 0.1" in refused(*argv, "--max-drop", "0.1")
    assert not file.exists()


def test_a_smaller_file_needs_data(refused, digits_run, tmp_path):
    assert "--int8 needs --data FOLDER" in refused("export", str(digits_run), str(tmp_path / "a.onnx"), "--int8")
    assert "writes .onnx alone" in refused("export", str(digits_run), str(tmp_path / "a.pt2"), "--int8")
