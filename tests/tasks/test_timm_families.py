"""Detectors and segmenters on small models of timm's families, and the table of what came of it."""

import importlib.util
from pathlib import Path

import foveate
import pytest
import timm
import torch
from foveate.tasks import TaskError
from foveate.tasks.dense.detect import create_detector
from foveate.tasks.dense.neck import MultiLevelNeck, ScaledMaps, SimpleFeaturePyramid
from foveate.tasks.dense.segment import create_segmenter
from foveate.tasks.dense.segment.segmenter import HEADS
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
# Stages and blocks, strides 16 and 14, one size and any, NCHW and NHWC, multiples of a window: the cheapest of each.
DOZEN = (
    "test_resnet",
    "test_convnext",
    "test_efficientnet",
    "test_byobnet",
    "test_nfnet",
    "vit_tiny_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_tiny_patch16_dinov3_qkvb",
    "deit_tiny_patch16_224",
    "hiera_tiny_224",
    "shvit_s1",
    "poolformerv2_s12",
)


def load_families():
    spec = importlib.util.spec_from_file_location("timm_families", ROOT / ".ci" / "timm_families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


families = load_families()
ROWS = families.read_rows()


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row["model"], marks=[] if row["model"] in DOZEN else pytest.mark.heavy) for row in ROWS],
)
def test_what_came_of_a_model_stands_in_the_table(row):
    """Regenerate it with ``.ci/wide timm``."""
    found = families.walk(row["model"])
    if timm.__version__ == row["timm"]:
        assert found == {key: row[key] for key in found}
    assert not found["result"].startswith("wrong")


def test_the_dozen_is_in_the_table():
    assert set(DOZEN) <= {row["model"] for row in ROWS}


def test_readme_has_the_sentence_of_the_table():
    """Regenerate it with ``.ci/wide timm``."""
    assert (ROOT / "README.md").read_text().split(families.MARK)[1].strip() == families.render(ROWS)


def test_most_families_work_and_none_is_wrong():
    names = {row["family"] for row in ROWS}
    failed = {row["family"] for row in ROWS if row["result"] != families.WORKS}
    assert len(names) >= 60
    assert len(failed) <= 0.15 * len(names)
    assert not [row for row in ROWS if not row["result"].startswith((families.WORKS, "refused: "))]


def test_every_family_of_timm_is_in_the_table():
    if {row["timm"] for row in ROWS} != {timm.__version__}:
        pytest.skip("the table is of another timm")
    theirs = {
        timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        for name in timm.list_models()
        if timm.models.model_entrypoint(name).__module__.startswith("timm.")
    }
    assert {row["family"] for row in ROWS} == theirs


@pytest.mark.parametrize("fault", ["stride", "layout", "shuffled", "channels"])
def test_the_walk_sees_wrong_maps(fault):
    model = create_segmenter("upernet", "test_resnet", num_classes=2, channels=16).eval()
    forward = model.backbone.features.forward

    def broken(x):
        maps = forward(x)
        if fault == "stride":
            maps[1] = nn.functional.avg_pool2d(maps[1], 2)
        elif fault == "layout":
            maps[1] = maps[1].transpose(2, 3)
        elif fault == "shuffled":
            maps[0] = maps[0].flip(2)
        else:
            maps[1] = maps[1][:, 1:]
        return maps

    model.backbone.features.forward = broken
    with pytest.raises(AssertionError, match=r"map [01]"):
        families.check_maps(model)


# The adapters themselves.


class Maps(nn.Module):
    """A backbone without weights, of given strides."""

    def __init__(self, strides, channels=8):
        super().__init__()
        self.reductions, self.channels = list(strides), [channels] * len(strides)

    def forward(self, x):
        return [
            x.new_zeros(len(x), self.channels[0], *(-(-side // s) for side in x.shape[2:])) for s in self.reductions
        ]


PYRAMIDS = ([16] * 4, [8, 16, 32], [4, 8, 16, 16])
RARE = ([16], [8] * 4, [32], [16, 32, 64], [2, 4])


@pytest.mark.parametrize(
    ("head", "strides"),
    [*((head, strides) for head in HEADS for strides in PYRAMIDS), *(("semantic_fpn", strides) for strides in RARE)],
)
def test_every_segmenter_stands_on_every_pyramid(head, strides):
    small = {"channels": 8} if head in ("upernet", "semantic_fpn") else {}
    small = {"channels": 64} if head in ("light_ham", "ham_net") else small
    if head in ("mask2former", "oneformer"):
        small = {"dim": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 3}
    model = create_segmenter(head, Maps(strides), num_classes=3, **small).eval()
    with torch.inference_mode():
        assert model(torch.rand(1, 3, 97, 143)).shape == (1, 3, 97, 143)
        maps = model.features(torch.rand(1, 3, 97, 143))
    if model.neck is not None and not isinstance(model.neck, MultiLevelNeck):
        assert model.neck.reductions == [4, 8, 16, 32]
        assert [tuple(level.shape[2:]) for level in maps] == [(25, 36), (13, 18), (7, 9), (4, 5)]


@pytest.mark.parametrize("strides", [*PYRAMIDS, *RARE])
@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn"])
def test_every_detector_stands_on_every_pyramid(head, strides):
    small = {"hidden": 8} if head == "mask_rcnn" else {}
    model = create_detector(head, Maps(strides), num_classes=3, channels=8, **small).eval()
    batch = torch.rand(1, 3, 128, 160)
    first = 8 if head == "retinanet" else 4
    expected = [(-(-128 // stride), -(-160 // stride)) for stride in (first * 2**step for step in range(5))]
    assert [tuple(level.shape[2:]) for level in model.neck(model.backbone(batch))] == expected


def test_entries_of_the_simple_pyramid_have_detectron2s_names():
    """The names and shapes of ViTDet's `SimpleFeaturePyramid` on ViT-B: backbone.simfp_2.0.weight and so on."""
    entries = {key: tuple(value.shape) for key, value in SimpleFeaturePyramid(768).state_dict().items()}
    expected = {}
    for name, layers, width in (
        ("simfp_2", {"0.weight": (768, 384, 2, 2), "0.bias": (384,), "1.weight": (384,), "1.bias": (384,)}, 192),
        ("simfp_3", {"0.weight": (768, 384, 2, 2), "0.bias": (384,)}, 384),
        ("simfp_4", {}, 768),
        ("simfp_5", {}, 768),
    ):
        if name == "simfp_2":
            layers |= {"3.weight": (384, 192, 2, 2), "3.bias": (192,)}
        first = {"simfp_2": 4, "simfp_3": 1, "simfp_4": 0, "simfp_5": 1}[name]
        for place, shape in ((first, (256, width, 1, 1)), (first + 1, (256, 256, 3, 3))):
            layers |= {f"{place}.weight": shape, f"{place}.norm.weight": (256,), f"{place}.norm.bias": (256,)}
        expected |= {f"{name}.{key}": shape for key, shape in layers.items()}
    assert entries == expected


def test_the_simple_pyramid_computes_what_vitdet_writes():
    """Section 3 of the paper, in plain functions: deconvolutions, LayerNorm over channels, 1x1 and 3x3 convolutions."""
    torch.manual_seed(0)
    neck = SimpleFeaturePyramid(8, out_channels=4, num_extra=1).double()
    x = torch.randn(1, 8, 6, 10, dtype=torch.float64)
    weights = neck.state_dict()

    def norm(x, name):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]

    def convolved(x, name, first):
        for place, padding in ((first, 0), (first + 1, 1)):
            x = nn.functional.conv2d(x, weights[f"{name}.{place}.weight"], padding=padding)
            x = norm(x, f"{name}.{place}.norm")
        return x

    def doubled(x, name):
        return nn.functional.conv_transpose2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2)

    finest = doubled(nn.functional.gelu(norm(doubled(x, "simfp_2.0"), "simfp_2.1")), "simfp_2.3")
    coarsest = convolved(nn.functional.max_pool2d(x, 2), "simfp_5", 1)
    expected = [
        convolved(finest, "simfp_2", 4),
        convolved(doubled(x, "simfp_3.0"), "simfp_3", 1),
        convolved(x, "simfp_4", 0),
        coarsest,
        coarsest[:, :, ::2, ::2],
    ]
    torch.testing.assert_close(neck([torch.zeros(1), x]), expected)


def test_the_multi_level_neck_computes_what_mmseg_writes():
    torch.manual_seed(0)
    neck = MultiLevelNeck([6] * 4)
    assert sorted(neck.state_dict()) == sorted(
        f"{part}.{level}.conv.{leaf}"
        for part in ("lateral_convs", "convs")
        for level in range(4)
        for leaf in ("weight", "bias")
    )
    maps = [torch.randn(1, 6, 7, 9) for _ in range(4)]
    for level, (found, size) in enumerate(zip(neck(maps), [(28, 36), (14, 18), (7, 9), (3, 4)], strict=True)):
        lateral, conv = neck.lateral_convs[level].conv, neck.convs[level].conv
        resized = nn.functional.interpolate(lateral(maps[level]), scale_factor=(4, 2, 1, 0.5)[level], mode="bilinear")
        assert resized.shape[2:] == size
        torch.testing.assert_close(found, conv(resized))


@pytest.mark.parametrize(
    ("head", "neck", "strides"),
    [
        ("upernet", "auto", [16] * 4),
        ("upernet", "simple", [16] * 4),
        ("upernet", None, [16] * 4),
        ("upernet", "auto", [8, 16]),
        ("upernet", "auto", [4, 8, 16]),
        ("mask2former", "auto", [8, 16, 32]),
    ],
)
def test_a_segmenters_file_tells_its_neck(head, neck, strides, tmp_path):
    small = {"channels": 8} if head != "mask2former" else {"dim": 32, "encoder_layers": 1, "decoder_layers": 1}
    model = create_segmenter(head, Maps(strides), num_classes=3, neck=neck, **small).eval()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    again = create_segmenter(head, Maps(strides), checkpoint=tmp_path / "model.pth").eval()
    image = torch.rand(1, 3, 97, 143)
    with torch.inference_mode():
        torch.testing.assert_close(again(image), model(image))
    assert type(again.neck) is type(model.neck)


@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn"])
@pytest.mark.parametrize("strides", [[16], [8, 16]])
def test_a_detectors_file_tells_its_pyramid(head, strides, tmp_path):
    small = {"hidden": 8} if head == "mask_rcnn" else {}
    model = create_detector(head, Maps(strides), num_classes=3, channels=8, **small)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    again = create_detector(head, Maps(strides), checkpoint=tmp_path / "model.pth")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_levels_come_from_the_nearest_maps():
    assert ScaledMaps([8, 16, 32], [8, 16, 64]).sources == [0, 0, 1, 1]
    assert ScaledMaps([8] * 4, [4, 8, 16, 16]).sources == [0, 1, 3, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_detector("mask_rcnn", Maps([4, 8, 14, 32])), "strides 4, 8, 14, 32; .* out_indices=None"),
        (
            lambda: create_detector("mask_rcnn", "hiera_tiny_224"),
            "up to 224x224 alone, .* up to 1344: .* img_size=1344",
        ),
        (lambda: create_segmenter("upernet", Maps([8, 16]), neck="simple"), "the backbone's are 8, 16: use 'scaled'"),
        (lambda: create_segmenter("upernet", Maps([16]), neck="multilevel"), "takes 4 maps, the backbone gives 1"),
        (lambda: create_segmenter("upernet", Maps([16]), neck="fpn"), "neck is 'fpn'; it can be 'auto', None"),
        (lambda: create_segmenter("mask2former", Maps([16]), neck=None), "takes four maps, the backbone gives 1"),
    ],
)
def test_what_does_not_go_together_is_said_at_construction(call, message):
    with pytest.raises(TaskError, match=message):
        call()


def test_a_chosen_size_makes_a_detector_of_one_size():
    options = {"min_size": 96, "max_size": 160, "channels": 8, "hidden": 8, "num_classes": 2}
    model = foveate.create_detector("mask_rcnn", "hiera_tiny_224", img_size=160, **options).eval()
    assert model.backbone.size == (160, 160)
    assert len(model.predict([torch.rand(3, 97, 143)])) == 1
