import json

import numpy as np
import pytest
import torch
from foveate import create_detector, create_segmenter
from foveate.tasks import TaskError
from foveate.tasks.export import Detections, Pyramid, export_model
from foveate.tasks.predictors import load_predictor
from foveate.tools.cli import main
from torch import nn


def test_a_classifier_of_a_run_is_exported_for_any_batch(digits_run, tmp_path, capsys):
    path = tmp_path / "new" / "digits.pt2"
    assert main(["export", str(digits_run), str(path), "--dynamic-batch"]) == 0
    text = capsys.readouterr().out
    assert "any number x 1x32x32; outputs: [1, 10]" in text
    assert "import foveate" not in text
    extra = {"foveate": ""}
    exported = torch.export.load(path, extra_files=extra).module()
    card = json.loads(extra["foveate"])
    assert card["classes"] == [str(digit) for digit in range(10)]
    assert card["input"]["mean"] == [0.69]
    images = torch.randn(5, 1, 32, 32)
    with torch.no_grad():
        expected = load_predictor(digits_run / "best.pth").model(images)
        assert torch.allclose(exported(images), expected, atol=1e-5)
    assert [file.name for file in path.parent.iterdir()] == ["digits.pt2"]


def test_onnx_is_run_and_compared(digits_run, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "digits.onnx"
    assert main(["export", str(digits_run / "last.pth"), str(path), "--batch", "2"]) == 0
    assert "greatest difference from the model" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).normal(size=(2, 1, 32, 32)).astype(np.float32)
    (logits,) = session.run(["output"], {"images": images})
    with torch.no_grad():
        expected = load_predictor(digits_run / "last.pth").model(torch.from_numpy(images))
    assert np.abs(logits - expected.numpy()).max() < 1e-4
    card = json.loads(session.get_modelmeta().custom_metadata_map["foveate"])
    assert card["shape"] == [2, 1, 32, 32]
    assert card["task"] == "classify"


def test_safetensors_hold_the_weights_and_the_card(digits_run, tmp_path):
    from safetensors import safe_open

    path = tmp_path / "digits.safetensors"
    assert main(["export", str(digits_run / "best.pth"), str(path)]) == 0
    state = load_predictor(digits_run / "best.pth").model.state_dict()
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["foveate"])["model"] == "nat_atto"
        assert set(file.keys()) == set(state)
        assert all(torch.equal(file.get_tensor(key), value) for key, value in state.items())


def test_a_name_without_weights_is_exported_on_request(tmp_path, refused, capsys):
    path = tmp_path / "maps.pt2"
    message = refused("export", "nat_atto", str(path))
    assert "No pretrained weights exist for nat_atto" in message
    assert "--untrained exports random weights" in message
    argv = ["export", "nat_atto", str(path), "--untrained", "--features", "--size", "45", "70"]
    assert main(argv) == 0
    assert "[1, 16, 12, 18], [1, 32, 6, 9], [1, 64, 3, 5], [1, 128, 2, 3]" in capsys.readouterr().out


class Wrong(nn.Module):
    """Computes something else when exported."""

    def forward(self, x):
        return x.sum((1, 2, 3)) * (1 + 1e-3 * torch.compiler.is_exporting())


def test_a_file_that_computes_something_else_is_not_written(tmp_path):
    path = tmp_path / "model.pt2"
    path.write_text("the file before")
    with pytest.raises(TaskError, match=r"not written: its outputs differ .* by 1\.0e-03 of the largest"):
        export_model(Wrong(), torch.randn(1, 3, 8, 8), path, {})
    assert path.read_text() == "the file before"
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    facts = export_model(Wrong(), torch.randn(1, 3, 8, 8), path, {}, tolerance=1e-2)
    assert facts["difference"] == pytest.approx(1e-3, rel=1e-2)


class Random(nn.Module):
    def forward(self, x):
        return x / 0.0 - x / 0.0


def test_nan_is_no_agreement(tmp_path):
    with pytest.raises(TaskError, match="not written"):
        export_model(Random(), torch.randn(1, 3, 8, 8), tmp_path / "model.pt2", {})


@pytest.mark.heavy
def test_segmenters_are_exported_whole(tmp_path):
    segmenter = create_segmenter("semantic_fpn", "nat_atto", num_classes=3).eval()
    facts = export_model(segmenter, torch.randn(1, 3, 50, 70), tmp_path / "segmenter.pt2", {})
    assert facts["outputs"] == [[1, 3, 50, 70]]


@pytest.fixture
def detector():
    return create_detector("retinanet", "nat_atto", num_classes=2, channels=16).eval()


def test_a_whole_detector_is_refused_with_what_can_be_exported(detector, tmp_path):
    with pytest.raises(TaskError, match=r"a whole RetinaNet can't be exported: .*--features exports its backbone"):
        export_model(detector, torch.randn(1, 3, 64, 96), tmp_path / "detector.pt2", {})


@pytest.mark.heavy
def test_detectors_are_exported_up_to_their_heads(detector, tmp_path):
    facts = export_model(Pyramid(detector), torch.randn(1, 3, 64, 96), tmp_path / "maps.pt2", {})
    assert facts["outputs"][0] == [1, 16, 8, 12]
    assert len(facts["outputs"]) == 5


class Convolutions(nn.Module):
    """A backbone of four convolutions, which is quickly exported."""

    channels = (4, 8, 12, 16)

    def __init__(self):
        super().__init__()
        pairs = zip((3, *self.channels), self.channels, strict=False)
        self.stages = nn.ModuleList(
            nn.Conv2d(a, b, stride, stride=stride) for (a, b), stride in zip(pairs, (4, 2, 2, 2), strict=True)
        )

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = stage(x).relu()
            maps.append(x)
        return maps


@pytest.fixture(scope="module")
def dino():
    torch.manual_seed(0)
    sizes = {"channels": 64, "hidden": 32, "num_queries": 10, "encoder_layers": 1, "decoder_layers": 1}
    model = create_detector("dino", Convolutions(), num_classes=3, max_detections=12, num_levels=2, **sizes).eval()
    for branch in (*model.head.reg_branches, *(layer.cross_attn for layer in model.head.decoder.layers)):
        for values in branch.parameters():
            nn.init.normal_(values, std=0.1)
    return model


@pytest.mark.heavy
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_dino_is_exported_whole_and_without_grid_sample(suffix, dino, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    path = tmp_path / f"dino{suffix}"
    facts = export_model(Detections(dino), torch.randn(2, 3, 70, 90), path, {})
    assert facts["outputs"] == [[2, 12, 4], [2, 12], [2, 12]]
    assert not facts["operators"]
    if suffix == ".onnx":
        graph = pytest.importorskip("onnx").load(path).graph
        assert [value.name for value in graph.output] == ["boxes", "scores", "labels"]
        kinds = {node.op_type for node in graph.node}
        assert "GridSample" not in kinds
        assert "TopK" in kinds


def test_what_dino_exports_is_what_it_finds(dino):
    """Images that aren't resized are found in the same pixels."""
    image = torch.rand(3, 70, 90)
    dino.transform.min_size = None
    batch, _, _ = dino.transform([image])
    with torch.no_grad():
        boxes, scores, labels = Detections(dino)(batch)
        found = dino([image])[0]
    torch.testing.assert_close(found, {"boxes": boxes[0], "labels": labels[0], "scores": scores[0]})


def test_detections_of_equal_scores_may_swap():
    boxes, scores, labels = torch.rand(1, 3, 4), torch.tensor([[0.9, 0.5, 0.5 - 1e-6]]), torch.tensor([[2, 0, 1]])
    order = torch.tensor([0, 2, 1])
    swapped = [boxes[:, order], scores, labels[:, order]]
    found = Detections.aligned(swapped, [boxes, scores, labels], 1e-4)
    assert torch.equal(found[0], boxes)
    assert torch.equal(found[2], labels)
    wrong = Detections.aligned([boxes, scores, labels[:, [1, 0, 2]]], [boxes, scores, labels], 1e-4)
    assert not torch.equal(wrong[2], labels)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["nat_atto", "x.bin", "--untrained"], "must be .onnx (ONNX), .pt2 (torch.export), .safetensors"),
        (["nat_tinny", "x.pt2"], "did you mean 'nat_tiny'?"),
        (["absent.pth", "x.pt2"], "absent.pth: no such file"),
        (["nat_atto", "x.pt2", "--untrained", "--size", "1", "2", "3"], "one or two numbers"),
        (["nat_atto", "x.pt2", "--untrained", "--batch", "0"], "--batch: must be a whole number, at least 1; got 0"),
        (["vit_tiny_patch16_224", "x.pt2", "--untrained", "--size", "64"], "does not take images of 64x64 pixels"),
    ],
)
def test_a_wrong_request_is_refused(argv, reason, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reason in refused("export", *argv)
    assert not list(tmp_path.iterdir())


def test_missing_packages_name_the_extra(refused, monkeypatch):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "onnxscript" else find(name, *rest)
    )
    message = refused("export", "nat_atto", "x.onnx", "--untrained")
    assert "needs the package onnxscript: pip install 'foveate[export]'" in message
