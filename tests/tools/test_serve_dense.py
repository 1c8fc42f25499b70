"""Detectors and segmenters by their ONNX files: foveate predict answers as by the checkpoints."""

import json

import numpy as np
import pytest
import torch
from foveate import create_detector, create_segmenter
from foveate.tasks.checkpoints import save_checkpoint
from foveate.tasks.data.coco import decode_masks
from foveate.tasks.data.segmentation import InputRule
from foveate.tasks.detect.task import detector_card
from foveate.tasks.segment.task import segmenter_card
from foveate.tools.cli import main
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

_CLASSES = list("abcde")
_SIZE = 64, 96
_REGIONS = dict(channels=16, hidden=16, score_threshold=0.2)
_QUERIES = dict(dim=32, num_queries=10, encoder_layers=1, encoder_hidden=32, decoder_layers=2, decoder_hidden=32)
OPTIONS = {
    "mask_rcnn": _REGIONS,
    "faster_rcnn": _REGIONS,
    "retinanet": dict(channels=16, score_threshold=0.005),
    "dino": dict(hidden=32, num_queries=10, encoder_layers=1, decoder_layers=1, num_levels=2, max_detections=12),
    "semantic_fpn": dict(channels=16),
    **dict.fromkeys(("mask2former", "oneformer"), _QUERIES | dict(num_heads=2, topk=20)),
}
# Of the weights of heads whose answers would else be all alike.
SPREAD = {"retinanet": 1.2, "mask2former": 1.5, "oneformer": 1.5}
TEST = {"mode": "whole", "crop_size": None, "stride": None, "scales": (1.0,), "flip": False}


def checkpoint(head, output, path):
    """Write a small model whose answers vary, as a run does."""
    torch.manual_seed(0)
    options, backbone = dict(OPTIONS[head]), "test_resnet"
    described = {"head": head, "backbone": backbone, "setting": "auto", "backbone_kwargs": {}}
    if output is None:
        options |= {"min_size": _SIZE[0], "max_size": _SIZE[1]}
        model = create_detector(head, backbone, len(_CLASSES), **options)
        card = detector_card(described | {"kwargs": options}, _CLASSES)
    else:
        things = [False, True, False, True, False]
        if head != "semantic_fpn":
            options |= {"things": (1, 3), "object_threshold": 0.3, "overlap_threshold": 0.3}
        model = create_segmenter(head, backbone, len(_CLASSES), **options)
        rule = InputRule(*_SIZE, 1, model.mean, model.std)
        card = segmenter_card(described | {"kwargs": options}, _CLASSES, things, output, rule, TEST)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
        if head in SPREAD:
            _vary(model, SPREAD[head])
    save_checkpoint({"card": card, "state_dict": model.state_dict()}, path)


def _vary(model, spread):
    """Let maps, scores and classes vary as of trained weights; else they are all but constant."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=spread * module.weight[0].numel() ** -0.5)
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
            module.train()
    images = torch.randn(4, 3, *_SIZE, generator=torch.Generator().manual_seed(0))
    model.backbone(images)
    model.eval()
    if not hasattr(model.head, "predictor"):
        return
    predictor, logits = model.head.predictor, []
    for name, parameter in predictor.named_parameters():
        if name.startswith("query"):
            parameter.mul_(5)
    handle = predictor.class_embed.register_forward_hook(lambda module, args, output: logits.append(output))
    model(images[:1])
    handle.remove()
    predictor.class_embed.weight.mul_(12)
    predictor.class_embed.bias.sub_(12 * logits[-1].flatten(0, -2).mean(0))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Photographs of the file's size, of its shape but larger, and of another shape."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, (height, width) in {"same": _SIZE, "larger": (128, 192), "upright": (90, 60)}.items():
        coarse = Image.fromarray(draw.integers(0, 256, (8, 12, 3), np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    return folder


def answers(model, images, output):
    argv = ["predict", str(images), "--model", str(model), "--output", str(output), "--threshold", "0.01"]
    assert main(argv) == 0
    entries = json.loads((output / "predictions.json").read_text())
    return {entry["image"].rpartition("/")[2].removesuffix(".png"): entry for entry in entries}


CASES = [
    ("mask_rcnn", None, ()),
    ("semantic_fpn", "semantic", ()),
    *((head, None, how) for head in ("faster_rcnn", "retinanet", "dino") for how in ((), ("--dynamic-size",))),
    ("semantic_fpn", "semantic", ("--dynamic-size",)),
    *(("mask2former", output, ()) for output in ("semantic", "instance", "panoptic")),
    ("mask2former", "instance", ("--dynamic-size",)),
    ("oneformer", "panoptic", ()),
]


@pytest.mark.parametrize(
    ("head", "output", "how"),
    [pytest.param(*case, marks=() if index < 2 else pytest.mark.heavy) for index, case in enumerate(CASES)],
)
def test_an_onnx_file_answers_as_the_checkpoint(head, output, how, images, tmp_path):
    path, file = tmp_path / "model.pth", tmp_path / "model.onnx"
    checkpoint(head, output, path)
    size = ["--size", *map(str, _SIZE)]
    # Random weights of such a size let rounding grow; that of Mask2Former's scores to 1.5e-4.
    tolerance = "2e-4" if head == "mask2former" else "1e-4"
    assert main(["export", str(path), str(file), *size, *how, "--tolerance", tolerance]) == 0
    expected, got = answers(path, images, tmp_path / "torch"), answers(file, images, tmp_path / "onnx")
    # A file of one size pads what has another shape, which a model sees.
    # And where sizes differ, labels and masks are resized, where a checkpoint's scores are.
    for name in expected if how else ("same", "larger"):
        same = name == "same"
        if output in ("semantic", "panoptic"):
            kind = {"semantic": "labels", "panoptic": "map"}[output]
            a, b = (np.asarray(Image.open(entry[name][kind])) for entry in (expected, got))
            assert len(np.unique(a)) > 1
            assert np.mean(a != b) <= (0.001 if same else 0.1)
        if output == "panoptic":
            assert len(expected[name]["segments"]) == len(got[name]["segments"]) > 1
            pairs = zip(expected[name]["segments"], got[name]["segments"], strict=True)
            assert all(a["class"] == b["class"] and a["thing"] == b["thing"] for a, b in pairs)
        if output not in ("semantic", "panoptic"):
            # A query's score is the mean over its mask, which is resized.
            scores = 1e-4 if same or output is None else 0.01
            _check_objects(expected[name]["objects"], got[name]["objects"], 0.001 if same else 0.1, scores)
    # It is made to fit all the same, and answered in its own pixels.
    assert Image.open(got["upright"]["picture"]).size == Image.open(expected["upright"]["picture"]).size


def _check_objects(expected, got, borders, scores):
    assert len(expected) == len(got) > 2
    for one in expected:
        # Masks of random weights may all have the whole image as their box.
        other = min(
            got,
            key=lambda other: (
                abs(np.subtract(one["box"], other["box"])).max()
                + (one["class"] != other["class"])
                + 10 * abs(one["score"] - other["score"])
            ),
        )
        assert one["score"] == pytest.approx(other["score"], abs=scores)
        assert one["box"] == pytest.approx(other["box"], abs=0.02)
        if "mask" in one:
            a, b = decode_masks([one["mask"], other["mask"]], *one["mask"]["size"])
            assert np.mean(a != b) <= borders


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("head", "output", "how"),
    [
        ("semantic_fpn", "semantic", ("--int8", "--calibration", "1")),
        ("mask_rcnn", None, ("--int8", "--calibration", "1")),
        ("mask_rcnn", None, ("--dtype", "float16")),
    ],
)
def test_a_smaller_file_is_measured(head, output, how, images, tmp_path, capsys):
    path, file = tmp_path / "model.pth", tmp_path / "model.onnx"
    checkpoint(head, output, path)
    argv = ["export", str(path), str(file), "--size", *map(str, _SIZE), *how, "--data", str(images)]
    assert main([*argv, "--tolerance", "1e-4", "--max-drop", "1"]) == 0
    text = capsys.readouterr().out
    assert "| file | images/s | MB | agreement | speed |" in text
    assert ("On 2 held-out images" if "--int8" in how else "On 3 images") in text
    assert answers(file, images, tmp_path / "out").keys() == {"same", "larger", "upright"}
