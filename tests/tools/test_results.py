"""`foveate.load(...).predict(...)`: images from anywhere, results that other tools take."""

import http.server
import json
import sys
import threading

import foveate
import numpy as np
import pytest
import torch
from foveate.tasks import TaskError, checkpoints
from foveate.tasks.data.classification import Digits
from foveate.tasks.data.coco import decode_masks
from foveate.tasks.data.segmentation import InputRule
from foveate.tasks.dense.detect import create_detector
from foveate.tasks.detect import Predictor as Detector
from foveate.tasks.detect.task import detector_card
from foveate.tasks.load import Model
from foveate.tasks.segment import Predictor as Segmenter
from PIL import Image

SIZE = (30, 41)
CLASSES = ["cat", "dog", "fox"]


class FoundObjects(torch.nn.Module):
    """Says of every image the same: two likely objects and an unlikely one."""

    def __init__(self, masks=True):
        super().__init__()
        self.masks = masks

    def forward(self, images):
        found = {
            "boxes": torch.tensor([[2.0, 3, 12, 8], [20, 10, 40, 30], [0, 0, 5, 5]]),
            "labels": torch.tensor([1, 0, 2]),
            "scores": torch.tensor([0.9, 0.75, 0.2]),
        }
        if self.masks:
            found["masks"] = torch.zeros(3, *SIZE, dtype=torch.uint8)
            found["masks"][0, 3:8, 2:12] = found["masks"][1, 10:30, 20:40] = found["masks"][2, :5, :5] = 1
        return [found for _ in images]


class FoundRegions(torch.nn.Module):
    """Labels the left half 0 and the right half 2."""

    def predict(self, images, output_size=None, **kwargs):
        labels = torch.zeros(output_size, dtype=torch.int64)
        labels[:, output_size[1] // 2 :] = 2
        return [labels]


def image():
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)


def detect(masks=True):
    return Model(Detector(FoundObjects(masks), CLASSES))


def segment():
    test = {"mode": "whole", "crop_size": None, "stride": None, "scales": (1.0,), "flip": False}
    rule = InputRule(None, 1, 1, (0.5,) * 3, (0.5,) * 3)
    return Model(Segmenter(FoundRegions(), rule, CLASSES, [False] * 3, "semantic", test))


def test_images_come_from_anywhere(digits_run, tmp_path):
    model = foveate.load(digits_run / "best.pth", "cpu")
    assert model.task == "classify"
    digit = Digits("val").image(0)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "digit.png"
    digit.save(path)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:

        def do_GET(self):
            self.send_response(200 if "digit" in self.path else 404)
            self.end_headers()
            self.wfile.write(path.read_bytes())

        server.RequestHandlerClass = type(
            "Handler",
            (http.server.BaseHTTPRequestHandler,),
            {
                "do_GET": do_GET,
                "log_message": lambda *args: None,
            },
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        sources = [str(path), path, path.parent, str(tmp_path / "in" / "*.png"), path.read_bytes(), digit]
        sources += [np.asarray(digit), np.asarray(digit.convert("RGBA")), f"{address}/digit.png"]
        results = model.predict(sources, top=3, batch_size=4)
        with pytest.raises(TaskError, match=r"/nothing.png: can't be had \(HTTP Error 404"):
            model.predict(f"{address}/nothing.png")
        server.shutdown()
    assert len(results) == len(sources)
    assert [result.source for result in results[:4]] == [str(path)] * 4
    assert results[4].source == "image 4"
    (alone,) = model.predict(path, top=3)
    assert len(alone["classes"]) == 3
    for result in results:  # of batches of four and of one, which round differently
        for entry, expected in zip(result["classes"], alone["classes"], strict=True):
            assert entry == {**expected, "probability": pytest.approx(expected["probability"], abs=1e-4)}
    with pytest.raises(TaskError, match="no such file"):
        model.predict(tmp_path / "none.png")
    with pytest.raises(TaskError, match="image 0: not an image"):
        model.predict(b"no image")
    with pytest.raises(TaskError, match=r"is an array .* of float32; images are"):
        model.predict(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(TaskError, match="image 1: is of type int"):
        model.predict([digit, 3])
    with pytest.raises(TaskError, match=r"threshold is 2, but"):
        model.predict(digit, threshold=2)


def test_a_detector_s_checkpoint_is_loaded(tmp_path):
    options = {"channels": 16, "hidden": 16, "min_size": 64, "max_size": 64}
    model = create_detector("mask_rcnn", "nat_atto", num_classes=2, **options)
    described = {"head": "mask_rcnn", "backbone": "nat_atto", "setting": "auto", "backbone_kwargs": {}}
    card = detector_card(described | {"kwargs": options}, ["cat", "dog"])
    checkpoints.save_checkpoint({"card": card, "state_dict": model.state_dict()}, tmp_path / "model.pth")
    loaded = foveate.load(str(tmp_path / "model.pth"), "cpu")
    (result,) = loaded.predict(image(), threshold=0.0)
    assert (loaded.task, result.kind) == ("detect", "objects")
    assert len(result.to_coco()) == len(result["objects"])


def test_objects_become_what_other_tools_take(tmp_path):
    supervision, pandas = pytest.importorskip("supervision"), pytest.importorskip("pandas")
    (result,) = detect().predict(image())
    assert list(result) == ["objects"]
    assert [entry["class"] for entry in result["objects"]] == ["dog", "cat"]
    found = result.to_supervision()
    assert isinstance(found, supervision.Detections)
    assert found.xyxy.tolist() == [[2, 3, 12, 8], [20, 10, 40, 30]]
    assert found.class_id.tolist() == [1, 0]
    assert found.confidence == pytest.approx([0.9, 0.75])
    assert found["class_name"].tolist() == ["dog", "cat"]
    assert found.mask.sum((1, 2)).tolist() == [50, 400]
    annotations = result.to_coco(image_id=7)
    assert [entry["bbox"] for entry in annotations] == [[2, 3, 10, 5], [20, 10, 20, 20]]
    assert [entry["category_id"] for entry in annotations] == [2, 1]
    assert {entry["image_id"] for entry in annotations} == {7}
    assert decode_masks([annotations[0]["segmentation"]], *SIZE).sum() == annotations[0]["area"] == 50
    json.dumps(annotations)
    words = result.to_yolo().splitlines()[1].split()
    assert words[0] == "0"
    assert np.allclose(np.sort(np.array(words[1::2], float) * 41), [20, 20, 40, 40])
    table = result.to_dataframe()
    assert isinstance(table, pandas.DataFrame)
    assert table[["class", "x2"]].values.tolist() == [["dog", 12.0], ["cat", 40.0]]
    boxes = detect(masks=False).predict(image(), threshold=0.1)[0]
    assert boxes.to_supervision().mask is None
    assert len(boxes.to_yolo().splitlines()) == 3
    assert [float(word) for word in boxes.to_yolo().split()[:5]] == pytest.approx(
        [1, 7 / 41, 5.5 / 30, 10 / 41, 5 / 30]
    )
    nothing = detect().predict(image(), threshold=1.0)[0]
    assert len(nothing.to_supervision()) == len(nothing.to_coco()) == len(nothing.to_dataframe()) == 0
    assert nothing.to_yolo() == ""


def test_regions_have_a_mask_for_each_class():
    supervision = pytest.importorskip("supervision")
    (result,) = segment().predict(Image.fromarray(image()))
    assert [entry["class"] for entry in result["classes"]] == ["fox", "cat"]
    found = result.to_supervision()
    assert isinstance(found, supervision.Detections)
    assert found.class_id.tolist() == [0, 2]
    assert found.xyxy.tolist() == [[0, 0, 20, 30], [20, 0, 41, 30]]
    assert found.mask[0].sum() == 600
    assert found.confidence is None
    first, second = result.to_coco()
    assert (first["area"], second["area"]) == (600, 630)
    assert "score" not in first
    assert result.to_dataframe()["share"].sum() == pytest.approx(1, abs=1e-5)


def test_labels_are_classifications_without_boxes(digits_run):
    supervision = pytest.importorskip("supervision")
    (result,) = foveate.load(digits_run / "best.pth", "cpu").predict(Digits("val").image(0))
    found = result.to_supervision()
    assert isinstance(found, supervision.Classifications)
    assert found.class_id[0] == int(result["classes"][0]["class"])
    with pytest.raises(TaskError, match="a classifier names the image"):
        result.to_coco()


@pytest.mark.parametrize("ending", ["png", "jpg", "json", "csv", "txt"])
def test_results_are_saved_by_their_ending(ending, tmp_path):
    result = detect().predict(image())[0]
    path = result.save(tmp_path / f"result.{ending}")
    if ending in ("png", "jpg"):
        with Image.open(path) as picture:
            assert min(picture.size) > 300
    elif ending == "json":
        assert json.loads(path.read_text())["objects"] == result["objects"]
    else:
        assert len(path.read_text().splitlines()) == (3 if ending == "csv" else 2)
    with pytest.raises(TaskError, match="are saved as"):
        result.save(tmp_path / "result.xyz")


def test_a_missing_package_is_named(monkeypatch):
    result = detect().predict(image())[0]
    for name, call in (("supervision", result.to_supervision), ("pandas", result.to_dataframe)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(TaskError, match=rf"{name} is needed for this .*pip install 'foveate\[results\]'"):
            call()
