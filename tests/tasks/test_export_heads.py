"""Detectors and segmenters leave whole: as they predict, in fixed sizes, by onnxruntime and by torch.export."""

import pytest
import torch
from foveate import create_detector, create_segmenter
from foveate.tasks import TaskError
from foveate.tasks.dense.deformable_encoder import sine_position
from foveate.tasks.dense.deploy import deployable
from foveate.tasks.dense.normalize import normalize
from foveate.tasks.dense.segment.fixed import Queries, segments
from foveate.tasks.dense.segment.postprocess import OUTPUTS, postprocess
from foveate.tasks.export import Options, example_images, export_model, whole_model
from foveate.tasks.export.program import symbolic, trace
from torch import nn

_REGIONS = dict(hidden=32, score_threshold=0.2)
DETECTORS = {
    "retinanet": dict(score_threshold=0.02),
    "retinanet detectron2": dict(score_threshold=0.02, rules="detectron2"),
    "retinanet anchors": dict(score_threshold=0.02, selection="anchors"),
    "faster_rcnn": _REGIONS,
    "mask_rcnn": _REGIONS,
    "cascade_mask_rcnn": _REGIONS,
    "cascade_mask_rcnn detectron2": dict(rules="detectron2", **_REGIONS),
    "dino": dict(hidden=32, num_queries=10, encoder_layers=1, decoder_layers=1, max_detections=12, num_levels=2),
}
LABELLERS = ("semantic_fpn", "upernet", "deeplabv3", "deeplabv3_plus", "light_ham", "ham_net", "mca", "attention_unet")
QUERIES = [f"{head} {output}" for head in ("mask2former", "oneformer") for output in OUTPUTS]
# tests/tools/test_serve_dense.py has others as .onnx.
BRIEF = ("retinanet .pt2",)


class Convolutions(nn.Module):
    """A backbone of four convolutions, which is quickly exported."""

    channels = (4, 8, 12, 16)
    reductions = (4, 8, 16, 32)

    def __init__(self):
        super().__init__()
        pairs = zip((3, *self.channels), self.channels, strict=False)
        self.stages = nn.ModuleList(
            nn.Conv2d(a, b, stride, stride=stride) for (a, b), stride in zip(pairs, (4, 2, 2, 2), strict=True)
        )

    def forward(self, x):
        x = nn.functional.pad(x, (0, -x.shape[-1] % 32, 0, -x.shape[-2] % 32))
        maps = []
        for stage in self.stages:
            x = stage(x).relu()
            maps.append(x)
        return maps


def build(name: str) -> nn.Module:
    """Return a small model whose answers vary."""
    torch.manual_seed(0)
    head = name.split()[0]
    if name in DETECTORS:
        model = create_detector(head, Convolutions(), 3, channels=32, min_size=None, **DETECTORS[name])
    elif head in LABELLERS:
        model = create_segmenter(head, Convolutions(), 5, **({} if head == "attention_unet" else {"channels": 64}))
    else:
        sizes = dict(dim=32, num_queries=10, encoder_layers=1, encoder_hidden=32, decoder_layers=3, decoder_hidden=32)
        model = create_segmenter(head, Convolutions(), 5, things=(1, 3), num_heads=2, topk=20, **sizes)
        model.object_threshold = model.overlap_threshold = 0.3
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
        if head == "retinanet":
            for module in model.head.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.normal_(module.weight, std=1.5 * module.weight[0].numel() ** -0.5)
    return model.eval()


@pytest.mark.parametrize("name", DETECTORS)
def test_a_deployed_detector_finds_what_it_predicts(name):
    model = build(name)
    images = torch.rand(2, 3, 70, 101)
    batch = torch.stack([normalize(image, model.transform.mean, model.transform.std, "rgb") for image in images])
    module = deployable(model)
    with torch.no_grad():
        found = dict(zip(module.OUTPUTS, module(batch), strict=True))
    for image, expected in enumerate(model.predict(list(images))):
        count = int(found["count"][image])
        assert count == len(expected["scores"]) > 3
        torch.testing.assert_close(found["scores"][image, :count], expected["scores"])
        # Boxes of equal scores may swap.
        apart = (found["boxes"][image, :count, None] - expected["boxes"]).abs().amax(-1)
        apart = apart + (found["labels"][image, :count, None] != expected["labels"])
        assert apart.amin(1).max() < 1e-3
        assert not found["scores"][image, count:].any()
        assert (found["labels"][image, count:] == -1).all()
        if "masks" in expected:
            same = found["masks"][image, apart.argmin(0)] == expected["masks"]
            assert same.float().mean() > 0.9999
            assert not found["masks"][image, count:].any()


def test_a_deployed_detector_finds_nothing_in_fixed_sizes():
    model = build("mask_rcnn")
    model.roi_heads.score_threshold = 1.0
    boxes, scores, labels, masks, count = deployable(model)(torch.rand(1, 3, 64, 64))
    assert count.tolist() == [0]
    assert not any(x.any() for x in (boxes, scores, masks))
    assert (labels == -1).all()


@pytest.mark.parametrize("name", ["mask2former semantic", "mask2former instance", "oneformer panoptic"])
def test_a_deployed_segmenter_answers_as_it_predicts(name):
    model, output = build(name), name.split()[1]
    images = example_images(3, 70, 101, 2)
    module = deployable(model, output)
    with torch.no_grad():
        found = dict(zip(module.OUTPUTS, module(images), strict=True))
    predicted = model.predict(images, output, normalized=True)
    if output == "semantic":
        assert torch.equal(found["labels"], predicted)
        return
    for image, expected in enumerate(predicted):
        count = int(found["count"][image])
        if output == "instance":
            assert count == len(expected["scores"])
            torch.testing.assert_close(found["scores"][image, :count], expected["scores"])
            assert (found["masks"][image, :count] == expected["masks"]).float().mean() > 0.999
        else:
            assert torch.equal(found["segments"][image], expected["segments"])
            assert count == len(expected["segments_info"])


@pytest.mark.parametrize("fusion", ["mask2former", "mmdet"])
def test_segments_are_numbered_by_the_published_rules(fusion):
    generator = torch.Generator().manual_seed(0)
    things = torch.tensor([True, False, False, True, False])
    numbers = []
    for _ in range(5):
        classes = torch.randn(2, 12, 5, generator=generator) * 4
        masks = nn.functional.interpolate(torch.randn(2, 12, 5, 6, generator=generator) * 3, size=(20, 24))
        shown, category, isthing, areas, scores, count = segments(Queries(classes, masks, things), 0.5, 0.3, fusion)
        for image in range(2):
            expected = postprocess(
                classes[image], masks[image], "panoptic", None, None, (0, 3), 0.5, 0.3, fusion=fusion
            )
            assert torch.equal(shown[image], expected["segments"])
            numbers.append(int(count[image]))
            for index, info in enumerate(expected["segments_info"]):
                assert category[image, index] == info["category_id"]
                assert isthing[image, index] == info["isthing"]
                assert areas[image, index] == info["area"]
                assert scores[image, index] == pytest.approx(info.get("score", float(scores[image, index])))
            assert count[image] == len(expected["segments_info"])
            assert (category[image, count[image] :] == -1).all()
    assert max(numbers) > 2


class Positions(nn.Module):
    """Of every other pixel: torch has to reason about rounded quotients of the size, as in a backbone."""

    def forward(self, x):
        x = x[..., ::2, ::2]
        return sine_position(*x.shape[-2:], 8, x)


def test_positions_are_followed_for_any_size():
    with symbolic(True):
        module = trace(Positions(), torch.zeros(1, 3, 6, 9), False, True).module()
    for size in ((6, 9), (5, 26)):
        images = torch.zeros(1, 3, *size)
        torch.testing.assert_close(module(images), Positions()(images))


CASES = [
    pytest.param(name, suffix, marks=() if f"{name} {suffix}" in BRIEF else pytest.mark.heavy, id=f"{name}{suffix}")
    for name in (*DETECTORS, *LABELLERS, *QUERIES)
    for suffix in (".onnx", ".pt2")
]


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_every_head_is_exported_whole(name, suffix, tmp_path):
    """The exporter runs what it wrote and compares; a difference is an error."""
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    output = name.split()[1] if name in QUERIES else None
    model = whole_model(build(name), output)
    path = tmp_path / f"model{suffix}"
    # Weights that are doubled in every layer let rounding grow.
    options = Options(tolerance=1e-4 if name in DETECTORS else 1e-5)
    facts = export_model(model, example_images(3, 70, 101, 2), path, {}, options)
    assert tuple(facts["outputs"]) == model.OUTPUTS
    assert set(facts["operators"]) <= ({"torchvision"} if suffix == ".pt2" else set())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    if suffix == ".onnx":
        graph = pytest.importorskip("onnx").load(path).graph
        assert [value.name for value in graph.output] == list(model.OUTPUTS)
        assert "GridSample" not in {node.op_type for node in graph.node}


def test_one_head_has_one_answer():
    with pytest.raises(TaskError, match="Segmenter has no output 'panoptic'"):
        whole_model(build("semantic_fpn"), "panoptic")
