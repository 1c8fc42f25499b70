"""Parity with mmdet: neck, heads, rules, detections and losses, for every fixture in ``tests/golden/dense``."""

from pathlib import Path

import foveate
import numpy as np
import pytest
import torch
from foveate.tasks.dense.detect import sample_evenly
from foveate.tasks.dense.detect.boxes import BoxCoder
from foveate.tasks.dense.detect.checkpoint import renamed
from foveate.tasks.dense.detect.postprocess import multiclass_nms, paste_masks
from foveate.tasks.dense.detect.roi_heads import BoxHead, MaskHead, RoIExtractor
from foveate.tasks.dense.detect.transform import DetectorTransform, resize, resized_size
from foveate.tasks.dense.neck import FeaturePyramid, convert_pyramid
from foveate.tasks.dense.normalize import normalize
from torch import nn

DENSE = Path(__file__).parents[1] / "golden" / "dense"
HEADS = {
    "maskrcnn": "mask_rcnn",
    "cascade": "cascade_mask_rcnn",
    "cascade_swin": "cascade_mask_rcnn",
    "retinanet": "retinanet",
}


class StubBackbone(nn.Module):
    """Stands for the backbone of features that are given; has no parameters."""

    def __init__(self, channels):
        super().__init__()
        self.channels = list(channels)


# Each takes some ten seconds.
HEAVY = ("predict_cascade_swin_a", "loss_cascade_swin_a", "loss_cascade_a")


def names(pattern: str) -> list:
    stems = [path.stem for path in sorted(DENSE.glob(f"{pattern}.json"))]
    return [pytest.param(stem, marks=pytest.mark.heavy if stem in HEAVY else ()) for stem in stems]


def detector_of(fixture, folder, **kwargs):
    head = HEADS[fixture.spec["model"]]
    channels = [level.shape[1] for level in fixture.levels()]
    return foveate.create_detector(head, StubBackbone(channels), checkpoint=fixture.checkpoint(folder), **kwargs)


def sizes_of(fixture, key: str) -> list[tuple[int, int]]:
    return [tuple(meta[key]) for meta in fixture.spec["inputs"]["metas"]]


@pytest.mark.parametrize("name", names("fpn*"))
def test_pyramid(name, open_fixture):
    fixture = open_fixture(f"dense/{name}")
    options = dict(fixture.spec["notes"]["kwargs"])
    options["extra_convs"] = options.pop("add_extra_convs", None)
    neck = FeaturePyramid(**options)
    neck.load_state_dict({k.removeprefix("neck."): v for k, v in convert_pyramid(fixture.state()).items()})
    with torch.inference_mode():
        for index, level in enumerate(neck(fixture.levels())):
            fixture.assert_output(f"out{index}", level, 2e-5)


def load_part(module: nn.Module, fixture, prefix: str, convs: int = 0) -> nn.Module:
    state = {renamed(key, convs): value for key, value in fixture.state().items()}
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return module.eval()


def test_rpn_maps_and_anchors(open_fixture):
    fixture = open_fixture("dense/rpn_raw")
    rpn = foveate.create_detector("mask_rcnn", StubBackbone([8, 8, 8, 8])).rpn
    load_part(rpn.head, fixture, "rpn.head.")
    levels = fixture.levels()
    with torch.inference_mode():
        logits, offsets = rpn(levels)
    for index, grid in enumerate(rpn.anchors(levels)):
        fixture.assert_output(f"cls{index}", logits[index], 1e-5)
        fixture.assert_output(f"reg{index}", offsets[index], 1e-5)
        fixture.assert_output(f"anchors{index}", grid, 0)
        fixture.assert_output(f"base_anchors{index}", rpn.anchors.base(4 * 2**index), 0)


def test_retina_maps_and_anchors(open_fixture):
    fixture = open_fixture("dense/retina_raw")
    head = foveate.create_detector("retinanet", StubBackbone([8, 8, 8, 8])).head
    load_part(head, fixture, "head.")
    levels = fixture.levels()
    with torch.inference_mode():
        logits, offsets = head(levels)
    for index, grid in enumerate(head.anchors(levels)):
        fixture.assert_output(f"cls{index}", logits[index], 1e-5)
        fixture.assert_output(f"reg{index}", offsets[index], 1e-5)
        fixture.assert_output(f"anchors{index}", grid, 0)
        fixture.assert_output(f"base_anchors{index}", head.anchors.base(8 * 2**index), 0)


def test_regions_are_cut_out_of_the_levels(open_fixture):
    fixture = open_fixture("dense/roi_align")
    rois = torch.tensor(fixture.spec["inputs"]["rois"], dtype=torch.float32)
    extract = RoIExtractor()
    fixture.assert_output("levels", extract.levels(rois[:, 1:]), 0)
    # The extractor takes boxes by image; the fixture mixes the images.
    order = rois[:, 0].argsort(stable=True)
    boxes = [rois[rois[:, 0] == image, 1:] for image in range(2)]
    for size in (7, 14):
        maps = extract(fixture.levels(), boxes, size)
        fixture.assert_output(f"feat{size}", maps[order.argsort()], 1e-6)


def test_box_heads(open_fixture):
    fixture = open_fixture("dense/bbox_head_shared2fc")
    head = load_part(BoxHead(256, 80), fixture, "roi_heads.box_heads.0.")
    with torch.inference_mode():
        logits, offsets = head(fixture.input())
    fixture.assert_output("cls", logits, 1e-5)
    fixture.assert_output("reg", offsets.flatten(1), 1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_box_heads_of_the_swin_style_cascade(stage, open_fixture):
    fixture = open_fixture("dense/bbox_head_convfc")
    head = load_part(BoxHead(256, 80, convs=4, hidden_layers=1), fixture, f"roi_heads.box_heads.{stage}.", convs=4)
    with torch.inference_mode():
        logits, offsets = head(fixture.input())
    fixture.assert_output(f"cls{stage}", logits, 1e-5)
    fixture.assert_output(f"reg{stage}", offsets.flatten(1), 1e-5)


def test_mask_head(open_fixture):
    fixture = open_fixture("dense/mask_head")
    head = load_part(MaskHead(256, 80), fixture, "roi_heads.mask_heads.0.")
    with torch.inference_mode():
        fixture.assert_output("mask_logits", head(fixture.input()), 1e-5)


def test_masks_are_pasted(open_fixture):
    fixture = open_fixture("dense/mask_paste")
    small = 3 * fixture.golden.input_for((5, 1, 7, 7), 420)
    logits = nn.functional.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    probabilities, boxes = logits[:, 0].sigmoid(), torch.tensor(fixture.spec["inputs"]["boxes"])
    soft = paste_masks(probabilities, boxes, (140, 200), threshold=None)
    fixture.assert_output("soft", soft, 1e-5)
    hard = paste_masks(probabilities, boxes, (140, 200))
    fixture.assert_output("area", hard.sum((1, 2)), 0)
    fixture.assert_output("row_sums", hard.sum(2), 0)
    fixture.assert_output("col_sums", hard.sum(1), 0)


@pytest.mark.parametrize("name", ["rpn", "rcnn", "stage2", "stage3"])
def test_box_coder(name, open_fixture):
    fixture = open_fixture("dense/box_coder")
    inputs, stds = fixture.spec["inputs"], fixture.spec["notes"]["stds"][name]
    boxes, goals = torch.tensor(inputs["boxes"]), torch.tensor(inputs["gt"])
    offsets = fixture.golden.input_for((4, 4), 430) * torch.tensor([1.0, 1, 4, 4])
    coder = BoxCoder(stds if isinstance(stds, list) else [float(stds)] * 4)
    fixture.assert_output(f"encode_{name}", coder.encode(boxes, goals), 1e-6)
    fixture.assert_output(f"decode_{name}", coder.decode(boxes, offsets, (240, 300)), 1e-4)
    fixture.assert_output(f"decode_noclip_{name}", coder.decode(boxes, offsets), 1e-3)


def test_multiclass_nms(open_fixture):
    fixture = open_fixture("dense/multiclass_nms")
    noise = fixture.golden.input_for((60, 4), 440)
    centre, half = noise[:, :2].sigmoid() * 100, 10 * (0.5 * noise[:, 2:]).exp()
    scores = (2 * fixture.golden.input_for((60, 6), 441)).softmax(1)[:, :-1]
    regions = torch.cat([centre - half, centre + half], dim=1)
    for suffix, most in (("", 100), ("_max20", 20)):
        boxes, best, candidates = multiclass_nms(regions, scores, 0.05, 0.5, most)
        fixture.assert_output(f"dets{suffix}", torch.cat([boxes, best[:, None]], dim=1), 2e-5)
        fixture.assert_output(f"labels{suffix}", candidates % 5, 0)
        if not suffix:
            fixture.assert_output("flat_inds", candidates, 0)


def extents(masks: torch.Tensor) -> torch.Tensor:
    """The first and last column and row of each mask, x1, y1, x2, y2; -1 where there is none."""
    found = [mask.nonzero() for mask in masks]
    return torch.stack(
        [torch.cat([at.amin(0).flip(0), at.amax(0).flip(0)]) if len(at) else torch.full((4,), -1) for at in found]
    )


@pytest.mark.parametrize("images", [1, pytest.param(2, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("name", names("predict_*"))
def test_detections(name, images, open_fixture, tmp_path):
    fixture = open_fixture(f"dense/{name}")
    model = detector_of(fixture, tmp_path).eval()
    features = [level[:images] for level in fixture.levels()]
    image_sizes, original_sizes = sizes_of(fixture, "img_shape")[:images], sizes_of(fixture, "ori_shape")[:images]
    detections = model.predict_from_features(features, image_sizes, original_sizes)
    assert len(detections) == images
    for index, detection in enumerate(detections):
        fixture.assert_output(f"scores{index}", detection["scores"], 1e-4)
        fixture.assert_output(f"labels{index}", detection["labels"], 0)
        fixture.assert_output(f"boxes{index}", detection["boxes"], 2e-3)
        if hasattr(model, "roi_heads"):
            assert detection["masks"].shape[1:] == original_sizes[index]
            fixture.assert_output(f"mask_area{index}", detection["masks"].sum((1, 2)), 3)
            fixture.assert_output(f"mask_extent{index}", extents(detection["masks"]), 1)
    if hasattr(model, "rpn"):
        with torch.inference_mode():
            proposals = model.rpn.propose(*model.rpn(model.neck(features)), image_sizes)
        for index, (boxes, scores) in enumerate(proposals):
            assert len(boxes) == fixture.spec["notes"]["proposal_counts"][index]
            fixture.assert_output(f"proposals{index}", boxes[:100], 2e-3)
            fixture.assert_output(f"objectness{index}", scores[:100], 1e-5)


@pytest.mark.parametrize("case", ["pre1000", "pre6"])
@pytest.mark.parametrize(("era", "selection"), [("legacy", "anchors"), ("new", "pairs")])
def test_candidates_of_both_eras_of_retinanet(case, era, selection, open_fixture, tmp_path):
    fixture = open_fixture("dense/retina_topk_rules")
    fixture.spec["model"] = "retinanet"
    options = {"pre1000": {}, "pre6": {"per_level": 6, "score_threshold": 0.01}}[case]
    model = detector_of(fixture, tmp_path, selection=selection, **options).eval()
    detections = model.predict_from_features(
        fixture.levels(), sizes_of(fixture, "img_shape"), sizes_of(fixture, "ori_shape")
    )
    for index, detection in enumerate(detections):
        dets = torch.cat([detection["boxes"], detection["scores"][:, None]], dim=1)
        fixture.assert_output(f"{era}_{case}_dets{index}", dets, 2e-3)
        fixture.assert_output(f"{era}_{case}_labels{index}", detection["labels"], 0)


def ellipses(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    low, high = boxes[:, :2], boxes[:, 2:]
    centre, half = (low + high) / 2, (high - low) / 2
    x = (torch.arange(width) + 0.5 - centre[:, :1]) / half[:, :1]
    y = (torch.arange(height) + 0.5 - centre[:, 1:]) / half[:, 1:]
    return x[:, None] ** 2 + y[:, :, None] ** 2 <= 1


def targets_of(fixture) -> list[dict[str, torch.Tensor]]:
    inputs = fixture.spec["inputs"]
    targets = []
    for boxes, labels, meta in zip(inputs["gt_boxes"], inputs["gt_labels"], inputs["metas"], strict=True):
        boxes = torch.tensor(boxes)
        masks = ellipses(boxes, *meta["batch_input_shape"])
        targets.append({"boxes": boxes, "labels": torch.tensor(labels), "masks": masks})
    return targets


@pytest.mark.parametrize("name", names("loss_*"))
def test_losses_and_gradients(name, open_fixture, tmp_path):
    fixture = open_fixture(f"dense/{name}")
    model = detector_of(fixture, tmp_path).train()
    model.sample = sample_evenly
    levels = [level.requires_grad_() for level in fixture.levels()]
    arguments = {}
    if "roi_proposals" in fixture.spec["inputs"]:
        arguments["proposals"] = [torch.tensor(boxes) for boxes in fixture.spec["inputs"]["roi_proposals"]]
    losses = model.losses_from_features(levels, targets_of(fixture), sizes_of(fixture, "img_shape"), **arguments)
    expected = {key for key in fixture.spec["outputs"] if "loss" in key}
    assert set(losses) == expected
    for key, value in losses.items():
        reference = float(np.sum(fixture.samples[f"{key}.value"], dtype=np.float64))
        assert value.item() == pytest.approx(reference, rel=2e-5, abs=2e-6), key
    total = sum(losses.values())
    assert total.item() == pytest.approx(float(fixture.samples["total.value"][0]), rel=1e-5)
    total.backward()
    # A cascade has millions of ReLUs near their kink; with other thread counts, rounding switches some.
    tolerance = 5e-2 if "cascade" in name else 1e-3
    for index, level in enumerate(levels):
        if f"grad_level{index}" in fixture.spec["outputs"]:
            scale = fixture.spec["outputs"][f"grad_level{index}"]["std"]
            fixture.assert_output(f"grad_level{index}", level.grad, tolerance * scale)
    norms = fixture.spec["notes"]["grad_norms"]
    convs = 4 if any("shared_convs" in key for key in norms) else 0
    keys = dict(zip(norms, convert_pyramid({key: torch.tensor(0) for key in norms}), strict=True))
    for key, norm in norms.items():
        parameter = model.get_parameter(renamed(keys[key], convs))
        assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), key


def test_sizes_resizing_and_padding(open_fixture):
    fixture = open_fixture("dense/preprocess")
    for key in ("det_1333x800", "det_1333x480"):
        max_size, min_size = map(int, key.split("_")[1].split("x"))
        rows = []
        for width, height in fixture.spec["inputs"]["sizes_wh"]:
            new_height, new_width = resized_size((height, width), min_size, max_size)
            padded = [-(-side // 32) * 32 for side in (new_width, new_height)]
            rows.append([width, height, new_width, new_height, new_width / width, new_height / height, *padded])
        fixture.assert_output(key, torch.tensor(rows), 1e-6)
    bgr = (60 * fixture.golden.input_for((37, 53, 3), 1200) + 120).round().clamp(0, 255).to(torch.uint8)
    for key, size in (("cv2_up", (64, 91)), ("cv2_down", (20, 29)), ("cv2_aniso", (30, 60))):
        fixture.assert_output(key, resize(bgr.permute(2, 0, 1), size).permute(1, 2, 0), 0)
    transform = DetectorTransform(min_size=None)
    rgb = bgr.flip(-1).permute(2, 0, 1)
    fixture.assert_output("normalized_rgb", normalize(rgb, transform.mean, transform.std).permute(1, 2, 0), 1e-6)
    batch, _, sizes = transform([rgb])
    assert sizes == [(37, 53)]
    fixture.assert_output("padded", batch[0].permute(1, 2, 0), 1e-6)
