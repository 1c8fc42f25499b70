import math

import numpy as np
import pytest
import torch
from foveate.tasks.data.augment import IGNORE
from foveate.tasks.metrics.segmentation import count_labels, measure_labels, measure_panoptic


def published_maps():
    """The two pairs of maps that the reference was measured on."""
    y, x = np.mgrid[:40, :56]
    pairs = []
    for i in range(2):
        truth = (x // 9 + 2 * (y // 11) + i) % 6
        truth[:3], truth[:, 50:] = IGNORE, IGNORE
        predicted = ((x + 2 + i) // 9 + 2 * ((y + 3) // 11) + i) % 6
        predicted[20:26, 10:30] = 5
        pairs.append((torch.from_numpy(predicted), torch.from_numpy(truth)))
    return pairs


def test_measures_of_labels_are_mmseg_s(golden_folder):
    expected = np.load(golden_folder / "dense" / "miou_2.npz")
    pairs = published_maps()
    counts = count_labels(pairs, 7)
    measured = measure_labels(counts)
    np.testing.assert_array_equal(counts.diagonal(), expected["intersect.value"])
    for ours, theirs in (("iou", "iou"), ("acc", "acc"), ("dice", "dice")):
        values = torch.nan_to_num(measured[ours], nan=-1)
        np.testing.assert_allclose(values, expected[f"{theirs}.value"], atol=1e-6)
    for ours, theirs in (("miou", "mIoU"), ("macc", "mAcc"), ("aacc", "aAcc")):
        assert measured[ours] == pytest.approx(float(expected[f"{theirs}.value"][0]), abs=1e-6)


def panoptic(classes, numbers):
    return torch.stack([torch.tensor(classes), torch.tensor(numbers)], -1)


def test_panoptic_quality_of_a_worked_example():
    """Class 0 is stuff, 1 a thing, 2 void."""
    truth = panoptic([[0] * 10, [1] * 5 + [1] * 5, [2] * 10], [[1] * 10, [2] * 5 + [3] * 5, [0] * 10])
    # Stuff: 8 of 10. First thing: 4 of 5, one pixel too many; the second is missed: its prediction overlaps by 2.
    found = panoptic(
        [[0] * 8 + [2] * 2, [1] * 4 + [2] * 4 + [1] * 2, [2] * 10],
        [[1] * 8 + [0] * 2, [5] * 4 + [0] * 4 + [7] * 2, [0] * 10],
    )
    measured = measure_panoptic([(found, truth)], things=[False, True])
    assert measured["pq_stuff"] == pytest.approx(8 / 10)
    # One true positive of IoU 4/5, one false positive, one false negative.
    assert measured["pq_things"] == pytest.approx(4 / 5 / 2)
    assert measured["sq_things"] == pytest.approx(4 / 5)
    assert measured["rq_things"] == pytest.approx(1 / 2)
    assert measured["pq"] == pytest.approx((0.8 + 0.4) / 2)


def test_what_a_prediction_leaves_void_is_missed():
    truth = panoptic([[0] * 10, [1] * 10], [[1] * 10, [2] * 10])
    void = panoptic([[0] * 10, [2] * 10], [[1] * 10, [0] * 10])
    measured = measure_panoptic([(void, truth)], things=[False, True])
    assert measured["pq_stuff"] == 1
    assert measured["pq_things"] == 0


def test_segments_in_true_void_and_classes_that_occur_nowhere_do_not_count():
    truth = panoptic([[0] * 10, [3] * 10], [[1] * 10, [0] * 10])
    found = panoptic([[0] * 10, [1] * 10], [[1] * 10, [2] * 10])
    measured = measure_panoptic([(found, truth)], things=[False, True, True])
    assert measured["pq"] == 1
    assert math.isnan(measured["pq_things"])
    assert torch.isnan(measured["class_pq"]).tolist() == [False, True, True]
