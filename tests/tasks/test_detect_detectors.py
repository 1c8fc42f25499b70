"""Detectors on any backbone, and on what data really holds: no objects, tiny boxes, mixed sizes, many proposals."""

import foveate
import pytest
import torch
from foveate.tasks import TaskError
from foveate.tasks.dense.detect import DetectorTransform, create_detector, sample_evenly
from torch import nn

HEADS = ("retinanet", "mask_rcnn", "cascade_mask_rcnn")
TIMM = ("resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "davit_tiny", "twins_svt_small")
FAST = {
    ("resnet18", "mask_rcnn"),
    ("convnext_atto", "cascade_mask_rcnn"),
    ("swin_tiny_patch4_window7_224", "retinanet"),
}


class StubBackbone(nn.Module):
    channels = (8, 12, 16, 24)


def small(head: str, backbone="nat_atto", **options):
    torch.manual_seed(1)
    widths = {"channels": 16} if head == "retinanet" else {"channels": 16, "hidden": 24}
    return create_detector(head, backbone, **({"num_classes": 3, "min_size": 64, "max_size": 96} | widths | options))


def boxes_target(boxes, labels, height, width) -> dict[str, torch.Tensor]:
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "masks": masks}


def a_batch() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Images of different sizes and dtypes: one with a large and a 1-pixel object, one without any."""
    draw = torch.Generator().manual_seed(0)
    images = [
        torch.rand(3, 61, 83, generator=draw),
        torch.randint(0, 256, (3, 97, 64), generator=draw, dtype=torch.uint8),
    ]
    return images, [boxes_target([[3, 4, 50, 44], [10, 10, 11, 11]], [0, 2], 61, 83), boxes_target([], [], 97, 64)]


def features_of(channels=StubBackbone.channels, batch=1, height=64, width=96, seed=0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, count, -(-height // stride), -(-width // stride), generator=draw)
        for count, stride in zip(channels, (4, 8, 16, 32), strict=True)
    ]


def assert_detections(detections, images, head: str) -> None:
    for detection, image in zip(detections, images, strict=True):
        height, width = image.shape[-2:]
        count = len(detection["scores"])
        assert detection["boxes"].shape == (count, 4)
        assert detection["labels"].shape == (count,)
        assert bool(((detection["labels"] >= 0) & (detection["labels"] < 3)).all())
        assert bool((detection["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all())
        assert bool((detection["boxes"] >= 0).all())
        assert bool((detection["scores"].diff() <= 0).all())
        assert detection["boxes"].isfinite().all()
        if head != "retinanet":
            assert detection["masks"].shape == (count, height, width)
            assert detection["masks"].dtype == torch.bool


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        pytest.param(backbone, head, marks=() if (backbone, head) in FAST else pytest.mark.heavy)
        for backbone in TIMM
        for head in HEADS
    ],
)
def test_any_timm_backbone_trains_and_detects(backbone, head):
    images, targets = a_batch()
    model = small(head, backbone)
    losses = model(images, targets)
    assert all(value.dim() == 0 and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert not [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all()
    ]
    assert_detections(model.eval()(images), images, head)


@pytest.mark.parametrize("head", HEADS)
def test_images_without_objects(head):
    images, targets = a_batch()
    model = small(head)
    losses = model(images[1:], targets[1:])
    assert all(value.isfinite() for value in losses.values())
    assert all(value == 0 for name, value in losses.items() if name.endswith(("bbox", "mask")))
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("head", HEADS)
def test_maps_of_odd_sizes(head):
    """Maps of a backbone that pads nothing: 14 x 19, 7 x 10, 4 x 5, 2 x 3."""
    model = small(head, StubBackbone())
    features, sizes = features_of(batch=2, height=53, width=75), [(53, 75), (41, 70)]
    targets = [
        boxes_target([[3, 4, 50, 44]], [1], 53, 75),
        boxes_target([[0, 0, 70, 41], [7, 9, 30, 33]], [0, 2], 53, 75),
    ]
    losses = model.losses_from_features(features, targets, sizes)
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    detections = model.eval().predict_from_features(features, sizes, [(106, 150), (41, 70)])
    assert_detections(detections, [torch.zeros(3, 106, 150), torch.zeros(3, 41, 70)], head)


@pytest.mark.parametrize("head", HEADS)
def test_no_detections(head):
    images, _ = a_batch()
    model = small(head, score_threshold=0.999).eval()
    with torch.inference_mode():
        detections = model(images)
    assert [len(detection["boxes"]) for detection in detections] == [0, 0]
    assert_detections(detections, images, head)


@pytest.mark.parametrize("head", HEADS[1:])
def test_two_thousand_proposals_and_none(head):
    torch.manual_seed(0)
    model = small(head, StubBackbone())
    features = features_of(batch=2)
    corner = torch.rand(2000, 2) * torch.tensor([80.0, 48.0])
    regions = torch.cat([corner, corner + 1 + torch.rand(2000, 2) * 15], dim=1)
    targets = [boxes_target([[3, 4, 50, 44], [10, 10, 11, 11]], [0, 2], 64, 96), boxes_target([], [], 64, 96)]
    for proposals in ([regions, regions.flip(0)], [regions, regions[:0]]):
        losses = model.losses_from_features(features, targets, [(64, 96), (60, 90)], proposals=proposals)
        assert all(value.isfinite() for value in losses.values())
    model.eval()
    pyramid = model.neck(features)
    for proposals in ([regions, regions.flip(0)], [regions[:0], regions[:0]]):
        with torch.inference_mode():
            detections = model.roi_heads(pyramid, proposals, [(64, 96), (60, 90)], [(128, 192), (60, 90)])
        assert_detections(detections, [torch.zeros(3, 128, 192), torch.zeros(3, 60, 90)], head)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
def test_autocast_is_finite(head, dtype):
    model = small(head, StubBackbone())
    features = features_of()
    target = boxes_target([[3, 4, 50, 44], [10, 10, 11, 11]], [0, 2], 64, 96)
    with torch.autocast("cpu", dtype):
        losses = model.losses_from_features(features, [target], [(64, 96)])
        assert all(value.isfinite() and value.dtype == torch.float32 for value in losses.values())
        sum(losses.values()).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        detections = model.eval().predict_from_features(features, [(64, 96)])
    assert_detections(detections, [torch.zeros(3, 64, 96)], head)
    assert detections[0]["boxes"].dtype == detections[0]["scores"].dtype == torch.float32


@pytest.mark.parametrize("head", HEADS[1:])
def test_losses_are_reproducible_with_an_even_draw(head):
    model = small(head, StubBackbone(), region_samples=64, anchor_samples=32)
    target = boxes_target([[3, 4, 50, 44], [20, 10, 60, 40]], [0, 2], 64, 96)

    def losses():
        found = model.losses_from_features(features_of(), [target], [(64, 96)])
        return torch.stack([*found.values()])

    assert not torch.equal(losses(), losses())
    model.sample = sample_evenly
    assert model.rpn.sampler.sample is model.roi_heads.sampler.sample is model.sample is sample_evenly
    assert torch.equal(losses(), losses())


def test_a_detector_learns_one_image():
    """A few steps on one image, and its object is found where it is."""
    torch.manual_seed(0)
    image = torch.full((3, 64, 96), 0.2)
    image[:, 16:48, 24:72] = 0.9
    target = boxes_target([[24, 16, 72, 48]], [1], 64, 96)
    model = small("mask_rcnn", min_size=None, num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=80)
    for _ in range(80):
        optimizer.zero_grad()
        sum(model([image], [target]).values()).backward()
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        best = {key: value[0] for key, value in model.eval()([image])[0].items()}
    assert best["labels"] == 1
    assert best["scores"] > 0.5
    assert (best["boxes"] - target["boxes"][0]).abs().max() < 6
    overlap = (best["masks"] & target["masks"][0]).sum() / (best["masks"] | target["masks"][0]).sum()
    assert overlap > 0.7


def test_detections_are_in_pixels_of_the_image_as_given():
    """Twice the original size, twice the boxes."""
    model = small("mask_rcnn", StubBackbone()).eval()
    features = features_of()
    once = model.predict_from_features(features, [(60, 91)])[0]
    twice = model.predict_from_features(features, [(60, 91)], [(120, 182)])[0]
    assert len(once["boxes"])
    torch.testing.assert_close(2 * once["boxes"], twice["boxes"])
    assert twice["masks"].shape[1:] == (120, 182)


@pytest.mark.parametrize("head", HEADS)
def test_detections_do_not_depend_on_the_rest_of_the_batch(head):
    """Padding reaches the last pixels through convolutions: mmdet's numbers are those of images alone."""
    draw = torch.Generator().manual_seed(1)
    sizes = [(61, 83), (97, 64), (60, 80), (20, 96), (61, 83)]
    images = [torch.rand(3, *size, generator=draw) for size in sizes]
    model = small(head, score_threshold=0.0).eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    with torch.no_grad():
        alone = [model([image])[0] for image in images]
        seen.clear()
        together = model(images)
    assert sorted(shape[0] for shape in seen) == [1, 1, 3]
    for single, grouped in zip(alone, together, strict=True):
        assert len(single["scores"]) > 0
        for key in ("boxes", "scores"):
            torch.testing.assert_close(grouped[key], single[key], atol=1e-3, rtol=1e-4)


def test_the_transform_moves_boxes_and_masks_with_the_image():
    image = torch.zeros(3, 50, 80)
    image[:, 10:30, 20:60] = 1
    target = boxes_target([[20, 10, 60, 30]], [1], 50, 80)
    batch, targets, sizes = DetectorTransform(min_size=100, max_size=1000, mean=(0, 0, 0), std=(1, 1, 1))(
        [image, torch.zeros(3, 200, 100)], [target, boxes_target([], [], 200, 100)]
    )
    assert sizes == [(100, 160), (200, 100)]
    assert batch.shape == (2, 3, 224, 160)
    assert targets[0]["boxes"].tolist() == [[40, 20, 120, 60]]
    assert targets[0]["masks"].shape == (1, 224, 160)
    assert targets[1]["masks"].shape == (0, 224, 160)
    assert ((batch[0, 0] > 0.5) == targets[0]["masks"][0]).float().mean() > 0.99
    assert torch.equal(target["boxes"], torch.tensor([[20.0, 10, 60, 30]]))


def test_training_draws_a_size_and_evaluation_takes_the_last():
    transform = DetectorTransform(min_size=(32, 64, 96), max_size=500)
    shapes = {transform([torch.zeros(3, 40, 50)])[2][0][0] for _ in range(40)}
    assert shapes == {32, 64, 96}
    assert transform.eval()([torch.zeros(3, 40, 50)])[2] == [(96, 120)]


def test_wrong_images_and_targets_are_one_line():
    images, targets = a_batch()
    model = small("mask_rcnn")

    def wrong(**entries):
        return [{**targets[0], **entries}, targets[1]]

    with pytest.raises(TaskError, match=r"training needs targets; .*model.eval\(\)"):
        model(images)
    with pytest.raises(TaskError, match="2 images and 1 targets"):
        model(images, targets[:1])
    with pytest.raises(TaskError, match="target 1 has no 'masks'; MaskRCNN needs boxes, labels, masks"):
        model(images, [targets[0], {key: targets[1][key] for key in ("boxes", "labels")}])
    with pytest.raises(TaskError, match="target 0 has labels 1 to 3; they must be 0 to 2, without a background"):
        model(images, wrong(labels=torch.tensor([1, 3])))
    with pytest.raises(TaskError, match=r"target 0 has the box \[10.0, 10.0, 10.0, 11.0\], which is empty"):
        model(images, wrong(boxes=torch.tensor([[3.0, 4, 50, 44], [10, 10, 10, 11]])))
    with pytest.raises(TaskError, match=r"masks \(2, 5, 5\); for 2 boxes they must be \(2, 61, 83\)"):
        model(images, wrong(masks=torch.zeros(2, 5, 5)))
    with pytest.raises(TaskError, match=r"boxes \(2, 5\) and labels \(2,\)"):
        model(images, wrong(boxes=torch.zeros(2, 5)))
    model.eval()
    with pytest.raises(TaskError, match=r"shape \(1, 61, 83\); the model takes \[3, height, width\]"):
        model([torch.zeros(1, 61, 83)])
    with pytest.raises(TaskError, match=r"dtype torch.int64"):
        model([torch.zeros(3, 61, 83, dtype=torch.int64)])
    with pytest.raises(TaskError, match="list of images is empty"):
        model([])
    with pytest.raises(TaskError, match="takes 4 maps, got 3"):
        model.predict_from_features(features_of()[:3], [(64, 96)])


def test_initial_weights_are_the_published_ones():
    torch.manual_seed(0)
    two_stage = create_detector("cascade_mask_rcnn", StubBackbone(), channels=64, hidden=256)
    dense = create_detector("retinanet", StubBackbone(), channels=64)
    head, mask = two_stage.roi_heads.box_heads[1], two_stage.roi_heads.mask_heads[1]
    for weight, std in (
        (two_stage.rpn.head.conv[0][0].weight, 0.01),
        (head.cls_score.weight, 0.01),
        (head.bbox_pred.weight, 0.001),
        (head.tower[0][0].weight, (2 / (9 * 64)) ** 0.5),
        (mask.convs[0][0].weight, (2 / (9 * 64)) ** 0.5),
        (two_stage.neck.layer_blocks[0][0].weight, (2 / (2 * 9 * 64)) ** 0.5),
        (dense.head.reg_tower[0][0].weight, 0.01),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    biases = {name: value for name, value in two_stage.named_parameters() if name.endswith("bias")}
    assert all((value == 0).all() for value in biases.values())
    assert dense.head.cls_logits.bias.sigmoid().mean().item() == pytest.approx(0.01)


def test_the_package_offers_it():
    assert foveate.create_detector is create_detector
    assert "create_detector" in foveate.__all__
