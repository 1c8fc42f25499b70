"""Token merging by bipartite matching (ToMe, arXiv 2210.09461; on maps as in arXiv 2303.17604)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["TokenMatching", "match_tokens"]


class TokenMatching(NamedTuple):
    """Which tokens of a map stay, and where each of the others may go, the most alike first.

    Attributes:
        stays: ``[D]``, the tokens that others are merged into, row by row.
        ranked: ``[B, N - D]``, the other tokens, from the one that is most like its destination to the least.
        target: ``[B, N - D]``, of each of them the place in ``stays`` of the token that it is most like.
    """

    stays: Tensor
    ranked: Tensor
    target: Tensor

    def merge(self, x: Tensor, count: int) -> Tensor:
        """Return ``[B, N - count, C]``: the rest of the ranked tokens of ``x`` ``[B, N, C]``, then the destinations.

        The first ``count`` ranked ones are averaged with their destinations, each token counting once.
        """
        channels = x.shape[2]
        index = self.ranked.unsqueeze(2).expand(-1, -1, channels)
        others = x.gather(1, index)
        into = self.target[:, :count].unsqueeze(2).expand(-1, -1, channels)
        destinations = x[:, self.stays].scatter_reduce(1, into, others[:, :count], "mean")
        return torch.cat([others[:, count:], destinations], 1)

    def unmerge(self, x: Tensor, count: int) -> Tensor:
        """Return ``[B, N, C]``: what became of each token in ``x`` ``[B, N - count, C]``, in `merge`'s order."""
        batch, _, channels = x.shape
        rest, destinations = x.split([self.ranked.shape[1] - count, len(self.stays)], 1)
        into = self.target[:, :count].unsqueeze(2).expand(-1, -1, channels)
        values = torch.cat([destinations.gather(1, into), rest, destinations], 1)
        places = torch.cat([self.ranked, self.stays.expand(batch, -1)], 1)
        return torch.zeros_like(values).scatter(1, places.unsqueeze(2).expand(-1, -1, channels), values)


def match_tokens(
    x: Tensor, map_size: Sequence[int], cell: tuple[int, int] = (2, 2), generator: torch.Generator | None = None
) -> TokenMatching:
    """Match the tokens of a map with a few of them, a token of each cell, by cosine similarity.

    Args:
        x: Tokens ``[B, H * W, C]``, row by row.
        map_size: H and W.
        cell: Height and width of the cells; what whole cells don't cover at the bottom and right has no destination.
        generator: Chooses a token of each cell at random, alike for all images; the upper left one without.

    Returns:
        The matching.

    Raises:
        ValueError: If the map has another number of tokens, or is smaller than a cell.

    Example:
        >>> matching = match_tokens(torch.randn(1, 48, 16), (6, 8))
        >>> matching.merge(torch.randn(1, 48, 16), 20).shape
        torch.Size([1, 28, 16])
    """
    height, width = map_size
    if x.shape[1] != height * width or height < cell[0] or width < cell[1]:
        raise ValueError(
            f"match_tokens needs the tokens of a map of {cell[0]}x{cell[1]} or more; got {x.shape[1]} tokens for "
            f"{height}x{width}"
        )
    cells = (height // cell[0], width // cell[1])
    row = torch.arange(cells[0], device=x.device).unsqueeze(1) * cell[0]
    column = torch.arange(cells[1], device=x.device) * cell[1]
    stays = row * width + column
    if generator is not None:
        inside = torch.randint(cell[0] * cell[1], cells, generator=generator, device=generator.device).to(x.device)
        stays = stays + inside // cell[1] * width + inside % cell[1]
    stays = stays.flatten()
    moves = torch.ones(height * width, dtype=torch.bool, device=x.device)
    moves[stays] = False
    others = moves.nonzero().squeeze(1)
    unit = F.normalize(x, dim=2)
    likeness, target = (unit[:, others] @ unit[:, stays].mT).max(2)
    order = likeness.argsort(dim=1, descending=True, stable=True)
    return TokenMatching(stays, others[order], target.gather(1, order))
