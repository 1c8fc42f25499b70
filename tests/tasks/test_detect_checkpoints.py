"""Whole detectors' files: the variant is read from them, they load strictly, in every container."""

import logging
from pathlib import Path

import foveate
import pytest
import torch
from foveate.tasks import TaskError
from foveate.tasks.dense.detect import create_detector
from foveate.zoo import CheckpointError
from torch import nn

# Published widths and those of the small models here; the hidden layers see maps of 7 x 7.
SMALL = {256: 16, 1024: 24, 12544: 16 * 49}
BACKBONES = {
    "nat/nat_mini_det_256x320": "nat_mini",
    "dinat/dinat_mini_det_256x320": "dinat_mini",
    "dinat_s/dinat_s_tiny_det_256x320": "dinat_s_tiny",
    "dat_pp/dat_pp_tiny_det_256x320": "dat_pp_tiny",
    "davit/davit_tiny_dense": "foveate_davit_tiny",
    "quadtree/quadtree_b0_dense_256x320": "quadtree_b0",
    "agent/agent_pvt_tiny_dense": "agent_pvt_tiny",
    "agent/agent_swin_tiny_dense": "agent_swin_tiny",
}
DEFAULT = ("nat/nat_mini_det_256x320", "quadtree/quadtree_b0_dense_256x320")


class StubBackbone(nn.Module):
    def __init__(self, channels=(64, 128, 320, 512)):
        super().__init__()
        self.channels = list(channels)


def published(open_fixture, kind: str, classes: int = 80, channels=(64, 128, 320, 512)) -> dict[str, torch.Tensor]:
    """A published state dict of neck and heads, with narrower layers."""
    fixture = open_fixture(f"dense/loss_{kind}_a")
    of_level = dict(zip((64, 128, 320, 512), channels, strict=True))
    of_classes = {80: classes, 81: classes + 1, 320: 4 * classes, 720: 9 * classes}
    state = {}
    for name, shape in fixture.spec["state"].items():
        if name.startswith("neck"):
            shape = [SMALL.get(size) or of_level.get(size, size) for size in shape]
        else:
            head = name.startswith(("roi_head", "bbox_head")) and (
                "fc_" in name or "logits" in name or "retina" in name
            )
            shape = [SMALL.get(size, of_classes.get(size, size) if head else size) for size in shape]
        state[name] = fixture.golden.tensor_for(name, tuple(shape))
    return state


def save(state: dict, folder: Path) -> Path:
    path = folder / "detector.pth"
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("kind", "head", "style"),
    [
        ("maskrcnn", "mask_rcnn", None),
        ("cascade", "cascade_mask_rcnn", "default"),
        ("cascade_swin", "cascade_mask_rcnn", "swin"),
        ("retinanet", "retinanet", None),
    ],
)
def test_the_variant_is_read_from_the_file(kind, head, style, open_fixture, tmp_path):
    state = published(open_fixture, kind, classes=7)
    model = create_detector(head, StubBackbone(), checkpoint=save({"meta": {}, "state_dict": state}, tmp_path))
    assert model.num_classes == 7
    assert model.neck.channels == [16] * 5
    heads = model.roi_heads.box_heads if style else ()
    assert [len(box_head.tower) for box_head in heads] == {"swin": [7] * 3, "default": [5] * 3, None: []}[style]
    assert [box_head.bbox_pred.out_features for box_head in heads] == (
        [28 if style == "swin" else 4] * 3 if style else []
    )
    # Every entry has arrived, and nothing else.
    floats = [value for value in model.state_dict().values() if value.is_floating_point()]
    assert sorted(float(value.double().sum()) for value in floats) == sorted(
        float(value.double().sum()) for value in state.values()
    )
    assert model.load_report.matched == len(state)


@pytest.mark.parametrize("source", ["on_input", "on_output"])
def test_the_extra_level_is_read_from_the_file(source, open_fixture, tmp_path):
    state = published(open_fixture, "maskrcnn")
    state["neck.fpn_convs.4.conv.weight"] = torch.randn(16, 512 if source == "on_input" else 16, 3, 3)
    state["neck.fpn_convs.4.conv.bias"] = torch.randn(16)
    model = create_detector("mask_rcnn", StubBackbone(), checkpoint=save(state, tmp_path))
    assert model.neck.extra_blocks.source == source
    assert torch.equal(model.neck.extra_blocks.convs[0].weight, state["neck.fpn_convs.4.conv.weight"])


def test_containers_are_read(open_fixture, tmp_path):
    from mmengine.logging import MessageHub

    state = published(open_fixture, "retinanet", classes=3)
    hub = MessageHub("curves")
    hub.update_scalar("train/loss", 0.5)
    containers = (
        state,
        {"meta": {"epoch": 12, "CLASSES": ("a", "b", "c")}, "state_dict": state, "optimizer": {"state": {}}},
        {"meta": {"cfg": "model = dict()"}, "state_dict": state, "message_hub": hub.state_dict()},
        {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        {"state_dict": state | {"data_preprocessor.mean": torch.zeros(3, 1, 1)}},
    )
    for container in containers:
        model = create_detector("retinanet", StubBackbone(), checkpoint=save(container, tmp_path))
        assert torch.equal(model.head.cls_logits.weight, state["bbox_head.retina_cls.weight"])


def test_our_own_file_is_read_too(tmp_path):
    torch.manual_seed(0)
    options = {"num_classes": 2, "channels": 16, "hidden": 24, "min_size": 64}
    model = create_detector("cascade_mask_rcnn", "nat_atto", style="default", **options).eval()
    path = save({"card": {}, "state_dict": model.state_dict()}, tmp_path)
    again = create_detector("cascade_mask_rcnn", "nat_atto", checkpoint=path, min_size=64).eval()
    image = torch.rand(3, 61, 83)
    with torch.inference_mode():
        expected, found = model([image])[0], again([image])[0]
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_file_that_does_not_fit_is_refused(open_fixture, tmp_path):
    state = published(open_fixture, "maskrcnn", classes=5)
    path = save(state, tmp_path)
    with pytest.raises(CheckpointError, match="has 5 classes, not 80; leave num_classes out"):
        create_detector("mask_rcnn", StubBackbone(), num_classes=80, checkpoint=path)
    with pytest.raises(CheckpointError, match="holds a mask_rcnn, not a retinanet"):
        create_detector("retinanet", StubBackbone(), checkpoint=path)
    with pytest.raises(CheckpointError, match="1 of another shape"):
        create_detector("mask_rcnn", StubBackbone((64, 128, 256, 512)), checkpoint=path)
    with pytest.raises(CheckpointError, match="1 unexpected"):
        create_detector("mask_rcnn", StubBackbone(), checkpoint=save(state | {"neck.more": torch.zeros(1)}, tmp_path))
    missing = {key: value for key, value in state.items() if key != "rpn_head.rpn_cls.bias"}
    with pytest.raises(CheckpointError, match=r"1 missing \(rpn.head.cls_logits.bias\)"):
        create_detector("mask_rcnn", StubBackbone(), checkpoint=save(missing, tmp_path))
    with pytest.raises(CheckpointError, match="holds no detector"):
        create_detector("mask_rcnn", StubBackbone(), checkpoint=save({"fc.weight": torch.zeros(1)}, tmp_path))


def test_other_classes_are_learned_from_a_file(open_fixture, tmp_path, caplog):
    state = published(open_fixture, "maskrcnn", classes=5)
    path = save(state, tmp_path)
    with caplog.at_level(logging.INFO):
        model = create_detector("mask_rcnn", StubBackbone(), 2, checkpoint=path, reset_classifier=True)
    assert torch.equal(model.rpn.head.cls_logits.weight, state["rpn_head.rpn_cls.weight"])
    assert model.roi_heads.box_heads[0].cls_score.weight.abs().max() < 0.1
    assert len(model.load_report.unexpected) == 6
    assert "6 keep their initial values" in caplog.text


def test_a_whole_file_serves_features_of_ones_own(open_fixture, tmp_path):
    state = published(open_fixture, "maskrcnn", classes=5) | {"backbone.patch_embed.weight": torch.zeros(3)}
    model = create_detector("mask_rcnn", StubBackbone(), checkpoint=save(state, tmp_path))
    assert model.num_classes == 5


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.heavy) for name in BACKBONES]
)
def test_whole_published_files_of_every_family(name, open_fixture, tmp_path):
    """A detector's file gives backbone and heads, to create_detector and to create_backbone."""
    fixture, model_name = open_fixture(name), BACKBONES[name]
    channels = [shape["shape"][1] for shape in fixture.spec["outputs"].values()]
    state = {f"backbone.{key}": value for key, value in fixture.state().items()}
    heads = published(open_fixture, "retinanet", channels=channels)
    path = save({"meta": {}, "state_dict": state | heads}, tmp_path)
    model = create_detector("retinanet", model_name, checkpoint=path).eval()
    assert torch.equal(model.head.bbox_pred.weight, heads["bbox_head.retina_reg.weight"])
    assert model.head.selection == ("anchors" if "davit" in name else "pairs")
    backbone = foveate.create_backbone(model_name, setting="detection", checkpoint=path).eval()
    with torch.inference_mode():
        for index, (level, other) in enumerate(
            zip(model.backbone(fixture.input()), backbone(fixture.input()), strict=True)
        ):
            fixture.assert_output(f"stage{index + 1}", level, 3e-4)
            assert torch.equal(level, other)


def test_a_published_file_needs_its_backbone_by_name(open_fixture, tmp_path):
    body = foveate.create_backbone("nat_atto", setting="detection")
    state = published(open_fixture, "retinanet", channels=body.channels) | {"backbone.norm0.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="read if it is given by name"):
        create_detector("retinanet", body, checkpoint=save(state, tmp_path))


@pytest.mark.parametrize(
    ("head", "options", "parameters", "buffers"),
    [
        ("mask_rcnn", {}, 20_167_408, 0),
        ("cascade_mask_rcnn", {"style": "default"}, 53_095_678, 0),
        ("cascade_mask_rcnn", {"style": "swin"}, 58_002_610, 6_144),
        ("retinanet", {}, 10_249_972, 0),
    ],
)
def test_parameters_of_neck_and_heads(head, options, parameters, buffers):
    with torch.device("meta"):
        model = create_detector(head, StubBackbone(), **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert sum(buffer.numel() for name, buffer in model.named_buffers() if "num_batches" not in name) == buffers


def test_wrong_arguments_are_one_line():
    with pytest.raises(TaskError, match="there is no detector 'maskrcnn'; did you mean 'mask_rcnn'"):
        create_detector("maskrcnn", "nat_atto")
    with pytest.raises(TaskError, match="no option 'max_detection'; did you mean 'max_detections'"):
        create_detector("mask_rcnn", StubBackbone(), max_detection=10)
    with pytest.raises(TaskError, match="nor nat_atto has an option 'max_detection'; did you mean 'max_detections'"):
        create_detector("mask_rcnn", "nat_atto", max_detection=10)
    with pytest.raises(TaskError, match="style is 'swim'"):
        create_detector("cascade_mask_rcnn", StubBackbone(), style="swim")
    with pytest.raises(TaskError, match="selection is 'both'"):
        create_detector("retinanet", StubBackbone(), selection="both")
    with pytest.raises(TaskError, match="Sequential has no `channels`"):
        create_detector("retinanet", nn.Sequential())
    with pytest.raises(TaskError, match="setting 'detection' is for a backbone given by name"):
        create_detector("retinanet", StubBackbone(), setting="detection")
    with pytest.raises(TaskError, match="but there is none"):
        create_detector("retinanet", StubBackbone(), reset_classifier=True)
    with pytest.raises(TaskError, match="tnt_s_patch16_224 takes images of up to 224x224 alone"):
        create_detector("retinanet", "tnt_s_patch16_224")
    with pytest.raises(ValueError, match="did you mean 'nat_tiny'"):
        create_detector("retinanet", "nat_tinny")
