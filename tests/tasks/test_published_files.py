"""Files of mmdet, mmseg, detectron2 and Mask2Former on timm's backbones: what they held is what comes out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from foveate.tasks import TaskError
from foveate.tasks.dense.detect import create_detector
from foveate.tasks.dense.segment import create_segmenter
from foveate.zoo import CheckpointError, create_backbone
from foveate.zoo.loading import create_model
from foveate.zoo.published import settings_of

from .published_names import COUNTS, MASK2FORMER, SWIN, as_detectron, as_mm, detectron_file, mm_file, renamed

# Published errors are rounding; the sheet allows 2e-5 of an output's standard deviation.
TOLERANCE = 2e-5


def compare(fixture, outputs: dict[str, torch.Tensor]) -> None:
    for name, expected in fixture.spec["outputs"].items():
        assert list(outputs[name].shape) == expected["shape"], name
        index, values = fixture.samples[f"{name}.index"], fixture.samples[f"{name}.value"]
        error = np.abs(outputs[name].reshape(-1)[torch.from_numpy(index)].numpy() - values).max()
        assert error <= TOLERANCE * expected["std"], (name, error / expected["std"])


def named(name: str, maps) -> dict[str, torch.Tensor]:
    return {f"{name}{level}": value for level, value in enumerate(maps)}


def image_of(fixture) -> torch.Tensor:
    spec = fixture.spec["inputs"]
    return fixture.golden.input_for(tuple(spec["shape"]), spec["seed"])


# --- What was published ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_retinanet_of_mmdet(open_fixture, tmp_path):
    fixture = open_fixture("mm/retinanet_r50_pytorch")
    path = mm_file(fixture.state(), tmp_path / "retinanet_r50_fpn_1x_coco_20200130-c2398f9e.pth")
    model = create_detector("retinanet", "resnet50", checkpoint=path).eval()
    maps = model.backbone(image_of(fixture))
    pyramid = model.neck(maps)
    logits, offsets = model.head(pyramid)
    found = named("stage", maps) | named("fpn", pyramid) | named("cls", logits) | named("reg", offsets)
    compare(fixture, found)
    assert all(name.endswith(COUNTS) for name in model.load_report.missing)
    assert model.transform.channel_order == "rgb"


@torch.no_grad()
def test_mask_rcnn_of_mmdet_on_swin(open_fixture, tmp_path):
    fixture = open_fixture("mm/mask_rcnn_swin_t")
    model = create_detector(
        "mask_rcnn", "swin_tiny_patch4_window7_224", checkpoint=mm_file(fixture.state(), tmp_path / "file.pth")
    ).eval()
    maps = model.backbone(image_of(fixture))
    pyramid = model.neck(maps)
    logits, offsets = model.rpn(pyramid)
    rois = [torch.tensor(fixture.spec["inputs"]["rois"])[:, 1:]]
    heads = model.roi_heads
    scores, boxes = heads.box_heads[0](heads.extract(pyramid, rois, 7))
    masks = heads.mask_heads[0](heads.extract(pyramid, rois, 14))
    found = named("stage", maps) | named("fpn", pyramid) | named("rpn_cls", logits) | named("rpn_reg", offsets)
    compare(fixture, found | {"cls_score": scores, "bbox_pred": boxes.flatten(1), "mask_logits": masks})


@torch.no_grad()
def test_upernet_of_mmseg_on_swin(open_fixture, tmp_path):
    fixture = open_fixture("mm/upernet_swin_t")
    model = create_segmenter(
        "upernet", "swin_tiny_patch4_window7_224", checkpoint=mm_file(fixture.state(), tmp_path / "file.pth")
    ).eval()
    maps = model.backbone(image_of(fixture))
    compare(fixture, named("stage", maps) | {"logits": model.head(maps), "aux_logits": model.aux_head(maps)})


@torch.no_grad()
def test_mask2formers_pickle(open_fixture, tmp_path):
    fixture = open_fixture("mm/mask2former_r50")
    state = fixture.state() | {"criterion.empty_weight": torch.ones(134)}
    path = detectron_file(state, tmp_path / "model_final_94dc52.pkl")
    model = create_segmenter("mask2former", "resnet50", checkpoint=path).eval()
    maps = model.backbone(image_of(fixture))
    compare(fixture, named("stage", maps) | model.head(maps))
    assert "criterion.empty_weight" in model.load_report.unexpected
    assert (model.mean, model.channel_order) == (pytest.approx((0.485, 0.456, 0.406)), "rgb")


# --- What the file doesn't say by names and shapes -------------------------------------------------------------------


@pytest.fixture(scope="module")
def retinanet() -> dict[str, torch.Tensor]:
    """A RetinaNet of mmdet, narrow, on a ResNet-26."""
    return as_mm(filled(create_detector("retinanet", "resnet26", num_classes=3, channels=16)))


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """Give every entry values of its own, of a size that lets activations be of order 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and "position" not in name:
                noise = torch.randn(value.shape, generator=generator)
                spread = noise * (value[0].numel() or 1) ** -0.5 if value.dim() > 1 else 0.1 * noise
                value.copy_(1 + 0.2 * noise.tanh() if name.endswith(("running_var", "norm.weight")) else spread)
    return model.eval()


CONFIG = """
norm_cfg = dict(type='BN', requires_grad=False)
img_norm_cfg = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
model = dict(
    type='RetinaNet',
    backbone=dict(type='ResNet', depth=50, norm_cfg=norm_cfg, style='caffe'),
    test_cfg=dict(nms_pre=1000, score_thr=0.1, nms=dict(type='nms', iou_threshold=0.6), max_per_img=7))
lr = -1e-2
dangerous = __import__('os').system('touch {path}')
"""


def style_of(model) -> str:
    block = model.backbone.features.layer2[0]
    return "caffe" if block.conv1.stride == (2, 2) and block.conv2.stride == (1, 1) else "pytorch"


@pytest.mark.parametrize(
    ("name", "config", "options", "style"),
    [
        ("retinanet_r50_fpn_1x_coco.pth", None, {}, "pytorch"),
        ("retinanet_r50_caffe_fpn_1x_coco.pth", None, {}, "caffe"),
        ("mine.pth", CONFIG, {}, "caffe"),
        ("mine.pth", CONFIG.replace("caffe", "pytorch"), {}, "pytorch"),
        ("mine.pth", None, {"style": "caffe"}, "caffe"),
        ("mine.pth", None, {"backbone_kwargs": {"style": "pytorch"}}, "pytorch"),
    ],
)
def test_the_stride_of_bottlenecks_is_told_by_settings_name_or_caller(
    name, config, options, style, retinanet, tmp_path
):
    made = tmp_path / "made"
    path = mm_file(retinanet, tmp_path / name, config and config.format(path=made))
    model = create_detector("retinanet", "resnet26", checkpoint=path, **options)
    assert style_of(model) == style
    assert not made.exists()
    caffe = style == "caffe" or config is not None
    assert model.transform.channel_order == ("bgr" if caffe else "rgb")
    assert model.transform.std == pytest.approx([1 / 255] * 3 if caffe else [58.395 / 255, 57.12 / 255, 57.375 / 255])
    if config is not None:
        assert (model.head.score_threshold, model.head.nms_threshold, model.head.max_detections) == (0.1, 0.6, 7)


def test_what_nothing_tells_is_asked_for(retinanet, tmp_path):
    path = mm_file(retinanet, tmp_path / "mine.pth")
    with pytest.raises(CheckpointError, match=r'mine\.pth: neither .* give style="caffe" or style="pytorch"'):
        create_detector("retinanet", "resnet26", checkpoint=path)
    with pytest.raises(CheckpointError, match="give style="):
        create_backbone("resnet26", checkpoint=path, out_indices=(-4, -3, -2, -1))
    with pytest.raises(CheckpointError, match="'caffee'; it can be 'pytorch' or 'caffe'"):
        create_detector("retinanet", "resnet26", checkpoint=path, style="caffee")
    path = mm_file(retinanet, tmp_path / "mine.pth", CONFIG)
    with pytest.raises(CheckpointError, match="says itself that it is of style 'caffe'"):
        create_detector("retinanet", "resnet26", checkpoint=path, style="pytorch")


def test_blue_comes_first_where_the_file_says_so(retinanet, tmp_path):
    path = mm_file(retinanet, tmp_path / "r50_caffe.pth")
    model = create_detector("retinanet", "resnet26", checkpoint=path, min_size=None, divisor=1)
    batch, _, _ = model.transform([torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1)])
    assert batch.flatten().tolist() == pytest.approx([30 - 103.53, 20 - 116.28, 10 - 123.675], abs=1e-4)
    with pytest.raises(TaskError, match="channel_order is 'bgrr'"):
        create_detector("retinanet", "resnet26", checkpoint=path, channel_order="bgrr")


def test_settings_are_read_and_not_run():
    text = "a = dict(b=[1, -2.5, (3, 'x')], c={'d': None})\ne = a\nf = open('x')\ng = a + a\nimport os"
    assert settings_of(text) == {
        "a": {"b": [1, -2.5, [3, "x"]], "c": {"d": None}},
        "e": {"b": [1, -2.5, [3, "x"]], "c": {"d": None}},
        "f": None,
        "g": None,
    }
    assert settings_of("(" * 5000) == settings_of("a = ") == settings_of("a = 1" + " " * 2_000_000) == {}


# --- Strictness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["missing", "renamed", "misshapen", "added"])
def test_a_file_that_differs_in_one_tensor_is_refused_by_its_name(change, retinanet, tmp_path):
    state, key = dict(retinanet), "backbone.layer3.1.conv2.weight"
    value = state[key] if change == "added" else state.pop(key)
    if change in ("renamed", "added"):
        state["backbone.layer3.1.conv4.weight"] = value
    elif change == "misshapen":
        state[key] = value[:1]
    path = mm_file(state, tmp_path / "retinanet_r50.pth")
    name = "conv4" if change == "added" else "conv2"
    for create in (
        lambda: create_detector("retinanet", "resnet26", checkpoint=path),
        lambda: create_backbone("resnet26", checkpoint=path, out_indices=(-4, -3, -2, -1)),
    ):
        with pytest.raises(CheckpointError, match=rf"layer3\.1\.{name}\.weight"):
            create()


@pytest.mark.parametrize("name", ["layer1.0.conv1.weight", "conv1.weight", "layer2.0.conv1.weight", "bn1.running_var"])
def test_no_tensor_may_be_missing_that_tells_what_a_file_is(name, retinanet, tmp_path):
    state = {key: value for key, value in retinanet.items() if key != f"backbone.{name}"}
    path = mm_file(state, tmp_path / "retinanet_r50.pth")
    with pytest.raises(CheckpointError, match=rf"1 missing \(backbone\.features\.{re.escape(name)}\)"):
        create_detector("retinanet", "resnet26", checkpoint=path)
    with pytest.raises(CheckpointError, match="is a dense model's; its backbone is read by create_backbone"):
        create_model("resnet26", checkpoint=path, features_only=True)


def test_a_file_of_another_model_is_refused_with_the_right_one(retinanet, tmp_path):
    path = mm_file(retinanet, tmp_path / "retinanet_r50.pth")
    with pytest.raises(CheckpointError, match=r"120 missing \(backbone\.features\.layer1\.2\."):
        create_detector("retinanet", "resnet50", checkpoint=path)
    path = mm_file({k: v for k, v in retinanet.items() if ".layer3.1" not in k}, tmp_path / "retinanet_r50.pth")
    with pytest.raises(CheckpointError, match=r"missing .*layer3"):
        create_detector("retinanet", "resnet26", checkpoint=path)
    with pytest.raises(CheckpointError, match="is mmdet's or mmseg's ResNet, not swin_tiny_patch4_window7_224"):
        create_detector("retinanet", "swin_tiny_patch4_window7_224", checkpoint=path)


def test_twins_and_constants_are_left_out_and_reported(retinanet, tmp_path):
    extras = {"ema_backbone_conv1_weight": torch.zeros(3), "data_preprocessor.mean": torch.zeros(3, 1, 1)}
    path = mm_file(retinanet | extras, tmp_path / "retinanet_r50.pth")
    report = create_detector("retinanet", "resnet26", checkpoint=path).load_report
    assert set(extras) <= set(report.unexpected)
    assert not report.missing


# --- detectron2 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["mask_rcnn", "faster_rcnn", "retinanet"])
def test_detectron2s_detectors(head, tmp_path):
    options = {"channels": 16} | ({"extra_relu": True} if head == "retinanet" else {"hidden": 24})
    options |= {"backbone_kwargs": {"style": "caffe"}, "rules": "detectron2"}
    model = filled(create_detector(head, "resnet26", num_classes=3, channel_order="bgr", **options))
    path = detectron_file(as_detectron(model, 3 if head == "retinanet" else 2), tmp_path / "model_final.pkl")
    read = create_detector(head, "resnet26", checkpoint=path, mean=model.transform.mean, std=model.transform.std).eval()
    assert style_of(read) == "caffe"
    assert read.transform.channel_order == "bgr"
    images = [torch.rand(3, 70, 90, generator=torch.Generator().manual_seed(3))]
    for detector in (model, read):
        detector.transform.min_size = (96,)
    found, expected = read(images)[0], model(images)[0]
    assert len(expected["boxes"])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    other = create_detector(head, "resnet26", checkpoint=path, style="pytorch")
    assert style_of(other) == "pytorch"


def test_detectron2s_boxes_shrink_freely_and_are_clipped_last():
    from foveate.tasks.dense.detect.boxes import BoxCoder

    offsets = torch.tensor([[0.0, 0.0, -10.0, 10.0]])
    reference = torch.tensor([[0.0, 0.0, 100.0, 100.0]])
    theirs = BoxCoder(shrinks_freely=True).decode(reference, offsets)[0]
    ours = BoxCoder().decode(reference, offsets)[0]
    assert float(theirs[2] - theirs[0]) == pytest.approx(100 * np.exp(-10), rel=1e-2)
    assert float(ours[2] - ours[0]) == pytest.approx(100 * 16 / 1000, rel=1e-4)
    assert float(theirs[3] - theirs[1]) == pytest.approx(float(ours[3] - ours[1])) == pytest.approx(6250)


# --- mmseg and other backbones ---------------------------------------------------------------------------------------

STEM = tuple((rf"backbone\.features\.conv1\.{index}\.", f"backbone.stem.{index}.") for index in (0, 1, 3, 4, 6))
V1C = (*STEM, (r"backbone\.features\.bn1\.", "backbone.stem.7."), (r"backbone\.features\.", "backbone."))
MMSEG = (
    (r"head\.neck\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
    (r"head\.neck\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
    (r"aux_head\.", "auxiliary_head."),
    (r"head\.aspp\.", "decode_head."),
    (r"head\.", "decode_head."),
)
MICROSOFT = (
    (r"backbone\.out_norms\.(\d)\.", r"backbone.norm\1."),
    (
        r"backbone\.features\.layers_(\d)\.downsample\.",
        lambda match: f"backbone.layers.{int(match[1]) - 1}.downsample.",
    ),
    (r"backbone\.features\.layers_(\d)\.", r"backbone.layers.\1."),
    (r"backbone\.features\.", "backbone."),
)
CONVNEXT = (
    (r"backbone\.out_norms\.(\d)\.", r"backbone.norm\1."),
    (r"backbone\.features\.stem_(\d)\.", r"backbone.downsample_layers.0.\1."),
    (r"backbone\.features\.stages_(\d)\.downsample\.", r"backbone.downsample_layers.\1."),
    (r"backbone\.features\.stages_(\d)\.blocks\.(\d+)\.conv_dw\.", r"backbone.stages.\1.\2.depthwise_conv."),
    (r"backbone\.features\.stages_(\d)\.blocks\.(\d+)\.mlp\.fc(\d)\.", r"backbone.stages.\1.\2.pointwise_conv\3."),
    (r"backbone\.features\.stages_(\d)\.blocks\.(\d+)\.", r"backbone.stages.\1.\2."),
)
PVT = (
    (r"backbone\.features\.patch_embed\.proj\.", "backbone.layers.0.0.projection."),
    (r"backbone\.features\.patch_embed\.norm\.", "backbone.layers.0.0.norm."),
    (r"backbone\.features\.stages_(\d)\.downsample\.proj\.", r"backbone.layers.\1.0.projection."),
    (r"backbone\.features\.stages_(\d)\.downsample\.norm\.", r"backbone.layers.\1.0.norm."),
    (r"backbone\.features\.stages_(\d)\.norm\.", r"backbone.layers.\1.2."),
    (r"backbone\.features\.stages_(\d)\.blocks\.(\d)\.attn\.proj\.", r"backbone.layers.\1.1.\2.attn.attn.out_proj."),
    (r"backbone\.features\.stages_(\d)\.blocks\.(\d)\.mlp\.fc1\.", r"backbone.layers.\1.1.\2.ffn.layers.0."),
    (r"backbone\.features\.stages_(\d)\.blocks\.(\d)\.mlp\.dwconv\.", r"backbone.layers.\1.1.\2.ffn.layers.1."),
    (r"backbone\.features\.stages_(\d)\.blocks\.(\d)\.mlp\.fc2\.", r"backbone.layers.\1.1.\2.ffn.layers.4."),
    (r"backbone\.features\.stages_(\d)\.blocks\.(\d)\.", r"backbone.layers.\1.1.\2."),
)
VIT = (
    (r"backbone\.out_norms\.3\.", "backbone.ln1."),
    (r"backbone\.features\.model\.patch_embed\.proj\.", "backbone.patch_embed.projection."),
    (r"backbone\.features\.model\.blocks\.(\d+)\.norm(\d)\.", r"backbone.layers.\1.ln\2."),
    (r"backbone\.features\.model\.blocks\.(\d+)\.attn\.qkv\.", r"backbone.layers.\1.attn.attn.in_proj_"),
    (r"backbone\.features\.model\.blocks\.(\d+)\.attn\.proj\.", r"backbone.layers.\1.attn.attn.out_proj."),
    (r"backbone\.features\.model\.blocks\.(\d+)\.mlp\.fc1\.", r"backbone.layers.\1.ffn.layers.0.0."),
    (r"backbone\.features\.model\.blocks\.(\d+)\.mlp\.fc2\.", r"backbone.layers.\1.ffn.layers.1."),
    (r"backbone\.features\.model\.", "backbone."),
    (r"neck\.", "neck."),
)


def unfolded(state: dict) -> dict:
    """Put what Swin merges in the order of nn.Unfold: channels outside, then rows, then columns."""
    result = dict(state)
    for key in (key for key in state if ".downsample." in key):
        value = state[key]
        channels = value.shape[-1] // 4
        # As timm has it: columns, rows, channels.
        parts = value.reshape(*value.shape[:-1], 2, 2, channels)
        result[key] = parts.movedim(-1, -3).transpose(-1, -2).reshape(value.shape)
    return result


def joined(state: dict) -> dict:
    """Join queries, keys and values as nn.MultiheadAttention has them, and make 1x1 convolutions of matrices."""
    result = {}
    for key, value in state.items():
        if match := re.match(r"(backbone\.layers\.\d\.1\.\d)\.attn\.(q|kv)\.(weight|bias)", key):
            block, part, leaf = match.groups()
            if part == "q":
                result[f"{block}.attn.attn.in_proj_{leaf}"] = torch.cat([value, state[f"{block}.attn.kv.{leaf}"]])
        else:
            result[key] = value[..., None, None] if re.search(r"ffn\.layers\.[04]\.weight", key) else value
    return result


MASKED = {"num_queries": 5, "dim": 32, "encoder_layers": 1, "encoder_hidden": 16, "decoder_layers": 3}
MASKED |= {"decoder_hidden": 16}
DEEP = {"stem_type": "deep", "stem_width": 32}
D8 = "resnet18", {"output_stride": 8, "style": "pytorch", **DEEP}
PLAIN = {"dense": True, "img_size": (64, 64), "dynamic_img_size": True}
NORMS = {"dense": True, "out_norms": (0, 1, 2, 3)}
KINDS = {
    "upernet_r18": ("upernet", "resnet18", {"style": "pytorch", **DEEP}, {"channels": 16}, (*V1C, *MMSEG), None),
    "fpn_r18": ("semantic_fpn", "resnet18", {"style": "pytorch", **DEEP}, {"channels": 16}, (*V1C, *MMSEG), None),
    "deeplabv3_r18-d8": ("deeplabv3", *D8, {"design": "mmseg", "channels": 16}, (*V1C, *MMSEG), None),
    "deeplabv3plus_r18-d8": ("deeplabv3_plus", *D8, {"channels": 16}, (*V1C, *MMSEG), None),
    "upernet_convnext_femto_512x512": ("upernet", "convnext_tiny", NORMS, {"channels": 16}, (*CONVNEXT, *MMSEG), None),
    "upernet_vit-b16_ln_mln": (
        "upernet", "vit_tiny_patch16_224", PLAIN | {"out_norms": (3,)}, {"channels": 16, "neck": "multilevel"},
        (*VIT, *MMSEG), None,
    ),
    "upernet_deit-s16": (
        "upernet", "deit_tiny_patch16_224", PLAIN, {"channels": 16, "neck": None}, (*VIT, *MMSEG), None
    ),
    "mask2former_swin-t": (
        "mask2former", "swin_tiny_patch4_window7_224", NORMS, MASKED, (*SWIN, *MASK2FORMER), unfolded
    ),
    "model_final": (
        "mask2former", "swin_tiny_patch4_window7_224", NORMS, MASKED, (*MICROSOFT, (r"head\.", "sem_seg_head.")), None
    ),
    "retinanet_pvtv2-b0": ("retinanet", "pvt_v2_b0", {"dense": True}, {"channels": 16}, PVT, joined),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_what_was_written_under_published_names_is_read(name, tmp_path):
    head, backbone, form, options, rules, change = KINDS[name]
    create = create_detector if head == "retinanet" else create_segmenter
    model = filled(create(head, backbone, num_classes=4, backbone_kwargs=form, **options))
    state = as_mm(model) if head == "retinanet" else model.state_dict()
    state = {re.sub(r"^backbone\.(patch|stages)", r"backbone.features.\1", key): state[key] for key in state}
    state = renamed(state, *rules)
    path = mm_file(change(state) if change else state, tmp_path / f"{name}.pth")
    read = create(head, backbone, checkpoint=path).eval()
    assert not [key for key in read.load_report.missing if not key.endswith(COUNTS)]
    x = torch.rand(1, 3, 97, 130, generator=torch.Generator().manual_seed(3))
    found, expected = read.backbone(x), model.backbone(x)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    if head != "retinanet":
        assert torch.equal(read(x), model(x))
        # What the file told is what another file of the model must say.
        assert read.told["backbone_kwargs"] == form


SAM = {"embed_dim": 32, "depth": 2, "num_heads": 2, "global_attn_indexes": (1,)}


@pytest.mark.parametrize("head", ["mask_rcnn", "cascade_mask_rcnn"])
@torch.no_grad()
def test_vitdet(head, tmp_path):
    design = {"design": "vitdet"} if head == "mask_rcnn" else {"style": "vitdet", "mask_heads": 1}
    options = {"channels": 16, "hidden": 24, "rules": "detectron2", **design}
    form = {"dense": True, "grid": 14, **SAM}
    model = filled(create_detector(head, "samvit_base_patch16", num_classes=3, backbone_kwargs=form, **options))
    stage = r"(\d)\." if head == "cascade_mask_rcnn" else r"0()\."
    dot = "." if head == "cascade_mask_rcnn" else ""
    state = renamed(
        model.state_dict(),
        (r"backbone\.features\.model\.patch_embed\.pos_embed", "backbone.net.pos_embed"),
        (r"backbone\.features\.model\.", "backbone.net."),
        (r"neck\.simfp_", "backbone.simfp_"),
        (r"rpn\.head\.conv\.(\d)\.0\.", r"proposal_generator.rpn_head.conv.conv\1."),
        (r"rpn\.head\.cls_logits\.", "proposal_generator.rpn_head.objectness_logits."),
        (r"rpn\.head\.bbox_pred\.", "proposal_generator.rpn_head.anchor_deltas."),
        (
            rf"roi_heads\.box_heads\.{stage}tower\.([0-3])\.0\.",
            lambda match: f"roi_heads.box_head.{match[1]}{dot}conv{int(match[2]) + 1}.",
        ),
        (
            rf"roi_heads\.box_heads\.{stage}tower\.([0-3])\.1\.",
            lambda match: f"roi_heads.box_head.{match[1]}{dot}conv{int(match[2]) + 1}.norm.",
        ),
        (rf"roi_heads\.box_heads\.{stage}tower\.5\.", lambda match: f"roi_heads.box_head.{match[1]}{dot}fc1."),
        (
            rf"roi_heads\.box_heads\.{stage}(cls_score|bbox_pred)\.",
            lambda match: f"roi_heads.box_predictor.{match[1]}{dot}{match[2]}.",
        ),
        (
            r"roi_heads\.mask_heads\.0\.convs\.(\d)\.0\.",
            lambda match: f"roi_heads.mask_head.mask_fcn{int(match[1]) + 1}.",
        ),
        (
            r"roi_heads\.mask_heads\.0\.convs\.(\d)\.1\.",
            lambda match: f"roi_heads.mask_head.mask_fcn{int(match[1]) + 1}.norm.",
        ),
        (r"roi_heads\.mask_heads\.0\.predictor\.conv5_mask\.", "roi_heads.mask_head.deconv."),
        (r"roi_heads\.mask_heads\.0\.predictor\.mask_fcn_logits\.", "roi_heads.mask_head.predictor."),
    )
    positions = state["backbone.net.pos_embed"].flatten(1, 2)
    state["backbone.net.pos_embed"] = torch.cat([torch.ones(1, 1, positions.shape[-1]), positions], dim=1)
    path = detectron_file(state, tmp_path / "model_final_61ccd1.pkl")
    read = create_detector(head, "samvit_base_patch16", checkpoint=path, backbone_kwargs=SAM).eval()
    assert (read.transform.min_size, read.transform.max_size, read.transform.divisor) == ((1024,), 1024, 1024)
    assert all(torch.equal(value, read.state_dict()[key]) for key, value in model.state_dict().items())
    x = torch.rand(1, 3, 250, 320, generator=torch.Generator().manual_seed(3))
    assert all(
        torch.equal(*pair) for pair in zip(read.neck(read.backbone(x)), model.neck(model.backbone(x)), strict=True)
    )
    assert {module.eps for module in read.backbone.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-6}


# --- Training ---------------------------------------------------------------------------------------------------------


def test_training_starts_from_a_published_file(tmp_path):
    from foveate.tasks import engine
    from foveate.tasks.predictors import load_predictor

    model = create_detector("mask_rcnn", "resnet26", num_classes=3, channels=16, hidden=24)
    with torch.no_grad():
        for name, value in model.backbone.state_dict().items():
            if name.endswith("running_mean"):
                value.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    state = as_mm(model)
    path = mm_file(state, tmp_path / "mask_rcnn_r50_caffe_fpn_1x_coco.pth")
    overrides = [
        "model.backbone=resnet26",
        f"model.checkpoint={path}",
        "model.frozen_stages=1",
        "model.norm_eval=True",
        "model.kwargs.reset_classifier=True",
        "model.kwargs.channels=16",
        "model.kwargs.hidden=24",
        "model.kwargs.region_samples=8",
        "epochs=1",
        "val_interval=1",
        "data.repeat=4",
        "batch_size=2",
        "data.augment.crop=96",
        "schedule.warmup_iterations=1",
        "device=cpu",
    ]
    config = engine.load_config("detect/mask_rcnn_nat_atto_nuclei", overrides)
    engine.train(config, tmp_path / "run", progress=False)
    for name in ("best.pth", "last.pth"):
        predictor = load_predictor(tmp_path / "run" / name)
        trained = predictor.model
        assert style_of(trained) == "caffe"
        assert trained.transform.channel_order == "bgr"
        body = {f"backbone.{key}": value for key, value in trained.backbone.features.state_dict().items()}
        changed = {key for key in body if not key.endswith(COUNTS) and not torch.equal(body[key], state[key])}
        assert not [key for key in changed if "layer1" in key or key.startswith(("backbone.conv1", "backbone.bn1"))]
        assert not [key for key in changed if "running" in key]
        assert {"backbone.layer2.0.conv1.weight", "backbone.layer4.1.conv2.weight"} <= changed
        again = create_detector("mask_rcnn", "resnet26", checkpoint=tmp_path / "run" / name)
        assert style_of(again) == "caffe"
        assert (again.transform.channel_order, again.transform.mean) == ("bgr", trained.transform.mean)


def test_stages_that_cannot_be_told_are_not_frozen(tmp_path):
    from foveate.tasks.dense.build import freeze_stages

    with pytest.raises(TaskError, match="frozen_stages is 1, but the backbone has no stages that timm tells apart"):
        freeze_stages(create_backbone("nat_atto"), 1)
    with pytest.raises(TaskError, match="frozen_stages is 5, but the backbone has 4"):
        freeze_stages(create_backbone("resnet18", out_indices=None), 5)


MEASURE = """
import sys
from pathlib import Path
from foveate.tasks.dense.detect import create_detector

def peak():
    # That of the process alone: getrusage's begins with that of its parent.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

def create(**options):
    return create_detector("retinanet", "resnet26", num_classes=3, channels=768, **options)

if sys.argv[1] == "write":
    from published_names import as_detectron, detectron_file
    detectron_file(as_detectron(create(extra_relu=True), 3), sys.argv[2])
else:
    create_detector("retinanet", "resnet26", channels=8)  # whatever is imported on the way
    before = peak()
    model = create(checkpoint=sys.argv[2])
    print(peak() - before, sum(value.numel() * 4 for value in model.state_dict().values()))
"""


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_a_large_file_is_in_memory_once(tmp_path):
    path = tmp_path / "model_final.pkl"

    def run(*arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        command = [sys.executable, "-c", MEASURE, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    run("write", str(path))
    more, size = map(int, run("read", str(path)).split())
    assert path.stat().st_size > 0.9 * size > 150e6
    assert more < 1.3 * path.stat().st_size + size
