"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, eq. 3): weighted sums of points of maps."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .backends import Backend, choose, export_obstacle, exporting, graph, in_forward_mode, is_transforming, report
from .bilinear import neighbors
from .deformable_gathers import deformable_gathers
from .deformable_native import deformable_native, obstacle
from .second_order import gradients_by


class Problem(NamedTuple):
    """A checked call of `multi_scale_deformable_attention`, in float32 or float64."""

    value: Tensor
    shapes: Sequence[tuple[int, int]]
    locations: Tensor
    weights: Tensor


def multi_scale_deformable_attention(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Read maps of several scales at the points that each query names, and sum what is found there, weighted.

    Reading is bilinear between the centres of the pixels, and zero outside of the maps.

    Args:
        value: The maps' pixels ``[B, S, heads, dim]``, row by row and one map after the other.
        shapes: Height and width of each map; their areas add up to ``S``.
        locations: ``[B, Q, heads, maps, points, 2]``, (x, y); 0 is the left or upper edge of a map, 1 the other one.
        weights: ``[B, Q, heads, maps, points]``.
        backend: ``"native"`` (CPU, float32, in C, where it was compiled: reads the four pixels around every point in
            both passes and keeps nothing between), ``"bags"`` (CPU: the same as one pass over bags of an embedding),
            ``"reference"`` (`torch.nn.functional.grid_sample` of each map, the usual formulation) or
            ``"gathers"`` (four gathers from each map). By default the fastest on the device; graphs for export are
            built of the gathers, since not every runtime computes GridSample as torch does.

    Returns:
        ``[B, Q, heads * dim]`` in the dtype of ``value``. Gradients of any order flow to all three; those of the
        native path and of bags are the gathers' from the second order on.

    Raises:
        ValueError: If shapes don't fit, or if there is no such backend or it cannot run; the message says why.

    Example:
        >>> value = torch.randn(1, 5 * 7 + 3 * 4, 2, 16)
        >>> locations = torch.rand(1, 10, 2, 2, 4, 2)
        >>> weights = torch.full((1, 10, 2, 2, 4), 1 / 8)
        >>> multi_scale_deformable_attention(value, [(5, 7), (3, 4)], locations, weights).shape
        torch.Size([1, 10, 32])
    """
    problem = _problem(value, shapes, locations, weights)
    name = choose("multi_scale_deformable_attention", _BACKENDS, problem, backend)
    if 0 in value.shape or 0 in weights.shape:
        name = "gathers"  # of nothing the others can't make their bags and maps
    return _BACKENDS[name].run(problem).to(value.dtype)


def deformable_backends(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    backend: str | None = None,
) -> dict[str, str]:
    """Say which backends can run a call of `multi_scale_deformable_attention`, and why the others cannot.

    Returns:
        Every backend in order of preference, with ``"chosen"``, ``"can run"`` or the reason against it.
    """
    problem = _problem(value, shapes, locations, weights)
    return report("multi_scale_deformable_attention", _BACKENDS, problem, backend)


def _problem(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Problem:
    _check(value, shapes, locations, weights)
    # Half a pixel of a large map is below the resolution of the 16-bit types.
    precision = torch.float64 if value.dtype == torch.float64 else torch.float32
    return Problem(value.to(precision), shapes, locations.to(precision), weights.to(precision))


def _check(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> None:
    if value.ndim != 4 or locations.ndim != 6 or locations.shape[:-1] != weights.shape or locations.shape[-1] != 2:
        raise ValueError(
            "multi_scale_deformable_attention takes value [B, S, heads, dim], locations [B, Q, heads, maps, points, 2] "
            f"and weights of that shape but for the 2; got {list(value.shape)}, {list(locations.shape)}, "
            f"{list(weights.shape)}"
        )
    area = sum(height * width for height, width in shapes)
    if area != value.shape[1] or len(shapes) != locations.shape[3]:
        raise ValueError(
            f"maps of {[tuple(shape) for shape in shapes]} have {area} pixels; value has {value.shape[1]}, and "
            f"locations are on {locations.shape[3]} maps"
        )
    if value.shape[0] != locations.shape[0] or value.shape[2] != locations.shape[2]:
        raise ValueError(
            f"value has {value.shape[0]} images and {value.shape[2]} heads, but locations have {locations.shape[0]} "
            f"and {locations.shape[2]}"
        )


def _reference(problem: Problem) -> Tensor:
    """Sample each map with `torch.nn.functional.grid_sample`, then sum."""
    value, shapes, locations, weights = problem
    batch, _, heads, dim = value.shape
    queries = locations.shape[1]
    grids = (2.0 * locations - 1.0).transpose(1, 2).flatten(0, 1)
    samples = []
    for level, (pixels, (height, width)) in enumerate(
        zip(value.split([height * width for height, width in shapes], dim=1), shapes, strict=True)
    ):
        image = pixels.permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width)
        samples.append(F.grid_sample(image, grids[:, :, level], mode="bilinear", align_corners=False))
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    out = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)
    return out.view(batch, heads * dim, queries).transpose(1, 2)


class _Twice(Function):
    """The output of bags as it is, but where gradients are differentiated too, they are the gathers', which can be."""

    @staticmethod
    def forward(ctx, out: Tensor, shapes: Sequence[tuple[int, int]], *operands: Tensor) -> Tensor:
        ctx.shapes = shapes
        ctx.save_for_backward(*operands)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return grad, None, None, None, None

        def compute(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return deformable_gathers(value, ctx.shapes, locations, weights)

        return None, None, *gradients_by(compute, grad, ctx.saved_tensors, ctx.needs_input_grad[2:])


def _bags(problem: Problem) -> Tensor:
    """Sum the rows of the pixels around the points, which are each query's and head's bag of an embedding."""
    value, shapes, locations, weights = problem
    batch, pixels, heads, dim = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    integer = torch.int32 if value.numel() < 2**31 else torch.int64

    def of_points(numbers: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(numbers, dtype=dtype).repeat_interleave(points)

    heights, widths = (of_points(sides, locations.dtype) for sides in zip(*shapes, strict=True))
    starts = [0]
    for height, width in shapes[:-1]:
        starts.append(starts[-1] + height * width)

    # The maps' axis and the points' as one: longer rows.
    locations, weights = locations.flatten(3, 4), weights.flatten(3)
    left, right, left_weight, right_weight = neighbors(locations[..., 0] * widths - 0.5, widths)
    upper, lower, upper_weight, lower_weight = neighbors(locations[..., 1] * heights - 0.5, heights)
    upper_weight, lower_weight = upper_weight * weights, lower_weight * weights
    with torch.no_grad():
        first = torch.arange(0, batch * pixels * heads, pixels * heads, dtype=integer)[:, None, None, None]
        first = first + torch.arange(heads, dtype=integer)[:, None] + of_points(starts, integer) * heads
        corners = [(y, x) for y in (upper * widths, lower * widths) for x in (left, right)]
        rows = torch.stack([torch.add(first, (y + x).to(integer), alpha=heads) for y, x in corners], dim=-1)
    shares = torch.stack([y * x for y in (upper_weight, lower_weight) for x in (left_weight, right_weight)], dim=-1)
    out = F.embedding_bag(
        rows.flatten(0, 2).flatten(1),
        value.reshape(-1, dim),
        per_sample_weights=shares.flatten(0, 2).flatten(1),
        mode="sum",
    ).view(batch, queries, heads * dim)
    if torch.compiler.is_compiling() or is_transforming():
        return out
    return _Twice.apply(out, shapes, *problem[:1], *problem[2:])


def _bags_obstacle(problem: Problem) -> str | None:
    return None if problem.value.device.type == "cpu" else f"it is for CPU tensors; value is on {problem.value.device}"


def _drawback(problem: Problem) -> str | None:
    # Bags and samples have no derivatives that are carried along.
    return "dual numbers take torch's plain operators" if in_forward_mode() else export_obstacle()


def _reference_drawback(problem: Problem) -> str | None:
    if in_forward_mode():
        return _drawback(problem)
    return "runtimes differ on GridSample" if exporting() and not graph().grid_sample else None


# In order of preference.
_BACKENDS: dict[str, Backend] = {
    "native": Backend(lambda problem: deformable_native(*problem), lambda problem: obstacle(problem.value)),
    "bags": Backend(_bags, _bags_obstacle, _drawback),
    "reference": Backend(_reference, drawback=_reference_drawback),
    "gathers": Backend(lambda problem: deformable_gathers(*problem)),
}
