"""Videos and animated pictures: looked at frame by frame, and annotated."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import cv2
import foveate
import numpy as np
import pytest
import torch
from foveate.tasks import TaskError
from foveate.tasks.checkpoints import save_checkpoint
from foveate.tasks.classify.task import classifier_card, create_classifier
from foveate.tasks.data.classification import InputRule
from foveate.tasks.data.coco import encode_mask
from foveate.tasks.data.images import DamagedImageError
from foveate.tasks.data.video import Video, is_video
from foveate.tasks.pictures.figures import choose_styles
from foveate.tasks.pictures.frames import annotate
from foveate.tasks.results import Result
from foveate.tools.cli import main
from PIL import Image


def film(path, frames=7, size=(64, 48), rate=10):
    """A grey that grows brighter by 20 a frame."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
    for number in range(frames):
        writer.write(np.full((size[1], size[0], 3), 20 * number % 256, np.uint8))
    writer.release()
    return path


@pytest.fixture
def classifier(tmp_path):
    """A checkpoint of an untrained classifier."""
    rule = InputRule(32, 3, (0.5,) * 3, (0.2,) * 3)
    model = create_classifier("nat_atto", 3, rule)
    card = classifier_card("nat_atto", {}, ["dark", "grey", "bright"], rule)
    save_checkpoint({"card": card, "state_dict": model.state_dict()}, tmp_path / "classifier.pth")
    return tmp_path / "classifier.pth"


def test_frames_come_in_order_with_their_numbers(tmp_path):
    path = film(tmp_path / "film.mp4")
    video = Video(path)
    assert (video.rate, video.count, is_video(path)) == (10, 7, True)
    frames = list(video.frames(3))
    assert [number for number, _ in frames] == [0, 3, 6]
    assert [np.asarray(image).mean() for _, image in frames] == pytest.approx([0, 60, 120], abs=4)
    # An animated picture, part of which is transparent, is laid over white.
    pictures = [Image.new("RGBA", (20, 10), (200 * number, 0, 0, 255 * (number > 0))) for number in range(3)]
    pictures[0].save(tmp_path / "moving.gif", save_all=True, append_images=pictures[1:], duration=50, disposal=2)
    pictures[1].save(tmp_path / "still.gif")
    assert (is_video(tmp_path / "moving.gif"), is_video(tmp_path / "still.gif")) == (True, False)
    moving = Video(tmp_path / "moving.gif")
    assert (moving.rate, moving.count) == (20, 3)
    assert len(list(moving.frames())) == 3


def test_what_is_no_video_is_said(tmp_path, capfd):
    with pytest.raises(DamagedImageError, match=r"^camera:97: no such camera$"):
        Video("camera:97")
    assert capfd.readouterr().err == ""
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(DamagedImageError, match=r"bad.mp4: not a video, or damaged"):
        Video(tmp_path / "bad.mp4")
    with pytest.raises(DamagedImageError, match=r"none.mp4: no such file"):
        Video(tmp_path / "none.mp4")
    with pytest.raises(TaskError, match=r"camera:one: a camera has a number, such as camera:0"):
        Video("camera:one")


def test_a_video_is_annotated_and_described(classifier, tmp_path, capsys):
    path, out = film(tmp_path / "film.mp4", size=(63, 47)), tmp_path / "out"
    argv = ["predict", str(path), "--checkpoint", str(classifier), "--every", "2", "--top", "1", "--batch-size", "3"]
    assert main([*argv, "--output", str(out)]) == 0
    assert "4 frames" in (text := capsys.readouterr().out)
    assert f"1 video and predictions.json: {out}" in text
    assert sorted(file.name for file in out.iterdir()) == ["film.mp4", "predictions.json"]
    entries = json.loads((out / "predictions.json").read_text())
    assert [(entry["frame"], entry["seconds"]) for entry in entries] == [(0, 0), (2, 0.2), (4, 0.4), (6, 0.6)]
    assert all(len(entry["classes"]) == 1 for entry in entries)
    annotated = Video(out / "film.mp4")
    assert (annotated.rate, annotated.count) == (5, 4)
    # Below the text the film is as it was.
    below = [np.asarray(image)[30:].mean() for _, image in annotated.frames()]
    assert below == pytest.approx([0, 40, 80, 120], abs=6)
    model = foveate.load(classifier, device="cpu")
    results = model.predict(path, every=2, top=1)
    # Other batches may round otherwise, and six digits are written.
    for result, entry in zip(results, entries, strict=True):
        (top,), (expected,) = dict(result)["classes"], entry["classes"]
        assert top == {**expected, "probability": pytest.approx(expected["probability"], abs=1e-5)}
    assert results[1].source == f"{path}, frame 2"
    assert main([*argv, "--no-pictures", "--output", str(tmp_path / "bare")]) == 0
    assert [file.name for file in (tmp_path / "bare").iterdir()] == ["predictions.json"]
    bare = json.loads((tmp_path / "bare" / "predictions.json").read_text())
    assert [entry["classes"] for entry in bare] == [entry["classes"] for entry in entries]


def test_interrupted_it_leaves_a_playable_file(classifier, tmp_path):
    path, out = film(tmp_path / "film.mp4", frames=3000, size=(32, 32)), tmp_path / "out"
    argv = ["predict", str(path), "--checkpoint", str(classifier), "--output", str(out)]
    # By a process of its own, that tells when the first frames are written.
    code = (
        "import sys\nfrom foveate.tasks.pictures import frames\nadd = frames.VideoWriter.add\ncount = 0\n"
        "def counted(self, frame):\n    global count\n    add(self, frame)\n    count += 1\n"
        "    if count == 20: print('begun', flush=True)\n"
        "frames.VideoWriter.add = counted\nfrom foveate.tools.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv, "--batch-size", "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert sorted(file.name for file in out.iterdir()) == ["film.mp4", "predictions.json"]
    entries = json.loads((out / "predictions.json").read_text())
    assert 20 <= len(entries) < 3000
    assert abs(len(list(Video(out / "film.mp4").frames())) - len(entries)) <= 1


def test_frames_are_read_as_they_are_asked_for(tmp_path):
    """However long a video is, no more frames are in memory than a batch has."""
    from foveate.tasks.load import Model

    path, batches = film(tmp_path / "film.mp4", frames=12), []

    class Counted(SimpleNamespace):
        def __call__(self, images):
            batches.append(len(images))
            return [[("grey", 1.0)]] * len(images)

    predictor = Counted(channels=3, white=65535, classes=["grey"], card=None, draw=None)
    predictor.describe, predictor.headline = lambda answer: {"classes": []}, str
    stream = Model(predictor).stream(path, batch_size=4)
    for count in range(1, 6):
        next(stream)
        assert len(batches) == -(-count // 4)


def result_of(answer, classes, size=(40, 60), threshold=0.5):
    predictor = SimpleNamespace(classes=classes, draw=None, threshold=threshold)
    predictor.describe, predictor.headline = lambda answer: {}, str
    return Result(predictor, Image.new("RGB", size[::-1], (90, 90, 90)), answer)


def test_objects_and_regions_are_drawn_in_their_classes_colours():
    classes = ["background", "cat", "dog", "bird"]
    mask = np.zeros((40, 60), np.uint8)
    mask[25:35, 5:20] = 1
    answer = {
        "boxes": torch.tensor([[5.0, 25, 20, 35], [30, 5, 50, 20]]),
        "labels": torch.tensor([3, 1]),
        "scores": torch.tensor([0.9, 0.2]),
        "masks": [encode_mask(mask), encode_mask(np.roll(mask, 20))],
    }
    frame = annotate(result_of(answer, classes))
    colour = tuple(bytes.fromhex(choose_styles([3], classes)[3][0][1:]))
    assert tuple(frame[25, 12]) == colour  # the outline
    assert frame.shape == (40, 60, 3)
    assert (frame[:, 32:] == 90).all() or tuple(frame[5, 40]) == (90, 90, 90)  # too unlikely
    tinted = frame[31, 12].astype(int)
    assert abs(tinted - (0.55 * 90 + 0.45 * np.array(colour))).max() <= 2
    both = answer | {"masks": [answer["masks"][0]] * 2, "scores": torch.tensor([0.9, 0.8])}
    tints = [np.array(list(bytes.fromhex(choose_styles([label], classes)[label][0][1:]))) for label in (3, 1)]
    shared = 0.55 * (0.55 * 90 + 0.45 * tints[0]) + 0.45 * tints[1]
    assert abs(annotate(result_of(both, classes))[31, 12] - shared).max() <= 2
    labels = torch.zeros(40, 60, dtype=torch.uint8)
    labels[20:] = 2
    regions = annotate(result_of(labels, classes))
    expected = 0.55 * 90 + 0.45 * np.array(list(bytes.fromhex(choose_styles([2], classes)[2][0][1:])))
    assert abs(regions[30, 30] - expected).max() <= 2
    assert tuple(regions[18, 50]) == (90, 90, 90)


def test_a_class_has_its_colour_in_every_picture():
    classes = ["background", *map(str, range(150))]
    alone, together = choose_styles([7], classes)[7], choose_styles([0, 2, 7], classes)
    assert alone == together[7]
    assert together.keys() == {2, 7}
    # Of two with the same colour and stripes, the second takes the next.
    both = choose_styles([1, 33], classes)
    assert both[1] == choose_styles([1], classes)[1] == choose_styles([33], classes)[33] != both[33]
    assert len({*choose_styles(range(1, 33), classes).values()}) == 32
