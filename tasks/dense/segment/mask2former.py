"""Mask2Former (arXiv 2112.01527) and OneFormer (arXiv 2211.06220) on any backbone.

Written anew after github.com/facebookresearch/Mask2Former and github.com/SHI-Labs/OneFormer (both MIT).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ....kernels.lengths import padding_to
from ... import TaskError, nearest
from ..normalize import check_evaluation
from .base import BaseSegmenter
from .inference import check_scales, pad_to, resize_to, views
from .losses import check_labels
from .masked_decoder import MaskedDecoder
from .oneformer import OneFormerDecoder, prompt_embedding, prompt_tokens
from .pixel_decoder import PixelDecoder
from .postprocess import OUTPUTS, postprocess
from .set_loss import SetCriterion, Target

# ADE20K's 50 classes without objects, and the others; Cityscapes' from person to bicycle; Mapillary Vistas' 37 of 65.
_ADE20K_STUFF = {0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59, 60, 61}
_ADE20K_STUFF |= {
    63,
    68,
    77,
    79,
    84,
    91,
    94,
    96,
    99,
    100,
    101,
    105,
    106,
    109,
    113,
    114,
    117,
    122,
    128,
    131,
    140,
    141,
    145,
}
THINGS = {
    "coco": tuple(range(80)),
    "ade20k": tuple(sorted(set(range(150)) - _ADE20K_STUFF)),
    "cityscapes": tuple(range(11, 19)),
    "mapillary": (0, 1, 8, *range(19, 24), *range(32, 43), *range(44, 58), *range(59, 63)),
}


def _mask2former(num_classes: int, things: Collection[int] | None = None, queries: int = 200, **options) -> dict:
    return {"backbone": "mask2former", "num_classes": num_classes, "num_queries": queries, "things": things, **options}


def _oneformer(data: str, num_classes: int, backbone: str = "oneformer", queries: int = 250, **options) -> dict:
    settings = {"num_classes": num_classes, "num_queries": queries, "topk": queries, "things": THINGS[data]}
    return {"backbone": backbone, **settings, **options}


# The published settings, with DiNAT-Large where that has one, for `create_segmenter(..., setting=...)`. The semantic
# models resize scores, all others the masks' logits.
SETTINGS: dict[str, dict[str, dict]] = {
    "mask2former": {
        "coco_panoptic": _mask2former(133, THINGS["coco"]),
        "coco_instance": _mask2former(80),
        "ade20k_panoptic": _mask2former(150, THINGS["ade20k"]),
        "ade20k_instance": _mask2former(100),
        "ade20k_semantic": _mask2former(150, queries=100, resize_first=False),
        "cityscapes_panoptic": _mask2former(19, THINGS["cityscapes"]),
        "cityscapes_instance": _mask2former(8),
        "cityscapes_semantic": _mask2former(19, queries=100, resize_first=False),
        "mapillary_panoptic": _mask2former(65, THINGS["mapillary"]),
        "mapillary_semantic": _mask2former(65, queries=100, resize_first=False),
    },
    "oneformer": {
        "coco": _oneformer("coco", 133, queries=150),
        "ade20k": _oneformer("ade20k", 150, object_threshold=0.5, number_things=True),
        "ade20k_1280": _oneformer("ade20k", 150, "oneformer_1280", object_threshold=0.5, number_things=True),
        "ade20k_1280_coco": _oneformer(
            "ade20k", 150, "oneformer_1280", queries=150, object_threshold=0.5, number_things=True
        ),
        "cityscapes": _oneformer("cityscapes", 19, "oneformer_cityscapes"),
        "mapillary": _oneformer("mapillary", 65),
    },
}


class Mask2FormerHead(nn.Module):
    """Pixel decoder and masked decoder.

    Args:
        in_channels: Channels of the backbone's four maps, from the finest to the coarsest.
        num_classes: Classes, without the one for no object.
        num_queries: Masks that are predicted.
        dim: Channels inside; a multiple of 32.
        encoder_layers: Layers of deformable attention.
        encoder_hidden: Channels inside their MLPs.
        decoder_layers: Layers of the masked decoder.
        decoder_hidden: Channels inside their MLPs.
        num_heads: Heads of every attention.
        sampling_points: Points of each head of deformable attention on each map.
        dropout: Dropout rate in the pixel decoder.
    """

    decoder = MaskedDecoder

    OPTIONS: ClassVar[tuple[str, ...]] = (
        "num_queries",
        "dim",
        "encoder_layers",
        "encoder_hidden",
        "decoder_layers",
        "decoder_hidden",
        "num_heads",
        "sampling_points",
        "dropout",
    )

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        num_queries: int = 100,
        dim: int = 256,
        encoder_layers: int = 6,
        encoder_hidden: int = 1024,
        decoder_layers: int = 9,
        decoder_hidden: int = 2048,
        num_heads: int = 8,
        sampling_points: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.pixel_decoder = PixelDecoder(
            in_channels, dim, encoder_hidden, encoder_layers, num_heads, sampling_points, dropout
        )
        self.predictor = self.decoder(num_classes, num_queries, dim, decoder_hidden, decoder_layers, num_heads)

    def predictions(self, features: Sequence[Tensor], prompt: str | None = None) -> list[tuple[Tensor, Tensor]]:
        """Return the class and mask logits of every layer, as `MaskedDecoder.forward` does; the last are the result."""
        return self.predictor(*self.pixel_decoder(features), self.embed_prompt(features, prompt))

    def embed_prompt(self, features: Sequence[Tensor], prompt: str | None) -> Tensor | None:
        """Return the embedding of a prompt ``[B, dim]``, which only OneFormer has."""
        return None

    def forward(self, features: Sequence[Tensor], prompt: str | None = None) -> dict[str, Tensor]:
        """Return all that the head computes from the backbone's features.

        Returns:
            ``mask_features`` ``[B, dim, H, W]``; ``multi_scale0``, 1, 2, from the coarsest; ``pred_logits``
            ``[B, Q, num_classes + 1]`` and ``pred_masks`` ``[B, Q, H, W]``; and, as ``aux0_logits``, ``aux0_masks``
            and so on, the predictions before the first layer and after each but the last.
        """
        mask_features, maps = self.pixel_decoder(features)
        *others, last = self.predictor(mask_features, maps, self.embed_prompt(features, prompt))
        outputs = {"mask_features": mask_features}
        outputs |= {f"multi_scale{level}": x for level, x in enumerate(maps)}
        outputs |= {"pred_logits": last[0], "pred_masks": last[1]}
        for index, (logits, masks) in enumerate(others):
            outputs |= {f"aux{index}_logits": logits, f"aux{index}_masks": masks}
        return outputs


class OneFormerHead(Mask2FormerHead):
    """Mask2Former's head, told by a prompt what to answer. Arguments as there; the published dropout is 0.1."""

    decoder = OneFormerDecoder

    def __init__(self, in_channels: Sequence[int], num_classes: int, num_queries: int = 250, **options):
        options.setdefault("dropout", 0.1)
        super().__init__(in_channels, num_classes, num_queries, **options)
        self.task_mlp = prompt_embedding(self.predictor.class_embed.in_features)

    def embed_prompt(self, features: Sequence[Tensor], prompt: str | None) -> Tensor:
        """Return the embedding of a prompt ``[B, dim]``; panoptic if none is named."""
        tokens = prompt_tokens("panoptic" if prompt is None else prompt, features[0])
        return self.task_mlp(tokens).expand(features[0].shape[0], -1)


class Mask2Former(BaseSegmenter):
    """A backbone and a head that predicts a set of masks with classes; for label maps, objects and panoptic segments.

    `predict` and `loss` take images of 0 to 1 or uint8, and normalise them by ``mean`` and ``std``; ``forward``, the
    backbone and the head take normalised ones.

    Args:
        backbone: Maps images to four maps.
        head: `Mask2FormerHead` or `OneFormerHead`.
        criterion: Loss of its predictions.
        things: Classes with objects; all by default. Matters to instances and panoptic segments.
        object_threshold: Probability that a query must exceed to be a panoptic segment.
        overlap_threshold: Fraction of its own mask that a panoptic segment must keep.
        topk: Pairs of query and class to look at for instances.
        resize_first: Whether, for label maps, the masks' logits are resized, or the scores.
        number_things: Whether instances are labelled by their index among ``things`` (OneFormer on ADE20K).
        fusion: Whose rules make panoptic segments, ``"mask2former"`` or ``"mmdet"``; see `postprocess.postprocess`.
        divisor: Images are padded, right and below, to a multiple of it.
        mean: Mean of the channels, of images of 0 to 1; ImageNet's by default.
        std: Their standard deviation.
        channel_order: See `BaseSegmenter`.
        neck: Makes the head's four maps of the backbone's; None if these are the same.

    Shape:
        Normalised images ``[B, 3, H, W]`` to scores ``[B, num_classes, H, W]`` of every class at every pixel, which are
        no probabilities: they need not add up to 1.
    """

    has_aux_head = False

    OPTIONS: ClassVar[tuple[str, ...]] = (
        "things",
        "object_threshold",
        "overlap_threshold",
        "topk",
        "resize_first",
        "number_things",
        "fusion",
        "divisor",
        "mean",
        "std",
        "channel_order",
        "neck",
    )

    def __init__(
        self,
        backbone: nn.Module,
        head: Mask2FormerHead,
        criterion: SetCriterion,
        things: Collection[int] | None = None,
        object_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
        topk: int = 100,
        resize_first: bool = True,
        number_things: bool = False,
        fusion: str = "mask2former",
        divisor: int = 32,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        channel_order: str = "rgb",
        neck: nn.Module | None = None,
    ):
        super().__init__(backbone, neck, mean, std, channel_order)
        self.head = head
        self.criterion = criterion
        self.things = tuple(range(criterion.num_classes)) if things is None else tuple(sorted(things))
        if self.things and not 0 <= self.things[0] <= self.things[-1] < criterion.num_classes:
            raise TaskError(f"things are classes from 0 to {criterion.num_classes - 1}; got {self.things}")
        self.object_threshold = object_threshold
        self.overlap_threshold = overlap_threshold
        self.topk = topk
        self.resize_first = resize_first
        self.number_things = number_things
        self.fusion = fusion
        self.divisor = divisor

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images ``[B, 3, H, W]`` to scores ``[B, num_classes, H, W]``."""
        results = self._results(x, "semantic", x.shape[-2:], x.shape[-2:])
        return torch.stack(results)

    def loss(
        self,
        images: Tensor | Sequence[Tensor],
        targets: Sequence[Target],
        prompt: str | None = None,
        normalized: bool = False,
    ) -> dict[str, Tensor]:
        """Return the losses of a batch, weighted; their sum is what one minimises.

        Args:
            images: RGB images ``[B, 3, H, W]``, or a list of ``[3, H_i, W_i]``, uint8 or floating point of 0 to 1.
                Those of a list are padded, by zeros after they are normalised.
            targets: For each image ``labels`` ``[N]``, integers from 0 to the number of classes less 1, and ``masks``
                ``[N, H, W]`` of the image's size, bool, uint8 or floating point of 0 and 1; `semantic_targets` makes
                them of label maps.
            prompt: For OneFormer, which is trained without its contrastive loss here.
            normalized: Whether the images are normalised already, by ``mean`` and ``std``.

        Raises:
            TaskError: If images or targets are none of these; of tensors on a GPU, values are not looked at.
        """
        x, sizes = self.prepare_batch(images, normalized)
        self._check(targets, sizes)
        padded = self.padded(x)
        # Masks cover what the predictions cover: the padded images.
        canvas = padded.shape[-2:]
        targets = [target | {"masks": pad_to(target["masks"].float(), canvas)} for target in targets]
        predictions = self.head.predictions(self.features(padded), prompt)
        return self.criterion.weighted(self.criterion(predictions, targets))

    def _check(self, targets: Sequence[Target], sizes: Sequence[Sequence[int]]) -> None:
        """Raise a TaskError that names the first fault of the targets."""
        if isinstance(targets, Tensor) or not all(isinstance(target, Mapping) for target in targets):
            raise TaskError("each image needs a dict of labels and masks; semantic_targets makes them of label maps")
        if len(targets) != len(sizes):
            raise TaskError(f"there are {len(sizes)} images and {len(targets)} targets; each image needs one")
        for index, (target, size) in enumerate(zip(targets, sizes, strict=True)):
            for key in ("labels", "masks"):
                if key not in target:
                    raise TaskError(f"target {index} has no {key!r}; it needs labels and masks")
            labels, masks = target["labels"], target["masks"]
            if labels.dim() != 1 or masks.dim() != 3 or len(labels) != len(masks):
                raise TaskError(
                    f"target {index} has labels {tuple(labels.shape)} and masks {tuple(masks.shape)}; "
                    "they must be [N] and [N, H, W]"
                )
            if tuple(masks.shape[1:]) != tuple(size):
                raise TaskError(
                    f"the masks of image {index} have {masks.shape[1]} x {masks.shape[2]} pixels, but the image has "
                    f"{size[0]} x {size[1]}; images of different sizes can be given as a list"
                )
            if labels.is_floating_point():
                raise TaskError(f"target {index} has labels of {labels.dtype}; they are integers")
            check_labels(labels, self.criterion.num_classes, whose=f"the objects of image {index}")

    def predict(
        self,
        images: Tensor | Sequence[Tensor],
        output: str = "semantic",
        output_size: Sequence[int] | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        normalized: bool = False,
    ) -> Tensor | list:
        """Segment images; put the model into evaluation mode first.

        Args:
            images: RGB images ``[B, 3, H, W]``, or a list of ``[3, H_i, W_i]``, uint8 or floating point of 0 to 1.
            output: ``"semantic"``, ``"instance"`` or ``"panoptic"``.
            output_size: Height and width of the results, such as an image's before it was resized; the images' own by
                default.
            scales: semantic: factors of the images' size; the scores of all views are averaged.
            flip: semantic: whether to look at the mirror images too.
            normalized: Whether the images are normalised already, by ``mean`` and ``std``.

        Returns:
            semantic: classes ``[B, H, W]``, or a list of ``[H_i, W_i]``. Otherwise a list with a dict for each image:
            of instances (`instance_masks`), or of ``segments`` and ``segments_info`` (`panoptic_segments`).

        Raises:
            TaskError: If the model is in training mode, images are none of these, the output is unknown or scales are
                not positive.
        """
        check_evaluation(self)
        if output not in OUTPUTS:
            raise TaskError(f"there is no output {output!r}{nearest(output, OUTPUTS)}")
        check_scales(scales)
        if output != "semantic" and (tuple(scales) != (1.0,) or flip):
            raise TaskError(f"scales and flip average the scores of pixels; they don't go with the {output} output")
        if not isinstance(images, Tensor):
            batches = (self.prepare_one(image, normalized) for image in images)
            return [self.predict(batch, output, output_size, scales, flip, normalized=True)[0] for batch in batches]
        images = self.prepare(images, normalized)
        with torch.inference_mode():
            size = tuple(images.shape[-2:]) if output_size is None else tuple(output_size)
            if output != "semantic":
                return self._results(images, output, images.shape[-2:], size)
            total = 0
            for view, mirrored in views(images, scales, flip):
                scores = torch.stack(self._results(view, output, view.shape[-2:], size))
                total = total + (scores.flip(-1) if mirrored else scores)
            return total.argmax(1)

    def postprocess(
        self,
        logits: Tensor,
        masks: Tensor,
        output: str,
        image_size: Sequence[int] | None = None,
        output_size: Sequence[int] | None = None,
    ) -> Tensor | dict:
        """Turn class logits ``[Q, K + 1]`` and mask logits ``[Q, H, W]`` of one image into a result.

        `postprocess.postprocess` with this model's settings; the masks have the network's input size.
        """
        result = postprocess(
            logits,
            masks,
            output,
            image_size,
            output_size,
            self.things,
            self.object_threshold,
            self.overlap_threshold,
            self.topk,
            self.resize_first,
            self.fusion,
        )
        if output == "instance" and self.number_things:
            things = torch.tensor(self.things, device=result["labels"].device)
            result["labels"] = torch.searchsorted(things, result["labels"])
        return result

    def _results(self, x: Tensor, output: str, image_size: Sequence[int], output_size: Sequence[int]) -> list:
        padded = self.padded(x)
        logits, masks = self.head.predictions(self.features(padded), output)[-1]
        logits = logits.float()
        return [
            self.postprocess(*pair, output, tuple(image_size), tuple(output_size))
            for pair in zip(logits, resize_to(masks.float(), padded.shape[-2:]), strict=True)
        ]

    def padded(self, x: Tensor) -> Tensor:
        """Return normalised images ``[B, C, H, W]``, padded as the network takes them."""
        below, right = (padding_to(length, self.divisor) for length in x.shape[-2:])
        return F.pad(x, (0, right, 0, below))
