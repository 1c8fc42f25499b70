"""What detectors have in common: images in, losses or detections out."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....zoo.checkpoint import LoadReport
from ... import TaskError
from ..normalize import check_evaluation, dtype_of
from .assign import Sample, Sampler
from .boxes import has_area
from .transform import DetectorTransform

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
    # What `create_detector` passes on to the constructor.
    OPTIONS: ClassVar[tuple[str, ...]]

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
        as_torchvision = self.torchvision_outputs if torchvision_outputs is None else torchvision_outputs
        return self._detect(images, normalized, as_torchvision)

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
            results = self.predict_from_features(features, image_sizes, originals, soft_masks=torchvision_outputs)
            results = [_as_torchvision(one) for one in results] if torchvision_outputs else results
            detections |= dict(zip(members, results, strict=True))
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


def _as_torchvision(detections: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an image's detections with labels from 1 and probabilities ``[D, 1, H, W]`` as masks."""
    converted = detections | {"labels": detections["labels"] + 1}
    return converted | {"masks": detections["masks"][:, None]} if "masks" in detections else converted
