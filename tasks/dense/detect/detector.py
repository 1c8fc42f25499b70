"""Detectors: any backbone, a published head, and how they are trained, evaluated and loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....zoo.backbone import head_options_of
from ....zoo.checkpoint import Checkpoint, CheckpointError
from ....zoo.published import form_of, statistics_from, translated
from ....zoo.published_forms import STYLES
from ....zoo.weights import read
from ... import TaskError, nearest
from ..build import OtherClassesError, build_backbone, described, has_backbone, is_ours
from ..neck import detector_neck
from ..options import known_options, split_options
from .anchors import AnchorGrid
from .base import Detector, Size
from .checkpoint import head_of, load_detector, read_detector, rules_of, variant_of
from .dino_detector import DINO
from .fixed import NONE
from .retinanet import RetinaHead
from .roi_heads import CASCADE_STAGES, DETECTRON_STAGES, MASK_RCNN_STAGES, RoIHeads, Stage
from .rpn import RegionProposalNetwork
from .transform import DetectorTransform

RULES = ("mmdet", "detectron2")


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

    OPTIONS: ClassVar[tuple[str, ...]] = (
        "channels",
        "extra_convs",
        "anchor_scales",
        "anchor_ratios",
        "score_threshold",
        "nms_threshold",
        "max_detections",
        "per_level",
        "selection",
        "extra_relu",
        "rules",
    )

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

    def find(self, batch: Tensor) -> dict[str, Tensor]:
        logits, offsets = self.head(self.neck(self.backbone(self.transform.padded(batch))))
        answers = self.head.find(logits, offsets, tuple(batch.shape[-2:]))
        return dict(zip(("boxes", "scores", "labels", "count"), answers, strict=True))

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
    OPTIONS: ClassVar[tuple[str, ...]] = (
        "channels",
        "hidden",
        "extra_convs",
        "anchor_scales",
        "anchor_ratios",
        "anchor_samples",
        "region_samples",
        "score_threshold",
        "nms_threshold",
        "max_detections",
        "rules",
        "design",
    )

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

    def find(self, batch: Tensor) -> dict[str, Tensor]:
        size = tuple(batch.shape[-2:])
        pyramid = self.neck(self.backbone(self.transform.padded(batch)))
        proposals, scores = self.rpn.find(*self.rpn(pyramid), size)
        return self.roi_heads.find(pyramid, proposals, scores > NONE, size)

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
        roi_losses = self.roi_heads.loss(pyramid, proposals, targets, image_sizes)
        return losses | {name: value for name, value in roi_losses.items() if not name.endswith("acc")}


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
    OPTIONS: ClassVar[tuple[str, ...]] = ("style", "mask_heads", *MaskRCNN.OPTIONS)

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
    checkpoint: str | Path | Checkpoint | None = None,
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
        checkpoint: A whole detector, mmdet's or ours: a path, an address, the ``model.tag`` of published weights
            (`foveate weights list`), or what `open_checkpoint` read. The variant is read from it unless given:
            Swin-style or default cascade, the pyramid's extra levels, widths, class count. A file of neck and heads
            alone leaves the backbone as it is, and says so.
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
    options, transform, others = split_options(kwargs, kind, DetectorTransform)
    body_options = {**(backbone_kwargs or {}), **others}
    if head == "cascade_mask_rcnn" and options.get("style") in STYLES:
        body_options["style"] = options.pop("style")  # of a ResNet, not of the cascade
    file, layout, published = None, None, False
    if checkpoint is not None:
        file = read_detector(read(checkpoint))
        state = file.state
        variant = _variant(head, state, file.path, num_classes, reset_classifier)
        num_classes = variant.pop("num_classes")
        layout = file.layout(backbone)
        published = has_backbone(state) and not is_ours(state) and layout is None
        if is_ours(state):
            file_options, file_transform, _ = split_options(file.card.get("kwargs") or {}, kind, DetectorTransform)
            options, transform = file_options | variant | options, file_transform | transform
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
        file.checkpoint if published else None,
        body_options,
        known_options(kind, DetectorTransform),
    )
    prepare = DetectorTransform(**(kind.TRANSFORM | transform))
    _check_size(backbone, body, prepare)
    model = kind(body, 80 if num_classes is None else num_classes, prepare, **options)
    model.torchvision_outputs = torchvision_outputs
    if file is not None:
        if layout is not None:
            file.state = translated(layout, file.state, body, file.path)
            model.classes = file.origin.classes
            model.told = described(options | transform, body_options)
        loaded = published and isinstance(backbone, str)
        model.load_report = load_detector(model, file, loaded, reset_classifier)
    return model


def _variant(head: str, state: dict[str, Tensor], path: Path, num_classes: int | None, reset_classifier: bool) -> dict:
    """Return the class count and the options of the detector that a state dict is of, or say why it can't be that."""
    file_head = head_of(state, path)
    if file_head != head:
        raise CheckpointError(
            f"{path}: holds a {file_head}, not a {head}; create_detector({file_head!r}, ...) reads it"
        )
    try:
        variant = variant_of(head, state, path)
    except KeyError as error:
        raise CheckpointError(f"{path}: 1 missing ({error.args[0]})") from error
    if num_classes not in (None, variant["num_classes"]):
        if not reset_classifier:
            raise OtherClassesError(path, variant["num_classes"], num_classes)
        variant["num_classes"] = num_classes
    return variant


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
