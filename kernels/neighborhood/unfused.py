"""Neighborhood attention in two halves, around a softmax that is the caller's: scores, and weighted sums of values.

NATTEN had these operators until 0.17. They hold all weights in memory, tokens times window, where `api.na2d` holds
none.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..backends import Backend, choose, export_obstacle, exporting, report, transform_obstacle
from ..lengths import is_open
from ..triton_launch import off_gpu
from . import native, triton_products
from .api import preferred
from .problem import AXIS_NAMES, check_rpb, make_axes
from .products import neighborhood_scores, neighborhood_values
from .reference import gather_windows, window_tables
from .window import Axis, axis_offsets, axis_windows, flatten_axes


class Problem(NamedTuple):
    """A checked call of an unfused operator: query and key, or weights and value."""

    first: Tensor
    second: Tensor
    axes: tuple[Axis, ...]


def _windows(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Return the rows of ``x`` by slot, ``[B, tokens, slots, heads, dim]``; zeros where a window has no key."""
    if not exporting() or any(axis.is_causal for axis in axes):
        return gather_windows(x.flatten(1, -3), axes)
    _refuse_open(axes)
    rank = len(axes)
    tables = [axis_windows(axis.length, axis.kernel_size, axis.dilation, axis.stride) for axis in axes]
    rows = _by_axes(x, 1, tables)
    return rows.flatten(1 + rank, 2 * rank).flatten(1, rank)


def _refuse_open(axes: tuple[Axis, ...]) -> None:
    """Refuse a graph of any size, whose tables would be those of one."""
    if is_open(*(axis.length for axis in axes)):
        raise ValueError(
            "the operators on weights of neighborhoods (na2d_qk, na2d_av, na2d_bias) gather by tables of one size"
        )


def _by_axes(x: Tensor, first: int, tables: Sequence[np.ndarray]) -> Tensor:
    """Gather along axes from the ``first`` on, each by a table ``[length, slots]``: ``[..., *lengths, *slots, ...]``.

    In a graph such tables grow with the sides of the map, where one of all its positions would have megabytes.
    """
    for index, table in enumerate(tables):
        places = torch.from_numpy(table).to(x.device)
        x = x.index_select(first + 2 * index, places.flatten()).unflatten(first + 2 * index, places.shape)
    moved = range(first, first + 2 * len(tables))
    return x.permute(*range(first), *moved[::2], *moved[1::2], *range(moved.stop, x.ndim))


def _scores_reference(problem: Problem) -> Tensor:
    query, key, axes = problem
    scores = torch.einsum("bnhd,bnkhd->bnhk", query.flatten(1, -3), _windows(key, axes))
    return scores.unflatten(1, query.shape[1:-2])


def _values_reference(problem: Problem) -> Tensor:
    weights, value, axes = problem
    out = torch.einsum("bnhk,bnkhd->bnhd", weights.flatten(1, -3), _windows(value, axes))
    return out.unflatten(1, weights.shape[1:-2])


def _pair(backend: str) -> tuple[Callable[[Problem], Tensor], ...]:
    def run(operator: Callable, problem: Problem) -> Tensor:
        first, second, axes = problem
        return operator(first, second, flatten_axes(axes), backend)

    return partial(run, neighborhood_scores), partial(run, neighborhood_values)


# In order of preference; each runs the scores and the values.
_BACKENDS: dict[str, Backend] = {
    "native": Backend(_pair("native"), lambda problem: native.tensor_obstacle(problem.second) or transform_obstacle()),
    "triton": Backend(
        _pair("triton"),
        lambda problem: triton_products.obstacle(problem.second) or transform_obstacle(),
        lambda problem: off_gpu(problem.second),
    ),
    "tiled": Backend(_pair("tiled"), lambda problem: transform_obstacle(), lambda problem: export_obstacle()),
    "reference": Backend((_scores_reference, _values_reference)),
}


def _missing(axes: tuple[Axis, ...], device: torch.device) -> Tensor | None:
    """Return which slots of each token's window hold no key, ``[*spatial, 1, slots]``, or None if all do."""
    if not any(axis.is_causal for axis in axes):
        return None
    tokens = torch.from_numpy(window_tables(axes)[0]).to(device)
    return (tokens < 0).unflatten(0, [axis.length for axis in axes]).unsqueeze(-2)


def _window_bias(rpb: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Return the bias of each token's window by slot, ``[*spatial, heads, slots]``."""
    if exporting():
        _refuse_open(axes)
        tables = [axis_offsets(axis)[:, None] + np.arange(axis.kernel_size) for axis in axes]
        return _by_axes(rpb, 1, tables).movedim(0, len(axes)).flatten(1 + len(axes))
    entries = torch.from_numpy(window_tables(axes)[1]).to(rpb.device)
    bias = rpb.flatten(1).index_select(1, entries.flatten()).view(-1, *entries.shape).transpose(0, 1)
    return bias.unflatten(0, [axis.length for axis in axes])


def _check(operator: str, rank: int, **tensors: Tensor) -> None:
    names = AXIS_NAMES[rank]
    layout = f"[B, {', '.join(name[0].upper() for name in names)}, heads, ...]"
    (first_name, first), (second_name, second) = tensors.items()
    for name, x in tensors.items():
        if x.ndim != rank + 3:
            raise ValueError(f"{operator} takes {name} as {layout}; got {x.ndim} axes: {list(x.shape)}")
        if not x.is_floating_point() or x.is_nested:
            raise ValueError(f"{operator} needs {name} as a dense floating-point tensor; got {x.dtype}")
    if first.shape[:-1] != second.shape[:-1] or first.device != second.device:
        raise ValueError(
            f"{operator} needs {first_name} and {second_name} of one {layout} and device; got {list(first.shape)} on "
            f"{first.device} and {list(second.shape)} on {second.device}"
        )


def _check_additional(operator: str, name: str, like: Tensor, x: Tensor) -> None:
    if x.ndim != 4 or x.shape[0] != like.shape[0] or x.shape[2:] != like.shape[-2:]:
        expected = f"[{like.shape[0]}, N, {like.shape[-2]}, {like.shape[-1]}]"
        raise ValueError(f"{operator} needs {name} as [B, N, heads, dim] = {expected}; got {list(x.shape)}")
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(
            f"{operator} needs {name} in {like.dtype} on {like.device}, as the map's own; got {x.dtype} on {x.device}"
        )


def _qk(
    rank: int,
    query: Tensor,
    key: Tensor,
    kernel_size: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    is_causal: bool | tuple[bool, ...],
    additional_keys: Tensor | None,
    rpb: Tensor | None,
    backend: str | None,
) -> Tensor:
    operator = f"na{rank}d_qk"
    _check(operator, rank, query=query, key=key)
    if query.shape != key.shape or query.dtype != key.dtype:
        raise ValueError(
            f"{operator} needs query and key of one shape and dtype; got {list(query.shape)} {query.dtype} and "
            f"{list(key.shape)} {key.dtype}"
        )
    axes = make_axes(operator, rank, query.shape[1:-2], kernel_size, 1, dilation, is_causal)
    if rpb is not None:
        check_rpb(operator, query, rpb, axes)
    problem = Problem(query, key, axes)
    name = choose(operator, _BACKENDS, problem, preferred(backend))
    # Kernels take nothing of length zero.
    scores = _BACKENDS["reference" if 0 in query.shape else name].run[0](problem)
    if rpb is not None:
        scores = (scores + _window_bias(rpb, axes)).to(scores.dtype)
    if (missing := _missing(axes, query.device)) is not None:
        scores = scores.masked_fill(missing, float("-inf"))
    if additional_keys is not None:
        _check_additional(operator, "additional_keys", query, additional_keys)
        more = torch.einsum("b...hd,bmhd->b...hm", query, additional_keys)
        scores = torch.cat([scores, more.to(scores.dtype)], -1)
    return scores


def _av(
    rank: int,
    weights: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    is_causal: bool | tuple[bool, ...],
    additional_values: Tensor | None,
    backend: str | None,
) -> Tensor:
    operator = f"na{rank}d_av"
    _check(operator, rank, attention=weights, value=value)
    axes = make_axes(operator, rank, value.shape[1:-2], kernel_size, 1, dilation, is_causal)
    slots = math.prod([axis.kernel_size for axis in axes])
    if additional_values is not None:
        _check_additional(operator, "additional_values", value, additional_values)
    more = 0 if additional_values is None else additional_values.shape[1]
    if weights.shape[-1] != slots + more:
        raise ValueError(
            f"{operator} needs a weight for each of the window's {slots} keys and {more} additional ones; "
            f"got {weights.shape[-1]}"
        )
    weights = weights.to(value.dtype)  # a softmax under autocast is in float32
    own = weights[..., :slots]
    if (missing := _missing(axes, value.device)) is not None:
        own = own.masked_fill(missing, 0)
    problem = Problem(own, value, axes)
    name = choose(operator, _BACKENDS, problem, preferred(backend))
    out = _BACKENDS["reference" if 0 in value.shape else name].run[1](problem)
    if more:
        out = out + torch.einsum("b...hm,bmhd->b...hd", weights[..., slots:], additional_values).to(out.dtype)
    return out


def unfused_neighborhood_backends(
    first: Tensor,
    second: Tensor,
    kernel_size: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    backend: str | None = None,
) -> dict[str, str]:
    """Say which backends can run a call of `na1d_qk` to `na3d_qk`, or of `na1d_av` to `na3d_av`, and why others cannot.

    Args:
        first: The query, or the weights; `na2d_qk` and `na2d_av` say more of all arguments.
        second: The key, or the value.
        kernel_size: Window length.
        dilation: Distance between neighbors.
        is_causal: Whether a query sees only its own position and the ones before it.
        backend: A request, as the operators take it.

    Returns:
        Every backend in order of preference, with ``"chosen"``, ``"can run"`` or the reason against it.

    Raises:
        ValueError: If the arguments don't fit, or a request cannot be obeyed.
    """
    rank = second.ndim - 3
    if rank not in AXIS_NAMES:
        raise ValueError(f"maps must have 4, 5 or 6 axes, [B, *spatial, heads, dim]; got {list(second.shape)}")
    operator = f"na{rank}d_qk and na{rank}d_av"
    axes = make_axes(operator, rank, second.shape[1:-2], kernel_size, 1, dilation, is_causal)
    _check(operator, rank, first=first, second=second)
    return report(operator, _BACKENDS, Problem(first, second, axes), preferred(backend))


def na1d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: int | tuple[int],
    dilation: int | tuple[int] = 1,
    is_causal: bool | tuple[bool] = False,
    additional_keys: Tensor | None = None,
    rpb: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Scores of the neighborhoods of lines: tensors are ``[B, L, heads, dim]``; everything else as in `na2d_qk`."""
    return _qk(1, query, key, kernel_size, dilation, is_causal, additional_keys, rpb, backend)


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    is_causal: bool | tuple[bool, bool] = False,
    additional_keys: Tensor | None = None,
    rpb: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Scores of each query over its neighborhood (NAT, arXiv 2204.07143), neither scaled nor normalized.

    Windows, ``dilation``, ``is_causal`` and ``rpb`` are those of `na2d`. The softmax of these scores, times ``dim **
    -0.5`` where there is no bias, is what `na2d` weights its values with. Gradients of any order.

    Args:
        query: ``[B, H, W, heads, dim]``.
        key: Same shape and dtype.
        kernel_size: Window length on each axis, at least 2; odd if there is a bias.
        dilation: Distance between neighbors; ``kernel_size * dilation`` must fit the axis.
        is_causal: Whether a query sees only its own position and the ones before it, for each axis.
        additional_keys: ``[B, N, heads, dim]``, whose scores follow those of the window.
        rpb: Relative position bias ``[heads, 2 * Kh - 1, 2 * Kw - 1]``, added to the scores.
        backend: A path by name, obeyed or refused with the reason: ``"native"`` (C, on CPUs), ``"triton"`` (on GPUs),
            ``"tiled"`` (plain torch) or ``"reference"``. By default the fastest that can run; exported graphs hold the
            last.

    Returns:
        ``[B, H, W, heads, Kh * Kw + N]`` in the dtype of ``query``: neighbors row-major, each axis ascending. The keys
        that a causal window lacks come last on their axis and have -inf.

    Raises:
        ValueError: If shapes, dtypes, devices or settings don't fit; the message names the axis and the numbers.

    Example:
        >>> q = k = v = torch.randn(1, 7, 9, 2, 16)
        >>> weights = na2d_qk(q / 4, k, 3).softmax(-1)
        >>> na2d_av(weights, v, 3).shape
        torch.Size([1, 7, 9, 2, 16])
    """
    return _qk(2, query, key, kernel_size, dilation, is_causal, additional_keys, rpb, backend)


def na2d_bias(rpb: Tensor, size: tuple[int, int], kernel_size: int | tuple[int, int]) -> Tensor:
    """Return the relative position bias that `na2d_qk` adds to its scores, for scores that come from elsewhere.

    Args:
        rpb: ``[heads, 2 * Kh - 1, 2 * Kw - 1]``; the entry in the middle is that of the query's own position.
        size: Height and width of the map.
        kernel_size: Window length on each axis; odd.

    Returns:
        ``[H, W, heads, Kh * Kw]``, in the order of `na2d_qk`.

    Raises:
        ValueError: If the table or the map doesn't fit the kernel.
    """
    axes = make_axes("na2d_bias", 2, size, kernel_size, 1, 1, False)
    expected = [2 * axis.kernel_size - 1 for axis in axes]
    if rpb.ndim != 3 or list(rpb.shape[1:]) != expected or any(axis.kernel_size % 2 == 0 for axis in axes):
        raise ValueError(
            f"na2d_bias needs odd kernels and a table of [heads, {expected[0]}, {expected[1]}]; got {list(rpb.shape)}"
        )
    return _window_bias(rpb, axes)


def na3d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: int | tuple[int, int, int],
    dilation: int | tuple[int, int, int] = 1,
    is_causal: bool | tuple[bool, bool, bool] = False,
    additional_keys: Tensor | None = None,
    rpb: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Scores of the neighborhoods of volumes: tensors are ``[B, D, H, W, heads, dim]``; else as in `na2d_qk`."""
    return _qk(3, query, key, kernel_size, dilation, is_causal, additional_keys, rpb, backend)


def na1d_av(
    attention: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int],
    dilation: int | tuple[int] = 1,
    is_causal: bool | tuple[bool] = False,
    additional_values: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Weighted sums of the neighborhoods of lines: ``[B, L, heads, dim]``; everything else as in `na2d_av`."""
    return _av(1, attention, value, kernel_size, dilation, is_causal, additional_values, backend)


def na2d_av(
    attention: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    is_causal: bool | tuple[bool, bool] = False,
    additional_values: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Sums of the values of each query's neighborhood by the weights of the caller, which need not add up to 1.

    Args:
        attention: ``[B, H, W, heads, Kh * Kw + N]``, in the order of `na2d_qk`; cast to the dtype of ``value``. What
            lies where a causal window has no key is ignored, NaN too.
        value: ``[B, H, W, heads, dim]``.
        kernel_size: As in `na2d_qk`, like dilation and is_causal.
        dilation: Distance between neighbors.
        is_causal: Whether a query sees only its own position and the ones before it, for each axis.
        additional_values: ``[B, N, heads, dim]``.
        backend: As in `na2d_qk`.

    Returns:
        ``[B, H, W, heads, dim]`` in the dtype of ``value``.

    Raises:
        ValueError: If shapes, dtypes, devices or settings don't fit; the message names the axis and the numbers.
    """
    return _av(2, attention, value, kernel_size, dilation, is_causal, additional_values, backend)


def na3d_av(
    attention: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int, int],
    dilation: int | tuple[int, int, int] = 1,
    is_causal: bool | tuple[bool, bool, bool] = False,
    additional_values: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Weighted sums of the neighborhoods of volumes: ``[B, D, H, W, heads, dim]``; everything else as in `na2d_av`."""
    return _av(3, attention, value, kernel_size, dilation, is_causal, additional_values, backend)
