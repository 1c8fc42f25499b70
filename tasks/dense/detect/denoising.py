"""Contrastive denoising (DINO, arXiv 2203.03605, section 3.3): queries made of objects with noise, in training.

Written anew after mmdet 3.3 (Apache-2.0), in whose order it draws from torch's global generator.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.ops import box_convert

# The two eps of mmdet's inverse sigmoids: of boxes that are refined or noisy, and of those that the heads add to.
REFINED_EPS = 1e-3
HEAD_EPS = 1e-5

LABEL_NOISE = 0.25
BOX_NOISE = 1.0


def inverse_sigmoid(x: Tensor, eps: float) -> Tensor:
    """Return logits of ``x``, clamped to 0 to 1, with both sides of the ratio at least ``eps``."""
    x = x.clamp(min=0, max=1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


class NoisyQueries(NamedTuple):
    """Queries ``[B, D, ...]`` for the objects of a batch, in ``groups`` of ``2 * most`` places.

    Each group has a place for each object of the image that has the most, then as many for the negatives, whose noise
    is too large to find their objects again.
    """

    content: Tensor  # [B, D, dim]
    boxes: Tensor  # [B, D, 4], before the sigmoid
    groups: int
    most: int

    def blocked(self, queries: int) -> Tensor:
        """Return which ``[D + queries, D + queries]`` each query must not see: denoising ones of other groups."""
        count = self.boxes.shape[1]
        group = torch.full((count + queries,), -1, device=self.boxes.device)
        group[:count] = torch.arange(count, device=group.device) // max(2 * self.most, 1)
        return (group >= 0) & (group != group[:, None])


class Denoising(nn.Module):
    """Makes queries of objects: labels that may be wrong, embedded, and boxes that are off.

    Args:
        num_classes: Classes of objects.
        dim: Channels of queries.
        count: How many objects' queries there are at most, unless an image has more objects.
    """

    def __init__(self, num_classes: int, dim: int, count: int = 100):
        super().__init__()
        self.label_embedding = nn.Embedding(num_classes, dim)
        self.count = count

    def forward(self, labels: Sequence[Tensor], boxes: Sequence[Tensor]) -> NoisyQueries:
        """Draw noise for labels ``[N]`` and boxes ``[N, 4]``, xyxy of 0 to 1, of each image's objects."""
        device, counts = boxes[0].device, [len(image) for image in labels]
        most, total = max(counts), sum(counts)
        groups = max(1, self.count // most) if most else 1
        size = 2 * groups * most
        content, places = (
            boxes[0].new_zeros(len(counts), size, width) for width in (self.label_embedding.embedding_dim, 4)
        )
        if total:
            # Rows: group by group the positives of all objects, then the negatives.
            noisy_labels = self._noisy_labels(torch.cat(list(labels)).repeat(2 * groups))
            noisy_boxes = self._noisy_boxes(torch.cat(list(boxes)), groups)
            image = torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))
            number = torch.cat([torch.arange(count, device=device) for count in counts])
            place = (torch.arange(2 * groups, device=device)[:, None] * most + number).flatten()
            where = image.repeat(2 * groups), place
            embedded = self.label_embedding(noisy_labels)
            content = content.to(embedded.dtype).index_put(where, embedded)
            places = places.index_put(where, inverse_sigmoid(noisy_boxes, REFINED_EPS))
        elif dist.is_available() and dist.is_initialized():
            # Every process's parameters must have gradients where those of one have.
            content = content + 0.0 * self.label_embedding(torch.arange(1, device=device)).sum()
        return NoisyQueries(content, places, groups, most)

    def _noisy_labels(self, labels: Tensor) -> Tensor:
        index = (torch.rand(len(labels), device=labels.device) < LABEL_NOISE).nonzero().flatten()
        other = torch.randint(0, self.label_embedding.num_embeddings, (len(index),), device=labels.device)
        return labels.scatter(0, index, other.to(labels.dtype))

    @staticmethod
    def _noisy_boxes(boxes: Tensor, groups: int) -> Tensor:
        total = len(boxes)
        boxes = boxes.repeat(2 * groups, 1)
        sign = torch.randint(0, 2, boxes.shape, device=boxes.device) * 2.0 - 1.0
        part = torch.rand(boxes.shape, device=boxes.device)
        negative = torch.arange(len(boxes), device=boxes.device) // total % 2 == 1
        part = part + negative[:, None]
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        noisy = boxes + part * sign * sides * BOX_NOISE / 2
        # Edges may have changed sides: widths below zero are left so.
        return box_convert(noisy.clamp(0, 1), "xyxy", "cxcywh")
