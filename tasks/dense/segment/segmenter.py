"""Segmenters: any backbone, a head that labels every pixel, and how they are trained, evaluated and loaded."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import is_model
from torch import Tensor, nn

from ....zoo.backbone import UnknownModelError, check_name, dense_settings_of, takes_options
from ....zoo.checkpoint import Checkpoint, CheckpointError
from ....zoo.library_errors import lacks_variance
from ....zoo.published import form_of, is_foreign, statistics_from, tests_of, translated
from ....zoo.weights import read, table
from ... import TaskError, nearest
from ..build import DenseFile, OtherClassesError, build_backbone, described, has_backbone, is_ours
from ..neck import segmenter_neck
from ..normalize import check_evaluation, statistics_of
from ..options import known_options, split_options
from .attention_unet import AttentionUNetHead
from .base import BaseSegmenter
from .checkpoint import aux_channels_of, head_of, load_segmenter, neck_of, read_segmenter, variant_of
from .deeplabv3 import DeepLabV3Head, DeepLabV3PlusHead
from .fcn import FCNHead
from .ham import HamNetHead, LightHamHead
from .inference import predict_labels, resize_to
from .losses import batch_labels, check_labels, pixel_cross_entropy
from .mask2former import SETTINGS, Mask2Former, Mask2FormerHead, OneFormerHead
from .mca import MCAHead
from .semantic_fpn import SemanticFPNHead
from .set_loss import SetCriterion
from .upernet import UPerHead

_logger = logging.getLogger(__name__)

HEADS = {
    "semantic_fpn": SemanticFPNHead,
    "upernet": UPerHead,
    "deeplabv3": DeepLabV3Head,
    "light_ham": LightHamHead,
    "ham_net": HamNetHead,
    "mca": MCAHead,
    "attention_unet": AttentionUNetHead,
    "deeplabv3_plus": DeepLabV3PlusHead,
    "mask2former": Mask2FormerHead,
    "oneformer": OneFormerHead,
}
# The heads that are trained with an auxiliary one.
_WITH_AUX = ("upernet", "deeplabv3", "deeplabv3_plus", "ham_net")
_DILATED = ("deeplabv3", "deeplabv3_plus")
# The heads that predict a set of masks; the others label pixels.
MASK_HEADS = ("mask2former", "oneformer")


class Segmenter(BaseSegmenter):
    """A backbone and a head that gives every pixel a class; for training perhaps an auxiliary head.

    ``head(features)`` and ``aux_head(features)`` give logits at their own scale, 1/4 of the image for UperNet and
    Semantic FPN.

    `predict` and `loss` take images of 0 to 1 or uint8, and normalise them by ``mean`` and ``std``; ``forward``, the
    backbone and the heads take normalised ones.

    Args:
        backbone: Maps images to a list of maps.
        head: Maps the list to logits.
        aux_head: Another one, used for the loss only.
        ignore_index: Label of pixels that don't count.
        loss_mean: Whether the cross entropy is divided by ``"all"`` pixels, as in mmseg, or the ``"valid"`` ones; see
            `pixel_cross_entropy`.
        aux_weight: Weight of the auxiliary loss.
        mean: Mean of the channels, of images of 0 to 1; ImageNet's by default.
        std: Their standard deviation.
        channel_order: See `BaseSegmenter`.
        neck: Makes the heads' maps of the backbone's; None if these are the same.

    Shape:
        Normalised images ``[B, 3, H, W]`` of any size to logits ``[B, num_classes, H, W]``.

    `create_segmenter` notes its ``num_classes``. ``class_weights`` ``[num_classes]`` may be set to weigh the loss by.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = (
        "ignore_index",
        "loss_mean",
        "aux_weight",
        "mean",
        "std",
        "channel_order",
        "neck",
    )

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        aux_head: nn.Module | None = None,
        ignore_index: int = 255,
        loss_mean: str = "all",
        aux_weight: float = 0.4,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        channel_order: str = "rgb",
        neck: nn.Module | None = None,
    ):
        super().__init__(backbone, neck, mean, std, channel_order)
        self.head = head
        self.aux_head = aux_head
        self.ignore_index = ignore_index
        self.loss_mean = loss_mean
        self.aux_weight = aux_weight
        # Of a run, not of the model: files don't hold it.
        self.register_buffer("class_weights", None, persistent=False)

    @property
    def has_aux_head(self) -> bool:
        """Whether there is an auxiliary head."""
        return self.aux_head is not None

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images ``[B, 3, H, W]`` to logits ``[B, num_classes, H, W]``."""
        return resize_to(self.head(self.features(x)), x.shape[-2:])

    def loss(
        self, images: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor], normalized: bool = False
    ) -> dict[str, Tensor]:
        """Return the losses of a batch, weighted; their sum is what one minimises.

        Args:
            images: RGB images ``[B, 3, H, W]``, or a list of ``[3, H_i, W_i]``, uint8 or floating point of 0 to 1.
                Those of a list are padded, by zeros after they are normalised.
            targets: Label maps ``[B, H, W]``, or a list of ``[H_i, W_i]``: integers from 0 to the number of classes
                less 1, or ``ignore_index``.
            normalized: Whether the images are normalised already, by ``mean`` and ``std``.

        Returns:
            ``decode.loss_ce`` and, with an auxiliary head, ``aux.loss_ce``, as mmseg calls them.

        Raises:
            TaskError: If images or targets are none of these (of tensors on a GPU, values are not looked at), or
                UperNet or DeepLabV3 is trained on a single image, whose pooled pixel has no variance.
        """
        x, sizes = self.prepare_batch(images, normalized)
        labels = batch_labels(targets, sizes, x.shape[-2:], self.ignore_index)
        features = self.features(x)
        try:
            logits = self.head(features)
        except ValueError as error:
            if not lacks_variance(error):
                raise
            raise TaskError("the batch norm of a map pooled to one pixel needs at least 2 images in a batch") from error
        check_labels(labels, logits.shape[1], self.ignore_index)
        losses = {"decode.loss_ce": self._cross_entropy(logits, labels)}
        if self.aux_head is not None:
            losses["aux.loss_ce"] = self.aux_weight * self._cross_entropy(self.aux_head(features), labels)
        return losses

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return pixel_cross_entropy(logits, labels, self.ignore_index, self.loss_mean, self.class_weights)

    def predict(
        self,
        images: Tensor | Sequence[Tensor],
        mode: str = "whole",
        crop_size: Sequence[int] | int | None = None,
        stride: Sequence[int] | int | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        output_size: Sequence[int] | None = None,
        normalized: bool = False,
    ) -> Tensor | list[Tensor]:
        """Label every pixel; put the model into evaluation mode first.

        Args:
            images: RGB images ``[B, 3, H, W]``, or a list of ``[3, H_i, W_i]``, uint8 or floating point of 0 to 1.
            mode: ``"whole"``, or ``"slide"``: logits are averaged over overlapping windows.
            crop_size: Height and width of the windows; 512 by default.
            stride: Steps between them; two thirds of the window by default.
            scales: Factors of the images' size. With several, or with ``flip``, probabilities are averaged over the
                views; the published multi-scale numbers use 0.5, 0.75, 1, 1.25, 1.5, 1.75 and ``flip``.
            flip: Whether to look at the mirror images too.
            output_size: Height and width of the label maps, such as an image's before it was resized; logits are
                resized to it. The images' own by default.
            normalized: Whether the images are normalised already, by ``mean`` and ``std``.

        Returns:
            Classes ``[B, H, W]``, or a list of ``[H_i, W_i]``.

        Raises:
            TaskError: If the model is in training mode, images are none of these, the mode is unknown, windows leave
                gaps, or scales are not positive.
        """
        check_evaluation(self)
        options = (mode, crop_size, stride, scales, flip, output_size)
        if isinstance(images, Tensor):
            return predict_labels(self, self.prepare(images, normalized), *options)
        return [predict_labels(self, self.prepare_one(image, normalized), *options)[0] for image in images]


def create_segmenter(
    head: str,
    backbone: str | nn.Module,
    num_classes: int | None = None,
    setting: str | None = "auto",
    checkpoint: str | Path | Checkpoint | None = None,
    aux_head: bool = True,
    backbone_kwargs: Mapping | None = None,
    reset_classifier: bool = False,
    **kwargs,
) -> Segmenter | Mask2Former:
    """Create a segmenter of any backbone.

    Args:
        head: ``"semantic_fpn"``, ``"upernet"``, ``"deeplabv3"``, ``"deeplabv3_plus"``, ``"light_ham"`` (SegNeXt on
            MSCAN), ``"ham_net"``, ``"mca"``, ``"attention_unet"``, ``"mask2former"`` or ``"oneformer"``.
        backbone: Name of any timm model, ours or theirs, or a module that maps images to a list of maps, from the
            finest to the coarsest, and has their ``channels`` and, unless the head takes them as they are,
            ``reductions``, their strides.
        num_classes: Classes; the checkpoint's, or else the setting's or 150 (ADE20K), by default.
        setting: The published dense setting of a named backbone, such as ``"segmentation"``; None for the plain one. By
            default the one for the head, where the backbone has it. Mask2Former and OneFormer have settings of their
            own, which include the backbone's: `mask2former.SETTINGS`, such as ``"coco_panoptic"``.
        checkpoint: Weights of a whole segmenter, a path, an address, the name of published ones, or what
            `open_checkpoint` read: mmseg's, detectron2's, or ours. The variant of the head is read from it unless
            given; ``"mask2former"`` reads OneFormer's too. A file of a head alone leaves the backbone as it is, and
            says so. What no file tells, the ``rank`` of ``"light_ham"``, is known of published names and of mmseg's
            files, and must be given of others.
        aux_head: Whether the heads published with an auxiliary head get one, unless the checkpoint has none: UperNet,
            DeepLabV3 and HamNet; the others never have one.
        backbone_kwargs: Options of a named backbone, such as ``drop_path_rate`` or ``pretrained``.
        reset_classifier: Whether to leave out the checkpoint's classifier, to train for other classes.
        **kwargs: Options of the head, such as ``channels``, of the segmenter, such as ``loss_mean`` or ``things``, and
            of Mask2Former's `SetCriterion`; ``neck``, what stands between backbone and head, see `segmenter_neck`; all
            others are options of a named backbone. ``mean`` and ``std`` of the
            images are by default those of the run whose checkpoint it is; ImageNet's of published segmenters; else the
            backbone's own.

    Raises:
        TaskError: If the head or an option is unknown, the backbone does not suit the head, or the rank of Light-Ham's
            factorisation must be given.
        UnknownModelError: If the backbone or its setting is unknown.
        CheckpointError: If the checkpoint can't be had or read, or is of another model.

    Example:
        >>> model = create_segmenter("upernet", "nat_atto", num_classes=19, channels=32).eval()
        >>> model(torch.randn(1, 3, 65, 97)).shape
        torch.Size([1, 19, 65, 97])
    """
    if head not in HEADS:
        raise TaskError(f"there is no segmenter {head!r}{nearest(head, HEADS)}")
    if reset_classifier and checkpoint is None:
        raise TaskError("reset_classifier leaves out part of a checkpoint, but there is none")
    entry = table().get(str(checkpoint))
    file, layout, state = None, None, None
    if checkpoint is not None:
        file = read_segmenter(read(checkpoint))
        state = file.state
        head = _held_head(head, state, file.path)
        layout = file.layout(backbone)
    options, with_aux = {}, aux_head and head in _WITH_AUX
    aux = {} if with_aux else None
    if setting in SETTINGS.get(head, {}):
        options = {name: value for name, value in SETTINGS[head][setting].items() if name != "backbone"}
    if file is not None:
        options |= _variant(head, file, {**(entry.options if entry else {}), **kwargs})
        if num_classes not in (None, options["num_classes"]) and not reset_classifier:
            raise OtherClassesError(file.path, options["num_classes"], num_classes)
        aux = _held_aux(file, with_aux)
    default_classes = options.pop("num_classes", 150)
    num_classes = default_classes if num_classes is None else num_classes

    transformer = head in MASK_HEADS
    kinds = (HEADS[head], Mask2Former, SetCriterion) if transformer else (HEADS[head], Segmenter)
    *parts, others = split_options(options | kwargs, *kinds)
    body_options = {**(backbone_kwargs or {}), **others}
    published = state is not None and has_backbone(state) and not is_ours(state) and layout is None
    if layout is not None:
        form = form_of(layout, file.origin, state, backbone, body_options)
        parts[1] = statistics_from(file.origin, state, form.get("style")) | parts[1]
        body_options = form | body_options
        body_options.pop("pretrained", None)
        if transformer and file.origin.library == "mm":
            parts[1].setdefault("fusion", "mmdet")
    elif file is not None and is_ours(state):
        body_options = file.held_form() | body_options

    if head in _DILATED and layout is None and isinstance(backbone, str):
        # Most transformers can't trade stride for dilation.
        dilated = {"output_stride": 16} | body_options
        body_options = dilated if is_model(backbone) and takes_options(backbone, dilated) else body_options
    body = build_backbone(
        head,
        backbone,
        _backbone_setting(head, backbone, setting),
        (head, "segmentation"),
        file.checkpoint if published else None,
        body_options,
        known_options(*kinds),
    )
    parts[1] = _statistics(file, body) | parts[1]
    model = _assembled(head, body, _neck(head, body, parts[1].pop("neck", "auto"), state), num_classes, parts, aux)
    model.num_classes = num_classes
    if file is not None:
        if layout is not None:
            file.state = translated(layout, state, body, file.path)
            given = {name: value for part in parts for name, value in part.items() if name not in _OF_IMAGES}
            model.told = described(given, body_options)
            model.classes, model.tests = file.origin.classes, tests_of(layout, file.origin)
        loaded = published and isinstance(backbone, str)
        model.load_report = load_segmenter(model, file, loaded, reset_classifier)
    return model


def _variant(head: str, file: DenseFile, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the class count and the options of a segmenter that its file tells, with those ``given`` beside it."""
    try:
        variant = variant_of(head, file.state)
    except KeyError as error:
        raise CheckpointError(f"{file.path}: 1 missing ({error.args[0]})") from error
    variant |= {"neck": neck_of(file.state)} | given
    if head == "light_ham" and "rank" not in variant:
        raise TaskError(
            f"{file.path}: doesn't tell the rank of its factorisation: give rank=16, SegNeXt-T's and S's, or "
            "rank=64, which the authors took for B and L"
        )
    return variant


def _held_aux(file: DenseFile, takes_aux: bool) -> dict[str, Any] | None:
    """Return the options of the auxiliary head that a file tells; None if it has none, or none is wanted."""
    channels = aux_channels_of(file.state)
    if takes_aux and channels is None:
        _logger.info(f"{file.path}: has no auxiliary head, and so the model gets none")
    return {"channels": channels} if takes_aux and channels is not None else None


def _assembled(
    head: str,
    body: nn.Module,
    neck: nn.Module | None,
    num_classes: int,
    parts: Sequence[dict[str, Any]],
    aux: Mapping[str, Any] | None,
) -> "Segmenter | Mask2Former":
    """Return the segmenter of its parts.

    Args:
        head: Its head's name.
        body: Its backbone.
        neck: What stands between them.
        num_classes: Classes.
        parts: Options of the head, of the segmenter, and of Mask2Former's losses; those that the backbone decides are
            added.
        aux: Options of the auxiliary head; None if there is none.
    """
    of_head, of_model = parts[:2]
    channels = body.channels if neck is None else neck.channels
    if head in _DILATED:
        of_head.setdefault("stride", list(getattr(neck or body, "reductions", [16]))[-1])
    if head in MASK_HEADS:
        criterion = SetCriterion(num_classes, **parts[2])
        module = HEADS[head](channels, num_classes, **of_head)
        if head == "oneformer":
            of_model.setdefault("topk", module.predictor.query_embed.num_embeddings)
        return Mask2Former(body, module, criterion, neck=neck, **of_model)
    aux_module = None
    if aux is not None:
        # mmseg's plain vision transformers have the auxiliary head on the last map, all others on the third.
        strides = getattr(body, "reductions", None)
        plain = head == "upernet" and strides is not None and len(set(strides)) == 1
        own = {"index": len(channels) - 1 if plain else min(2, len(channels) - 1)}
        own |= {"dropout": of_head["dropout"]} if "dropout" in of_head else {}
        own |= {"group_norm": True} if head == "ham_net" else {}
        aux_module = FCNHead(channels, num_classes, **aux, **own)
    return Segmenter(body, HEADS[head](channels, num_classes, **of_head), aux_module, neck=neck, **of_model)


def _neck(head: str, body: nn.Module, neck: str | None, state: dict[str, Tensor] | None) -> nn.Module | None:
    """Return the neck asked for or held by a file, whose heads may stand on the backbone's maps as they are."""
    module = segmenter_neck(head, body, neck)
    bare = state is not None and neck == "auto" and module is not None and module.state_dict()
    return None if bare else module


def _statistics(file: DenseFile | None, body: nn.Module) -> dict[str, Any]:
    """Return mean and std of a segmenter's images: of a run's file, of published files, or else of its backbone."""
    if file is None:
        return statistics_of(body)
    usual = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "channel_order": "rgb"}
    rule = file.card.get("input") or {} if is_ours(file.state) else {}
    return {name: rule.get(name, value) for name, value in usual.items()}


def _held_head(head: str, state: dict[str, Tensor], path: Path) -> str:
    """Return the head that a state dict is of, if it is the one that was asked for."""
    file_head = head_of(state, path)
    if file_head != head and (head, file_head) != ("mask2former", "oneformer"):
        raise CheckpointError(f"{path}: holds a {file_head}, not a {head}; create it as {file_head!r}")
    return file_head


# What a run's data say of images.
_OF_IMAGES = ("mean", "std", "channel_order")


def _backbone_setting(head: str, backbone: str | nn.Module, setting: str | None) -> str | None:
    """Return the backbone's setting that a setting of the segmenter includes, or the setting itself."""
    own = SETTINGS.get(head, {})
    if setting not in own or not isinstance(backbone, str):
        return None if setting in own else setting
    check_name(backbone)
    if is_foreign(backbone):
        return None  # timm's own have none
    if own[setting]["backbone"] not in (known := dense_settings_of(backbone)):
        names = [*known, *(name for name, settings in own.items() if settings["backbone"] in known)]
        raise UnknownModelError(
            f"{backbone} has no setting {setting!r}; it has {', '.join(map(repr, names)) or 'none'}"
        )
    return own[setting]["backbone"]
