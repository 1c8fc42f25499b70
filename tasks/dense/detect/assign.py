"""Which boxes learn which object: matching by overlap, and drawing a balanced sample of the matches."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .boxes import pairwise_iou

BACKGROUND = -1
IGNORED = -2

Sample = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Matcher:
    """Matches boxes to objects by intersection over union.

    Attributes:
        positive: A box matches the object it overlaps most if by at least this.
        negative: A box is background if it overlaps no object by this; between the two it is ignored.
        minimum: An object whose best overlap reaches this also takes the boxes that have it, whatever they overlap;
            of two objects the later one takes a box. None: no such rule.
    """

    positive: float
    negative: float
    minimum: float | None = None

    def __call__(self, boxes: Tensor, objects: Tensor) -> Tensor:
        """Return, for ``boxes`` ``[N, 4]``, the index of the matched one of ``objects`` ``[M, 4]``.

        It is `BACKGROUND` or `IGNORED` for the others.
        """
        if len(objects) == 0 or len(boxes) == 0:
            return torch.full((len(boxes),), BACKGROUND, device=boxes.device)
        overlaps = pairwise_iou(objects, boxes)
        best, matches = overlaps.max(dim=0)
        unmatched = torch.where(best < self.negative, BACKGROUND, IGNORED)
        matches = torch.where(best >= self.positive, matches, unmatched)
        if self.minimum is not None:
            of_object = overlaps.amax(dim=1, keepdim=True)
            taker, taken = ((overlaps == of_object) & (of_object >= self.minimum)).nonzero().unbind(1)
            last = torch.full_like(matches, -1).scatter_reduce(0, taken, taker, "amax")
            matches = torch.where(last >= 0, last, matches)
        return matches


def sample_randomly(gallery: Tensor, count: int) -> Tensor:
    """Return ``count`` of the indices ``gallery`` ``[N]``, at random."""
    return gallery[torch.randperm(len(gallery), device=gallery.device)[:count]]


def sample_evenly(gallery: Tensor, count: int) -> Tensor:
    """Return ``count`` of the indices ``gallery`` ``[N]``, evenly spaced: makes losses reproducible."""
    return gallery[torch.arange(count, device=gallery.device) * len(gallery) // count]


class Sampler:
    """Draws a sample of matches of limited size in which positives are limited too; background fills it up.

    Attributes:
        sample: ``sample(gallery, count)`` returns ``count`` of the ascending indices ``gallery``; it is called only
            where there are more than wanted. Replace it, for all samplers of a detector through ``detector.sample``, to
            make the choice deterministic: ``detector.sample = sample_evenly``.

    Args:
        count: Size of the sample.
        positive_fraction: Largest share of positives.
    """

    def __init__(self, count: int, positive_fraction: float, sample: Sample = sample_randomly):
        self.count = count
        self.positive_fraction = positive_fraction
        self.sample = sample

    def __call__(self, matches: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ascending indices of the positives and of the background sampled from ``matches`` ``[N]``."""
        positive = self._limit(matches >= 0, int(self.count * self.positive_fraction))
        return positive, self._limit(matches == BACKGROUND, self.count - len(positive))

    def _limit(self, mask: Tensor, count: int) -> Tensor:
        gallery = mask.nonzero().squeeze(1)
        return gallery if len(gallery) <= count else self.sample(gallery, count).sort().values
