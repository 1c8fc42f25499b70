"""The public operator: its checks, and the table of its backends."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Backend, choose, default_scale, export_obstacle, report, transform_obstacle
from ..lengths import is_open
from ..triton_launch import off_gpu, triton_obstacle
from .native import obstacle as native_obstacle
from .operator import routed_attention_op
from .reference import routed_attention_reference

_MAX_TRITON_DIM = 128


class Problem(NamedTuple):
    """A checked call of `routed_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    routes: Tensor
    region_size: tuple[int, int]
    scale: float


def _operator(problem: Problem, backend: str, differentiable_twice: bool = False) -> Tensor:
    *tensors, region_size, scale = problem
    return routed_attention_op(*tensors, *region_size, scale, backend, differentiable_twice)[0]


def _triton_obstacle(problem: Problem) -> str | None:
    dim, dim_v = problem.query.shape[-1], problem.value.shape[-1]
    if dim != dim_v:
        return f"it needs value's dim to be query's; got {dim_v} and {dim}"
    return "it needs channels; got a dim of 0" if dim == 0 else triton_obstacle(problem.query, dim, _MAX_TRITON_DIM)


# In order of preference.
_BACKENDS: dict[str, Backend] = {
    "triton": Backend(partial(_operator, backend="triton"), _triton_obstacle, lambda problem: off_gpu(problem.query)),
    "native": Backend(
        partial(_operator, backend="native"), lambda problem: native_obstacle(problem.query, problem.value)
    ),
    "chunked": Backend(
        partial(_operator, backend="chunked"), lambda problem: transform_obstacle(), lambda problem: export_obstacle()
    ),
    "reference": Backend(lambda problem: routed_attention_reference(*problem)),
}


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    region_size: int | tuple[int, int],
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every region of a map to the regions that ``routes`` names (BiFormer, arXiv 2303.08810, eq. 6).

    The map is cut into regions of ``region_size``, numbered row-major. The queries of region ``r`` attend to all the
    tokens of the regions ``routes[:, r]``, whose order does not matter. Everything after ``region_size`` is
    keyword-only.

    Args:
        query: ``[B, H, W, heads, dim]``; ``H`` and ``W`` are multiples of the region's.
        key: Same shape and dtype as ``query``.
        value: ``[B, H, W, heads, dim_v]``, same dtype as ``query``.
        routes: Integers ``[B, regions, topk]``, each below ``regions``; one that is named twice counts twice.
        region_size: Height and width of a region, in tokens.
        scale: Factor on the scores; ``dim ** -0.5`` by default.
        backend: ``"triton"`` (GPU; reads the regions in place), ``"native"`` (CPU, in C, where it was compiled:
            likewise; half precision as copies in float32), ``"chunked"`` (plain torch, a few
            regions at a time) or ``"reference"`` (gathers all regions at once). By default the first that runs; graphs
            for export, and traced ones, are built from the reference, whose operators other runtimes know.

    Returns:
        ``[B, H, W, heads, dim_v]``. Gradients flow to query, key and value, of any order where no backend or the
        reference is asked for, else of the first.

    Raises:
        ValueError: If shapes, dtypes, devices or the region size don't fit, or if the backend cannot run; the message
            says why.

    Example:
        >>> q = k = v = torch.randn(1, 8, 12, 2, 16)
        >>> routes = torch.rand(1, 4, 4).topk(2).indices
        >>> routed_attention(q, k, v, routes, (4, 6)).shape
        torch.Size([1, 8, 12, 2, 16])
    """
    problem = _problem(query, key, value, routes, region_size, scale)
    name = choose("routed_attention", _BACKENDS, problem, backend)
    if name == "reference" or 0 in query.shape or 0 in value.shape:  # of nothing there is nothing to cut into chunks
        return _BACKENDS["reference"].run(problem)
    # Where nobody asked for the path, whose gradients have none, the reference takes the second derivatives.
    return _BACKENDS[name].run(problem, differentiable_twice=backend is None)


def routing_backends(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    region_size: int | tuple[int, int],
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> dict[str, str]:
    """Say which backends can run a call of `routed_attention`, whose arguments these are, and why the others cannot.

    Returns:
        Every backend in order of preference, with ``"chosen"``, ``"can run"`` or the reason against it.
    """
    return report("routed_attention", _BACKENDS, _problem(query, key, value, routes, region_size, scale), backend)


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    region_size: int | tuple[int, int],
    scale: float | None,
) -> Problem:
    # While a graph is traced, sizes are tensors.
    sizes = (region_size, region_size) if isinstance(region_size, int) else region_size
    region_size = tuple(int(size) if isinstance(size, Tensor) else size for size in sizes)
    _check(query, key, value, routes, region_size)
    return Problem(query, key, value, routes, region_size, default_scale(query) if scale is None else scale)


def _check(query: Tensor, key: Tensor, value: Tensor, routes: Tensor, region_size: tuple[int, ...]) -> None:
    if len(region_size) != 2 or not all(isinstance(length, (int, torch.SymInt)) for length in region_size):
        raise ValueError(f"routed_attention takes region_size as an integer or two; got {region_size!r}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 5:
            raise ValueError(
                f"routed_attention takes {name} as [B, H, W, heads, dim]; got {x.ndim} axes: {list(x.shape)}"
            )
        if x.dtype != query.dtype or not x.is_floating_point():
            raise ValueError(
                "routed_attention needs query, key and value in one floating-point dtype; "
                f"got {query.dtype}, {key.dtype} and {value.dtype}"
            )
    for name, x in (("key", key), ("value", value), ("routes", routes)):
        if x.device != query.device:
            raise ValueError(
                f"routed_attention needs its tensors on one device; query is on {query.device}, {name} on {x.device}"
            )
    if key.shape != query.shape or value.shape[:-1] != query.shape[:-1]:
        raise ValueError(
            "routed_attention needs query, key and value of one shape (value's dim may differ); "
            f"got {list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    if is_open(*query.shape, *region_size):
        return
    for axis, length, part in zip(("height", "width"), query.shape[1:3], region_size, strict=True):
        if part < 1 or length % part:
            raise ValueError(
                f"routed_attention needs the map's {axis} to be a multiple of the region's; got {length} and {part}; "
                "pad the map"
            )
    regions = (query.shape[1] // region_size[0]) * (query.shape[2] // region_size[1])
    if routes.ndim != 3 or tuple(routes.shape[:2]) != (query.shape[0], regions) or routes.shape[2] < 1:
        raise ValueError(
            f"routed_attention needs routes of shape [B, regions, topk] = [{query.shape[0]}, {regions}, 1 or more]; "
            f"got {list(routes.shape)}"
        )
    if routes.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"routed_attention needs routes in int32 or int64; got {routes.dtype}")
