"""`foveate attend IMAGE` and ``--table``: pictures, the numbers beside them, and a row for each head."""

import csv
import json

import numpy as np
import pytest
import torch
from foveate.tasks import detect, segment
from foveate.tasks.data.classification import InputRule
from foveate.tasks.data.segmentation import InputRule as SegmentRule
from foveate.tasks.dense.detect import create_detector
from foveate.tasks.dense.segment import create_segmenter
from foveate.tools import attend_image
from foveate.tools.cli import main
from PIL import Image

MODEL = ["--model", "nat_atto", "--untrained"]


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return str(path)


def test_a_picture_has_its_numbers_beside_it(photo, tmp_path, capsys):
    output = ["--output", str(tmp_path)]
    assert main(["attend", photo, *MODEL, "--at", "40,30", "55,20", "--layers", "stages.1.*", *output]) == 0
    assert (tmp_path / "photo_query.png").stat().st_size > 10_000
    told = json.loads((tmp_path / "photo_query.json").read_text())
    assert told["skipped"] == {}
    arrays = np.load(tmp_path / "photo_query.npz")
    assert [query["at"] for query in told["queries"][:1]] == [[40.0, 30.0]]
    # The photo's middle is the input's.
    assert told["queries"][0]["at_input"] == pytest.approx([16, 16], abs=0.51)
    for query in told["queries"]:
        assert query["check"] < 1e-5
        assert query["map"] == [4, 4]
    name = f"1.{told['queries'][0]['layer']}"
    weights = arrays[name].mean(0)
    best = told["queries"][len(told["queries"]) // 2]["best"][0]
    assert best["weight"] == pytest.approx(weights.max(), abs=1e-6)
    assert weights[best["row"], best["column"]] == weights.max()


def test_a_map_has_its_numbers_beside_it(photo, tmp_path):
    command = ["attend", photo, *MODEL, "--at", "40,30", "55,20", "--output", str(tmp_path)]
    assert main([*command, "--method", "rollout"]) == 0
    told, arrays = json.loads((tmp_path / "photo_rollout.json").read_text()), np.load(tmp_path / "photo_rollout.npz")
    # A map for each place that it begins at.
    assert told["at"] == [[40.0, 30.0], [55.0, 20.0]]
    assert all(arrays[f"{number}.map"].sum() == pytest.approx(1, abs=1e-5) for number in (0, 1))
    assert main([*command, "--method", "cam", "--class", "3"]) == 0
    told, arrays = json.loads((tmp_path / "photo_cam.json").read_text()), np.load(tmp_path / "photo_cam.npz")
    assert "for class 3" in told["map"]
    assert len(told["at_input"]) == 2
    assert arrays["map"].shape == (32, 32)


def test_a_table_has_a_row_for_each_head(photo, tmp_path):
    assert main(["attend", photo, "--table", *MODEL, "--layers", "stages.2.*.0.*", "--output", str(tmp_path)]) == 0
    with (tmp_path / "heads.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["head"] for row in rows] == [str(head) for head in range(4)]
    assert all(float(row["entropy (bits)"]) <= float(row["of"]) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say what to do"),
        (["PHOTO"], "name one model"),
        (["PHOTO", *MODEL, "--at", "here"], "must be X,Y in pixels"),
        (["PHOTO", *MODEL, "--at", "224,0"], "the image is 80x60 pixels; 224,0 is not on it"),
        (["PHOTO", *MODEL, "--at", "2,30"], "2,30 is cropped away"),
        (["PHOTO", *MODEL, "--box", "1"], "--box is of detectors and segmenters"),
        (["PHOTO", *MODEL, "--animate", "5"], "at least 2 places"),
        (["PHOTO", *MODEL, "--method", "roll"], "--method is one of query, rollout, relevance, cam"),
        (["PHOTO", *MODEL, "--method", "rollout", "--heads"], "--heads is of --method query"),
        (["PHOTO", *MODEL, "--method", "rollout", "--class", "3"], "the same for every class"),
        (["PHOTO", *MODEL, "--layers", "stage.*"], "no module of NAT is named"),
        (["PHOTO", "--evaluate"], "neither an IMAGE"),
    ],
)
def test_what_cant_be_done_is_said(arguments, words, photo, capsys):
    assert main(["attend", *(photo if word == "PHOTO" else word for word in arguments)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("size", [(80, 60), (33, 90), (32, 32), (17, 19)])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_a_place_of_the_photo_is_found_in_the_input(size, mode):
    rule = InputRule(48, 1, (0.0,), (1.0,), crop_pct=0.9, crop_mode=mode, interpolation="bilinear")
    left, right, top, bottom = rule.place(size)
    pixels = np.zeros(size[::-1], np.uint8)
    x, y = size[0] // 2 + 3, size[1] // 2 - 2
    pixels[y - 1 : y + 2, x - 1 : x + 2] = 255
    shown = rule.transform()(Image.fromarray(pixels))[0].numpy()
    rows, columns = np.indices(shown.shape) + 0.5
    centre = ((shown * columns).sum() / shown.sum(), (shown * rows).sum() / shown.sum())
    expected = (
        left + (x + 0.5) * (right - left) / size[0],
        top + (y + 0.5) * (bottom - top) / size[1],
    )
    assert centre == pytest.approx(expected, abs=0.75)


def test_photos_are_upright_and_grey_ones_are_drawn(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80), dtype=np.uint8)
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[274] = 6  # the camera was turned: 60 wide, 80 high
    turned.save(tmp_path / "turned.jpg", exif=exif)
    command = ["attend", str(tmp_path / "turned.jpg"), *MODEL, "--layers", "stages.1.*", "--output", str(tmp_path)]
    assert main([*command, "--at", "30,40", "30,60", "--animate", "2"]) == 0
    with Image.open(tmp_path / "turned_query.gif") as moving:
        assert moving.n_frames == 2
    told = json.loads((tmp_path / "turned_query.json").read_text())
    assert told["queries"][0]["at_input"] == pytest.approx([16, 16], abs=0.51)


@pytest.fixture
def dense(monkeypatch):
    """Let the command take a detector, or a segmenter, with random weights."""

    def take(predictor, task):
        predictor.card, predictor.threshold = {"task": task}, 0.0
        monkeypatch.setattr(attend_image, "load_any", lambda args: predictor)
        return predictor

    return take


def test_a_box_is_the_mean_of_what_lies_within(photo, dense, tmp_path, golden_module):
    detector = create_detector(
        "mask_rcnn", "nat_atto", num_classes=2, min_size=96, max_size=200, channels=16, hidden=16, score_threshold=0.0
    )
    golden_module.fill(detector)
    predictor = dense(detect.Predictor(detector, ["cat", "dog"]), "detect")
    (found,) = predictor([Image.open(photo)])
    command = ["attend", photo, "--checkpoint", "best.pth", "--output", str(tmp_path)]
    assert main([*command, "--box", "2", "--layers", "*stages.0.*", "*stages.1.*"]) == 0
    told = json.loads((tmp_path / "photo_query.json").read_text())
    arrays = np.load(tmp_path / "photo_query.npz")
    left, top, right, bottom = found["boxes"][1].tolist()
    for query in told["queries"]:
        assert query["class"] in ("cat", "dog")
        assert query["box"] == pytest.approx([left, top, right, bottom])
        assert query["map"] in ([24, 32], [12, 16])  # of 96x128 pixels
        assert query["check"] < 1e-5
        assert arrays[f"0.{query['layer']}"].mean(0).sum() + query["outside"] == pytest.approx(1, abs=1e-5)
    share = (right - left) * (bottom - top) / 80 / 60
    assert told["queries"][0]["tokens_asked"] / 24 / 32 == pytest.approx(share, abs=0.1)
    inside = f"{(left + right) / 2},{(top + bottom) / 2}"
    assert main([*command, "--box", inside, "--segment", "1", "--layers", "*stages.1.*"]) == 0
    kinds = [query["kind"] for query in json.loads((tmp_path / "photo_query.json").read_text())["queries"]]
    assert kinds[0] == "neighborhood"


def test_what_a_detector_cant_say_is_said(photo, dense, refused):
    detector = create_detector("retinanet", "nat_atto", num_classes=2, min_size=64, channels=16, score_threshold=0.0)
    predictor = dense(detect.Predictor(detector, ["cat", "dog"]), "detect")
    command = ["attend", photo, "--checkpoint", "best.pth"]
    assert "finds no segment on it" in refused(*command, "--segment", "1")
    assert "--method rollout is of classifiers" in refused(*command, "--method", "rollout")
    assert "--box is 'here'" in refused(*command, "--box", "here")
    assert "there is no box 999999" in refused(*command, "--box", "999999")
    predictor.threshold = 1.0
    assert "finds no segment on it" in refused(*command)


def test_a_segment_is_asked_for_by_a_place_within(photo, dense, tmp_path):
    torch.manual_seed(0)
    segmenter = create_segmenter("semantic_fpn", "nat_atto", num_classes=3, channels=16)
    rule = SegmentRule(64, 128, 32, segmenter.mean, segmenter.std)
    test = {"mode": "whole", "crop_size": None, "stride": None, "scales": (1.0,), "flip": False}
    predictor = segment.Predictor(segmenter, rule, ["sky", "sea", "land"], [False] * 3, "semantic", test)
    dense(predictor, "segment")
    (labels,) = predictor([Image.open(photo)])
    command = ["attend", photo, "--checkpoint", "best.pth", "--layers", "*stages.1.*", "--output", str(tmp_path)]
    assert main([*command, "--segment", "40,30"]) == 0
    told = json.loads((tmp_path / "photo_query.json").read_text())
    mask = np.load(tmp_path / "photo_query.npz")["0.mask"]
    assert mask[30, 40]
    assert (labels.numpy()[mask] == labels[30, 40].item()).all()
    assert told["queries"][0]["class"] == ["sky", "sea", "land"][labels[30, 40]]
