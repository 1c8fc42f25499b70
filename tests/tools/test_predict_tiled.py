"""`foveate predict --tile`: pictures, labels and entries of large images, by small untrained models."""

import json

import cv2
import numpy as np
import pytest
from foveate.tasks.data.coco import decode_masks
from foveate.tools.cli import main
from PIL import Image

from .test_serve_dense import checkpoint


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A scene of 200x330 in a TIFF of strips."""
    path = tmp_path_factory.mktemp("tiles") / "scene.tif"
    pixels = np.random.default_rng(0).integers(0, 255, (25, 41, 3), np.uint8)
    pixels = cv2.resize(pixels, (330, 200), interpolation=cv2.INTER_CUBIC)
    Image.fromarray(pixels).save(path, compression="tiff_lzw", strip_size=20000)
    return path


@pytest.mark.parametrize(
    ("head", "output"),
    [
        pytest.param("mask_rcnn", None, marks=pytest.mark.heavy),
        ("semantic_fpn", "semantic"),
        ("mask2former", "panoptic"),
        ("mask2former", "instance"),
    ],
)
def test_what_is_found_in_tiles_is_written(head, output, picture, tmp_path, capsys):
    checkpoint(head, output, tmp_path / "best.pth")
    argv = ["predict", str(picture), "--checkpoint", str(tmp_path / "best.pth"), "--output", str(tmp_path / "out")]
    assert main([*argv, "--tile", "96", "--overlap", "32", "--threshold", "0.3"]) == 0
    assert "1 picture and predictions.json" in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    with Image.open(entry["picture"]) as shown:
        assert min(shown.size) > 200
    if "objects" in entry:
        assert entry["objects"]
        for found in entry["objects"]:
            x1, y1, x2, y2 = found["box"]
            assert 0 <= x1 < x2 <= 330
            assert 0 <= y1 < y2 <= 200
            assert found["mask"]["size"] == [200, 330]
            (mask,) = decode_masks([{**found["mask"], "counts": found["mask"]["counts"].encode()}], 200, 330)
            assert not mask[:, int(x2) + 1 :].any()
            assert not mask[int(y2) + 1 :].any()
        return
    name = "labels" if output == "semantic" else "map"
    written = np.asarray(Image.open(entry[name]))
    assert written.shape[:2] == (200, 330)
    if output == "semantic":
        assert sum(row["share"] for row in entry["classes"]) == pytest.approx(1, abs=1e-5)
        shares = np.bincount(written.ravel(), minlength=5) / written.size
        for row in entry["classes"]:
            assert row["share"] == pytest.approx(shares["abcde".index(row["class"])], abs=1e-6)
    else:
        codes = written.astype(int) @ [1, 256, 65536]
        assert {row["id"]: row["area"] for row in entry["segments"]} == {
            number: (codes == number).sum() for number in np.unique(codes) if number
        }


def test_tiles_are_refused_where_they_mean_nothing(refused, digits_run, picture, tmp_path):
    argv = ["predict", str(picture), "--checkpoint", str(digits_run / "best.pth"), "--output", str(tmp_path / "out")]
    assert "a classifier names the picture as a whole" in refused(*argv, "--tile", "96")
    assert "--overlap is of tiles; give their side by --tile" in refused(*argv, "--overlap", "9")


def test_a_damaged_picture_is_named_and_the_others_are_done(picture, tmp_path, capsys):
    checkpoint("semantic_fpn", "semantic", tmp_path / "best.pth")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tif").write_bytes(picture.read_bytes()[:30000])
    (tmp_path / "in" / "b.tif").write_bytes(picture.read_bytes())
    argv = ["predict", str(tmp_path / "in"), "--checkpoint", str(tmp_path / "best.pth")]
    assert main([*argv, "--output", str(tmp_path / "out"), "--tile", "128"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"foveate: error: {tmp_path}/in/a.tif: not an image, or damaged (")
    assert captured.err.count("\n") == 1
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 1
