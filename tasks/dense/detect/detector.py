"""Detectors: any backbone, a published head, and how they are trained, evaluated and loaded."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....zoo import CheckpointError
from ....zoo._checkpoint import LoadReport
from ....zoo.backbone import head_options_of
from ....zoo.published import STYLES, form_of, statistics_from, translated
from ....zoo.weights import locate
from ... import TaskError, nearest
from ..build import OtherClassesError, build_backbone, described, has_backbone, is_ours
from ..neck import channel_mapper, detector_neck
from ..normalize import check_evaluation, dtype_of
from .anchors import AnchorGrid
from .assign import Sample, Sampler
from .boxes import has_area
from .checkpoint import head_of, load_detector, read_detector, rules_of, variant_of
from .dino import DinoHead, in_pixels
from .dino_loss import DinoCriterion
from .retinanet import RetinaHead
from .roi_heads import CASCADE_STAGES, DETECTRON_STAGES, MASK_RCNN_STAGES, RoIHeads, Stage
from .rpn import RegionProposalNetwork
from .transform import DetectorTransform

RULES = ("mmdet", "detectron2")

Size = tuple[int, int]


class Detector(nn.Module):
    """What detectors have in common: images in, losses or detections out, called as torchvision's.

    ``model(images)`` and ``model(images, targets)`` are as there: lists of images of any sizes, targets with boxes in
    pixels, losses in training and detections in evaluation. Two things differ from torchvision: labels are from 0 to
    ``num_classes - 1``, without a background, where torchvision's are from 1; and masks are ``[D, H, W]``, bool, where
    torchvision's are ``[D, 1, H, W]``, probabilities. ``torchvision_outputs`` gives detections as torchvision does;
    targets are of labels from 0 all the same.

    Attributes:
        backbone: Maps a batch to maps, four of 1/4 to 1/32 of the image or what the neck makes them of.
        neck: The pyramid on them.
        transform: Makes the batch of images.
        num_classes: Classes of objects; labels are 0 to ``num_classes - 1``. Background is no label.
        load_report: What became of a checkpoint's entries, a `LoadReport`; None if there was none.
        torchvision_outputs: Whether detections have labels from 1 and masks ``[D, 1, H, W]``, float32 of 0 to 1.
        TRANSFORM: Options of the transform that the detector was published with, other than the transform's own.

    Args:
        backbone: See above; has ``channels``.
    """

    needs_masks: ClassVar[bool] = False
    TRANSFORM: ClassVar[dict] = {}

    def __init__(self, backbone: nn.Module, neck: nn.Module, transform: DetectorTransform, num_classes: int):
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.transform = transform
        self.num_classes = num_classes
        self.load_report: LoadReport | None = None
        self.torchvision_outputs = False

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return losses in training, detections in evaluation.

        Args:
            images: RGB images ``[3, H, W]`` of any sizes, floating point of 0 to 1, or uint8, which are resized exactly
                as in the published models.
            targets: For training, of each image ``boxes`` ``[N, 4]`` (xyxy in pixels), ``labels`` ``[N]`` (int64 from 0
                to ``num_classes - 1``) and, where there is a mask head, ``masks`` ``[N, H, W]`` (bool or uint8). An
                image without objects has tensors of length 0.

        Returns:
            In training a dict of scalar losses, whose sum is to be minimised. In evaluation, for each image, whatever
            the others are, a dict of ``boxes`` ``[D, 4]``, ``labels`` ``[D]``, ``scores`` ``[D]`` and, with a mask
            head, ``masks`` ``[D, H, W]`` (bool), best first, in pixels of the image as it was given;
            or as torchvision's, see ``torchvision_outputs``.

        Raises:
            TaskError: If images or targets are none of these.
        """
        if not self.training:
            return self._detect(images, False, self.torchvision_outputs)
        if targets is None:
            raise TaskError("training needs targets; for detections, put the model into evaluation mode: model.eval()")
        return self.loss(images, targets)

    def loss(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], normalized: bool = False
    ) -> dict[str, Tensor]:
        """Return the losses of a batch, in training or evaluation; their sum is to be minimised.

        Args:
            images: As those of `forward`.
            targets: As those of `forward`.
            normalized: Whether the images are normalised already, by the transform's ``mean`` and ``std``.

        Returns:
            A dict of scalars.

        Raises:
            TaskError: If images or targets are none of these.
        """
        self._check_images(images)
        self._check(targets, images)
        batch, targets, image_sizes = self.transform(images, targets, normalized)
        return self.losses_from_features(self.backbone(batch.to(dtype_of(self))), targets, image_sizes)

    @torch.inference_mode()
    def predict(
        self, images: Sequence[Tensor], normalized: bool = False, torchvision_outputs: bool | None = None
    ) -> list[dict[str, Tensor]]:
        """Return the detections of each image, as `forward` does in evaluation, without gradients.

        Args:
            images: As those of `forward`.
            normalized: Whether the images are normalised already, by the transform's ``mean`` and ``std``.
            torchvision_outputs: Whether labels are from 1 and masks ``[D, 1, H, W]``, float32 of 0 to 1, as
                torchvision's; the model's setting by default.

        Raises:
            TaskError: If the model is in training mode, or images are none of these.
        """
        check_evaluation(self)
        wanted = self.torchvision_outputs if torchvision_outputs is None else torchvision_outputs
        return self._detect(images, normalized, wanted)

    @staticmethod
    def _check_images(images: Sequence[Tensor]) -> None:
        if not len(images):
            raise TaskError("the list of images is empty")
        if isinstance(images, Tensor) and images.dim() != 4:
            raise TaskError(
                f"images have shape {tuple(images.shape)}; they are a list of [C, H, W], or a batch [B, C, H, W]"
            )

    def _detect(self, images: Sequence[Tensor], normalized: bool, torchvision_outputs: bool) -> list[dict[str, Tensor]]:
        """Return what each image gets alone: only those that are padded to the same size share a batch."""
        self._check_images(images)
        groups: dict[Size, list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(self.transform.padded_size(image), []).append(index)
        detections: dict[int, dict[str, Tensor]] = {}
        for members in groups.values():
            batch, _, image_sizes = self.transform([images[index] for index in members], normalized=normalized)
            originals = [tuple(images[index].shape[-2:]) for index in members]
            features = self.backbone(batch.to(dtype_of(self)))
            found = self.predict_from_features(features, image_sizes, originals, soft_masks=torchvision_outputs)
            found = [_as_torchvision(one) for one in found] if torchvision_outputs else found
            detections |= dict(zip(members, found, strict=True))
        return [detections[index] for index in range(len(images))]

    def predict_from_features(
        self,
        features: Sequence[Tensor],
        image_sizes: Sequence[Size],
        original_sizes: Sequence[Size] | None = None,
        soft_masks: bool = False,
    ) -> list[dict[str, Tensor]]:
        """Return the detections of each image, as `forward` does, from maps of the backbone.

        Args:
            features: Maps ``[B, C_i, H_i, W_i]`` of the padded batch, as ``backbone`` returns them.
            image_sizes: ``(height, width)`` of each image in the batch, without padding.
            original_sizes: ``(height, width)`` of each image before it was resized, in whose pixels the answer is; as
                ``image_sizes`` by default.
            soft_masks: Whether masks are probabilities, float32, instead of bool.
        """
        raise NotImplementedError

    def losses_from_features(
        self, features: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], image_sizes: Sequence[Size]
    ) -> dict[str, Tensor]:
        """Return the losses, as `forward` does, from maps of the backbone.

        Args:
            features: Maps ``[B, C_i, H_i, W_i]`` of the padded batch, as ``backbone`` returns them.
            targets: As those of `forward`, in pixels of the batch; masks ``[N, H, W]`` have the padded batch's size.
            image_sizes: ``(height, width)`` of each image in the batch, without padding.
        """
        raise NotImplementedError

    @property
    def sample(self) -> Sample | None:
        """What samples the anchors and regions that learn: ``sample(gallery, count)``; None if none are sampled.

        It returns ``count`` of the ascending indices ``gallery`` ``[N]``, and is called where there are more than
        wanted. It is random; set ``detector.sample = sample_evenly``, or a function of your own, for losses that can be
        reproduced. Setting it sets it for all samplers, ``detector.rpn.sampler`` and ``detector.roi_heads.sampler``.
        """
        return next((sampler.sample for sampler in self._samplers()), None)

    @sample.setter
    def sample(self, sample: Sample) -> None:
        for sampler in self._samplers():
            sampler.sample = sample

    def _samplers(self) -> list[Sampler]:
        return [module.sampler for module in self.modules() if isinstance(getattr(module, "sampler", None), Sampler)]

    def _check(self, targets: Sequence[dict[str, Tensor]], images: Sequence[Tensor] | None = None) -> None:
        """Raise a TaskError that names the first fault of the targets."""
        if images is not None and len(targets) != len(images):
            raise TaskError(f"there are {len(images)} images and {len(targets)} targets; each image needs one")
        for index, target in enumerate(targets):
            needed = ("boxes", "labels", "masks") if self.needs_masks else ("boxes", "labels")
            for key in needed:
                if key not in target:
                    raise TaskError(f"target {index} has no {key!r}; {type(self).__name__} needs {', '.join(needed)}")
            boxes, labels = target["boxes"], target["labels"]
            if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
                raise TaskError(
                    f"target {index} has boxes {tuple(boxes.shape)} and labels {tuple(labels.shape)}; "
                    "they must be [N, 4] and [N]"
                )
            if labels.is_floating_point():
                raise TaskError(f"target {index} has labels of {labels.dtype}; they are integers")
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise TaskError(
                    f"target {index} has labels {int(labels.min())} to {int(labels.max())}; "
                    f"they must be 0 to {self.num_classes - 1}, without a background"
                )
            if not bool(has_area(boxes).all()):
                wrong = int((~has_area(boxes)).nonzero()[0])
                raise TaskError(
                    f"target {index} has the box {boxes[wrong].tolist()}, which is empty; boxes are x1, y1, x2, y2"
                )
            if not self.needs_masks:
                continue
            masks = target["masks"]
            size = masks.shape[1:] if images is None else images[index].shape[-2:]
            if masks.shape != (len(boxes), *size) or len(masks.shape) != 3:
                raise TaskError(
                    f"target {index} has masks {tuple(masks.shape)}; for {len(boxes)} boxes they must be "
                    f"{(len(boxes), *size)}"
                )
            if masks.is_floating_point():
                raise TaskError(f"target {index} has masks of {masks.dtype}; they are bool or uint8")


def _as_torchvision(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an image's detections with labels from 1 and probabilities ``[D, 1, H, W]`` as masks."""
    given = found | {"labels": found["labels"] + 1}
    return given | {"masks": found["masks"][:, None]} if "masks" in found else given


class RetinaNet(Detector):
    """RetinaNet (Lin et al. 2017).

    Attributes:
        head: Classes and boxes of every anchor, a `RetinaHead`.

    Args:
        backbone: Maps a batch to maps; has ``channels`` and, unless they are four of 1/4 to 1/32, ``reductions``.
        num_classes: Classes of objects.
        transform: Makes the batch of images.
        channels: Channels of the pyramid.
        extra_convs: How the pyramid gets its coarsest levels; see `FeaturePyramid`.
        anchor_scales: Sides of anchors in strides.
        anchor_ratios: Heights of anchors over their widths.
        score_threshold: Detections have higher scores.
        nms_threshold: Largest overlap of detections of a class.
        max_detections: Most detections of an image.
        per_level: How many pairs of anchor and class, or anchors, of a level are considered.
        selection: ``"pairs"``, or ``"anchors"`` for what was published with mmdet until 2.18, here DaViT and BiFormer;
            see `RetinaHead`.
        extra_relu: Whether a ReLU stands between the pyramid's convolved levels, as in detectron2.
        rules: Whose rules find objects, ``"mmdet"`` or ``"detectron2"``; see `RetinaHead`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int = 80,
        transform: DetectorTransform | None = None,
        channels: int = 256,
        extra_convs: str | None = "on_input",
        anchor_scales: Sequence[float] = tuple(4 * 2 ** (octave / 3) for octave in range(3)),
        anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
        per_level: int = 1000,
        selection: str = "pairs",
        extra_relu: bool = False,
        rules: str = "mmdet",
    ):
        _check_rules(rules)
        neck = detector_neck(
            backbone, channels, num_outs=5, start_level=1, extra_convs=extra_convs, extra_relu=extra_relu
        )
        super().__init__(backbone, neck, transform or DetectorTransform(), num_classes)
        self.head = RetinaHead(
            channels,
            num_classes,
            AnchorGrid((8, 16, 32, 64, 128), anchor_scales, anchor_ratios),
            score_threshold,
            nms_threshold,
            max_detections,
            per_level,
            selection,
            rules,
        )

    @torch.no_grad()
    def predict_from_features(
        self,
        features: Sequence[Tensor],
        image_sizes: Sequence[Size],
        original_sizes: Sequence[Size] | None = None,
        soft_masks: bool = False,
    ) -> list[dict[str, Tensor]]:
        logits, offsets = self.head(self.neck(features))
        return self.head.detect(logits, offsets, image_sizes, original_sizes or image_sizes)

    def losses_from_features(
        self, features: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], image_sizes: Sequence[Size]
    ) -> dict[str, Tensor]:
        self._check(targets)
        logits, offsets = self.head(self.neck(features))
        objects = [target["boxes"].float() for target in targets]
        losses = self.head.loss(logits, offsets, objects, [target["labels"] for target in targets])
        return {name: levels.sum() for name, levels in losses.items()}


class MaskRCNN(Detector):
    """Mask R-CNN (He et al. 2017).

    Attributes:
        rpn: Proposes regions, a `RegionProposalNetwork`.
        roi_heads: Boxes and masks of regions, `RoIHeads`.

    Args:
        backbone: Maps a batch to maps; has ``channels`` and, unless they are four of 1/4 to 1/32, ``reductions``.
        num_classes: Classes of objects.
        transform: Makes the batch of images.
        channels: Channels of the pyramid and of the heads' convolutions.
        hidden: Width of the box heads' hidden layers.
        extra_convs: How the pyramid gets its coarsest level: None, or ``"on_input"`` as in DAT++; see
            `FeaturePyramid`.
        anchor_scales: Sides of anchors in strides.
        anchor_ratios: Heights of anchors over their widths.
        anchor_samples: Anchors of an image that learn.
        region_samples: Regions of an image that learn.
        score_threshold: Detections have higher scores.
        nms_threshold: Largest overlap of detections of a class.
        max_detections: Most detections of an image.
        rules: Whose rules find objects, ``"mmdet"`` or ``"detectron2"``; see `RoIHeads`.
        design: ``"plain"``, or ``"vitdet"``: two convolutions propose regions, and the heads on these have four, with
            norms over the channels.

    Raises:
        TaskError: If there is no such design, or there are no such rules.
    """

    DESIGNS: ClassVar[dict[str, tuple[dict, dict]]] = {
        "plain": ({}, {}),
        "vitdet": ({"convs": 2}, {"convs": 4, "layer_norm": True}),
    }
    needs_masks: ClassVar[bool] = True

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int = 80,
        transform: DetectorTransform | None = None,
        channels: int = 256,
        hidden: int = 1024,
        extra_convs: str | None = None,
        anchor_scales: Sequence[float] = (8.0,),
        anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        anchor_samples: int = 256,
        region_samples: int = 512,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
        rules: str = "mmdet",
        design: str = "plain",
    ):
        _check_rules(rules)
        if design not in self.DESIGNS:
            raise TaskError(f"design is {design!r}; it can be {' or '.join(map(repr, self.DESIGNS))}")
        self._rules, self._of_design = rules, self.DESIGNS[design]
        neck = detector_neck(backbone, channels, num_outs=5, start_level=0, extra_convs=extra_convs)
        super().__init__(backbone, neck, transform or DetectorTransform(), num_classes)
        rpn, regions, stages = self._design()
        anchors = AnchorGrid((4, 8, 16, 32, 64), anchor_scales, anchor_ratios)
        self.rpn = RegionProposalNetwork(channels, anchors, samples=anchor_samples, rules=rules, **rpn)
        self.roi_heads = RoIHeads(
            channels,
            num_classes,
            stages,
            hidden=hidden,
            samples=region_samples,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
            rules=rules,
            **regions,
        )

    def _design(self) -> tuple[dict, dict, tuple[Stage, ...]]:
        """Return the options of the RPN and of the heads on regions, and the stages."""
        return *self._of_design, MASK_RCNN_STAGES

    @torch.no_grad()
    def predict_from_features(
        self,
        features: Sequence[Tensor],
        image_sizes: Sequence[Size],
        original_sizes: Sequence[Size] | None = None,
        soft_masks: bool = False,
    ) -> list[dict[str, Tensor]]:
        pyramid = self.neck(features)
        proposals = self.rpn.propose(*self.rpn(pyramid), image_sizes)
        regions = [boxes for boxes, _ in proposals]
        return self.roi_heads(pyramid, regions, image_sizes, original_sizes or image_sizes, soft_masks)

    def losses_from_features(
        self,
        features: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
        image_sizes: Sequence[Size],
        proposals: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses, as `forward` does, from maps of the backbone.

        Which anchors and regions learn is sampled; see ``sample`` for how to fix it.

        Args:
            features: Maps ``[B, C_i, H_i, W_i]`` of the padded batch, as ``backbone`` returns them.
            targets: As those of `forward`, in pixels of the batch; masks ``[N, H, W]`` have the padded batch's size.
            image_sizes: ``(height, width)`` of each image in the batch, without padding.
            proposals: Regions ``[P, 4]`` of each image, in pixels of the batch, instead of those of the RPN. Objects
                are always added to them.

        Returns:
            ``loss_rpn_cls``, ``loss_rpn_bbox``, ``loss_cls``, ``loss_bbox`` and ``loss_mask``; of a cascade the latter
            for each stage, ``s0.loss_cls`` and so on.
        """
        self._check(targets)
        targets = [{**target, "boxes": target["boxes"].float()} for target in targets]
        pyramid = self.neck(features)
        logits, offsets = self.rpn(pyramid)
        losses = self.rpn.loss(logits, offsets, [target["boxes"] for target in targets], image_sizes)
        losses = {name: levels.sum() for name, levels in losses.items()}
        if proposals is None:
            proposals = [boxes for boxes, _ in self.rpn.propose(logits, offsets, image_sizes, training=True)]
        found = self.roi_heads.loss(pyramid, proposals, targets, image_sizes)
        return losses | {name: value for name, value in found.items() if not name.endswith("acc")}


class FasterRCNN(MaskRCNN):
    """Faster R-CNN (Ren et al. 2015) on a feature pyramid: Mask R-CNN without masks. Arguments as there."""

    needs_masks: ClassVar[bool] = False

    def _design(self) -> tuple[dict, dict, tuple[Stage, ...]]:
        rpn, regions = self._of_design
        return rpn, regions | {"mask_heads": 0}, MASK_RCNN_STAGES


class CascadeMaskRCNN(MaskRCNN):
    """Cascade Mask R-CNN (Cai & Vasconcelos 2018): three stages of boxes and masks.

    Args:
        backbone: Maps a batch to maps; has ``channels`` and, unless they are four of 1/4 to 1/32, ``reductions``.
        num_classes: Classes of objects.
        transform: Makes the batch of images.
        style: ``"swin"``: box heads with four convolutions and batch norm, offsets for each class, GIoU loss, as in all
            models published with the backbones here; ``"default"``, mmdet's: two hidden layers, offsets for all
            classes, smooth L1 loss; or ``"vitdet"``, four convolutions with norms over the channels, and offsets for
            all classes.
        mask_heads: How many heads for masks there are: one for each stage, or as in detectron2 a single one.
        **options: As those of `MaskRCNN`.

    Raises:
        TaskError: If there is no such style.
    """

    STYLES: ClassVar[dict[str, dict]] = {
        "swin": {"convs": 4, "per_class": True, "box_loss": "giou"},
        "default": {"convs": 0, "per_class": False, "box_loss": "smooth_l1"},
        "vitdet": {"convs": 4, "per_class": False, "box_loss": "smooth_l1", "layer_norm": True},
    }

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int = 80,
        transform: DetectorTransform | None = None,
        style: str = "swin",
        mask_heads: int = 3,
        **options,
    ):
        if style not in self.STYLES:
            raise TaskError(f"style is {style!r}; it can be {' or '.join(map(repr, self.STYLES))}")
        self._style, self._mask_heads = style, mask_heads
        super().__init__(backbone, num_classes, transform, **options)

    def _design(self) -> tuple[dict, dict, tuple[Stage, ...]]:
        rpn = {"most_in_training": 2000, "inside_only": True, "beta": 1 / 9}
        rpn |= {"convs": 2} if self._style == "vitdet" else {}
        stages = DETECTRON_STAGES if self._rules == "detectron2" else CASCADE_STAGES
        return rpn, self.STYLES[self._style] | {"mask_heads": self._mask_heads}, stages


class DINO(Detector):
    """DINO (arXiv 2203.03605): a transformer of the DETR line, whose detections need no suppression.

    Images are padded to the batch alone, and no pixel of the padding counts. Denoising draws from torch's global
    generator in mmdet's order, so that `torch.manual_seed` before the loss reproduces it.

    Attributes:
        head: From the neck's maps to classes and boxes, a `DinoHead`.
        criterion: The losses, a `DinoCriterion`.

    Args:
        backbone: Maps a batch to maps; has ``channels`` and, unless they are four of 1/4 to 1/32, ``reductions``.
        num_classes: Classes of objects.
        transform: Makes the batch of images.
        channels: Channels of the neck and the transformer.
        num_levels: Maps of the neck: 4, of strides 8 to 64, or 5, of strides 4 to 64.
        num_queries: Queries.
        encoder_layers: Layers of the encoder.
        decoder_layers: Layers of the decoder.
        hidden: Channels inside the transformer's MLPs.
        num_heads: Heads of each attention.
        num_points: Points of each head on each map.
        temperature: Of the encoder's position embedding: 20, or 10000 in mmdet's "improved" form.
        offset: Of the encoder's position embedding: 0, or -0.5 in the improved form.
        denoising_queries: Objects of the denoising: 100, or 300 in the improved form.
        cls_weight: Weight of the loss of the classes: 1, or 2 in the improved form.
        max_detections: Most detections of an image.
    """

    TRANSFORM: ClassVar[dict] = {"divisor": 1}

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int = 80,
        transform: DetectorTransform | None = None,
        channels: int = 256,
        num_levels: int = 4,
        num_queries: int = 900,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        hidden: int = 2048,
        num_heads: int = 8,
        num_points: int = 4,
        temperature: float = 20.0,
        offset: float = 0.0,
        denoising_queries: int = 100,
        cls_weight: float = 1.0,
        max_detections: int = 300,
    ):
        neck = channel_mapper(backbone, channels, num_levels)
        super().__init__(backbone, neck, transform or DetectorTransform(**self.TRANSFORM), num_classes)
        self.head = DinoHead(
            channels,
            num_classes,
            num_levels,
            num_queries,
            encoder_layers,
            decoder_layers,
            hidden,
            num_heads,
            num_points,
            temperature,
            offset,
            denoising_queries,
            max_detections,
        )
        self.criterion = DinoCriterion(cls_weight)

    @torch.no_grad()
    def predict_from_features(
        self,
        features: Sequence[Tensor],
        image_sizes: Sequence[Size],
        original_sizes: Sequence[Size] | None = None,
        soft_masks: bool = False,
    ) -> list[dict[str, Tensor]]:
        found = self.head(self.neck(features), image_sizes, self.transform.canvas(image_sizes))
        return self.head.detect(found.logits[-1], found.boxes[-1], image_sizes, original_sizes or image_sizes)

    @torch.no_grad()
    def find(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the detections of a batch of images of one size, in tensors, as for export.

        Args:
            batch: Normalised images ``[B, C, H, W]``, as the transform makes them.

        Returns:
            Boxes ``[B, D, 4]`` in pixels of the batch, scores ``[B, D]`` and labels ``[B, D]``, best first.
        """
        size = tuple(batch.shape[-2:])
        found = self.head(self.neck(self.backbone(batch)), [size], size)
        boxes, labels, scores = self.head.best(found.logits[-1], found.boxes[-1])
        return in_pixels(boxes, size), scores, labels

    def losses_from_features(
        self, features: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], image_sizes: Sequence[Size]
    ) -> dict[str, Tensor]:
        self._check(targets)
        labels = [target["labels"].long() for target in targets]
        boxes = [
            target["boxes"].float() / target["boxes"].new_tensor([width, height, width, height]).float()
            for target, (height, width) in zip(targets, image_sizes, strict=True)
        ]
        canvas = self.transform.canvas(image_sizes)
        found = self.head(self.neck(features), image_sizes, canvas, (labels, boxes))
        return self.criterion(found, labels, boxes, image_sizes)


DETECTORS = {
    "dino": DINO,
    "retinanet": RetinaNet,
    "faster_rcnn": FasterRCNN,
    "mask_rcnn": MaskRCNN,
    "cascade_mask_rcnn": CascadeMaskRCNN,
}


def _check_rules(rules: str) -> None:
    if rules not in RULES:
        raise TaskError(f"rules is {rules!r}; it can be {' or '.join(map(repr, RULES))}")


def create_detector(
    head: str,
    backbone: str | nn.Module,
    num_classes: int | None = None,
    setting: str | None = "auto",
    checkpoint: str | Path | None = None,
    backbone_kwargs: Mapping | None = None,
    reset_classifier: bool = False,
    torchvision_outputs: bool = False,
    **kwargs,
) -> Detector:
    """Create a detector of any backbone.

    Args:
        head: ``"retinanet"``, ``"faster_rcnn"``, ``"mask_rcnn"``, ``"cascade_mask_rcnn"`` or ``"dino"``.
        backbone: Name of any timm model, ours or theirs, or a module that maps images to a list of maps, and has their
            ``channels`` and ``reductions``, their strides; without the latter they are four, of 1/4 to 1/32 of the
            image. Maps of one stride, as of plain vision transformers, get ViTDet's simple feature pyramid, other
            strides than 4, 8, 16 and 32 what `detector_neck` says.
        num_classes: Classes of objects; the checkpoint's, or else 80 (COCO), by default. Labels are 0 to
            ``num_classes - 1``; background is no label.
        setting: The published dense setting of a named backbone, such as ``"detection"``; None for the plain one. By
            default the one for the head, where the backbone has it.
        checkpoint: A whole detector, mmdet's or ours: a path, an address, or the ``model.tag`` of published weights
            (`foveate weights list`). The variant is read from it unless given: Swin-style or default cascade, the
            pyramid's extra levels, widths, class count. A file of neck and heads alone leaves the backbone as it is,
            and says so.
        backbone_kwargs: Options of a named backbone, such as ``drop_path_rate`` or ``pretrained``.
        reset_classifier: Whether to leave out the checkpoint's layers that know the classes, to train for others.
        torchvision_outputs: Whether detections are as torchvision's: labels from 1, masks ``[D, 1, H, W]``, float32 of
            0 to 1; see `Detector`. Targets have labels from 0 all the same.
        **kwargs: Options of the detector's class (`RetinaNet`, `FasterRCNN`, `MaskRCNN`, ...), such as ``channels``,
            and of its transform (`DetectorTransform`): ``min_size``, ``max_size``, ``mean``, ``std``, ``divisor``; by
            default those of the run whose checkpoint it is. All others are options of a named backbone.

    Raises:
        TaskError: If the head or an option is unknown, or the backbone doesn't suit the head.
        UnknownModelError: If the backbone or its setting is unknown.
        CheckpointError: If the checkpoint can't be read, or is of another model.

    Example:
        >>> model = create_detector("mask_rcnn", "nat_atto", num_classes=3, min_size=64).eval()
        >>> model([torch.rand(3, 65, 97)])[0]["boxes"].shape[1]
        4
    """
    if head not in DETECTORS:
        raise TaskError(f"there is no detector {head!r}{nearest(head, DETECTORS)}")
    kind = DETECTORS[head]
    options, transform, others = _split_options(kind, kwargs)
    body_options = {**(backbone_kwargs or {}), **others}
    if head == "cascade_mask_rcnn" and options.get("style") in STYLES:
        body_options["style"] = options.pop("style")  # of a ResNet, not of the cascade
    file, layout, published = None, None, False
    if checkpoint is not None:
        checkpoint = locate(checkpoint)
        file = read_detector(checkpoint)
        state = file.state
        variant = _variant(head, state, checkpoint, num_classes, reset_classifier)
        num_classes = variant.pop("num_classes")
        layout = file.layout(backbone)
        published = has_backbone(state) and not is_ours(state) and layout is None
        if is_ours(state):
            held, held_transform, _ = _split_options(kind, file.card.get("kwargs") or {})
            options, transform = held | variant | options, held_transform | transform
            body_options = file.held_form() | body_options
        else:
            options = rules_of(file, options) | variant | options
        if layout is not None:
            form = form_of(layout, file.origin, state, backbone, body_options)
            transform = statistics_from(file.origin, state, form.get("style")) | transform
            if layout.family.endswith("ViTDet"):
                transform = {"min_size": 1024, "max_size": 1024, "divisor": 1024} | transform
            body_options = form | body_options
            body_options.pop("pretrained", None)
    elif reset_classifier:
        raise TaskError("reset_classifier leaves out part of a checkpoint, but there is none")
    if isinstance(backbone, str):
        options = head_options_of(backbone, head) | options
    body = build_backbone(
        head,
        backbone,
        setting,
        (head, "detection"),
        checkpoint if published else None,
        body_options,
        _known_options(kind),
    )
    prepare = DetectorTransform(**(kind.TRANSFORM | transform))
    _check_size(backbone, body, prepare)
    model = kind(body, 80 if num_classes is None else num_classes, prepare, **options)
    model.torchvision_outputs = torchvision_outputs
    if file is not None:
        if layout is not None:
            file.state = translated(layout, file.state, body, checkpoint)
            model.classes = file.origin.classes
            model.told = described(options | transform, body_options)
        loaded = published and isinstance(backbone, str)
        model.load_report = load_detector(model, file, loaded, reset_classifier)
    return model


def _variant(head: str, state: dict[str, Tensor], path: Path, num_classes: int | None, reset_classifier: bool) -> dict:
    """Return the class count and the options of the detector that a state dict is of, or say why it can't be that."""
    held = head_of(state, path)
    if held != head:
        raise CheckpointError(f"{path}: holds a {held}, not a {head}; create_detector({held!r}, ...) reads it")
    try:
        variant = variant_of(head, state, path)
    except KeyError as error:
        raise CheckpointError(f"{path}: 1 missing ({error.args[0]})") from error
    if num_classes not in (None, variant["num_classes"]):
        if not reset_classifier:
            raise OtherClassesError(path, variant["num_classes"], num_classes)
        variant["num_classes"] = num_classes
    return variant


def _options_of(kind: type[Detector]) -> list[str]:
    """Return the names of the options of a detector's class and of those it passes them on to."""
    names = []
    for base in kind.__mro__:
        if base is Detector:
            break
        names += list(inspect.signature(base).parameters)[3:]
    return [name for name in dict.fromkeys(names) if name != "options"]


def _known_options(kind: type[Detector]) -> list[str]:
    return [*_options_of(kind), *inspect.signature(DetectorTransform).parameters]


def _split_options(kind: type[Detector], given: dict) -> tuple[dict, dict, dict]:
    """Return the options of the detector, those of its transform, and all others."""
    of_detector, of_transform = _options_of(kind), list(inspect.signature(DetectorTransform).parameters)
    return (
        {name: value for name, value in given.items() if name in of_detector},
        {name: value for name, value in given.items() if name in of_transform},
        {name: value for name, value in given.items() if name not in of_detector + of_transform},
    )


def _check_size(backbone: str | nn.Module, body: nn.Module, transform: DetectorTransform) -> None:
    """Raise a TaskError if a backbone of one input size can't take all images that the transform makes."""
    size = getattr(body, "size", None)
    if size is None:
        return
    least = -(-transform.max_size // transform.divisor) * transform.divisor
    if transform.min_size is None or min(size) < least:
        name = backbone if isinstance(backbone, str) else type(backbone).__name__
        raise TaskError(
            f"{name} takes images of up to {size[0]}x{size[1]} alone, and the detector makes them up to "
            f"{'any size' if transform.min_size is None else least}: build it with img_size={least}, or the detector "
            f"with min_size={min(size)}, max_size={min(size)}"
        )
