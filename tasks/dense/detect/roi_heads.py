"""Heads on regions: boxes and masks, in one stage (Mask R-CNN) or in a cascade of several."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import roi_align

from . import fixed
from .assign import Matcher, Sampler
from .boxes import BoxCoder, giou_loss, scale_of
from .masks import crop_masks
from .postprocess import multiclass_nms, paste_masks
from .rpn import EPS


@dataclass(frozen=True)
class Stage:
    """What a stage of a cascade learns.

    Attributes:
        iou: Least overlap with an object of a region that learns it.
        stds: Standard deviations of the offsets of boxes.
        weight: Weight of its losses.
        low_quality: Whether the regions that overlap an object most learn it, if none overlaps it by more.
    """

    iou: float
    stds: tuple[float, float, float, float]
    weight: float = 1.0
    low_quality: bool = False


MASK_RCNN_STAGES = (Stage(0.5, (0.1, 0.1, 0.2, 0.2), low_quality=True),)
CASCADE_STAGES = (
    Stage(0.5, (0.1, 0.1, 0.2, 0.2)),
    Stage(0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
    Stage(0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
)
# Weights of 30 and 15, where mmdet rounds their inverses.
DETECTRON_STAGES = (*CASCADE_STAGES[:2], Stage(0.7, (1 / 30, 1 / 30, 1 / 15, 1 / 15), 0.25))


class RoIExtractor:
    """Cuts regions out of the level of a pyramid that suits their size.

    Args:
        strides: Strides of the levels, the pyramid's first ones.
        finest: Side in pixels from which on a region is cut out of the second level, halved.
        eps: Added to the side, in units of ``finest``: detectron2 adds another than mmdet.
    """

    def __init__(self, strides: Sequence[int] = (4, 8, 16, 32), finest: int = 56, eps: float = 1e-6):
        self.strides = tuple(strides)
        self.finest = finest
        self.eps = eps

    def levels(self, boxes: Tensor) -> Tensor:
        """Return the level ``[N]`` of each of ``boxes`` ``[N, 4]``."""
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        return (side / self.finest + self.eps).log2().floor().clamp(0, len(self.strides) - 1).long()

    def __call__(self, pyramid: Sequence[Tensor], boxes: Sequence[Tensor], size: int) -> Tensor:
        """Return the maps ``[N, C, size, size]`` of the boxes ``[N_i, 4]`` of each image, in their order."""
        image = torch.cat([torch.full_like(box[:, :1], index) for index, box in enumerate(boxes)])
        rois = torch.cat([image, torch.cat(list(boxes))], dim=1)
        levels = self.levels(rois[:, 1:])
        order = levels.argsort(stable=True)
        counts = levels.bincount(minlength=len(self.strides)).tolist()
        # Coordinates don't fit into half precision, and the operator wants one dtype.
        maps = [
            roi_align(level.float(), group, size, 1 / stride, sampling_ratio=-1, aligned=True)
            for level, stride, group in zip(pyramid, self.strides, rois[order].split(counts), strict=False)
        ]
        return torch.cat(maps)[order.argsort()].to(pyramid[0].dtype)

    def fixed(self, pyramid: Sequence[Tensor], boxes: Tensor, size: int) -> Tensor:
        """Return the maps ``[B * P, C, size, size]`` of as many boxes ``[B, P, 4]`` in every image.

        Every level cuts all boxes: those of other levels without extent, which costs nothing and gives zeros.
        """
        image = torch.arange(boxes.shape[0], dtype=boxes.dtype, device=boxes.device)[:, None, None]
        rois = torch.cat([image.expand(-1, boxes.shape[1], -1), boxes], dim=-1).flatten(0, 1)
        levels = self.levels(rois[:, 1:])
        maps = 0
        for index, (level, stride) in enumerate(zip(pyramid, self.strides, strict=False)):
            own = torch.cat([rois[:, :1], rois[:, 1:] * (levels == index)[:, None]], dim=1)
            maps = maps + roi_align(level.float(), own, size, 1 / stride, sampling_ratio=-1, aligned=True)
        return maps.to(pyramid[0].dtype)


class BoxHead(nn.Module):
    """Classes and box offsets of regions.

    Args:
        channels: Channels of the pyramid.
        num_classes: Classes of objects; background is one more, the last.
        convs: Convolutions with batch norm before the hidden layers, 4 in the Swin-style cascade.
        hidden_layers: Hidden layers, 2, or 1 in the Swin-style cascade.
        hidden: Their width.
        per_class: Whether each class has offsets of its own.
        size: Side of a region's map.
        norm: Makes the norm of the convolutions, of their channels.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        convs: int = 0,
        hidden_layers: int = 2,
        hidden: int = 1024,
        per_class: bool = True,
        size: int = 7,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__()
        self.tower = FastRCNNConvFCHead(
            (channels, size, size), [channels] * convs, [hidden] * hidden_layers, norm_layer=norm
        )
        self.cls_score = nn.Linear(hidden, num_classes + 1)
        self.bbox_pred = nn.Linear(hidden, 4 * num_classes if per_class else 4)
        for layer in self.tower:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map regions ``[N, C, 7, 7]`` to logits ``[N, K + 1]`` and offsets ``[N, K or 1, 4]``, float32."""
        x = self.tower(x)
        return self.cls_score(x).float(), self.bbox_pred(x).float().unflatten(1, (-1, 4))


class MaskHead(nn.Sequential):
    """Masks of regions, one for each class: maps ``[N, C, 14, 14]`` to logits ``[N, K, 28, 28]``.

    Args:
        channels: Channels of the pyramid.
        num_classes: Classes of objects.
        norm: Makes the norm of the convolutions, of their channels; None for none.
    """

    def __init__(self, channels: int, num_classes: int, norm: Callable[[int], nn.Module] | None = None):
        predictor = MaskRCNNPredictor(channels, channels, num_classes)
        for name, parameter in predictor.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        convs = MaskRCNNHeads(channels, [channels] * 4, dilation=1, norm_layer=norm)
        super().__init__(OrderedDict(convs=convs, predictor=predictor))


class RoIHeads(nn.Module):
    """Detects objects in proposed regions, and refines them from stage to stage.

    Attributes:
        box_heads: One `BoxHead` for each stage.
        mask_heads: One `MaskHead` for each stage; or a single one, or none.
        sampler: Draws the regions that learn.
        score_threshold: Detections have higher scores.
        nms_threshold: Largest overlap of detections of a class.
        max_detections: Most detections of an image.

    Args:
        channels: Channels of the pyramid.
        num_classes: Classes of objects.
        stages: What the stages learn.
        convs: Convolutions of a box head.
        hidden: Width of a box head's hidden layers.
        per_class: Whether each class has box offsets of its own.
        box_loss: ``"l1"``, ``"smooth_l1"`` on offsets, or ``"giou"`` on boxes.
        samples: Regions of an image that learn.
        mask_heads: How many heads for masks there are: one for each stage (None), one, or none (0).
        rules: ``"mmdet"``, or ``"detectron2"``: boxes shrink freely, and it is not the logits of a cascade's stages
            that are averaged, but their probabilities.
        layer_norm: Whether the convolutions, of masks too, have norms over the channels, as in ViTDet.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        stages: Sequence[Stage] = MASK_RCNN_STAGES,
        convs: int = 0,
        hidden: int = 1024,
        per_class: bool = True,
        box_loss: str = "l1",
        samples: int = 512,
        mask_heads: int | None = None,
        rules: str = "mmdet",
        layer_norm: bool = False,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.stages = tuple(stages)
        self.box_loss = box_loss
        theirs = rules == "detectron2"
        # Theirs is 1e-8 of 224 pixels.
        self.extract = RoIExtractor(eps=4e-8) if theirs else RoIExtractor()
        self.coders = [BoxCoder(stage.stds, theirs) for stage in stages]
        self.averages_probabilities = theirs
        self.sampler = Sampler(samples, 0.25)
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections
        norm = functools.partial(LayerNorm2d, eps=1e-6) if layer_norm else nn.BatchNorm2d
        self.box_heads = nn.ModuleList(
            BoxHead(channels, num_classes, convs, 1 if convs else 2, hidden, per_class, norm=norm) for _ in stages
        )
        count = len(self.stages) if mask_heads is None else mask_heads
        self.mask_heads = nn.ModuleList(
            MaskHead(channels, num_classes, norm if layer_norm else None) for _ in range(count)
        )

    def loss(
        self,
        pyramid: Sequence[Tensor],
        proposals: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
        image_sizes: Sequence[tuple[int, int]],
    ) -> dict[str, Tensor]:
        """Return ``loss_cls``, ``loss_bbox``, ``loss_mask`` and ``acc``, a percentage, each a scalar.

        Where there are several stages, names begin with ``s0.``, ``s1.`` and so on.

        Args:
            pyramid: Maps ``[B, C, H_i, W_i]``.
            proposals: Regions ``[P, 4]`` of each image.
            targets: ``boxes`` ``[M, 4]``, ``labels`` ``[M]`` and ``masks`` ``[M, H, W]`` of each image's objects.
            image_sizes: ``(height, width)`` of each image, without padding.
        """
        losses = {}
        for index, stage in enumerate(self.stages):
            samples = [self._sample(stage, regions, target) for regions, target in zip(proposals, targets, strict=True)]
            rois = [sample.boxes for sample in samples]
            logits, offsets = self.box_heads[index](self.extract(pyramid, rois, 7))
            stage_losses = self._box_losses(index, logits, offsets, samples)
            if index < len(self.mask_heads):
                stage_losses["loss_mask"] = self._mask_loss(index, pyramid, samples, targets)
            prefix = f"s{index}." if len(self.stages) > 1 else ""
            for name, value in stage_losses.items():
                losses[prefix + name] = value * stage.weight if name.startswith("loss") else value
            if index + 1 < len(self.stages):
                labels = torch.cat([sample.labels for sample in samples])
                labels = torch.where(labels == self.num_classes, logits[:, :-1].argmax(dim=1), labels)
                refined = self._refine(index, rois, labels, offsets, image_sizes)
                proposals = [boxes[~sample.is_object] for boxes, sample in zip(refined, samples, strict=True)]
        return losses

    @torch.no_grad()
    def _sample(self, stage: Stage, proposals: Tensor, target: dict[str, Tensor]) -> "_Sample":
        objects = target["boxes"]
        matcher = Matcher(stage.iou, stage.iou, minimum=stage.iou if stage.low_quality else None)
        # Objects are regions too; each learns itself, whatever else it overlaps.
        matches = torch.cat([torch.arange(len(objects), device=objects.device), matcher(proposals, objects)])
        boxes = torch.cat([objects, proposals.to(objects)])
        positive, negative = self.sampler(matches)
        drawn = torch.cat([positive, negative])
        objects_of = matches[positive]
        background = torch.full_like(negative, self.num_classes)
        return _Sample(
            boxes=boxes[drawn],
            labels=torch.cat([target["labels"][objects_of].to(background), background]),
            objects=objects_of,
            goals=objects[objects_of],
            is_object=drawn < len(objects),
        )

    def _box_losses(
        self, index: int, logits: Tensor, offsets: Tensor, samples: Sequence["_Sample"]
    ) -> dict[str, Tensor]:
        labels = torch.cat([sample.labels for sample in samples])
        divisor = max(len(labels), 1) + EPS
        cls = F.cross_entropy(logits, labels, reduction="sum") / divisor
        right = (logits.argmax(dim=1) == labels).sum() * (100 / max(len(labels), 1))
        positive = (labels < self.num_classes).nonzero().squeeze(1)
        slot = labels[positive] if offsets.shape[1] > 1 else torch.zeros_like(positive)
        offsets = offsets[positive, slot]
        regions = torch.cat([sample.boxes for sample in samples])[positive]
        goals = torch.cat([sample.goals for sample in samples])
        coder = self.coders[index]
        if self.box_loss == "giou":
            bbox = 10 * giou_loss(coder.decode(regions, offsets), goals).sum()
        else:
            beta = 1.0 if self.box_loss == "smooth_l1" else 0.0
            bbox = F.smooth_l1_loss(offsets, coder.encode(regions, goals), beta=beta, reduction="sum")
        return {"loss_cls": cls, "acc": right, "loss_bbox": bbox / divisor}

    def _mask_loss(
        self, index: int, pyramid: Sequence[Tensor], samples: Sequence["_Sample"], targets: Sequence[dict[str, Tensor]]
    ) -> Tensor:
        boxes = [sample.boxes[: len(sample.objects)] for sample in samples]
        labels = torch.cat([sample.labels[: len(sample.objects)] for sample in samples])
        logits = self.mask_heads[index](self.extract(pyramid, boxes, 14)).float()
        if len(labels) == 0:
            return logits.sum()
        goals = torch.cat(
            [
                crop_masks(target["masks"], box, sample.objects, logits.shape[-1])
                for target, box, sample in zip(targets, boxes, samples, strict=True)
            ]
        )
        return F.binary_cross_entropy_with_logits(
            logits[torch.arange(len(labels), device=labels.device), labels], goals
        )

    @torch.no_grad()
    def _refine(
        self,
        index: int,
        rois: Sequence[Tensor],
        labels: Tensor,
        offsets: Tensor,
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Move the regions of each image by the offsets of their labels ``[N]``."""
        slot = labels if offsets.shape[1] > 1 else torch.zeros_like(labels)
        offsets = offsets[torch.arange(len(labels), device=labels.device), slot].split([len(boxes) for boxes in rois])
        return [
            self.coders[index].decode(boxes, offset, image_size)
            for boxes, offset, image_size in zip(rois, offsets, image_sizes, strict=True)
        ]

    def forward(
        self,
        pyramid: Sequence[Tensor],
        proposals: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        original_sizes: Sequence[tuple[int, int]],
        soft_masks: bool = False,
    ) -> list[dict[str, Tensor]]:
        """Return the detections of each image, best first, in pixels of the original images.

        Args:
            pyramid: Maps ``[B, C, H_i, W_i]``.
            proposals: Regions ``[P, 4]`` of each image.
            image_sizes: ``(height, width)`` of each image, without padding.
            original_sizes: ``(height, width)`` of each image before it was resized.
            soft_masks: Whether masks are probabilities.

        Returns:
            For each image ``boxes`` ``[D, 4]``, ``labels`` ``[D]``, ``scores`` ``[D]`` and, where there are heads for
            them, ``masks``
            ``[D, height, width]``, bool, or float32 if they are soft.
        """
        results = self._boxes(pyramid, proposals, image_sizes)
        if not len(self.mask_heads):
            return [
                {"boxes": boxes / scale_of(boxes, size, original), "labels": labels, "scores": scores}
                for (boxes, scores, labels), size, original in zip(results, image_sizes, original_sizes, strict=True)
            ]
        masks = self._masks(pyramid, [boxes for boxes, _, _ in results], [labels for _, _, labels in results])
        detections = []
        for (boxes, scores, labels), mask, size, original in zip(
            results, masks, image_sizes, original_sizes, strict=True
        ):
            boxes = boxes / scale_of(boxes, size, original)
            pasted = paste_masks(mask, boxes, original, None if soft_masks else 0.5)
            detections.append({"boxes": boxes, "labels": labels, "scores": scores, "masks": pasted})
        return detections

    def _boxes(
        self, pyramid: Sequence[Tensor], proposals: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        rois, sums = list(proposals), 0
        for index, head in enumerate(self.box_heads):
            logits, offsets = head(self.extract(pyramid, rois, 7))
            sums = sums + (logits.softmax(dim=1) if self.averages_probabilities else logits)
            if index + 1 < len(self.box_heads):
                rois = self._refine(index, rois, logits[:, :-1].argmax(dim=1), offsets, image_sizes)
        means = sums / len(self.box_heads)
        scores = (means if self.averages_probabilities else means.softmax(dim=1))[:, :-1]
        counts = [len(boxes) for boxes in rois]
        results = []
        for boxes, score, offset, image_size in zip(
            rois, scores.split(counts), offsets.split(counts), image_sizes, strict=True
        ):
            decoded = self.coders[-1].decode(boxes[:, None], offset, image_size)
            decoded = decoded if decoded.shape[1] > 1 else decoded.squeeze(1)
            best_boxes, best_scores, candidates = multiclass_nms(
                decoded, score, self.score_threshold, self.nms_threshold, self.max_detections
            )
            results.append((best_boxes, best_scores, candidates % self.num_classes))
        return results

    def find(
        self, pyramid: Sequence[Tensor], proposals: Tensor, present: Tensor, image_size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Return what `forward` finds in images of one size, in tensors that are as large for all images.

        Args:
            pyramid: Maps ``[B, C, H_i, W_i]``.
            proposals: Regions ``[B, P, 4]``.
            present: Which of them there are, ``[B, P]``.
            image_size: ``(height, width)`` of the images, without padding.
        """
        rois, sums, last = proposals, 0, len(self.box_heads) - 1
        batch, count = rois.shape[:2]
        for index, head in enumerate(self.box_heads):
            logits, offsets = (x.unflatten(0, (batch, count)) for x in head(self.extract.fixed(pyramid, rois, 7)))
            sums = sums + (logits.softmax(dim=-1) if self.averages_probabilities else logits)
            if index < last:
                labels = logits[..., :-1].argmax(dim=-1)
                offset = self._of_class(offsets, labels)
                rois = self.coders[index].decode(rois, offset, image_size) * present[..., None]
        means = sums / len(self.box_heads)
        scores = (means if self.averages_probabilities else means.softmax(dim=-1))[..., :-1]
        scores = torch.where(present[..., None], scores, fixed.NONE)
        most = fixed.most_pairs(count, self.num_classes, self.score_threshold, exclusive=True)
        scores, pairs = fixed.pairs_above(scores, self.score_threshold, most)
        regions, labels = torch.div(pairs, self.num_classes, rounding_mode="floor"), pairs % self.num_classes
        slots = offsets.shape[2]
        places = pairs if slots > 1 else regions
        offsets = fixed.take(offsets.flatten(1, 2), places)
        boxes = self.coders[-1].decode(fixed.take(rois, regions), offsets, image_size)
        boxes, scores, labels, number = fixed.finished(
            *fixed.choose(boxes, scores, labels, self.nms_threshold, self.max_detections)
        )
        answers = {"boxes": boxes, "scores": scores, "labels": labels}
        if len(self.mask_heads):
            answers["masks"] = self._laid(pyramid, boxes, labels, image_size)
        return answers | {"count": number}

    @staticmethod
    def _of_class(offsets: Tensor, labels: Tensor) -> Tensor:
        """Return the offsets ``[B, P, 4]`` of labels ``[B, P]`` out of ``[B, P, K or 1, 4]``."""
        if offsets.shape[2] == 1:
            return offsets.squeeze(2)
        return offsets.gather(2, labels[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)

    def _laid(self, pyramid: Sequence[Tensor], boxes: Tensor, labels: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Return masks ``[B, D, height, width]``, bool; of labels below 0 there are none."""
        regions = self.extract.fixed(pyramid, boxes, 14)
        label = labels.flatten().clamp(min=0)[:, None, None, None]
        masks = 0
        for head in self.mask_heads:
            maps = head(regions)
            masks = masks + maps.gather(1, label.expand(-1, 1, *maps.shape[2:])).squeeze(1).float().sigmoid()
        masks = (masks / len(self.mask_heads)).unflatten(0, boxes.shape[:2])
        return (fixed.laid_masks(masks, boxes, image_size) >= 0.5) & (labels >= 0)[..., None, None]

    def _masks(self, pyramid: Sequence[Tensor], boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> list[Tensor]:
        """Return the probabilities ``[D, 28, 28]`` of the masks of each image's detections."""
        counts, label = [len(part) for part in labels], torch.cat(list(labels))
        regions = self.extract(pyramid, boxes, 14)
        masks, rows = 0, torch.arange(len(label), device=label.device)
        for head in self.mask_heads:
            masks = masks + head(regions)[rows, label].float().sigmoid()
        return (masks / len(self.mask_heads)).split(counts)


@dataclass
class _Sample:
    """Regions of an image that learn: positives first, then background."""

    boxes: Tensor
    labels: Tensor
    objects: Tensor
    goals: Tensor
    is_object: Tensor
