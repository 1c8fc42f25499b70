"""What was exported, used: by foveate predict, with its metadata, its own preprocessing, quantised."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from foveate.tasks import TaskError
from foveate.tasks.classify import Predictor
from foveate.tasks.data.classification import Digits, InputRule
from foveate.tasks.export import Options, export_model, quantize
from foveate.tasks.export.preprocess import FromImages
from foveate.tasks.export.program import read_program
from foveate.tasks.exported import load_exported
from foveate.tasks.predictors import load_predictor
from foveate.tools.cli import main
from foveate.zoo import CheckpointError
from PIL import Image

from .test_serve_dense import checkpoint

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


@pytest.fixture(scope="module")
def exported(digits_run, tmp_path_factory):
    file = tmp_path_factory.mktemp("exported") / "digits.onnx"
    assert main(["export", str(digits_run), str(file)]) == 0
    return file


def test_an_onnx_file_answers_as_the_checkpoint(digits_run, images, tmp_path, exported):
    _check_answers(digits_run, images, tmp_path, exported)


@pytest.mark.heavy
@pytest.mark.parametrize("layout", ["hwc", "chw"])
def test_a_file_that_resizes_answers_as_the_checkpoint(digits_run, images, tmp_path, layout):
    file = tmp_path / "digits.onnx"
    assert main(["export", str(digits_run), str(file), "--preprocess", layout]) == 0
    _check_answers(digits_run, images, tmp_path, file)


def _check_answers(digits_run, images, tmp_path, file):
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


@pytest.mark.parametrize("said", ["", "[]", "{", '{"task": "classify", "preprocessing": 3}', "no classes", "of others"])
def test_exported_files_that_make_no_sense_are_one_line(said, tmp_path):
    onnx = pytest.importorskip("onnx")
    if " " in said and said[0] != "{":
        classes = {"no classes": [], "of others": ["a"]}[said]
        rule = {"size": 4, "channels": 1, "mean": [0.5], "std": [0.5]}
        said = json.dumps({"task": "classify", "classes": classes, "preprocessing": {"rule": rule}})
    shapes = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("images", [1, 1, 4, 4]), ("output", [1, 16]))
    ]
    node = onnx.helper.make_node("Flatten", ["images"], ["output"])
    graph = onnx.helper.make_graph([node], "flat", shapes[:1], shapes[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.helper.set_model_props(model, {"foveate": said})
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(CheckpointError, match=r"x.onnx: what it says of its model or run makes no sense") as error:
        load_exported(tmp_path / "x.onnx")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", ["hwc", "chw"])
def test_resize_is_part_of_a_file(layout, tmp_path):
    rule = InputRule(16, 3, (0.5,) * 3, (0.25,) * 3, "bilinear", 0.875)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 16), torch.nn.Flatten()).eval()
    model = FromImages(network, rule, layout)
    card = {"task": "classify", "classes": list("abcd"), "layout": layout, "preprocessing": {"rule": vars(rule)}}
    export_model(model, model.example(21, 30), tmp_path / "x.onnx", card, Options(dynamic_size=True))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 19, 3), np.uint8))
    (got,) = load_exported(tmp_path / "x.onnx")([image])
    (expected,) = Predictor(network, rule, list("abcd"))([image])
    assert dict(got) == pytest.approx(dict(expected), abs=0.02)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(32, 32), (100, 75), (33, 41), (240, 181), (20, 45)])
def test_resize_in_the_graph_is_pillows(interpolation, size):
    rule = InputRule(32, 3, (0.0,) * 3, (1 / 255,) * 3, interpolation, 0.875)
    image = torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = rule.transform()(Image.fromarray(image[0].numpy()))
    got = FromImages(torch.nn.Identity(), rule)(image)[0]
    difference = (got - expected).abs()
    # Bilinear weights are fractions of whole numbers; those of the cubic are rounded, and so are a few of its levels.
    assert difference.max() < (0.01 if interpolation == "bilinear" else 1.01)
    assert (difference > 0.01).float().mean() < 2e-3


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


def _weights(file):
    """Return how many bytes of constants a file holds."""
    return sum(len(tensor.raw_data) for tensor in pytest.importorskip("onnx").load(file).graph.initializer)


@pytest.mark.parametrize(
    ("how", "images_measured"),
    [
        (["--int8", "--calibration", "20"], "40 held-out"),
        pytest.param(["--dtype", "float16"], "60", marks=pytest.mark.heavy),
    ],
)
def test_a_smaller_file_is_measured_and_refused_if_it_loses_too_much(
    digits_run, folder, images, exported, tmp_path, capsys, refused, monkeypatch, how, images_measured
):
    file = tmp_path / "small.onnx"

    def export(model, example, path, *rest):
        shutil.copyfile(exported, path)
        return {"outputs": {}, "operators": [], "difference": 0.0}

    monkeypatch.setattr("foveate.tasks.export.export_model", export)
    argv = ["export", str(digits_run), str(file), *how, "--data", str(folder)]
    assert main([*argv, "--max-drop", "0.1"]) == 0
    text = capsys.readouterr().out
    assert "| file | accuracy | agreement | images/s | speed | MB |" in text
    assert f"On {images_measured} images" in text
    assert _weights(file) < 0.6 * _weights(exported)
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


def test_a_smaller_file_of_another_size_is_measured_on_images_of_that_size(
    digits_run, folder, tmp_path, refused, monkeypatch
):
    cards = []

    def export(model, example, path, card, options):
        cards.append(card)
        raise TaskError("no further")

    def measure_by(folder, *args):
        shapes.append(tuple(folder[0][0].shape))
        return [], [], []

    shapes = []
    monkeypatch.setattr("foveate.tasks.export.export_model", export)
    monkeypatch.setattr("foveate.tasks.export.quantize.split", measure_by)
    argv = ["export", str(digits_run), str(tmp_path / "a.onnx"), "--int8", "--data", str(folder), "--size"]
    assert "no further" in refused(*argv, "64")
    assert shapes == [(1, 64, 64)]
    assert cards[0]["preprocessing"]["rule"]["size"] == 64
    assert "crop the middle 64x64" in cards[0]["preprocessing"]["resize"]
    assert "--int8 is measured on square images: give one number" in refused(*argv, "64", "32")


@pytest.mark.parametrize(("how", "used"), [(["--int8", "--calibration", "20"], 40), (["--dtype", "float16"], 60)])
def test_only_int8_holds_images_back(digits_run, folder, exported, tmp_path, refused, monkeypatch, how, used):
    def measure(files, images, labels):
        assert len(labels) == len(images)
        raise TaskError(f"measured on {len(images)}")

    monkeypatch.setattr("foveate.tasks.export.export_model", lambda *args: shutil.copyfile(exported, args[2]))
    for write in ("halved", "calibrated"):
        monkeypatch.setattr(f"foveate.tasks.export.quantize.{write}", lambda source, target, *images: None)
    monkeypatch.setattr("foveate.tasks.export.quantize.measured", measure)
    argv = ["export", str(digits_run), str(tmp_path / "a.onnx"), *how, "--data", str(folder)]
    assert f"measured on {used}" in refused(*argv)


@pytest.mark.parametrize(("broken", "step"), [("halved", "made"), ("measured", "measured")])
def test_what_goes_wrong_with_a_smaller_file_is_named(
    digits_run, folder, exported, tmp_path, refused, monkeypatch, broken, step
):
    def fail(*args):
        raise RuntimeError("no kernel of Conv\nat source.cc")

    monkeypatch.setattr("foveate.tasks.export.export_model", lambda *args: shutil.copyfile(exported, args[2]))
    monkeypatch.setattr(f"foveate.tasks.export.quantize.{broken}", fail)
    argv = ["--dtype", "float16", "--data", str(folder)]
    message = refused("export", str(digits_run), str(tmp_path / "a.onnx"), *argv)
    assert f"a.onnx: not written: float16 can't be {step}: no kernel of Conv" in message
    assert "does not take images" not in message
    assert not list(tmp_path.iterdir())


def test_a_smaller_file_that_cant_be_is_refused_before_anything_is_written(
    digits_run, folder, tmp_path, refused, monkeypatch
):
    def export(*args):
        raise AssertionError("it was exported")

    monkeypatch.setattr("foveate.tasks.export.export_model", export)
    weights = tmp_path / "model.pth"
    checkpoint("retinanet", None, weights)
    argv = ("--dtype", "bfloat16", "--data", str(folder))
    message = refused("export", str(weights), str(tmp_path / "a.pt2"), *argv)
    assert "--dtype bfloat16 of detectors and segmenters is written as .onnx alone, not .pt2" in message
    argv = ("export", str(digits_run), str(tmp_path / "a.onnx"), "--int8", "--data")
    assert "holds 60 images, but 50 to calibrate by" in refused(*argv, str(folder), "--calibration", "50")
    assert "no such folder" in refused(*argv, str(tmp_path / "absent"))


def test_a_smaller_file_needs_data(refused, digits_run, tmp_path, monkeypatch):
    assert "--int8 needs --data FOLDER" in refused("export", str(digits_run), str(tmp_path / "a.onnx"), "--int8")
    weights = str(tmp_path / "a.safetensors")
    assert "writes .onnx and .pt2 alone" in refused("export", str(digits_run), weights, "--int8")
    program, data = str(tmp_path / "a.pt2"), ("--data", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert "pip install 'foveate[pt2e]'" in refused("export", str(digits_run), program, "--int8", *data)
    argv = ("export", str(digits_run), program, "--dtype", "bfloat16", "--batch", "2", *data)
    assert "take --dynamic-batch, or --batch 1" in refused(*argv)
    assert "onnxruntime has next to no operators" in refused(
        "export", str(digits_run), str(tmp_path / "a.onnx"), "--dtype", "bfloat16", *data
    )


@pytest.mark.heavy
@pytest.mark.parametrize("how", [["--int8", "--calibration", "20"], ["--dtype", "bfloat16"], ["--dtype", "float16"]])
def test_a_smaller_program_is_measured(digits_run, folder, tmp_path, capsys, how):
    if "--int8" in how:
        pytest.importorskip("torchao")
    file = tmp_path / "small.pt2"
    argv = ["export", str(digits_run), str(file), *how, "--data", str(folder), "--dynamic-batch"]
    assert main([*argv, "--max-drop", "0.1"]) == 0
    assert "| file | accuracy | agreement | images/s | speed | MB |" in capsys.readouterr().out
    predictor, held_out = load_predictor(digits_run / "best.pth"), Digits("val")
    images = torch.stack([predictor.transform(held_out.image(index)) for index in range(3)])
    with torch.no_grad():
        logits, expected = read_program(file)(images), predictor.model(images)
    assert logits.dtype == torch.float32
    assert 0 < (logits - expected).abs().max() < 0.2 * expected.abs().max()


class Masked(torch.nn.Module):
    """Two products with weights, and between them what infinity masks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Linear(16, 16), torch.nn.Linear(16, 4)

    def forward(self, x):
        scores = self.first(x.flatten(1))
        mask = torch.arange(16) > 7
        return self.last(scores.masked_fill(mask, float("-inf")).softmax(-1))


def test_what_infinity_masks_is_not_calibrated(tmp_path):
    model = Masked().eval()  # whose seed is the images' too
    images = torch.randn(1, 1, 4, 4)
    export_model(model, images, tmp_path / "a.onnx", {})
    with np.errstate(all="raise", under="ignore"):
        quantize.calibrated(tmp_path / "a.onnx", tmp_path / "b.onnx", [images])
    got, expected = (
        onnxruntime.InferenceSession(tmp_path / name).run(None, {"images": images.numpy()})[0]
        for name in ("b.onnx", "a.onnx")
    )
    assert 0 < np.abs(got - expected).max() < 0.1 * np.abs(expected).max()  # as int8 of so few numbers may differ


@pytest.mark.heavy
def test_int8_by_torchao_keeps_no_weights_in_float32(tmp_path):
    pytest.importorskip("torchao")
    from foveate.tasks.export.quantize_program import calibrated_module

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3, 2), torch.nn.Flatten(), torch.nn.Linear(32 * 49, 64)).eval()
    example = torch.randn(2, 3, 16, 16)
    small = calibrated_module(model, example, list(example[:, None]), True)
    export_model(small, example, tmp_path / "x.pt2", {}, Options(dynamic_batch=True))
    assert (tmp_path / "x.pt2").stat().st_size < 0.5 * sum(p.numel() * 4 for p in model.parameters())
    got, expected = read_program(tmp_path / "x.pt2")(example), model(example)
    assert 0 < (got - expected).abs().max() < 0.05 * expected.abs().max()


def test_detectors_and_segmenters_are_held_to_their_answers_in_float32(monkeypatch, tmp_path):
    image = Image.new("RGB", (40, 30))
    boxes, labels = torch.tensor([[2.0, 3, 12, 8], [20, 10, 40, 30]]), torch.tensor([1, 0])
    objects = {"boxes": boxes, "labels": labels, "scores": torch.tensor([0.9, 0.7])}
    fewer = {key: value[:1] for key, value in objects.items()}
    pixels = torch.zeros(30, 40, dtype=torch.uint8)
    other = pixels.clone()
    other[:3] = 1
    for name in "ab":
        (tmp_path / name).write_bytes(b"x")
    files = {name: tmp_path / name for name in "ab"}
    for first, second, expected in ((objects, objects, 1), (objects, fewer, 0.5), (pixels, other, 0.9)):
        answers = {files["a"]: first, files["b"]: second}
        monkeypatch.setattr(quantize, "load_exported", lambda path, threads, of=answers: lambda images: [of[path]])
        rows = quantize.compared(files, [image])
        assert [row["agreement"] for row in rows] == pytest.approx([1, expected])
    low = objects | {"scores": torch.tensor([0.3, 0.2])}
    monkeypatch.setattr(quantize, "load_exported", lambda path, threads: lambda images: [low])
    with pytest.raises(TaskError, match=r"no object of a score of 0.5"):
        quantize.compared(files, [image])


def test_speeds_are_those_of_one_thread(monkeypatch, tmp_path):
    (tmp_path / "a.pt2").write_bytes(b"x")
    threads, before = set(), torch.get_num_threads()

    def logits(image):
        threads.add(torch.get_num_threads())
        return torch.zeros(1, 2)

    monkeypatch.setattr(quantize, "_logits", lambda path: logits)
    torch.set_num_threads(2)
    try:
        quantize.measured({"a": tmp_path / "a.pt2"}, [torch.zeros(1, 4, 4)], [0])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == {1}


def test_images_to_calibrate_by_are_not_compared_on(tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(9)]
    used, others = quantize.split_files(paths, 4)
    assert len(used) == 4
    assert {*used, *others} == {*paths}
    assert len(others) == 5
    with pytest.raises(TaskError, match="--data holds 9 images, but 5"):
        quantize.split_files(paths, 5)
