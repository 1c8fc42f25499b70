"""The region proposal network (Ren et al. 2015) of published detectors: proposals and losses."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead

from . import fixed
from .anchors import AnchorGrid
from .assign import Matcher, Sampler
from .boxes import BoxCoder, has_area
from .postprocess import grouped_nms, top_k

# What every published mean over samples adds to its divisor.
EPS = torch.finfo(torch.float32).eps


def flatten_map(level: Tensor, values: int) -> Tensor:
    """Turn a map ``[B, A * values, H, W]`` into ``[B, H * W * A, values]`` float32, in the order of the anchors."""
    return level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, values).float()


class RegionProposalNetwork(nn.Module):
    """Proposes regions on the levels of a pyramid.

    Attributes:
        head: The shared convolution and its two outputs, torchvision's.
        anchors: The anchors of the levels.
        sampler: Draws the anchors that learn.
        nms_threshold: Largest overlap of proposals of a level.
        per_level: Best anchors of each level that are considered, in evaluation and in training.
        most: Most proposals of an image, in evaluation and in training.

    Args:
        channels: Channels of the pyramid.
        anchors: The anchors of the levels.
        most_in_training: Most proposals of an image in training.
        inside_only: Whether only anchors inside the image learn.
        beta: Where the loss of boxes turns from a parabola to a line; 0 is L1.
        samples: Anchors of an image that learn.
        rules: ``"mmdet"`` or ``"detectron2"``; see `BoxCoder`.
        convs: Convolutions of the head.
    """

    def __init__(
        self,
        channels: int,
        anchors: AnchorGrid,
        most_in_training: int = 1000,
        inside_only: bool = False,
        beta: float = 0.0,
        samples: int = 256,
        rules: str = "mmdet",
        convs: int = 1,
    ):
        super().__init__()
        self.head = RPNHead(channels, anchors.per_cell, conv_depth=convs)
        self.anchors = anchors
        self.coder = BoxCoder(shrinks_freely=rules == "detectron2")
        self.matcher = Matcher(0.7, 0.3, minimum=0.3)
        self.sampler = Sampler(samples, 0.5)
        self.nms_threshold = 0.7
        self.per_level = (1000, 2000)
        self.most = (1000, most_in_training)
        self.inside_only = inside_only
        self.beta = beta

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return, for every level, logits ``[B, A, H, W]`` and offsets ``[B, A * 4, H, W]``."""
        return self.head(list(pyramid))

    @torch.no_grad()
    def propose(
        self,
        logits: Sequence[Tensor],
        offsets: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        training: bool = False,
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the proposals ``[P, 4]`` of each image and their scores ``[P]``, best first.

        Args:
            logits: As `forward` returns them.
            offsets: As `forward` returns them.
            image_sizes: ``(height, width)`` of each image, without padding.
            training: Whether they are to learn from; then there are more.
        """
        per_level, most = self.per_level[training], self.most[training]
        anchors = self.anchors(logits)
        scores = [flatten_map(level.detach(), 1).squeeze(-1).sigmoid() for level in logits]
        offsets = [flatten_map(level.detach(), 4) for level in offsets]
        proposals = []
        for image, image_size in enumerate(image_sizes):
            boxes, best, groups = [], [], []
            for level, grid in enumerate(anchors):
                score = scores[level][image]
                if len(score) > per_level:
                    index = top_k(score, per_level)
                    score, grid, offset = score[index], grid[index], offsets[level][image, index]
                else:
                    offset = offsets[level][image]
                boxes.append(self.coder.decode(grid, offset, image_size))
                best.append(score)
                groups.append(torch.full_like(score, level))
            boxes, best, groups = torch.cat(boxes), torch.cat(best), torch.cat(groups)
            valid = has_area(boxes)
            boxes, best, groups = boxes[valid], best[valid], groups[valid]
            index = grouped_nms(boxes, best, groups, self.nms_threshold)[:most]
            proposals.append((boxes[index], best[index]))
        return proposals

    def find(
        self, logits: Sequence[Tensor], offsets: Sequence[Tensor], image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return what `propose` finds in images of one size: proposals ``[B, P, 4]`` and their scores, -1 for none."""
        scores = [flatten_map(level, 1).squeeze(-1).sigmoid() for level in logits]
        offsets = [flatten_map(level, 4) for level in offsets]
        limits = self.per_level[0], self.most[0], self.nms_threshold
        return fixed.propose(self.anchors(logits), scores, offsets, self.coder, image_size, *limits)

    def loss(
        self,
        logits: Sequence[Tensor],
        offsets: Sequence[Tensor],
        objects: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> dict[str, Tensor]:
        """Return ``loss_rpn_cls`` and ``loss_rpn_bbox``, each with the values ``[levels]`` that are to be added.

        Args:
            logits: As `forward` returns them.
            offsets: As `forward` returns them.
            objects: Boxes ``[M, 4]`` of each image's objects.
            image_sizes: ``(height, width)`` of each image, without padding.
        """
        grids = self.anchors(logits)
        anchors, count = torch.cat(grids), len(grids)
        levels = torch.cat([torch.full((len(grid),), level, device=grid.device) for level, grid in enumerate(grids)])
        logits = torch.cat([flatten_map(level, 1).squeeze(-1) for level in logits], dim=1)
        offsets = torch.cat([flatten_map(level, 4) for level in offsets], dim=1)
        cls, bbox, samples = logits.new_zeros(count), logits.new_zeros(count), 0
        for image, (boxes, image_size) in enumerate(zip(objects, image_sizes, strict=True)):
            inside = self._inside(anchors, image_size)
            matches = self.matcher(anchors[inside], boxes)
            positive, negative = self.sampler(matches)
            goals = boxes[matches[positive]]
            positive, negative = inside[positive], inside[negative]
            samples += max(len(positive), 1) + max(len(negative), 1)
            drawn = torch.cat([positive, negative])
            labels = torch.cat([torch.ones_like(positive), torch.zeros_like(negative)]).to(logits)
            loss = F.binary_cross_entropy_with_logits(logits[image, drawn], labels, reduction="none")
            cls = cls.index_add(0, levels[drawn], loss)
            loss = F.smooth_l1_loss(
                offsets[image, positive], self.coder.encode(anchors[positive], goals), beta=self.beta, reduction="none"
            )
            bbox = bbox.index_add(0, levels[positive], loss.sum(dim=1))
        return {"loss_rpn_cls": cls / (samples + EPS), "loss_rpn_bbox": bbox / (samples + EPS)}

    def _inside(self, anchors: Tensor, image_size: tuple[int, int]) -> Tensor:
        if not self.inside_only:
            return torch.arange(len(anchors), device=anchors.device)
        height, width = image_size
        inside = (anchors[:, :2] >= 0).all(dim=1) & (anchors[:, 2] < width) & (anchors[:, 3] < height)
        return inside.nonzero().squeeze(1)
