"""Global context by matrix factorisation in place of attention (Hamburger, arXiv 2109.04553), as in SegNeXt's heads.

A map is a matrix of channels by positions. Some steps of multiplicative updates (Lee and Seung) factorise it into few
non-negative bases and their coefficients, whose product, of low rank, is the output. The steps are too few to converge:
results depend on their number and on the bases that they begin with.
"""

import torch
import torch.nn.functional as F
from timm.layers import GroupNormAct
from torch import Tensor, nn

from ..kernels.precision import full_precision

# In the denominators; without it, channels of zeros give NaN.
_EPS = 1e-6


def initial_bases(dim: int, rank: int, batch: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """Return uniform random bases ``[batch, dim, rank]`` whose columns have unit length, in float32 on the CPU.

    Args:
        dim: Channels.
        rank: Number of bases.
        batch: Images.
        generator: Which random numbers; torch's global generator by default.
    """
    uniform = torch.rand(batch, dim, rank, generator=generator, dtype=torch.float32, device="cpu")
    return F.normalize(uniform, dim=1)


def factorize(x: Tensor, bases: Tensor, steps: int, one_step_gradient: bool = False) -> Tensor:
    """Return the non-negative approximation of low rank that multiplicative updates find.

    Coefficients begin as the softmax over the bases of their products with the positions. A step updates coefficients,
    then bases; a last update of the coefficients follows.

    Args:
        x: Non-negative matrices ``[B, D, N]``.
        bases: Their first bases ``[B, D, R]`` or ``[1, D, R]``, non-negative.
        steps: Number of steps.
        one_step_gradient: Whether gradients flow through the last update alone, which takes less memory; as published,
            they flow through all steps.

    Returns:
        ``[B, D, N]``.

    Example:
        >>> factorize(torch.rand(2, 16, 35), initial_bases(16, 4), steps=7).shape
        torch.Size([2, 16, 35])
    """
    bases = bases.expand(x.shape[0], -1, -1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not one_step_gradient):
        coefficients = torch.bmm(x.transpose(1, 2), bases).softmax(-1)
        for _ in range(steps):
            coefficients = _update_coefficients(x, bases, coefficients)
            gram = torch.bmm(coefficients.transpose(1, 2), coefficients)
            bases = bases * (torch.bmm(x, coefficients) / (torch.bmm(bases, gram) + _EPS))
    return torch.bmm(bases, _update_coefficients(x, bases, coefficients).transpose(1, 2))


def _update_coefficients(x: Tensor, bases: Tensor, coefficients: Tensor) -> Tensor:
    gram = torch.bmm(bases.transpose(1, 2), bases)
    return coefficients * (torch.bmm(x.transpose(1, 2), bases) / (torch.bmm(coefficients, gram) + _EPS))


class Hamburger2d(nn.Module):
    """A projection and ReLU, the factorisation, a projection and group norm, added to the input; ReLU.

    The published code draws new bases in every call, so that its results wobble. Here one set, drawn from a seed of its
    own, serves every image: for a batch of one that is the published result after ``torch.manual_seed(seed)``, and it
    depends neither on the batch nor on the global generator. The set is part of the state dict, so that a file tells
    its rank and gives again what it gave. The factorisation is computed in float32 under autocast too.

    Args:
        dim: Channels, a multiple of 32, at least 64.
        rank: Number of bases. It is in none of the published files: SegNeXt's authors take 16 for T and S and 64 for B
            and L.
        seed: Of the bases.
        random_bases: Whether to draw new bases for each image while training, from the global generator, as published.
        steps: Number of the factorisation's steps in training and in evaluation.
        one_step_gradient: See `factorize`.
        inner_dim: Channels that are factorised; ``dim`` by default.

    Shape:
        NCHW maps ``[B, dim, H, W]`` to the same shape; any H and W.

    Raises:
        ValueError: If there are no such channels, or the rank is not positive.

    Example:
        >>> Hamburger2d(64, rank=16)(torch.randn(2, 64, 5, 7)).shape
        torch.Size([2, 64, 5, 7])
    """

    def __init__(
        self,
        dim: int,
        rank: int = 16,
        seed: int = 0,
        random_bases: bool = False,
        steps: tuple[int, int] = (6, 7),
        one_step_gradient: bool = False,
        inner_dim: int | None = None,
    ):
        super().__init__()
        inner_dim = dim if inner_dim is None else inner_dim
        if dim % 32 or dim < 64:
            raise ValueError(f"the norms have 32 groups of 2 channels or more: 64, 96, 128, ... channels; got {dim}")
        if rank < 1:
            raise ValueError(f"the factorisation needs a rank of at least 1; got {rank}")
        self.rank, self.seed, self.random_bases = rank, seed, random_bases
        self.steps, self.one_step_gradient = steps, one_step_gradient
        self.ham_in = nn.Conv2d(dim, inner_dim, 1)
        self.ham_out = nn.Conv2d(inner_dim, dim, 1, bias=False)
        self.norm = GroupNormAct(dim, 32, apply_act=False)
        self.register_buffer("bases", torch.empty(1, inner_dim, rank))
        self.reset_bases()

    def reset_bases(self) -> None:
        """Draw the bases from the seed; to be called after ``to_empty``."""
        drawn = initial_bases(*self.bases.shape[1:], generator=torch.Generator().manual_seed(self.seed))
        self.bases.copy_(drawn)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, seed={self.seed}, steps={self.steps}"

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, dim, H, W]`` to the same shape."""
        z = self.ham_in(x).relu()
        batch, dim, height, width = z.shape
        bases = initial_bases(dim, self.rank, batch) if self.random_bases and self.training else self.bases
        with full_precision(z):
            matrix = z.reshape(batch, dim, height * width).float()
            steps = self.steps[0] if self.training else self.steps[1]
            low_rank = factorize(matrix, bases.to(matrix), steps, self.one_step_gradient)
        z = low_rank.view(batch, dim, height, width).to(z.dtype)
        return (x + self.norm(self.ham_out(z))).relu()
