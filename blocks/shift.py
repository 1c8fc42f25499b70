"""Shifts of channels by one position in place of attention (ShiftViT, arXiv 2201.10801)."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from ..kernels.backends import is_exporting

# Along which axis each group of channels moves, height or width, and by how many positions towards the end.
_MOVES = ((1, -1), (1, 1), (0, -1), (0, 1))


class Shift2d(nn.Module):
    """Move four groups of channels by one position left, right, up and down; zeros move in, the rest stays.

    Without parameters. A map of one row or column is all zeros in the two groups that move along that axis.

    Args:
        dim: Channels.
        parts: A group has ``dim // parts`` channels; at least 4.
        channels_first: Whether maps are NCHW instead of NHWC.

    Shape:
        ``[B, H, W, dim]`` to ``[B, H, W, dim]``, or ``[B, dim, H, W]`` with ``channels_first``; any H and W.

    Raises:
        ValueError: If there are fewer than 4 parts.

    Example:
        >>> Shift2d(24)(torch.randn(1, 5, 7, 24)).shape
        torch.Size([1, 5, 7, 24])
    """

    def __init__(self, dim: int, parts: int = 12, channels_first: bool = False):
        super().__init__()
        if parts < 4:
            raise ValueError(f"Shift2d moves four groups of channels, so it needs at least 4 parts; got {parts}")
        self.group = dim // parts
        self.channels_first = channels_first

    @property
    def unrecorded(self) -> str:
        """Why it tells no weights."""
        return "it moves channels by one position, whatever they hold"

    def extra_repr(self) -> str:
        return f"{self.group} channels each way"

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and not torch.is_grad_enabled() and writes_shifts():
            return write_shifted(x, self.group, self.channels_first)
        return join_shifted(x, self.group, self.channels_first)


@torch.jit.ignore
def writes_shifts() -> bool:
    """Return whether a result may be written piece by piece: not in a graph, whose compiler does it better."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_exporting())


@register_notrace_function
@torch.jit.ignore
def write_shifted(x: Tensor, group: int, channels_first: bool) -> Tensor:
    """Return the shifted map, every number written once; without gradients."""
    out = torch.empty_like(x)
    channels, top = (1, 2) if channels_first else (3, 1)
    for index, (axis, step) in enumerate(_MOVES):
        target, source = (y.narrow(channels, index * group, group) for y in (out, x))
        length = x.shape[top + axis]
        moved = max(length - 1, 0)
        target.narrow(top + axis, max(step, 0), moved).copy_(source.narrow(top + axis, max(-step, 0), moved))
        target.select(top + axis, 0 if step > 0 else length - 1).zero_()
    rest = x.shape[channels] - 4 * group
    out.narrow(channels, 4 * group, rest).copy_(x.narrow(channels, 4 * group, rest))
    return out


def join_shifted(x: Tensor, group: int, channels_first: bool) -> Tensor:
    """Return the shifted map, joined from slices and zeros."""
    if channels_first:
        pieces = [
            F.pad(x[:, :group, :, 1:], [0, 1]),
            F.pad(x[:, group : 2 * group, :, :-1], [1, 0]),
            F.pad(x[:, 2 * group : 3 * group, 1:], [0, 0, 0, 1]),
            F.pad(x[:, 3 * group : 4 * group, :-1], [0, 0, 1, 0]),
            x[:, 4 * group :],
        ]
        return torch.cat(pieces, 1)
    pieces = [
        F.pad(x[:, :, 1:, :group], [0, 0, 0, 1]),
        F.pad(x[:, :, :-1, group : 2 * group], [0, 0, 1, 0]),
        F.pad(x[:, 1:, :, 2 * group : 3 * group], [0, 0, 0, 0, 0, 1]),
        F.pad(x[:, :-1, :, 3 * group : 4 * group], [0, 0, 0, 0, 1, 0]),
        x[:, :, :, 4 * group :],
    ]
    return torch.cat(pieces, 3)
