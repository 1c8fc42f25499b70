"""Mask R-CNN's neck and heads against torchvision's, with the same weights, on a backbone's maps of one image."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import AnchorGenerator

from ...tasks.dense.detect import create_detector
from ..timing import alternate
from .dino import bench_dino


def measure(args: argparse.Namespace) -> list[dict]:
    if args.head == "dino":
        return bench_dino(args.models, tuple(args.image), args.rounds, args.device)
    return bench_detectors(args.models, tuple(args.image), args.rounds, args.device)


def bench_detectors(names: Sequence[str], image_size: tuple[int, int], rounds: int, device: str) -> list[dict]:
    """Time Mask R-CNN after the backbone, from its maps to pasted masks, and torchvision's with the same weights.

    The weights are random, but such that there are as many detections as there may be.
    """
    rows = []
    for name in names:
        model = create_detector("mask_rcnn", name).eval().to(device)
        with torch.inference_mode():
            # A fresh classifier is sure of nothing, and then there are no masks to make.
            model.roi_heads.box_heads[0].cls_score.weight *= 30
            features = model.backbone(torch.randn(1, 3, *image_size, device=device))
            calls = {
                "foveate": lambda m=model, x=features: m.predict_from_features(x, [image_size]),
                "torchvision": partial(_torchvision_twin(model, image_size), features),
            }
            counts = {path: len(call()[0]["boxes"]) for path, call in calls.items()}
            times = alternate(calls, rounds, device)
        for path, seconds in times.items():
            rows.append(
                {
                    "backbone": name,
                    "image": "x".join(map(str, image_size)),
                    "neck and heads": path,
                    "detections": counts[path],
                    "ms": round(seconds * 1e3, 1),
                    "times torchvision's time": round(seconds / times["torchvision"], 2),
                }
            )
    return rows


def _torchvision_twin(model: torch.nn.Module, image_size: tuple[int, int]) -> Callable[[list[Tensor]], list[dict]]:
    """Return torchvision's Mask R-CNN after the backbone, with the weights of ours, as a function of the maps."""
    neck = torch.nn.Module()
    neck.out_channels = model.neck.channels[0]
    anchors = AnchorGenerator(tuple((8 * 2**level,) for level in range(2, 7)), ((0.5, 1.0, 2.0),) * 5)
    twin = MaskRCNN(neck, model.num_classes + 1, rpn_anchor_generator=anchors, rpn_head=model.rpn.head)
    box_head, mask_head = model.roi_heads.box_heads[0], model.roi_heads.mask_heads[0]
    twin.roi_heads.box_head.fc6, twin.roi_heads.box_head.fc7 = box_head.tower[1], box_head.tower[3]
    twin.roi_heads.mask_head, twin.roi_heads.mask_predictor = mask_head.convs, mask_head.predictor
    twin.to(box_head.cls_score.weight.device).eval()
    predictor = twin.roi_heads.box_predictor
    for leaf in ("weight", "bias"):
        # torchvision's background is the first class, ours the last, and it has offsets of its own there.
        getattr(predictor.cls_score, leaf).copy_(getattr(box_head.cls_score, leaf).roll(1, 0))
        getattr(predictor.bbox_pred, leaf)[4:].copy_(getattr(box_head.bbox_pred, leaf))

    def call(features: list[Tensor]) -> list[dict]:
        pyramid = dict(zip("0123p", model.neck(features), strict=True))
        images = ImageList(features[0].new_zeros(1, 3, *image_size), [image_size])
        proposals, _ = twin.rpn(images, pyramid)
        detections, _ = twin.roi_heads(pyramid, proposals, [image_size])
        return twin.transform.postprocess(detections, [image_size], [image_size])

    return call
