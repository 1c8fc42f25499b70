"""Keyword arguments of `create_detector` and `create_segmenter` reach the part of the model that names them."""

import inspect

import pytest
from foveate.tasks import TaskError
from foveate.tasks.dense.detect.detector import DETECTORS, Detector, create_detector
from foveate.tasks.dense.detect.transform import DetectorTransform
from foveate.tasks.dense.options import known_options, split_options
from foveate.tasks.dense.segment.mask2former import Mask2Former
from foveate.tasks.dense.segment.segmenter import HEADS, Segmenter, create_segmenter
from foveate.tasks.dense.segment.set_loss import SetCriterion
from torch import nn

PARTS = {*DETECTORS.values(), *HEADS.values(), DetectorTransform, Segmenter, Mask2Former, SetCriterion}
# What the functions pass themselves, and what a class passes on to its base.
THEIR_OWN = {"in_channels", "num_classes", "backbone", "transform", "head", "aux_head", "criterion", "options"}


@pytest.mark.parametrize("part", sorted(PARTS, key=lambda part: part.__name__))
def test_every_part_names_all_options_of_its_constructor(part):
    bases = part.__mro__[: part.__mro__.index(Detector if issubclass(part, Detector) else nn.Module)]
    taken = {name for base in bases for name in inspect.signature(base).parameters}
    assert set(part.OPTIONS) == taken - THEIR_OWN
    assert len(set(part.OPTIONS)) == len(part.OPTIONS)


def test_options_reach_their_part_and_all_others_the_backbone():
    given = {"channels": 16, "mean": (0.5,) * 3, "drop_path_rate": 0.1}
    kinds = (HEADS["upernet"], Segmenter)
    assert split_options(given, *kinds) == [{"channels": 16}, {"mean": (0.5,) * 3}, {"drop_path_rate": 0.1}]
    assert known_options(*kinds)[:3] == ["channels", "pool_scales", "dropout"]
    small = {"channels": 16, "hidden": 16, "min_size": 64}
    model = create_detector("mask_rcnn", "nat_atto", num_classes=2, max_detections=7, drop_path_rate=0.3, **small)
    assert model.transform.min_size == (64,)
    assert model.roi_heads.max_detections == 7
    assert any(getattr(module, "drop_prob", 0) > 0.29 for module in model.backbone.modules())


@pytest.mark.parametrize(("create", "head"), [(create_detector, "mask_rcnn"), (create_segmenter, "upernet")])
def test_an_option_of_none_is_named_with_the_nearest(create, head):
    with pytest.raises(
        TaskError, match=f"neither {head} nor nat_atto has an option 'chanels'; did you mean 'channels'"
    ):
        create(head, "nat_atto", num_classes=2, chanels=16)
