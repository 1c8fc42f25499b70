"""Predictors of published detectors and segmenters, from files that hold random weights in their place."""

import threading

import numpy as np
import pytest
import timm
import torch
from foveate.tasks import TaskError
from foveate.tasks.classify import Predictor as Classifier
from foveate.tasks.data.class_names import class_names, folder_names
from foveate.tasks.dense.detect import create_detector
from foveate.tasks.dense.segment import create_segmenter
from foveate.tasks.detect import Predictor
from foveate.tasks.predictors import is_published, load_dense, load_published
from foveate.zoo import CheckpointError
from PIL import Image

from .published_names import MASK2FORMER, renamed


def save(model, path):
    torch.save({"state_dict": model.state_dict()}, path)
    return path


def test_a_published_detector_knows_its_classes(tmp_path):
    path = save(create_detector("retinanet", "foveate_davit_tiny"), tmp_path / "weights.pth")
    predictor = load_published("foveate_davit_tiny.dingmyu_retinanet_coco_1x", weights=path)
    assert (predictor.classes[0], predictor.classes[79]) == ("person", "toothbrush")
    assert predictor.model.head.selection == "anchors"
    assert predictor.model.transform.min_size == (800,)
    with pytest.raises(CheckpointError, match="holds a retinanet, not a mask_rcnn"):
        load_published("foveate_davit_tiny.dingmyu_mask_rcnn_coco_1x", weights=path)


def test_a_classifier_s_images_are_resized_beside_each_other():
    predictor = Classifier.from_model("nat_atto", timm.create_model("nat_atto"))
    draw, both = np.random.default_rng(0), threading.Barrier(2)
    images = [Image.fromarray(draw.integers(0, 256, (30, 40), np.uint8)) for _ in range(2)]
    alone = [predictor([image]) for image in images]
    transform = predictor.transform

    def resize(image):
        both.wait(timeout=60)  # broken, unless there are two at once
        return transform(image)

    predictor.transform = resize
    for (single,), pair in zip(alone, predictor(images), strict=True):
        assert [name for name, _ in single] == [name for name, _ in pair]
        assert [share for _, share in single] == pytest.approx([share for _, share in pair], abs=1e-5)


def test_a_published_dino_is_a_detector(tmp_path):
    path = save(create_detector("dino", "resnet18", 80), tmp_path / "weights.pth")
    predictor = load_dense("dino", "resnet18", path)
    assert isinstance(predictor, Predictor)
    assert (predictor.classes[0], predictor.classes[79]) == ("person", "toothbrush")
    assert predictor.card["head"] == "dino"


@pytest.mark.heavy
def test_published_dino_models_are_opened_by_their_names(tmp_path):
    path = save(create_detector("dino", "transnext_tiny"), tmp_path / "weights.pth")
    predictor = load_published("transnext_tiny.shi_dino_coco_1x", weights=path)
    assert predictor.card["head"] == "dino"
    assert predictor.classes[0] == "person"


def test_a_published_segmenter_resizes_as_published(tmp_path):
    path = save(create_segmenter("semantic_fpn", "quadtree_b0"), tmp_path / "weights.pth")
    predictor = load_published("quadtree_b0.tang_semantic_fpn_ade20k_160k", weights=path)
    assert predictor.classes[:2] == ["wall", "building"]
    assert predictor.rule(Image.new("RGB", (100, 60))).shape == (3, 512, 864)
    assert predictor.output == "semantic"


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "task", "things"),
    [
        ("dinat_large.shi_mask2former_ade20k_panoptic", "panoptic", 100),
        ("dinat_large.shi_mask2former_cityscapes_semantic", "semantic", None),
        ("dinat_large.shi_oneformer_cityscapes", "panoptic", 8),
    ],
)
def test_a_published_mask_transformer_knows_its_task(name, task, things, tmp_path):
    head = "oneformer" if "oneformer" in name else "mask2former"
    recipe = name.partition(f"{head}_")[2]
    path = save(create_segmenter(head, "dinat_large", setting=recipe), tmp_path / "weights.pth")
    predictor = load_published(name, weights=path)
    assert predictor.output == task
    assert things is None or sum(predictor.things) == things


@pytest.mark.heavy
def test_mask2former_on_transnext_is_mmsegs(open_fixture, tmp_path):
    body = open_fixture("transnext/transnext_tiny_seg_256x320")
    model = create_segmenter("mask2former", "transnext_tiny", setting="ade20k_semantic")
    head = renamed(
        {name: value for name, value in model.state_dict().items() if name.startswith("head.")}, *MASK2FORMER
    )
    state = {f"backbone.{name}": value for name, value in body.state().items()}
    torch.save({"state_dict": state | head, "meta": {}}, path := tmp_path / "weights.pth")
    predictor = load_published("transnext_tiny.shi_mask2former_ade20k_semantic", weights=path)
    assert (predictor.output, predictor.classes[:2]) == ("semantic", ["wall", "building"])
    assert predictor.rule(Image.new("RGB", (100, 60))).shape == (3, 512, 853)
    assert predictor.model.head.predictor.query_embed.num_embeddings == 100
    torch.testing.assert_close(predictor.model.head.state_dict(), model.head.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        maps = predictor.model.backbone(body.input())
    body.assert_output("stage4", maps[3], 1.5e-5 * body.spec["outputs"]["stage4"]["std"])


def test_what_was_not_published_is_said_so():
    assert is_published("nat_tiny.shi_mask_rcnn_coco_3x")
    assert not is_published("nat_tiny")
    with pytest.raises(TaskError, match="foveate list --detectors"):
        load_published("nat_tiny.mask_rcnn")
    with pytest.raises(TaskError, match="no weights were published; train it: foveate train detect/mask_rcnn_biformer"):
        load_published("biformer_small.mask_rcnn_coco_1x")


def test_folders_of_imagenet_may_be_named_after_its_synsets(tmp_path):
    classes = class_names("imagenet-1k", 1000)
    assert folder_names(classes, tmp_path) == classes
    (tmp_path / "n01443537").mkdir()
    assert classes[folder_names(classes, tmp_path).index("n01443537")] == "goldfish, Carassius auratus"
    assert folder_names(["n01443537", "b"], tmp_path) == ["n01443537", "b"]


def test_class_names_are_as_many_as_the_classes():
    assert len(class_names("coco", 80)) == 80
    assert class_names("coco", 133)[79:81] == ["toothbrush", "class 80"]
    assert class_names("ade20k", 100)[0] == "class 0"
    assert class_names("cityscapes", 19)[18] == "bicycle"
    assert class_names("imagenet-1k", 1000)[281] == "tabby, tabby cat"
    assert class_names("imagenet-1k", 2) == ["class 0", "class 1"]
    assert class_names("", 2) == ["class 0", "class 1"]
