"""Which classes are taken for which, object by object and pixel by pixel, and which images were answered worst."""

import numpy as np
import pytest
import torch
from foveate.tasks.data.coco import encode_mask
from foveate.tasks.metrics.confusion import confuse_labels, confuse_objects, worst_of


def objects(boxes, labels, scores=None, crowds=None):
    masks = []
    for x1, y1, x2, y2 in boxes:
        mask = np.zeros((40, 40), np.uint8)
        mask[y1:y2, x1:x2] = 1
        masks.append(encode_mask(mask))
    entry = {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": torch.tensor(labels).long()}
    entry |= {"masks": masks, "size": (40, 40)}
    if scores is not None:
        return entry | {"scores": torch.tensor(scores, dtype=torch.float32)}
    return entry | {"iscrowd": torch.tensor(crowds or [0] * len(boxes))}


A, B, C, FAR = (0, 0, 10, 10), (20, 0, 30, 10), (0, 20, 10, 30), (30, 30, 40, 40)


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_each_object_is_found_once_by_what_overlaps_it_most(kind):
    truths = [
        objects([A, B, C], [0, 1, 1]),
        objects([A], [0], crowds=[1]),
        objects([], []),
        objects([A], [1]),
    ]
    predictions = [
        # A is found, B taken for class 0, C missed; a second find of A is of nothing, and so is what lies far away.
        objects([A, (0, 0, 10, 9), B, FAR, C], [0, 0, 0, 1, 1], [0.9, 0.8, 0.7, 0.6, 0.4]),
        objects([A], [0], [0.9]),
        objects([], [], []),
        objects([FAR], [1], [0.9]),
    ]
    counts, scores = confuse_objects(predictions, truths, 2, kind)
    assert counts.tolist() == [[1, 0, 0], [1, 0, 2], [1, 2, 0]]
    assert scores == pytest.approx([2 / 7, 1, 1, 0])
    assert worst_of(scores, 2) == [3, 0]


def test_labels_are_counted_in_pairs():
    assert confuse_labels([0, 1, 1, 1], [0, 0, 1, 1], 3).tolist() == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
