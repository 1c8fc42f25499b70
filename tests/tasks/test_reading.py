"""The same picture, read to train, to be measured by, and to predict from: the same tensor, for all tasks."""

import json

import cv2
import numpy as np
import pytest
import torch
from foveate.tasks import TaskError, engine
from foveate.tasks.checkpoints import read_checkpoint, save_checkpoint, with_white
from foveate.tasks.data.images import FULL_WHITE, choose_white, read_image
from foveate.tasks.engine.config import plain, task_class_of
from foveate.tasks.engine.resume import rebuild_config
from foveate.tasks.predictors import load_predictor
from foveate.tools.cli import main
from PIL import Image

SIDE = 64
CONFIGS = {
    "classify": """
model = dict(name="nat_atto")
data = dict(
    name="folder",
    root={root!r},
    size=64,
    crop_pct=1.0,
    augment=dict(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, color_jitter=None),
)
""",
    "detect": """
model = dict(head="retinanet", backbone="nat_atto", kwargs=dict(channels=16, min_size=64))
data = dict(
    name="coco",
    root={root!r},
    train=dict(annotations="truth.json", images="images"),
    val=dict(annotations="truth.json", images="images"),
    augment=dict(flip=0.0),
)
""",
    "segment": """
model = dict(head="semantic_fpn", backbone="nat_atto", kwargs=dict(channels=16, neck_channels=16))
data = dict(name="folder", root={root!r}, short=None, augment=dict(crop=64, flip=0.0))
""",
}
SMOOTH = np.add.outer(np.arange(SIDE), 3 * np.arange(SIDE)) / (4 * SIDE - 4)


def _write(kind: str, path):
    """Write a picture of a kind; return its file."""
    grey = Image.fromarray((255 * SMOOTH).astype(np.uint8))
    colours = Image.merge("RGB", [grey, grey.transpose(Image.Transpose.ROTATE_90), grey])
    file = path.with_suffix(".jpg" if kind in ("CMYK", "sideways") else ".png")
    if kind.startswith("deep"):
        greatest = int(kind.removeprefix("deep"))
        Image.fromarray((greatest * SMOOTH).astype(np.uint16)).save(file)
    elif kind == "colours of 12 bits":
        cv2.imwrite(str(file), np.stack([4000 * SMOOTH, 3000 * SMOOTH.T, 500 * SMOOTH], -1).astype(np.uint16))
    elif kind == "sideways":
        exif = Image.Exif()
        exif[0x0112] = 6
        colours.save(file, exif=exif, quality=95)
    elif kind == "transparent":
        layered = colours.convert("RGBA")
        layered.putalpha(grey)
        layered.save(file)
    elif kind == "transparent palette":
        colours.quantize(16).save(file, transparency=3)
    else:
        colours.convert(kind).save(file, **{"quality": 95} if file.suffix == ".jpg" else {})
    return file


KINDS = {
    "1": FULL_WHITE,
    "L": FULL_WHITE,
    "LA": FULL_WHITE,
    "P": FULL_WHITE,
    "RGB": FULL_WHITE,
    "CMYK": FULL_WHITE,
    "transparent": FULL_WHITE,
    "transparent palette": FULL_WHITE,
    "sideways": FULL_WHITE,
    "deep235": 255,
    "deep900": 1023,
    "deep4095": 4095,
    "deep65535": FULL_WHITE,
    "colours of 12 bits": 4095,
}


def _folder(task: str, kind: str, root):
    """Lay the picture out as the task's data; return its file."""
    if task == "classify":
        for part in ("train", "val"):
            for name in ("a", "b"):
                (root / part / name).mkdir(parents=True)
                file = _write(kind, root / part / name / "x")
        return file
    if task == "segment":
        for part in ("train", "val"):
            for name in ("images", "masks"):
                (root / name / part).mkdir(parents=True)
            file = _write(kind, root / "images" / part / "x")
            Image.fromarray((SMOOTH > 0.5).astype(np.uint8)).save(root / "masks" / part / "x.png")
        (root / "classes.txt").write_text("dark\nbright\n")
        return file
    (root / "images").mkdir()
    file = _write(kind, root / "images" / "x")
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 30], "area": 600, "iscrowd": 0}
    truth = {
        "images": [{"id": 1, "file_name": file.name, "height": SIDE, "width": SIDE}],
        "annotations": [box],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (root / "truth.json").write_text(json.dumps(truth))
    return file


def _task(task: str, root, tmp_path, *overrides):
    (tmp_path / "config.py").write_text(f'task = "{task}"\n' + CONFIGS[task].format(root=str(root)))
    config = engine.load_config(tmp_path / "config.py", overrides)
    return config, task_class_of(task)(config)


def _seen(model, call):
    """Return the first tensor that reaches the model while ``call`` runs."""
    seen = []
    with torch.no_grad():
        hook = model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        call()
        hook.remove()
    return seen[0][0]


@pytest.mark.parametrize("task", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_evaluation_and_prediction_read_a_picture_alike(task, kind, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    file = _folder(task, kind, root)
    config, run = _task(task, root, tmp_path)
    model = run.build_model().eval()
    card = run.card()
    assert card["white"] == KINDS[kind]
    path = tmp_path / "best.pth"
    save_checkpoint({"card": card, "state_dict": model.state_dict(), "config": plain(config)}, path)
    predictor = load_predictor(path)
    image = read_image(file, predictor.channels, predictor.white)
    predicted = _seen(predictor.model, lambda: predictor([image]))
    item = run.val_set[0][0]
    measured = _seen(model, lambda: run.predict(model, item[None] if task == "classify" else [item]))
    assert torch.equal(measured, predicted)
    assert torch.equal(run.train_set[0][0], predicted)
    # Nothing is lost to black, whatever the depth.
    assert np.ptp(np.asarray(image)) > 190
    if kind != "colours of 12 bits":
        # Of an opened image too; of colours of 16 bits Pillow itself keeps 8.
        with Image.open(file) as opened:
            opened.load()
            assert torch.equal(_seen(predictor.model, lambda: predictor([opened])), predicted)
            predictor.draw(opened, predictor([opened])[0], tmp_path / "drawn.png")


@pytest.mark.parametrize("config", ["text", {"data": "text"}, {"data": None}, None])
def test_a_card_beside_no_config_is_read(config):
    assert with_white({"task": "classify"}, {"config": config})["white"] == FULL_WHITE


@pytest.mark.parametrize("task", CONFIGS)
def test_runs_of_before_are_read_as_they_were(task, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    _folder(task, "deep900", root)
    config, run = _task(task, root, tmp_path)
    card = {key: value for key, value in run.card().items() if key != "white"}
    for name, white in (("folder", FULL_WHITE), ("nuclei", 255)):
        checkpoint = {"card": card, "state_dict": {}, "config": plain(config | {"data": {"name": name}})}
        save_checkpoint(checkpoint, tmp_path / "old.pth")
        checkpoint = read_checkpoint(tmp_path / "old.pth")
        assert checkpoint["card"]["white"] == white
        # So are they when they are measured or continued, whatever the images' depth.
        again = rebuild_config(config, checkpoint, "old.pth")
        assert task_class_of(task)(again).val_set.white == white
    with pytest.raises(TaskError, match=r"old\.pth: was trained with data\.white=255, not 4095; leave data\.white out"):
        rebuild_config(config | {"data": config["data"] | {"white": 4095}}, checkpoint, "old.pth")


def test_the_setting_wins_and_is_checked(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    file = _folder("segment", "deep900", root)
    _, run = _task("segment", root, tmp_path, "data.white=2000")
    assert run.card()["white"] == run.val_set.white == 2000
    assert np.asarray(run.train_set.image(0)).max() == np.asarray(read_image(file, 1, 2000)).max() == 115
    with pytest.raises(TaskError, match=r"data\.white is 70000, but must be from 1 to 65535"):
        _task("segment", root, tmp_path, "data.white=70000")


def test_white_is_the_depth_of_the_images_that_are_looked_at(tmp_path):
    files = [_write(kind, tmp_path / kind) for kind in ("deep235", "L", "deep900")]
    assert choose_white(files) == 1023
    assert choose_white(files[:1]) == 255
    assert choose_white(files[1:2]) == choose_white([]) == FULL_WHITE
    assert choose_white([tmp_path / "absent.png", files[0]]) == 255


def test_transparent_colours_of_12_bits_keep_their_transparency(tmp_path):
    pixels = np.full((4, 4, 4), 4095, np.uint16)
    pixels[..., :3] = 0
    pixels[:2, :, 3] = 65535
    pixels[2:, :, 3] = 0
    cv2.imwrite(str(tmp_path / "x.png"), pixels)
    grey = np.asarray(read_image(tmp_path / "x.png", 1, 4095))
    assert (grey[:2] == 0).all()
    assert (grey[2:] == 255).all()


def test_predict_takes_another_white(tmp_path, capsys):
    root = tmp_path / "data"
    root.mkdir()
    file = _folder("classify", "RGB", root)
    config, run = _task("classify", root, tmp_path)
    save_checkpoint(
        {"card": run.card(), "state_dict": run.build_model().state_dict(), "config": plain(config)},
        tmp_path / "best.pth",
    )
    deep = _write("deep900", tmp_path / "deep")
    argv = ["predict", str(deep), str(file), "--checkpoint", str(tmp_path / "best.pth")]
    assert main([*argv, "--output", str(tmp_path / "out"), "--white", "1023"]) == 0
    assert main([*argv, "--white", "0"]) == 2
    assert "--white is 0, but must be from 1 to 65535" in capsys.readouterr().err
