"""Whole detectors and segmenters as modules from a batch of images to tensors, whose sizes what is seen can't change.

Such a module answers as `predict` does, by the same rules, and can be exported: the number of what is found is an
output of its own, and what follows it is empty.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import TaskError, nearest
from .detect.base import Detector
from .segment.fixed import Queries, instances, segments, semantic_labels
from .segment.inference import resize_to
from .segment.mask2former import Mask2Former
from .segment.postprocess import OUTPUTS


class Detections(nn.Module):
    """What a detector finds.

    Attributes:
        OUTPUTS: Names of the outputs.

    Args:
        model: A `Detector`.

    Shape:
        Normalised images ``[B, C, H, W]``, resized as the detector's transform does it, but not padded, to boxes
        ``[B, D, 4]`` in their pixels, scores and labels ``[B, D]``, with a mask head masks ``[B, D, H, W]`` (bool), and
        the number of detections ``[B]``, beyond which boxes, scores and masks are 0 and labels -1.
    """

    def __init__(self, model: Detector):
        super().__init__()
        self.model = model
        self.OUTPUTS = ("boxes", "scores", "labels", *(("masks",) if model.needs_masks else ()), "count")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what is found; see the class."""
        answers = self.model.find(x)
        return tuple(answers[name] for name in self.OUTPUTS)


class LabelMaps(nn.Module):
    """The class of every pixel.

    Args:
        model: A `Segmenter`.

    Shape:
        Normalised images ``[B, C, H, W]`` to labels ``[B, H, W]``, int64.
    """

    OUTPUTS: ClassVar[tuple[str, ...]] = ("labels",)

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Return the labels; see the class."""
        return (self.model(x).argmax(1),)


class Segments(nn.Module):
    """What a Mask2Former or OneFormer answers.

    Attributes:
        OUTPUTS: Names of the outputs: semantic ``labels`` ``[B, H, W]``; instance ``boxes`` ``[B, T, 4]``, ``scores``
            and ``labels`` ``[B, T]``, ``masks`` ``[B, T, H, W]`` (bool) and ``count`` ``[B]``; panoptic ``segments``
            ``[B, H, W]`` (0 for none, the others from 1), and of segment i + 1, at i, ``category_ids``, ``isthing``,
            ``areas`` in pixels and ``scores``, each ``[B, Q]``, and ``count`` ``[B]``. What follows the count is -1 for
            labels, else 0.

    Args:
        model: A `Mask2Former`.
        output: ``"semantic"``, ``"instance"`` or ``"panoptic"``.

    Raises:
        TaskError: If there is no such output.
    """

    NAMES: ClassVar[dict[str, tuple[str, ...]]] = {
        "semantic": ("labels",),
        "instance": ("boxes", "scores", "labels", "masks", "count"),
        "panoptic": ("segments", "category_ids", "isthing", "areas", "scores", "count"),
    }

    def __init__(self, model: Mask2Former, output: str = "panoptic"):
        super().__init__()
        if output not in OUTPUTS:
            raise TaskError(f"there is no output {output!r}{nearest(output, OUTPUTS)}")
        self.model = model
        self.output = output
        self.OUTPUTS = self.NAMES[output]
        things = torch.zeros(model.criterion.num_classes + 1, dtype=torch.bool)
        things[list(model.things)] = True
        self.register_buffer("things", things, persistent=False)
        self.register_buffer("numbers", (things.cumsum(0) - 1).clamp(min=0), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the answer to normalised images ``[B, C, H, W]``; see the class."""
        model, (height, width) = self.model, x.shape[-2:]
        padded = model.padded(x)
        classes, masks = model.head.predictions(model.features(padded), self.output)[-1]
        masks = resize_to(masks.float(), padded.shape[-2:])[..., :height, :width]
        queries = Queries(classes.float(), masks, self.things)
        if self.output == "semantic":
            return (semantic_labels(queries),)
        if self.output == "instance":
            return instances(queries, model.topk, self.numbers if model.number_things else None)
        return segments(queries, model.object_threshold, model.overlap_threshold, model.fusion)


def deployable(model: nn.Module, output: str | None = None) -> nn.Module:
    """Return the module that answers as a detector's or segmenter's ``predict``, in evaluation mode.

    Args:
        model: What `create_detector` or `create_segmenter` made.
        output: What a Mask2Former or OneFormer is asked for; ``"panoptic"`` if None.

    Returns:
        `Detections`, `LabelMaps` or `Segments`, which has ``OUTPUTS``, the names of what it returns.

    Raises:
        TaskError: If there is no such output, or the model has no others than its own.
    """
    if isinstance(model, Mask2Former):
        return Segments(model, output or "panoptic").eval()
    if output not in (None, "semantic"):
        raise TaskError(f"{type(model).__name__} has no output {output!r}; Mask2Former and OneFormer have several")
    return (Detections(model) if isinstance(model, Detector) else LabelMaps(model)).eval()
