"""The public operator: checks, and the one place where a path is chosen."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import na2d_reference
from .tiled import na2d_tiled

BACKENDS = {"reference": na2d_reference, "tiled": na2d_tiled}


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    *,
    dilation: int | tuple[int, int] = 1,
    scale: float | None = None,
    rpb: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Neighborhood attention on maps: every query attends to its ``kernel_size`` neighborhood (NAT, arXiv 2204.07143).

    The window is centred on the query and shifts at the borders, so that every query has exactly
    ``kernel_size[0] * kernel_size[1]`` keys. With dilation (DiNAT, arXiv 2209.15001) only every ``dilation``-th
    position is a neighbor. Everything after ``kernel_size`` is keyword-only.

    Args:
        query: ``[B, H, W, heads, dim]``.
        key: Same shape and dtype as ``query``.
        value: ``[B, H, W, heads, dim_v]``, same dtype as ``query``.
        kernel_size: Window height and width, each at least 2; odd if there is a bias.
        dilation: Distance between neighbors on each axis; ``kernel_size * dilation`` must fit into the map.
        scale: Factor on the scores; ``dim ** -0.5`` by default.
        rpb: Relative position bias ``[heads, 2 * Kh - 1, 2 * Kw - 1]``, added to the scaled scores. Its middle entry
            belongs to the query's own position, the last ones to keys below and to the right. In float32 or in the
            dtype of ``query``.
        backend: ``"tiled"`` or ``"reference"``; by default the fastest that runs.

    Returns:
        ``[B, H, W, heads, dim_v]``.

    Raises:
        ValueError: If shapes, dtypes, devices, kernel size, dilation or backend don't fit; the message says which.
    """
    kernel_size, dilation = _pair("kernel_size", kernel_size, 2), _pair("dilation", dilation, 1)
    _check(query, key, value, kernel_size, dilation, rpb)
    if backend is None:
        backend = "tiled"
    elif backend not in BACKENDS:
        raise ValueError(f"na2d has no backend {backend!r}; it has {', '.join(map(repr, BACKENDS))}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return BACKENDS[backend](query, key, value, kernel_size, dilation, scale, rpb)


def _pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) for v in pair):
        raise ValueError(f"na2d takes {name} as an integer or two, for height and width; got {value!r}")
    if min(pair) < least:
        raise ValueError(f"na2d needs a {name} of at least {least} on each axis; got {value!r}")
    return pair


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    rpb: Tensor | None,
) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 5:
            raise ValueError(f"na2d takes {name} as [B, H, W, heads, dim]; got {x.ndim} axes: {list(x.shape)}")
        if x.dtype != query.dtype or not x.is_floating_point():
            raise ValueError(
                "na2d needs query, key and value in one floating-point dtype; "
                f"got {query.dtype}, {key.dtype} and {value.dtype}"
            )
        if x.device != query.device:
            raise ValueError(f"na2d needs its tensors on one device; query is on {query.device}, {name} on {x.device}")
    if key.shape != query.shape or value.shape[:-1] != query.shape[:-1]:
        raise ValueError(
            "na2d needs query, key and value of one shape (value's dim may differ); "
            f"got {list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    for axis, length, kernel, step in zip(("height", "width"), query.shape[1:3], kernel_size, dilation, strict=True):
        if kernel * step > length:
            raise ValueError(
                f"na2d's neighborhood does not fit the map's {axis}: kernel_size {kernel} x dilation {step} = "
                f"{kernel * step} > {length}; pad the map or lower one of them"
            )
    if rpb is None:
        return
    if kernel_size[0] % 2 == 0 or kernel_size[1] % 2 == 0:
        raise ValueError(f"na2d defines rpb for odd kernel sizes only; got kernel_size {kernel_size}")
    expected = [query.shape[3], 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1]
    if list(rpb.shape) != expected:
        raise ValueError(
            f"na2d needs rpb of shape [heads, 2 * Kh - 1, 2 * Kw - 1] = {expected} for kernel_size {kernel_size}; "
            f"got {list(rpb.shape)}"
        )
    if rpb.dtype not in (query.dtype, torch.float32) or rpb.device != query.device:
        raise ValueError(
            f"na2d needs rpb in float32 or query's {query.dtype}, on query's {query.device}; "
            f"got {rpb.dtype} on {rpb.device}"
        )
