"""Reading maps between their pixels."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import Backend, choose, exporting, graph, in_forward_mode, is_transforming, report


class Problem(NamedTuple):
    """A call of `sample_bilinear`."""

    x: Tensor
    rows: Tensor
    columns: Tensor


def sample_bilinear(x: Tensor, rows: Tensor, columns: Tensor, backend: str | None = None) -> Tensor:
    """Read maps at points, bilinear between the pixels, which are zero outside.

    That is the sampling of deformable convolution (arXiv 1703.06211, eq. 3), in absolute positions, which `grid_sample`
    would have rounded once more. Points that are not finite give values that are not numbers, and read nothing else.

    Args:
        x: Maps ``[B, H, W, C]``.
        rows: Vertical positions ``[B, P]`` in pixels, 0 the centre of the first row, in float32 or float64.
        columns: Horizontal positions ``[B, P]``.
        backend: ``"gather"``, the reference, or ``"bags"`` (CPU, without gradients: one pass over the four pixels
            around every point). By default bags where they can run; graphs are built from the gather.

    Returns:
        ``[B, P, C]`` in the dtype of ``x``. Gradients flow to all three.

    Raises:
        ValueError: If there is no such backend or it cannot run; the message says why.

    Example:
        >>> x = torch.arange(6.0).view(1, 2, 3, 1)
        >>> sample_bilinear(x, torch.tensor([[0.5, 9.0]]), torch.tensor([[1.0, 0.0]])).flatten()
        tensor([2.5000, 0.0000])
    """
    problem = Problem(x, rows, columns)
    return _BACKENDS[choose("sample_bilinear", _BACKENDS, problem, backend)].run(problem)


def bilinear_backends(x: Tensor, rows: Tensor, columns: Tensor, backend: str | None = None) -> dict[str, str]:
    """Say which backends can run a call of `sample_bilinear`, and why the others cannot.

    Returns:
        Every backend in order of preference, with ``"chosen"``, ``"can run"`` or the reason against it.
    """
    return report("sample_bilinear", _BACKENDS, Problem(x, rows, columns), backend)


def neighbors(position: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the pixels before and after each point along an axis of ``size``, and the point's share in each.

    A pixel outside is replaced by the nearest one, with a share of zero.
    """
    before = position.detach().floor()
    after = before + 1
    # Points that are not numbers must name a pixel too; their shares are not numbers.
    zero, last = torch.zeros_like(size), size - 1
    first = torch.minimum(torch.maximum(torch.where(before == before, before, zero), zero), last)
    second = torch.minimum(torch.maximum(torch.where(after == after, after, zero), zero), last)
    offset = position - before
    return first, second, (1 - offset) * (first == before), offset * (second == after)


def gather_bilinear(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Do what `sample_bilinear` does, by four gathers; in exported graphs by one."""
    # TorchScript, which knows no graphs for other runtimes, leaves the other branch out.
    if torch.jit.is_scripting():
        return _gather_each(x, rows, columns)
    else:
        return _gather_corners(x, rows, columns) if exporting() else _gather_each(x, rows, columns)


def _gather_each(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    height, width, dim = x.shape[1], x.shape[2], x.shape[3]
    upper, lower, upper_share, lower_share = neighbors(rows, torch.full_like(rows[:1, :1], height))
    left, right, left_share, right_share = neighbors(columns, torch.full_like(columns[:1, :1], width))
    pixels = x.flatten(1, 2).to(rows.dtype)
    out = torch.zeros_like(pixels[:, :1])
    for row, row_share in ((upper, upper_share), (lower, lower_share)):
        for column, column_share in ((left, left_share), (right, right_share)):
            index = (row.long() * width + column.long()).unsqueeze(2).expand(-1, -1, dim)
            out = out + torch.gather(pixels, 1, index) * (row_share * column_share).unsqueeze(2)
    return out.to(x.dtype)


def _gather_corners(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Do what `sample_bilinear` does, in a third of the operators: writing a graph takes the square of their number."""
    batch, height, width = x.shape[:3]
    (row, row_share), (column, column_share) = _ends(rows, height), _ends(columns, width)
    pixel = row[:, None] * width + column + torch.arange(batch, device=x.device)[:, None] * (height * width)
    share = row_share[:, None] * column_share
    pixels = x.flatten(0, 2).to(rows.dtype)
    return (F.embedding(pixel, pixels) * share.unsqueeze(-1)).sum((0, 1)).to(x.dtype)


def _ends(position: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the pixels ``[2, B, P]`` before and after each point, as `neighbors` does, and its shares in them."""
    before = position.floor()
    ends = torch.stack([before, before + 1])
    # Of what is no number any integer may come, and is brought into the map.
    pixel = ends.long().clamp(0, length - 1)
    return pixel, (1 - (position - ends).abs()) * (pixel == ends)


def sample_aligned(x: Tensor, points: Tensor) -> Tensor:
    """Do what `torch.nn.functional.grid_sample` does with aligned corners; in exported graphs by gathers, unless asked.

    Not every runtime computes GridSample as torch does.

    Args:
        x: Maps ``[B, C, H, W]``.
        points: ``[B, h, w, 2]``, (x, y), from -1, the centre of the first column or row, to 1, that of the last.

    Returns:
        ``[B, C, h, w]``.
    """
    # As in `gather_bilinear`.
    if torch.jit.is_scripting():
        return F.grid_sample(x, points, mode="bilinear", align_corners=True)
    else:
        return _sample_aligned(x, points)


def _sample_aligned(x: Tensor, points: Tensor) -> Tensor:
    # GridSample has no derivatives that are carried along.
    if graph().grid_sample or not (exporting() or in_forward_mode()):
        return F.grid_sample(x, points, mode="bilinear", align_corners=True)
    (height, width), shape = x.shape[-2:], points.shape[1:3]
    columns, rows = points.flatten(1, 2).unbind(-1)
    values = gather_bilinear(x.permute(0, 2, 3, 1), (rows + 1) * ((height - 1) / 2), (columns + 1) * ((width - 1) / 2))
    return values.transpose(1, 2).unflatten(2, shape)


def _bags(problem: Problem) -> Tensor:
    """Sum the rows of the pixels around the points, which are each point's bag of an embedding."""
    x, rows, columns = problem
    batch, height, width, dim = x.shape
    upper, lower, *row_shares = neighbors(rows, torch.full_like(rows[:1, :1], height))
    left, right, *column_shares = neighbors(columns, torch.full_like(columns[:1, :1], width))
    first = torch.arange(0, batch * height * width, height * width)[:, None]
    starts = [first + row.long() * width for row in (upper, lower)]
    pixels = torch.stack([start + column.long() for start in starts for column in (left, right)], dim=-1)
    shares = torch.stack([row * column for row in row_shares for column in column_shares], dim=-1)
    out = F.embedding_bag(
        pixels.flatten(0, 1),
        x.reshape(-1, dim).to(rows.dtype),
        per_sample_weights=shares.flatten(0, 1),
        mode="sum",
    )
    return out.view(batch, rows.shape[1], dim).to(x.dtype)


def _bags_obstacle(problem: Problem) -> str | None:
    return None if problem.x.is_cpu else f"they are for CPU tensors; x is on {problem.x.device}"


def _bags_drawback(problem: Problem) -> str | None:
    if torch.is_grad_enabled():
        return "gradients of any order take the gather"
    if torch.compiler.is_compiling() or exporting() or is_transforming():
        return "graphs and transforms take torch's plain operators"
    return None


# In order of preference.
_BACKENDS: dict[str, Backend] = {
    "bags": Backend(_bags, _bags_obstacle, _bags_drawback),
    "gather": Backend(lambda problem: gather_bilinear(*problem)),
}
