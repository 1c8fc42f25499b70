"""Measures of maps are those of the published code, and tell a good map from a bad one."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from foveate.tasks import TaskError
from foveate.tasks.seeing import deletion, insertion, judge, max_box_acc_v2, pixel_ap, pointing_game


@pytest.fixture(scope="module")
def wsol(golden_folder):
    data = np.load(golden_folder / "seeing/wsol_data.npz")
    bits = (torch.from_numpy(np.unpackbits(data[name], axis=-1)).bool() for name in ("masks", "ignores"))
    boxes = [torch.from_numpy(data["boxes"][data["boxes"][:, 0] == i, 1:]) for i in range(len(data["maps"]))]
    return torch.from_numpy(data["maps"] / 65535), boxes, *bits


def test_boxes_of_maps_are_judged_as_published(wsol, open_fixture):
    maps, boxes = wsol[:2]
    fixture = open_fixture("seeing/wsol")
    curves = torch.from_numpy(judge.box_curves(maps, boxes))
    fixture.assert_output("box.v2.curve", 100 * curves, 1e-5)
    best = curves.amax(1).mean().item()
    fixture.assert_output("MaxBoxAccV2", torch.tensor([100 * best]), 1e-5)
    assert max_box_acc_v2(maps[:2].float(), boxes[:2]) == judge.box_curves(maps[:2], boxes[:2]).max(1).mean()


def test_pixels_and_points_are_judged_as_published(wsol, open_fixture):
    maps, boxes, masks, ignores = wsol
    fixture = open_fixture("seeing/wsol")
    for dtype in (torch.float64, torch.float32):
        fixture.assert_output("PxAP", torch.tensor([100 * pixel_ap(maps.to(dtype), masks, ignores)]), 1e-5)
        for tolerance in (0, 15):
            share = torch.tensor([pointing_game(maps.to(dtype), boxes, tolerance)])
            fixture.assert_output(f"pointing.{tolerance}", share, 1e-7)
    assert pixel_ap(maps, masks) != pixel_ap(maps, masks, ignores)


def test_contours_are_those_of_opencv():
    cv2 = pytest.importorskip("cv2")
    generator = torch.Generator().manual_seed(0)
    coarse = F.interpolate(torch.rand(20, 1, 12, 12, generator=generator), (40, 50), mode="bilinear")[:, 0]
    cuts = torch.cat([coarse > 0.5, torch.rand(20, 40, 50, generator=generator) > 0.6, torch.zeros(1, 40, 50) > 0])
    of_cut, boxes = judge._contour_boxes(cuts)
    for i, cut in enumerate(cuts.numpy().astype(np.uint8)):
        contours = cv2.findContours(cut, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
        expected = [(x, y, min(x + w, 49), min(y + h, 39)) for x, y, w, h in map(cv2.boundingRect, contours)]
        assert sorted(map(tuple, boxes[of_cut == i].int().tolist())) == sorted(expected)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("vit_tiny", "del"),
        *(pytest.param(*which, marks=pytest.mark.heavy) for which in (("resnet18", "del"), ("resnet18", "ins"))),
        pytest.param("vit_tiny", "ins", marks=pytest.mark.heavy),
    ],
)
def test_insertion_and_deletion_are_rise_s(name, short, open_fixture):
    fixture = open_fixture(f"seeing/insertion_deletion_{name}")
    golden, inputs = fixture.golden, fixture.spec["inputs"]
    model = timm.create_model(fixture.spec["model"])
    model.load_state_dict(fixture.state(), strict=False)
    x = golden.input_for(tuple(inputs["image"]["shape"]), inputs["image"]["seed"])
    coarse, fine = inputs["map"]["seeds"]
    saliency = F.interpolate(golden.input_for((1, 1, 14, 14), coarse), (224, 224), mode="bilinear")[:, 0]
    saliency = saliency + 1e-4 * golden.input_for((224, 224), fine)
    fixture.assert_output("kernel", judge.blur_kernel(), 1e-8)
    fixture.assert_output("blurred", judge._blur(x), 1e-6)
    scores, area = {"del": deletion, "ins": insertion}[short](model, x, saliency)
    fixture.assert_output(f"{short}.scores", scores[0], 1e-5)
    fixture.assert_output(f"{short}.auc", area, 1e-5)
    assert scores.shape == (1, 29)
    assert model.training


def brightness(x: torch.Tensor) -> torch.Tensor:
    left = 40 * x[:, 0, :8, :8].mean((1, 2))
    return torch.stack([left, torch.full_like(left, 25.0)], dim=1)


class Corner(torch.nn.Module):
    """Class 0 is the upper left corner's brightness."""

    def forward(self, x):
        return brightness(x)


def test_a_map_of_what_counts_beats_others_in_a_batch():
    x = torch.ones(2, 3, 32, 32)
    good, bad = torch.zeros(2, 32, 32)
    good[:8, :8] = 1
    bad[16:, 16:] = 1
    maps = torch.stack([good, bad])
    scores, area = deletion(Corner(), x, maps, target=0, step=100)
    assert scores.shape == (2, 12)
    assert area[0] < 0.1 < area[1]
    lit = x.clone()
    lit[:, :, :, 8:] = 0
    assert insertion(Corner(), lit, maps, target=0, step=100)[1].diff() < -0.1
    # Each image by itself is the same, and its class is that of the whole image.
    assert torch.equal(deletion(Corner(), x[1:], maps[1:], step=100)[0], scores[1:])
    # Ties go by rows: all of a constant map's first step is the first 100 pixels, rows 0 to 3.
    flat = deletion(Corner(), x[:1], torch.zeros(1, 32, 32), step=128)[0][0]
    x[0, :, :4] = 0
    assert flat[1] == brightness(x)[0].softmax(0)[0]


def test_pointing_counts_ends_and_distance():
    maps = torch.zeros(1, 50, 60)
    maps[0, 10, 20] = 1
    for box, away in (([20, 10, 25, 30], 0), ([5, 5, 20, 10], 0), ([21, 10, 30, 30], 1), ([23, 14, 30, 30], 5)):
        assert pointing_game(maps, [torch.tensor([box])], tolerance=away) == 1
        assert pointing_game(maps, [torch.tensor([box])], tolerance=away - 0.1) == 0


def test_ignored_pixels_and_bins():
    masks = torch.tensor([[[1, 0, 0, 1]]])
    assert pixel_ap(torch.tensor([[[0.9, 0.2, 0.1, 1.0]]]), masks) == 1
    # Within one bin of .001 there is no order.
    assert pixel_ap(torch.tensor([[[0.5004, 0.5002, 0.1, 1.0]]]), masks) == pytest.approx(0.5 + 0.5 * 2 / 3)
    wrong = torch.tensor([[[0.9, 0.95, 0.1, 1.0]]])
    assert pixel_ap(wrong, masks) < 1
    assert pixel_ap(wrong, masks, torch.tensor([[[1, 1, 0, 0]]])) == 1


def test_errors_name_the_cause():
    maps = torch.rand(2, 8, 8)
    with pytest.raises(TaskError, match=r"\[2, 8, 8\] for \[2, 3, 9, 9\]; resize"):
        insertion(Corner(), torch.rand(2, 3, 9, 9), maps)
    with pytest.raises(TaskError, match="no numbers"):
        deletion(Corner(), torch.rand(2, 3, 8, 8), maps * float("nan"))
    with pytest.raises(TaskError, match="step is 0"):
        deletion(Corner(), torch.rand(2, 3, 8, 8), maps, step=0)
    with pytest.raises(TaskError, match=r"\[2, 8, 8\] and 1"):
        pointing_game(maps, [torch.zeros(1, 4)])
    with pytest.raises(TaskError, match="image 1 has no box"):
        max_box_acc_v2(maps, [torch.zeros(1, 4), torch.zeros(0, 4)])
    with pytest.raises(TaskError, match="0 to 1"):
        pixel_ap(2 * maps + 1, maps > 0.5)
    with pytest.raises(TaskError, match="no object"):
        pixel_ap(maps, maps > 2)
    with pytest.raises(TaskError, match="one shape"):
        pixel_ap(maps, maps[:1] > 0)
