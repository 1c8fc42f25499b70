"""Short runs of detection and segmentation; the heavy ones hold the recipes to their floors."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from foveate.tasks import TaskError, engine
from foveate.tasks.dense.detect import create_detector
from foveate.tasks.dense.segment import create_segmenter
from foveate.tasks.engine.hooks import RunHook
from foveate.tasks.predictors import load_predictor
from foveate.tools.cli import main
from foveate.zoo import CheckpointError
from PIL import Image

MASK_RCNN, DINO, UPERNET, MASK2FORMER = (
    "detect/mask_rcnn_nat_atto_nuclei",
    "detect/dino_nat_atto_nuclei",
    "segment/upernet_nat_atto_nuclei",
    "segment/mask2former_nat_atto_nuclei",
)
SHORT = {
    MASK_RCNN: (
        "epochs=3",
        "data.repeat=32",
        "batch_size=2",
        "data.augment.crop=96",
        "model.kwargs.channels=32",
        "model.kwargs.hidden=32",
        "model.kwargs.region_samples=32",
        "schedule.warmup_iterations=1",
    ),
    DINO: (
        "epochs=3",
        "data.repeat=32",
        "batch_size=2",
        "data.augment.crop=96",
        "model.kwargs.hidden=32",
        "model.kwargs.num_queries=60",
        "model.kwargs.encoder_layers=1",
        "model.kwargs.decoder_layers=1",
        "schedule.warmup_iterations=1",
    ),
    UPERNET: (
        "epochs=4",
        "data.repeat=48",
        "batch_size=4",
        "data.augment.crop=96",
        "model.kwargs.channels=16",
        "schedule.warmup_iterations=1",
    ),
    MASK2FORMER: (
        "epochs=2",
        "data.repeat=24",
        "batch_size=2",
        "data.augment.crop=96",
        "model.kwargs.num_queries=20",
        "model.kwargs.dim=32",
        "model.kwargs.num_points=256",
        "schedule.warmup_iterations=1",
    ),
}
METRICS = {
    MASK_RCNN: {"box_ap", "box_ap50", "mask_ap", "mask_ap50", "mask_ar100"},
    DINO: {"box_ap", "box_ap50"},
    UPERNET: {"miou", "macc", "aacc", "mdice", "iou_nucleus"},
    MASK2FORMER: {"pq", "sq", "rq", "pq_things", "pq_stuff"},
}


def train(recipe, output, *overrides, resume=False):
    config = engine.load_config(recipe, (*SHORT[recipe], *overrides))
    return config, engine.train(config, output, resume=resume, progress=False)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    from foveate.tasks.data.samples import load_nuclei_half

    path = tmp_path_factory.mktemp("images") / "heldout.png"
    # With 16 bits, as it is bundled and as the demo leaves it.
    Image.fromarray(load_nuclei_half("val")[0]).save(path)
    return path


@pytest.mark.parametrize("recipe", [pytest.param(x, marks=pytest.mark.heavy) if x == DINO else x for x in SHORT])
def test_a_run_learns_is_drawn_measured_again_and_predicted_with(recipe, tmp_path, image):
    config, result = train(recipe, tmp_path / "run")
    first, last = result["history"][0], result["history"][-1]
    assert last["train/loss"] < first["train/loss"]
    assert METRICS[recipe] <= {key.removeprefix("val/") for key in last}
    assert result["metric"] in METRICS[recipe]
    for name, _ in result["pictures"]:
        with Image.open(tmp_path / "run" / name) as picture:
            assert min(picture.size) > 300
    metrics, predictions, _ = engine.evaluate(config, result["last"], progress=False)
    assert metrics == {key[4:]: value for key, value in last.items() if key.startswith("val/")}
    argv = ["predict", str(image), "--model", str(result["last"]), "--output", str(tmp_path / "out")]
    assert main([*argv, "--threshold", "0.05"]) == 0
    (entry,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    with Image.open(entry["picture"]) as picture:
        assert min(picture.size) > 300
    if recipe in (MASK_RCNN, DINO):
        assert all(thing["class"] == "nucleus" and 0.05 <= thing["score"] <= 1 for thing in entry["objects"])
    elif recipe == UPERNET:
        # Background alone gives 0.41.
        assert metrics["miou"] > 0.5
        assert sum(part["share"] for part in entry["classes"]) == pytest.approx(1, abs=1e-5)
        with Image.open(entry["labels"]) as labels:
            assert labels.size == (256, 512)
            assert np.array_equal(np.asarray(labels), predictions[0].numpy())
    else:
        with Image.open(entry["map"]) as numbers:
            assert numbers.size == (256, 512)


@pytest.mark.parametrize(
    ("recipe", "mark"),
    [(MASK_RCNN, "neck.simfp_2.0.weight"), (UPERNET, "neck.lateral_convs.3.conv.weight")],
)
def test_a_plain_vision_transformer_is_trained_and_its_file_is_read_again(recipe, mark, tmp_path, image):
    """ViTDet's pyramid under the detector, mmseg's MultiLevelNeck under UperNet."""
    small = ("model.backbone=vit_tiny_patch16_224", "model.backbone_kwargs={'depth': 4, 'embed_dim': 48}")
    short = ("epochs=2", "val_interval=2", "data.repeat=8", "batch_size=2", "data.augment.crop=64")
    short += ("model.kwargs.max_detections=5",) if recipe == MASK_RCNN else ()
    _, result = train(recipe, tmp_path / "run", "model.setting=None", *small, *short)
    assert result["history"][-1]["train/loss"] < result["history"][0]["train/loss"]
    assert METRICS[recipe] <= {key.removeprefix("val/") for key in result["history"][-1]}
    assert mark in torch.load(result["last"], weights_only=True)["state_dict"]
    assert main(["predict", str(image), "--model", str(result["last"]), "--output", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(("recipe", "options"), [(UPERNET, ()), (DINO, ("grad_checkpointing=True", "val_interval=2"))])
def test_a_run_continues_to_the_same_bits(recipe, options, tmp_path, monkeypatch):
    short = ("epochs=2", "data.repeat=4", "batch_size=2", *options)
    _, straight = train(recipe, tmp_path / "straight", *short)
    check = RunHook._check_finite

    def interrupted(self, runner, again=False):
        if runner.epoch == 1:
            raise KeyboardInterrupt
        check(self, runner, again)

    with monkeypatch.context() as patch:
        patch.setattr(RunHook, "_check_finite", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "broken", *short)
    _, resumed = train(recipe, tmp_path / "broken", *short, resume=True)
    states = [torch.load(run["last"], weights_only=True)["state_dict"] for run in (straight, resumed)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert resumed["pictures"]
    wrong = "holds a model to segment, not a model to detect" if recipe == UPERNET else "its model is dino on nat_atto"
    with pytest.raises((CheckpointError, TaskError), match=wrong):
        engine.evaluate(engine.load_config(MASK_RCNN), resumed["best"])
    predictor = load_predictor(resumed["best"])
    found = predictor([Image.new("L", (45, 33))])[0]
    assert found.shape == (33, 45) if recipe == UPERNET else len(found["boxes"][0]) == 4


# What a file tells of a variant, and a config need not.
FROM_A_FILE = {
    MASK_RCNN: {"channels": 24, "hidden": 40},
    UPERNET: {"channels": 24, "aux_head": False},
    MASK2FORMER: {"num_queries": 10, "dim": 64, "encoder_layers": 1, "decoder_layers": 2, "encoder_hidden": 24},
}


@pytest.mark.parametrize(
    ("recipe", "head"),
    [(MASK_RCNN, "mask_rcnn"), (UPERNET, "upernet"), (MASK2FORMER, "mask2former"), (MASK2FORMER, "oneformer")],
)
def test_a_run_from_another_variant_and_classes_is_rebuilt_from_its_folder_alone(recipe, head, tmp_path, image):
    settings = (*SHORT[recipe], "epochs=1", "data.repeat=4", "batch_size=2", "schedule.warmup_iterations=0")
    config = engine.load_config(recipe, (*settings, "schedule.name=step"))
    model, variant = config["model"], FROM_A_FILE[recipe]
    kwargs = {key: value for key, value in model["kwargs"].items() if key not in variant}
    create = create_detector if recipe == MASK_RCNN else create_segmenter
    start = tmp_path / "start.pth"
    torch.manual_seed(0)
    given = create(head, model["backbone"], num_classes=5, **kwargs, **variant)
    torch.save({"state_dict": given.state_dict()}, start)

    model |= {"checkpoint": str(start), "kwargs": kwargs}
    with pytest.raises(CheckpointError, match=r"has 5 classes, the data \d; .*model\.kwargs\.reset_classifier=True"):
        engine.train(config, tmp_path / "refused", progress=False)
    model["kwargs"] = kwargs | {"reset_classifier": True}
    run = tmp_path / "run"
    result = engine.train(config, run, progress=False)
    start.unlink()
    for config in ([str(run / "config.py")], []):  # and by the checkpoint alone
        assert main(["eval", *config, str(run / "best.pth"), "--json", str(tmp_path / "metrics.json")]) == 0
        assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(result["metrics"], nan_ok=True)
    out = tmp_path / "out"
    assert main(["predict", str(image), "--checkpoint", str(run / "best.pth"), "--output", str(out)]) == 0
    assert main(["export", str(run), str(tmp_path / "maps.pt2"), "--features", "--size", "64"]) == 0
    assert main(["export", str(run), str(tmp_path / "weights.safetensors")]) == 0
    assert main(["predict", str(image), "--model", str(tmp_path / "weights.safetensors"), "--output", str(out)]) == 0
    assert main(["train", str(run / "config.py"), "epochs=2", "--output", str(run), "--resume"]) == 0
    assert [entry["epoch"] for entry in json.loads((run / "history.json").read_text())] == [1, 2]


def test_a_run_that_began_before_cards_left_out_the_start_is_rebuilt_too(tmp_path, image):
    """Its card says reset_classifier, and the widths are told by the weights alone."""
    run = tmp_path / "run"
    _, result = train(UPERNET, run, "epochs=1", "data.repeat=4", "batch_size=2", "schedule.warmup_iterations=0")
    checkpoint = torch.load(result["best"], weights_only=True)
    kwargs = {key: value for key, value in checkpoint["card"]["kwargs"].items() if key != "channels"}
    checkpoint["card"]["kwargs"] = kwargs | {"reset_classifier": True}
    torch.save(checkpoint, run / "old.pth")
    predictor, expected = load_predictor(run / "old.pth"), load_predictor(result["best"])
    with Image.open(image) as opened:
        assert torch.equal(predictor([opened])[0], expected([opened])[0])


@pytest.mark.parametrize(
    ("recipe", "override", "reason"),
    [
        (MASK_RCNN, "model.backbone=nat_ato", "did you mean 'nat_atto'"),
        (MASK_RCNN, "model.head=mask_rccn", "must be auto or one of dino, retinanet"),
        (MASK_RCNN, "model.kwargs.chanels=3", "chanels"),
        (MASK_RCNN, "data.augment.corp=3", "did you mean 'crop'"),
        (MASK_RCNN, "model.pretrained=True model.backbone=foveate_host_atto", "published weights can't be loaded"),
        (UPERNET, "model.output=panoptic", "panoptic segmentation needs mask2former"),
        (UPERNET, "model.kwargs.chanels=3", "chanels"),
        (UPERNET, "data.augment.crop=None", r"data\.augment\.crop is not set"),
        (UPERNET, "model.backbone=None", r"model\.backbone is not set"),
    ],
)
def test_a_setting_that_cannot_be_done_is_refused(recipe, override, reason, tmp_path):
    with pytest.raises(ValueError, match=reason) as caught:
        train(recipe, tmp_path / "run", *override.split())
    assert "\n" not in str(caught.value)


def test_a_coco_recipe_says_what_it_needs(tmp_path):
    config = engine.load_config("detect/mask_rcnn_nat_tiny_3x_coco", [f"data.root={tmp_path}"])
    with pytest.raises(TaskError, match=r"train2017: no such folder \(data\.root and data\.train\.images\)"):
        engine.train(config, tmp_path / "run", progress=False)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("recipe", "floors"),
    [(MASK_RCNN, {"box_ap50": 0.80, "mask_ap50": 0.75}), (UPERNET, {"iou_nucleus": 0.85}), (MASK2FORMER, {"pq": 0.5})],
)
def test_a_recipe_reaches_its_floors(recipe, floors, tmp_path):
    result = engine.train(engine.load_config(recipe), tmp_path / "run", progress=False)
    for name, floor in floors.items():
        assert result["metrics"][name] >= floor


@pytest.mark.parametrize("recipe", SHORT)
def test_two_processes_measure_what_one_does(recipe, tmp_path):
    """Only the first measures; a measure that waited for the other would wait for ever."""
    options = (*SHORT[recipe], "epochs=1", "schedule.warmup_iterations=0", "data.repeat=8", "device=cpu")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "foveate", "train", recipe, *options, "--output", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "two" / "history.json").read_text())[-1]
    metrics, *_ = engine.evaluate(engine.load_config(recipe, options), tmp_path / "two" / "last.pth", progress=False)
    assert METRICS[recipe] <= metrics.keys()
    for name in METRICS[recipe]:
        assert measured[f"val/{name}"] == pytest.approx(metrics[name], abs=1e-5, nan_ok=True)
