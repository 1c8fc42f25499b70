"""The public operators: checks, and the one place where a path is chosen."""

import logging
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import flex, tiled, triton_ops
from .native import can_run, neighborhood_native
from .reference import neighborhood_reference
from .window import Axis

_logger = logging.getLogger(__name__)

_AXIS_NAMES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


class Problem(NamedTuple):
    """A checked call of an operator, as the backends take it. ``axes`` are plain tuples of `Axis`."""

    query: Tensor
    key: Tensor
    value: Tensor
    axes: tuple[tuple, ...]
    scale: float
    rpb: Tensor | None
    additional_keys: Tensor | None
    additional_values: Tensor | None
    with_lse: bool


class _Backend(NamedTuple):
    obstacle: Callable[[Problem], str | None]  # why it cannot run, or None
    run: Callable[..., tuple[Tensor, Tensor | None]]
    drawback: Callable[[Problem], str | None] = lambda problem: None  # why it is not chosen unless asked for, or None


def _off_gpu(problem: Problem) -> str | None:
    return None if problem.query.is_cuda else "off the GPU it is interpreted"


def _reference(*problem) -> tuple[Tensor, Tensor]:
    *arguments, _ = problem  # it always returns the log-sum-exp
    arguments[3] = tuple(Axis(*axis) for axis in arguments[3])
    return neighborhood_reference(*arguments)


# In order of preference; flex and the reference run on request only.
_BACKENDS: dict[str, _Backend] = {
    "native": _Backend(lambda problem: can_run(problem.query), neighborhood_native),
    "triton": _Backend(
        lambda problem: triton_ops.can_run(problem.query, problem.value), triton_ops.neighborhood_triton, _off_gpu
    ),
    "tiled": _Backend(lambda problem: None, tiled.neighborhood_tiled),
    "flex": _Backend(
        lambda problem: flex.can_run([x for x in problem if isinstance(x, Tensor)], problem.with_lse),
        flex.neighborhood_flex,
        lambda problem: "every shape is compiled, for some ten seconds, and on CPUs is slower than tiled then",
    ),
    "reference": _Backend(lambda problem: None, _reference),
}


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int],
    stride: int | tuple[int] = 1,
    dilation: int | tuple[int] = 1,
    is_causal: bool | tuple[bool] = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    rpb: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on lines: tensors are ``[B, L, heads, dim]``; everything else as in `na2d`."""
    return _neighborhood(
        1,
        (query, key, value, additional_keys, additional_values),
        backend,
        return_lse,
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        scale=scale,
        rpb=rpb,
    )


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    is_causal: bool | tuple[bool, bool] = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    rpb: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on maps: every query attends to its ``kernel_size`` neighborhood (NAT, arXiv 2204.07143).

    The window is centred on the query and shifts at the borders, so that every query has exactly
    ``kernel_size[0] * kernel_size[1]`` keys. The arguments are NATTEN's, in its order; ``rpb``, which NATTEN dropped,
    is the relative position bias of the published NAT and DiNAT models.

    Args:
        query: ``[B, H, W, heads, dim]``.
        key: ``[B, H, W, heads_kv, dim]``, where ``heads_kv`` divides ``heads``: consecutive query heads share one.
        value: ``[B, H, W, heads_kv, dim_v]``.
        kernel_size: Window length on each axis, at least 2; odd if there is a bias.
        stride: Consecutive queries that share the window of their middle one (GNA, arXiv 2504.16922), at most
            ``kernel_size``. With ``stride == kernel_size`` attention is blocked, as in Swin.
        dilation: Distance between neighbors (DiNAT, arXiv 2209.15001); ``kernel_size * dilation`` must fit the axis.
        is_causal: Whether a query sees only its own position and the ones before it, for each axis. Then windows hold
            fewer keys at the start.
        scale: Factor on the scores; ``dim ** -0.5`` by default.
        additional_keys: ``[B, N, heads_kv, dim]``, seen by every query besides its window, in the same softmax.
        additional_values: ``[B, N, heads_kv, dim_v]``.
        rpb: Relative position bias ``[heads, 2 * Kh - 1, 2 * Kw - 1]``, added to the scaled scores. Its middle entry
            belongs to the query's own position, the last ones to keys below and to the right. In float32 or in the
            dtype of ``query``; not defined with stride or on a causal axis.
        backend: A path by name, obeyed or refused with the reason: ``"native"`` (C, on CPUs), ``"triton"`` (on GPUs),
            ``"tiled"`` (plain torch), ``"flex"`` (torch's FlexAttention, compiled for every shape; on CPUs without
            gradients) or ``"reference"``. By default the fastest that can run; the last two run on request only.
        return_lse: Whether to return the log-sum-exp of the scores too.

    Returns:
        ``[B, H, W, heads, dim_v]``; with ``return_lse`` also ``[B, H, W, heads]``, natural logarithm, at least float32.

    Raises:
        ValueError: If shapes, dtypes, devices or settings don't fit; the message names the axis and the numbers.
    """
    return _neighborhood(
        2,
        (query, key, value, additional_keys, additional_values),
        backend,
        return_lse,
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        scale=scale,
        rpb=rpb,
    )


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int, int],
    stride: int | tuple[int, int, int] = 1,
    dilation: int | tuple[int, int, int] = 1,
    is_causal: bool | tuple[bool, bool, bool] = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    rpb: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on volumes: tensors are ``[B, D, H, W, heads, dim]``; everything else as in `na2d`."""
    return _neighborhood(
        3,
        (query, key, value, additional_keys, additional_values),
        backend,
        return_lse,
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        scale=scale,
        rpb=rpb,
    )


def clear_plans() -> None:
    """Forget how maps are cut by the tiled path, and the masks of the flex path."""
    tiled.clear_plans()
    flex.clear_masks()


_preferred: str | None = os.environ.get("FOVEATE_NEIGHBORHOOD_BACKEND") or None


def set_neighborhood_backend(name: str | None) -> None:
    """Choose the path of every later call that names none; None for the fastest that can run.

    The environment variable FOVEATE_NEIGHBORHOOD_BACKEND sets the same at import.

    Raises:
        ValueError: If there is no such backend.
    """
    global _preferred
    if name is not None:
        _check_backend("set_neighborhood_backend", name)
    _preferred = name


def neighborhood_backends(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, ...],
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
    **options,
) -> dict[str, str]:
    """Say which backends can run a call of `na1d`, `na2d` or `na3d`, and why the others cannot.

    The arguments are the operator's; the rank of ``query`` tells which operator it is.

    Returns:
        Every backend in order of preference, with ``"chosen"``, ``"can run"`` or the reason against it.
    """
    rank = query.ndim - 3
    if rank not in _AXIS_NAMES:
        raise ValueError(f"query must have 4, 5 or 6 axes, [B, *spatial, heads, dim]; got {list(query.shape)}")
    tensors = (query, key, value, additional_keys, additional_values)
    problem = _problem(rank, tensors, return_lse, kernel_size=kernel_size, **options)
    chosen = _choose(f"na{rank}d", problem, backend)
    return {name: backend.obstacle(problem) or "can run" for name, backend in _BACKENDS.items()} | {chosen: "chosen"}


def _neighborhood(
    rank: int, tensors: tuple[Tensor | None, ...], backend: str | None, return_lse: bool, **options
) -> Tensor | tuple[Tensor, Tensor]:
    problem = _problem(rank, tensors, return_lse, **options)
    name = _choose(f"na{rank}d", problem, backend)
    query, _, value = tensors[:3]
    if 0 in query.shape or 0 in value.shape:
        output = query.new_zeros(*query.shape[:-1], value.shape[-1])
        lse = query.new_zeros(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))
    else:
        output, lse = _BACKENDS[name].run(*problem)
    return (output, lse) if return_lse else output


def _choose(operator: str, problem: Problem, requested: str | None) -> str:
    """Return the requested backend if it can run, else the reason against it; without a request, the first that can."""
    requested = requested or _preferred
    if requested is not None:
        _check_backend(operator, requested)
        if reason := _BACKENDS[requested].obstacle(problem):
            raise ValueError(f"{operator}'s backend {requested!r} cannot run here: {reason}")
        return requested
    for name, backend in _BACKENDS.items():
        reason = backend.obstacle(problem) or backend.drawback(problem)
        if reason is None:
            return name
        if not torch.compiler.is_compiling():  # some versions of torch can't trace a logger
            _logger.debug("%s: not %s: %s", operator, name, reason)
    raise AssertionError("the reference runs everywhere")


def _check_backend(operator: str, name: str) -> None:
    if name not in _BACKENDS:
        raise ValueError(f"{operator} has no backend {name!r}; it has {', '.join(map(repr, _BACKENDS))}")


def _per_axis(operator: str, name: str, value, names: Sequence[str], kind: type) -> tuple:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * len(names)
    if len(values) != len(names) or not all(type(v) is kind for v in values):
        noun = "a bool" if kind is bool else "an integer"
        raise ValueError(f"{operator} takes {name} as {noun}, or one for each of {', '.join(names)}; got {value!r}")
    return values


def _problem(
    rank: int,
    tensors: tuple[Tensor | None, ...],
    with_lse: bool,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
) -> Problem:
    """Check the arguments of an operator and bring them into the backends' form."""
    query, key, value, additional_keys, additional_values = tensors
    operator, names = f"na{rank}d", _AXIS_NAMES[rank]
    _check_tensors(operator, names, *tensors)
    axes = []
    for name, length, kernel, step, distance, causal in zip(
        names,
        query.shape[1:-2],
        _per_axis(operator, "kernel_size", kernel_size, names, int),
        _per_axis(operator, "stride", stride, names, int),
        _per_axis(operator, "dilation", dilation, names, int),
        _per_axis(operator, "is_causal", is_causal, names, bool),
        strict=True,
    ):
        if kernel < 2:
            raise ValueError(f"{operator} needs a kernel_size of at least 2; got {kernel} on the {name}")
        if distance < 1:
            raise ValueError(f"{operator} needs a dilation of at least 1; got {distance} on the {name}")
        if not 1 <= step <= kernel:
            raise ValueError(
                f"{operator} needs a stride between 1 and the kernel_size {kernel}; got {step} on the {name}"
            )
        if kernel * distance > length:
            raise ValueError(
                f"{operator}'s neighborhood does not fit the {name}: kernel_size {kernel} x dilation {distance} = "
                f"{kernel * distance} > {length}; pad the input or lower one of them"
            )
        axes.append((int(length), kernel, step, distance, causal))
    if rpb is not None:
        _check_rpb(operator, query, rpb, [Axis(*axis) for axis in axes])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return Problem(query, key, value, tuple(axes), scale, rpb, additional_keys, additional_values, with_lse)


def _check_tensors(
    operator: str,
    names: Sequence[str],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
) -> None:
    layout = f"[B, {', '.join(name[0].upper() for name in names)}, heads, dim]"
    tensors = {"query": query, "key": key, "value": value}
    for name, x in tensors.items():
        if x.ndim != len(names) + 3:
            raise ValueError(f"{operator} takes {name} as {layout}; got {x.ndim} axes: {list(x.shape)}")
    if (additional_keys is None) != (additional_values is None):
        raise ValueError(f"{operator} takes additional_keys and additional_values together, or neither")
    if additional_keys is not None:
        tensors |= {"additional_keys": additional_keys, "additional_values": additional_values}
        expected = [[x.shape[0], additional_keys.shape[1], *x.shape[-2:]] for x in (key, value)]
        if [list(additional_keys.shape), list(additional_values.shape)] != expected:
            raise ValueError(
                f"{operator} needs additional_keys and additional_values as [B, N, heads_kv, dim] = {expected[0]} and "
                f"{expected[1]}; got {list(additional_keys.shape)} and {list(additional_values.shape)}"
            )
    for name, x in tensors.items():
        if x.dtype != query.dtype or not x.is_floating_point():
            raise ValueError(
                f"{operator} needs its tensors in one floating-point dtype; query is {query.dtype}, {name} {x.dtype}"
            )
        if x.device != query.device:
            raise ValueError(
                f"{operator} needs its tensors on one device; query is on {query.device}, {name} on {x.device}"
            )
    heads, heads_kv = query.shape[-2], key.shape[-2]
    if (
        key.shape[:-2] != query.shape[:-2]
        or key.shape[-1] != query.shape[-1]
        or value.shape[:-1] != key.shape[:-1]
        or (heads % heads_kv if heads_kv else heads)
    ):
        raise ValueError(
            f"{operator} needs query, key and value of one shape, except that value's dim may differ and key's heads "
            f"may divide query's; got {list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )


def _check_rpb(operator: str, query: Tensor, rpb: Tensor, axes: list[Axis]) -> None:
    kernel_size = tuple(axis.kernel_size for axis in axes)
    if any(kernel % 2 == 0 for kernel in kernel_size):
        raise ValueError(f"{operator} defines rpb for odd kernel sizes only; got kernel_size {kernel_size}")
    if any(axis.is_causal or axis.stride > 1 for axis in axes):
        raise ValueError(f"{operator} defines rpb neither with a stride nor on a causal axis")
    expected = [query.shape[-2], *(2 * kernel - 1 for kernel in kernel_size)]
    if list(rpb.shape) != expected:
        raise ValueError(
            f"{operator} needs rpb of shape [heads, 2 * kernel_size - 1 for each axis] = {expected} for kernel_size "
            f"{kernel_size}; got {list(rpb.shape)}"
        )
    if rpb.dtype not in (query.dtype, torch.float32) or rpb.device != query.device:
        raise ValueError(
            f"{operator} needs rpb in float32 or query's {query.dtype}, on query's {query.device}; "
            f"got {rpb.dtype} on {rpb.device}"
        )
