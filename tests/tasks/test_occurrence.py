"""Before training: classes that never occur are named, and what can't be measured is refused."""

import json

import numpy as np
import pytest
import torch
from foveate.tasks import TaskError, engine
from foveate.tasks.data.augment import IGNORE
from foveate.tasks.data.occurrence import check_classes
from foveate.tasks.engine.config import task_class_of
from foveate.tasks.engine.hooks import Metric
from foveate.tasks.engine.loading import Samples
from foveate.tasks.metrics.segmentation import count_labels, measure_labels
from foveate.tools.cli import main
from PIL import Image

CLASSES = ("ground", "disc")


def test_classes_that_never_occur_are_named():
    assert check_classes("training", [[0], [1, 0]], CLASSES, "here", "object") == []
    (line,) = check_classes("training", [[0], [], [0]], CLASSES, "here", "object", hint=lambda: "; look")
    assert line == "1 of 2 classes have no object in 3 training images: disc; look"
    with pytest.raises(TaskError, match=r"^here: the validation images have no object that counts.* measure by$"):
        check_classes("validation", [[], []], CLASSES, "here", "object")
    with pytest.raises(TaskError, match="no class but 'disc'"):
        check_classes("validation", [[1], []], CLASSES, "here", "pixel", needed=2)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def masks(root, split, *values):
    """Write an image for each list of values, of which each fills as much of its label map as the others."""
    for index, found in enumerate(values):
        write(root / "images" / split / f"{index}.png", np.full((32, 32, 3), 9))
        write(root / "masks" / split / f"{index}.png", np.repeat(found, 32 // len(found))[:, None].repeat(32, 1))


def config_file(root, **settings):
    config = {
        "task": "segment",
        "model": {"backbone": "nat_atto", "head": "semantic_fpn", "kwargs": {"channels": 16}},
        "data": {"name": "folder", "root": str(root), "classes": CLASSES, "augment": {"crop": 32}, "short": None},
        "epochs": 1,
        "batch_size": 2,
        "schedule": {"warmup_iterations": 0},
        "device": "cpu",
    }
    (root / "config.py").write_text("".join(f"{key} = {value!r}\n" for key, value in (config | settings).items()))
    return root / "config.py"


def task_of(path, *overrides):
    config = engine.load_config(path, overrides)
    return task_class_of(config["task"])(config)


def test_masks_of_0_and_255_are_refused_with_the_cure(tmp_path, capsys):
    """All of 255 counted as unlabelled, and the run reported a perfect mIoU."""
    for split in ("train", "val"):
        masks(tmp_path, split, [0, 255], [0, 0, 0, 255])
    path = config_file(tmp_path)
    capsys.readouterr()
    assert main(["train", str(path), "--output", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "validation images have no class but 'ground'" in message
    assert "counted as unlabelled: 255 (37.5% of the pixels)" in message
    assert "if one stands for a class, set data.values=[0,255]" in message
    assert not (tmp_path / "run" / "last.pth").exists()
    assert task_of(path, "data.values=[0,255]").check_data() == []


def test_held_out_maps_without_a_labelled_pixel_are_refused(tmp_path):
    masks(tmp_path, "train", [0, 1], [0, 1])
    masks(tmp_path, "val", [255], [255])
    config = engine.load_config(config_file(tmp_path), ())
    with pytest.raises(TaskError, match=r"validation images have no labelled pixel.*255 \(100\.0% of the pixels\)"):
        engine.train(config, tmp_path / "run", progress=False)


def test_a_run_names_the_classes_it_cannot_learn_and_is_measured_by_the_others(tmp_path):
    masks(tmp_path, "train", [0, 1], [0, 1], [0, 255])
    masks(tmp_path, "val", [0, 1], [1, 0])
    path = config_file(tmp_path)
    result = engine.train(engine.load_config(path, ("data.classes=('a','b','c')",)), tmp_path / "run", progress=False)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "1 of 3 classes have no labelled pixel in 3 training images: c; counted as unlabelled: 255 (16.7%" in log
    assert "1 of 3 classes have no labelled pixel in 2 validation images: c" in log
    assert (tmp_path / "run" / "best.pth").exists()
    assert 0 <= result["metrics"]["miou"] < 1
    config = engine.load_config(path, ("data.classes=('a','b','c')",))
    with pytest.warns(UserWarning, match="1 of 3 classes have no labelled pixel in 2 validation images: c"):
        engine.evaluate(config, result["best"], progress=False)


def test_a_single_class_is_refused(tmp_path):
    for split in ("train", "val"):
        masks(tmp_path, split, [0], [0])
        write(tmp_path / "sorted" / split / "only" / "0.png", np.zeros((8, 8, 3)))
    with pytest.raises(TaskError, match="no class but 'all'"):
        task_of(config_file(tmp_path), "data.classes=('all',)").check_data()
    data = {"name": "folder", "root": str(tmp_path / "sorted"), "size": 32}
    path = config_file(tmp_path, task="classify", model={"name": "nat_atto"}, data=data)
    with pytest.raises(TaskError, match="has one class, 'only'"):
        engine.train(engine.load_config(path, ()), tmp_path / "run", progress=False)


def coco(root, crowd, held_out_crowd):
    """Three classes, of which only the second has objects; panoptic segments beside the instances."""
    for split, is_crowd in (("train", crowd), ("val", held_out_crowd)):
        write(root / "images" / split / "0.png", np.zeros((32, 32, 3)))
        write(root / f"panoptic_{split}" / "0.png", np.broadcast_to([1, 0, 0], (32, 32, 3)))
        image = {"id": 1, "file_name": "0.png", "height": 32, "width": 32}
        runs = {"size": [32, 32], "counts": [0, 320, 704]}
        thing = {"id": 1, "category_id": 2, "iscrowd": is_crowd, "bbox": [0, 0, 10, 32], "area": 320}
        categories = [{"id": number, "name": name, "isthing": 1} for number, name in ((1, "a"), (2, "b"), (3, "c"))]
        content = {"images": [image], "categories": categories}
        instances = content | {"annotations": [thing | {"image_id": 1, "segmentation": runs}]}
        (root / f"instances_{split}.json").write_text(json.dumps(instances))
        segments = [{"image_id": 1, "file_name": "0.png", "segments_info": [thing]}]
        (root / f"panoptic_{split}.json").write_text(json.dumps(content | {"annotations": segments}))


TASKS = {
    "boxes": {"task": "detect", "model": {"head": "retinanet", "backbone": "nat_atto"}},
    "masks": {"task": "detect", "model": {"head": "mask_rcnn", "backbone": "nat_atto"}},
    "instances": {"task": "segment", "model": {"head": "mask2former", "backbone": "nat_atto", "output": "instance"}},
    "panoptic": {"task": "segment", "model": {"head": "mask2former", "backbone": "nat_atto", "output": "panoptic"}},
}


@pytest.mark.parametrize("kind", TASKS)
def test_crowds_alone_are_refused_and_other_classes_are_named(kind, tmp_path):
    name = "panoptic" if kind == "panoptic" else "instances"
    data = {"name": "coco_panoptic" if kind == "panoptic" else "coco", "root": str(tmp_path), "augment": {"crop": 32}}
    for split in ("train", "val"):
        data[split] = {"annotations": f"{name}_{split}.json", "images": f"images/{split}"}
    path = config_file(tmp_path, **TASKS[kind], data=data)
    coco(tmp_path, 0, 1)
    with pytest.raises(TaskError, match=r"the validation images have no (object|segment) that counts.*measure by"):
        engine.train(engine.load_config(path, ()), tmp_path / "run", progress=False)
    coco(tmp_path, 1, 0)
    with pytest.raises(TaskError, match=r"the training images have no (object|segment) that counts.*learn from"):
        engine.train(engine.load_config(path, ()), tmp_path / "run", progress=False)
    assert len(task_of(path).check_data(training=False)) == 1
    coco(tmp_path, 0, 0)
    lines = task_of(path).check_data()
    assert ["training" in line for line in lines] == [True, False]
    assert all(line.startswith("2 of 3 classes have no ") and line.endswith("images: a, c") for line in lines)


def test_a_metric_that_damaged_images_leave_nothing_for_is_an_error_that_says_so():
    class Nothing:
        metric = "mask_ap"

        def measure(self, predictions, targets):
            return {}

    samples = Samples([0, 1], None)
    samples.damaged[0] = True
    metric = Metric(Nothing(), samples)
    metric.process(([0, 1], [0, 1]), [0, 1])
    with pytest.raises(TaskError, match=r"mask_ap can't be measured: of 2 held-out images 1 can't be read"):
        metric.evaluate(2)


def test_classes_absent_from_truth_and_prediction_are_no_perfect_score():
    truth = torch.tensor([[0, 0, 1, 1], [IGNORE] * 4])
    measured = measure_labels(count_labels([(torch.tensor([[0, 1, 1, 1], [2] * 4]), truth)], 3))
    assert torch.isnan(measured["iou"]).tolist() == [False, False, True]
    assert measured["miou"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    nothing = measure_labels(count_labels([(torch.zeros(2, 4), torch.full((2, 4), IGNORE))], 3))
    assert np.isnan(nothing["miou"])
    assert np.isnan(nothing["aacc"])
