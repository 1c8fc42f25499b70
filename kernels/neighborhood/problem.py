"""A call of an operator: its arguments, checked, in the form that all backends take."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import default_scale
from .window import Axis

AXIS_NAMES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


class Problem(NamedTuple):
    """A checked call of `api.na1d`, `api.na2d` or `api.na3d`."""

    query: Tensor
    key: Tensor
    value: Tensor
    axes: tuple[Axis, ...]
    scale: float
    rpb: Tensor | None
    additional_keys: Tensor | None
    additional_values: Tensor | None
    with_lse: bool


def _per_axis(operator: str, name: str, value, names: Sequence[str], kind: type) -> tuple:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * len(names)
    if len(values) != len(names) or not all(type(v) is kind for v in values):
        noun = "a bool" if kind is bool else "an integer"
        raise ValueError(f"{operator} takes {name} as {noun}, or one for each of {', '.join(names)}; got {value!r}")
    return values


def make_axes(
    operator: str,
    rank: int,
    lengths: Sequence[int],
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    is_causal: bool | tuple[bool, ...],
) -> tuple[Axis, ...]:
    """Check how windows are laid on each axis.

    Raises:
        ValueError: If they don't fit; the message names the operator, the axis and the numbers.
    """
    names = AXIS_NAMES[rank]
    axes = []
    for name, length, kernel, step, distance, causal in zip(
        names,
        lengths,
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
        axes.append(Axis(length if isinstance(length, torch.SymInt) else int(length), kernel, step, distance, causal))
    return tuple(axes)


def make_problem(
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
    operator, names = f"na{rank}d", AXIS_NAMES[rank]
    _check_tensors(operator, names, *tensors)
    axes = make_axes(operator, rank, query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    if rpb is not None:
        check_rpb(operator, query, rpb, axes)
    scale = default_scale(query) if scale is None else scale
    return Problem(query, key, value, axes, scale, rpb, additional_keys, additional_values, with_lse)


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


def check_rpb(operator: str, query: Tensor, rpb: Tensor, axes: Sequence[Axis]) -> None:
    """Raise a ValueError if a relative position bias doesn't fit the windows or the query ``[..., heads, dim]``."""
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
