"""The rules of published detectors, each beside its plain form."""

import numpy as np
import pytest
import torch
from foveate.tasks.dense.detect.anchors import AnchorGrid
from foveate.tasks.dense.detect.assign import BACKGROUND, IGNORED, Matcher, Sampler, sample_evenly
from foveate.tasks.dense.detect.boxes import BoxCoder, giou_loss, has_area, pairwise_iou
from foveate.tasks.dense.detect.masks import crop_masks
from foveate.tasks.dense.detect.postprocess import grouped_nms, paste_masks, top_k
from foveate.tasks.dense.detect.roi_heads import RoIExtractor
from foveate.tasks.dense.detect.rpn import RegionProposalNetwork
from foveate.tasks.dense.detect.transform import DetectorTransform
from torchvision.ops import box_iou, generalized_box_iou, nms


def some_boxes(count: int, seed: int = 0, side: float = 40.0, low: float = 0.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=draw) * 200 + low
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=draw) * side], dim=1)


def plain_grouped_nms(boxes, scores, groups, threshold):
    return nms(boxes + (groups.to(boxes) * (boxes.max() + 1))[:, None], scores, threshold)


@pytest.mark.parametrize("low", [0.0, -30.0])
@pytest.mark.parametrize("count", [0, 7, 3000])
def test_nms_by_groups_is_one_nms_of_shifted_boxes(count, low):
    boxes, draw = some_boxes(count, low=low), torch.Generator().manual_seed(1)
    scores = torch.randint(0, 200, (count,), generator=draw) / 200  # with ties
    groups = torch.randint(0, 9, (count,), generator=draw)
    kept = grouped_nms(boxes, scores, groups, 0.5)
    expected = plain_grouped_nms(boxes, scores, groups, 0.5) if count else torch.zeros(0, dtype=torch.int64)
    assert torch.equal(kept, expected)


def test_nms_of_many_boxes_is_by_groups_even_if_they_meet():
    boxes, draw = some_boxes(10_500, low=-100.0), torch.Generator().manual_seed(1)
    scores, groups = torch.rand(10_500, generator=draw), torch.randint(0, 3, (10_500,), generator=draw)
    kept = grouped_nms(boxes, scores, groups, 0.5)
    shifted = boxes + (groups.to(boxes) * (boxes.max() + 1))[:, None]
    expected = torch.cat(
        [
            (groups == group).nonzero()[:, 0][nms(shifted[groups == group], scores[groups == group], 0.5)]
            for group in range(3)
        ]
    )
    assert torch.equal(kept.sort().values, expected.sort().values)
    assert (scores[kept].diff() <= 0).all()


def test_top_k_is_a_stable_sort():
    scores = torch.randint(0, 20, (500,), generator=torch.Generator().manual_seed(0)) / 20
    for count in (1, 17, 499, 500, 800):
        assert torch.equal(top_k(scores, count), scores.sort(descending=True, stable=True).indices[:count])


def test_overlaps_are_torchvisions():
    first, second = some_boxes(20), some_boxes(30, seed=1)
    torch.testing.assert_close(pairwise_iou(first, second), box_iou(first, second))
    losses = giou_loss(first, second[:20])
    torch.testing.assert_close(losses, 1 - generalized_box_iou(first, second[:20]).diagonal())
    flat = torch.tensor([[5.0, 5, 5, 9]])
    assert pairwise_iou(flat, flat).item() == 0
    assert giou_loss(flat, flat).isfinite().all()


def test_offsets_lead_back_to_the_box():
    references, boxes = some_boxes(50), some_boxes(50, seed=1)
    coder = BoxCoder((0.1, 0.1, 0.2, 0.2))
    torch.testing.assert_close(coder.decode(references, coder.encode(references, boxes)), boxes, atol=1e-3, rtol=1e-5)
    # Sizes change by 62.5 at most, and boxes end with the image.
    wild = coder.decode(torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[0.0, 0, 100, -100]]))
    assert (wild[0, 2] - wild[0, 0]).item() == pytest.approx(250)
    assert (wild[0, 3] - wild[0, 1]).item() == pytest.approx(4 / 62.5)
    clipped = coder.decode(torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[0.0, 0, 100, 100]]), (50, 70))
    assert clipped.tolist() == [[0, 0, 70, 50]]


def plain_matches(boxes, objects, positive, negative, minimum):
    overlaps = box_iou(objects, boxes)
    matches = torch.full((len(boxes),), IGNORED)
    best, which = overlaps.max(dim=0)
    matches[best < negative] = BACKGROUND
    matches[best >= positive] = which[best >= positive]
    for index in range(len(objects)):
        if minimum is not None and overlaps[index].max() >= minimum:
            matches[overlaps[index] == overlaps[index].max()] = index
    return matches


@pytest.mark.parametrize(("positive", "negative", "minimum"), [(0.7, 0.3, 0.3), (0.5, 0.4, 0.0), (0.6, 0.6, None)])
def test_matches(positive, negative, minimum):
    boxes, objects = some_boxes(400), some_boxes(12, seed=3, side=60)
    objects[5] = objects[4]  # two objects at one place: the later one takes the box
    expected = plain_matches(boxes, objects, positive, negative, minimum)
    assert torch.equal(Matcher(positive, negative, minimum)(boxes, objects), expected)
    assert (Matcher(positive, negative, minimum)(boxes, objects[:0]) == BACKGROUND).all()
    assert len(Matcher(positive, negative, minimum)(boxes[:0], objects)) == 0


@pytest.mark.parametrize("sample", [None, sample_evenly])
def test_samples_are_limited_and_filled_up(sample):
    matches = torch.full((1000,), BACKGROUND)
    matches[100:300], matches[500:600] = 3, IGNORED
    options = {} if sample is None else {"sample": sample}
    positive, negative = Sampler(256, 0.25, **options)(matches)
    assert len(positive) == 64
    assert len(negative) == 192
    assert (matches[positive] == 3).all()
    assert (matches[negative] == BACKGROUND).all()
    assert (positive.diff() > 0).all()
    assert (negative.diff() > 0).all()
    # Fewer than wanted are all taken, in order, and background fills the rest.
    positive, negative = Sampler(256, 1.0, **options)(torch.where(matches == 3, matches, IGNORED))
    assert positive.tolist() == list(range(100, 300))
    assert len(negative) == 0


def test_regions_keep_their_order_over_images_and_levels():
    boxes = [torch.tensor([[0.0, 0, 300, 300], [4, 4, 20, 20]]), torch.zeros(0, 4), torch.tensor([[8.0, 8, 140, 140]])]
    pyramid = [torch.full((3, 1, 320 // s, 320 // s), float(s)) for s in (4, 8, 16, 32, 64)]
    for index, level in enumerate(pyramid):
        level += 100 * torch.arange(3)[:, None, None, None]
        assert level.shape[-1] == 320 // (4 * 2**index)
    maps = RoIExtractor()(pyramid, boxes, 7)
    assert maps.mean(dim=(1, 2, 3)).round().tolist() == [16, 4, 208]


def test_a_pasted_crop_is_the_mask_again():
    masks = torch.zeros(2, 70, 90, dtype=torch.uint8)
    masks[0, 10:50, 20:80], masks[1, 30:60, 5:40] = 1, 1
    boxes = torch.tensor([[5.0, 30, 40, 60], [20, 10, 80, 50]])
    goals = crop_masks(masks, boxes, torch.tensor([1, 0]), 28)
    assert goals.shape == (2, 28, 28)
    assert goals.min() == 1
    pasted = paste_masks(goals, boxes, (70, 90))
    assert torch.equal(pasted, masks.flip(0).bool())
    # Boxes that reach beyond the image, or have no extent, are pasted where there is anything to see.
    odd = torch.tensor([[-30.0, -30, 10, 10], [5, 5, 5, 20], [200, 200, 300, 300]])
    pasted = paste_masks(torch.ones(3, 28, 28), odd, (70, 90))
    assert pasted[0, :10, :10].all()
    assert not pasted[2].any()


@pytest.mark.parametrize(("training", "considered", "most"), [(False, 1000, 1000), (True, 2000, 1500)])
def test_training_considers_more_regions(training, considered, most):
    """Anchors of one pixel that don't overlap: what is considered is proposed, up to the most of an image."""
    rpn = RegionProposalNetwork(1, AnchorGrid((4, 8), (0.25,), (1.0,)), most_in_training=1500)
    logits = [torch.rand(1, 1, 50, 50, generator=torch.Generator().manual_seed(0)), torch.full((1, 1, 3, 3), -1.0)]
    offsets = [torch.zeros(1, 4, *level.shape[2:]) for level in logits]
    [(boxes, scores)] = rpn.propose(logits, offsets, [(200, 200)], training=training)
    rpn.most = (10_000, 10_000)
    [(unlimited, _)] = rpn.propose(logits, offsets, [(200, 200)], training=training)
    assert len(unlimited) == considered + 9
    assert len(boxes) == len(scores) == most
    assert torch.equal(scores, logits[0].sigmoid().flatten().sort(descending=True).values[:most])


def test_objects_that_a_resize_leaves_without_area_go():
    transform = DetectorTransform(min_size=6, max_size=6, divisor=8).train()
    # Neighbors in float32 that are one number after the resize.
    left = np.float32(42.708333)
    boxes = torch.tensor([[2.0, 2, 40, 40], [left, 1, np.nextafter(left, np.float32(64)), 30], [5, 5, 6, 6]])
    assert has_area(boxes).all()
    masks = torch.zeros(3, 64, 64, dtype=torch.uint8)
    masks[0, 2:40, 2:40] = masks[1, :40, :40] = masks[2, 5, 5] = 1
    labels = torch.tensor([1, 2, 3])
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    _, (target,), _ = transform([image], [{"boxes": boxes, "labels": labels, "masks": masks, "note": "kept"}])
    assert target["labels"].tolist() == [1]
    assert target["masks"].shape == (1, 8, 8)
    assert target["note"] == "kept"
    assert has_area(target["boxes"]).all()
    _, (target,), _ = transform([image], [{"boxes": boxes[2:], "labels": labels[2:]}])
    assert target["labels"].tolist() == [3]
