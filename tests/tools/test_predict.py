import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from foveate.tasks import TaskError
from foveate.tasks.checkpoints import read_checkpoint
from foveate.tasks.classify import Predictor
from foveate.tasks.data.classification import Digits
from foveate.tools.cli import main
from foveate.tools.predict import _read_ahead
from foveate.zoo._download import DownloadError
from PIL import Image


def test_images_of_any_kind_get_a_picture_and_an_entry(digits_run, tmp_path, capsys):
    source, output = tmp_path / "in", tmp_path / "out"
    (source / "more").mkdir(parents=True)
    digit = Digits("val").image(0)
    digit.save(source / "digit.png")
    digit.resize((50, 31)).convert("RGBA").save(source / "more" / "digit.png")
    Image.fromarray(np.asarray(digit).astype(np.uint16) * 257).save(source / "deep.png")
    digit.convert("CMYK").resize((200, 300)).save(source / "print.jpg")
    argv = ["predict", str(source), "--checkpoint", str(digits_run / "best.pth"), "--output", str(output), "--top", "3"]
    assert main([*argv, "--batch-size", "3"]) == 0
    entries = json.loads((output / "predictions.json").read_text())
    assert len(entries) == 4
    pictures = {entry["picture"] for entry in entries}
    assert len(pictures) == 4
    for entry in entries:
        with Image.open(entry["picture"]) as picture:
            assert min(picture.size) > 200
        probabilities = [ranked["probability"] for ranked in entry["classes"]]
        assert len(probabilities) == 3
        assert probabilities == sorted(probabilities, reverse=True)
    shallow, deep = (next(e for e in entries if e["image"].endswith(f"in/{name}.png")) for name in ("digit", "deep"))
    assert shallow["classes"] == deep["classes"]
    assert "4 pictures" in capsys.readouterr().out


def test_without_pictures_the_answers_are_the_same(digits_run, tmp_path, capsys):
    Digits("val").image(0).save(tmp_path / "digit.png")
    argv = ["predict", str(tmp_path / "digit.png"), "--checkpoint", str(digits_run / "best.pth"), "--output"]
    entries = []
    for more in ([], ["--no-pictures"]):
        output = tmp_path / f"out{len(more)}"
        assert main([*argv, str(output), *more]) == 0
        entries += json.loads((output / "predictions.json").read_text())
    assert f"1 image and predictions.json: {output}" in capsys.readouterr().out
    assert [file.name for file in output.iterdir()] == ["predictions.json"]
    assert entries[0].pop("picture")
    assert entries[0] == entries[1]


def test_an_image_file_is_predicted_as_it_was_evaluated(digits_run, tmp_path):
    held_out = Digits("val")
    for index in range(397):
        held_out.image(index).save(tmp_path / f"{index:03d}.png")
    argv = ["predict", str(tmp_path / "[0-9]*.png"), "--checkpoint", str(digits_run / "last.pth"), "--top", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foveate.tasks.pictures.classes.draw_prediction", lambda *args: None)
        assert main([*argv, "--output", str(tmp_path / "out")]) == 0
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    right = sum(
        entry["classes"][0]["class"] == str(label) for entry, label in zip(entries, held_out.targets, strict=True)
    )
    history = json.loads((digits_run / "history.json").read_text())
    assert right / 397 == pytest.approx(history[-1]["val/accuracy"], abs=1e-6)


def test_a_damaged_image_is_named_and_the_others_are_done(digits_run, tmp_path, capsys):
    Digits("val").image(0).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    argv = ["predict", str(tmp_path), "--checkpoint", str(digits_run / "best.pth"), "--output", str(tmp_path / "out")]
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"foveate: error: {tmp_path}/bad.png: not an image, or damaged")
    assert captured.err.count("\n") == 1
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 1


def test_what_an_image_does_ends_no_batch(digits_run, tmp_path, capsys, monkeypatch):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    names = ["a.png", "b.png", f"{'n' * 240}.png", f"{'n' * 240}.tiff"]
    for name in names:
        Digits("val").image(0).save(source / name)
    Image.fromarray(np.zeros((1, 90), np.uint8)).save(source / "one.png")
    Image.fromarray(np.zeros((70, 90), np.uint8)).save(source / "large.png")
    called = Predictor.__call__

    def call(self, images, top=None):
        if any(image.width == 90 and image.height == 1 for image in images):
            raise ZeroDivisionError("of such an image")
        return called(self, images, top)

    monkeypatch.setattr(Predictor, "__call__", call)
    monkeypatch.setattr("foveate.tasks.classify.predict.read_checkpoint", without_card)
    argv = ["predict", str(source), "--checkpoint", str(digits_run / "best.pth"), "--output", str(output)]
    assert main([*argv, "--max-pixels", "6000"]) == 2
    captured = capsys.readouterr()
    assert "one.png: has no answer (of such an image)" in captured.err
    assert (
        "large.png: has 6300 pixels, and labels of each need memory; look at it in tiles by --tile, or" in captured.err
    )
    assert captured.err.count("\n") == 2
    assert "4 pictures and predictions.json" in captured.out
    entries = json.loads((output / "predictions.json").read_text())
    assert [Path(entry["image"]).name for entry in entries] == names
    assert all(Path(entry["picture"]).is_file() for entry in entries)


def without_card(path, task):
    """Read a checkpoint whose task isn't told afterwards, as if it labelled pixels."""
    checkpoint = read_checkpoint(path, task)
    return checkpoint | {"card": checkpoint["card"] | {"task": "segment"}}


def test_what_has_no_weights_is_refused(refused, tmp_path, monkeypatch):
    Digits("val").image(0).save(tmp_path / "image.png")
    image = str(tmp_path / "image.png")
    assert "No pretrained weights exist for foveate_host_atto" in refused(
        "predict", image, "--model", "foveate_host_atto"
    )
    assert "did you mean 'nat_tiny'" in refused("predict", image, "--model", "nat_tinny")

    def offline(*args, **kwargs):
        raise DownloadError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("foveate.zoo.weights._fetch_from", offline)
    message = refused("predict", image, "--model", "nat_mini")
    assert "nat_mini.shi_in1k can't be had" in message
    assert "Name or service not known" in message


def test_a_published_model_names_imagenet_classes(tmp_path, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(
        "timm.create_model", lambda name, pretrained, **kwargs: create(name, pretrained=False, **kwargs).eval()
    )
    monkeypatch.setattr("foveate.zoo.loading.check_host", lambda url: None)
    Image.fromarray(np.zeros((40, 90), np.uint8)).save(tmp_path / "image.png")
    torch.manual_seed(0)
    argv = ["predict", str(tmp_path / "image.png"), "--model", "resnet18", "--output", str(tmp_path / "out")]
    assert main(argv) == 0
    (entry,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(entry["classes"]) == 5
    assert all(ranked["class"][0].isalpha() for ranked in entry["classes"])


def test_the_next_batch_is_read_meanwhile_unless_images_are_large(monkeypatch):
    begun = {name: threading.Event() for name in "abcdefg"}

    def read(name):
        if name.startswith("http"):
            return SimpleNamespace(width=1, height=1, thread=threading.current_thread())
        begun[name].set()
        if name == "b":
            raise TaskError("b is damaged")
        return SimpleNamespace(width=10, height=10, name=name)

    batches = _read_ahead(["a", "b", "c", "d", "http://h/e"], 2, read)
    (_, first), (_, second) = next(batches)
    assert (first.name, str(second)) == ("a", "b is damaged")
    assert begun["c"].wait(10)
    assert begun["d"].wait(10)
    assert [path for path, _ in next(batches)] == ["c", "d"]
    [(_, last)] = next(batches)
    assert last.thread is threading.main_thread()
    assert list(batches) == []

    monkeypatch.setattr("foveate.tools.predict._AHEAD", 99)
    batches = _read_ahead(["e", "f", "g"], 1, read)
    assert next(batches)[0][1].name == "e"
    assert not begun["f"].wait(0.2)
    assert next(batches)[0][1].name == "f"
    batches.close()
    assert not begun["g"].is_set()
