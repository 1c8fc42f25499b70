"""Attention of a few tokens to a few, whole or in the windows of a map: softmax(scale * q k^T + bias) v."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import Backend, choose, default_scale, report
from .token_attention_native import obstacle, token_attention_native


class Problem(NamedTuple):
    """A checked call of `token_attention` or `window_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    scale: float | None


def _native(problem: Problem) -> Tensor:
    query, key, value, bias, scale = problem
    scale = default_scale(query) if scale is None else scale
    if query.ndim == 7:
        return token_attention_native(query, key, value, bias, scale)
    query, key, value = (x[:, None, None, :, None] for x in (query, key, value))
    return token_attention_native(query, key, value, bias, scale)[:, 0, 0, :, 0]


def _native_obstacle(problem: Problem) -> str | None:
    return obstacle(*problem[:4])


def _native_drawback(problem: Problem) -> str | None:
    return "autocast chooses the precision" if torch.is_autocast_enabled("cpu") else None


def _reference(problem: Problem) -> Tensor:
    query, key, value, bias, scale = problem
    if query.ndim == 4:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    shape = query.shape
    query, key, value = (x.flatten(4, 5).flatten(0, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return out.unflatten(2, shape[4:6]).unflatten(0, shape[:3])


# In order of preference.
_BACKENDS: dict[str, Backend] = {
    "native": Backend(_native, _native_obstacle, _native_drawback),
    "reference": Backend(_reference),
}


def token_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attend from tokens to tokens, as `F.scaled_dot_product_attention` does with a bias for its mask.

    Args:
        query: ``[B, heads, N, dim]``, any strides.
        key: ``[B, heads, M, dim]``.
        value: ``[B, heads, M, dim_v]``.
        bias: Added to the scores, ``[B, heads, N, M]``; an axis of 1 is for all.
        scale: Factor on the scores; ``dim ** -0.5`` by default.
        backend: ``"native"`` (CPU, in C, where it was compiled: float32, without gradients; a query is a lane of a
            vector) or ``"reference"`` (torch's own). By default native where it runs.

    Returns:
        ``[B, heads, N, dim_v]``, which lies in memory as ``[B, N, heads, dim_v]``.

    Raises:
        ValueError: If the shapes don't fit, or there is no such backend or it cannot run; the message says why.

    Example:
        >>> token_attention(torch.randn(1, 2, 9, 16), *torch.randn(2, 1, 2, 49, 16)).shape
        torch.Size([1, 2, 9, 16])
    """
    problem = _checked(Problem(query, key, value, bias, scale), 4)
    return _BACKENDS[choose("token_attention", _BACKENDS, problem, backend)].run(problem)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attend within each window of a map, which may lie in memory as a map does: nothing is cut.

    Args:
        query: ``[B, rows, columns, heads, height, width, dim]``: so many windows of that size; any strides.
        key: The same, of any size of windows.
        value: As ``key``, with ``dim_v`` channels.
        bias: Added to the scores of every window, ``[1, heads, height * width, keys]``; an axis of 1 is for all.
        scale: Factor on the scores; ``dim ** -0.5`` by default.
        backend: As for `token_attention`; the reference cuts the map.

    Returns:
        As ``query``, with ``dim_v`` channels.

    Raises:
        ValueError: As for `token_attention`.

    Example:
        >>> window_attention(*torch.randn(3, 1, 2, 3, 4, 7, 7, 16)).shape
        torch.Size([1, 2, 3, 4, 7, 7, 16])
    """
    problem = _checked(Problem(query, key, value, bias, scale), 7)
    return _BACKENDS[choose("window_attention", _BACKENDS, problem, backend)].run(problem)


def token_attention_backends(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> dict[str, str]:
    """Say which backends can run a call of `token_attention` or `window_attention`, whose arguments these are.

    Returns:
        Every backend in order of preference, with ``"chosen"``, ``"can run"`` or the reason against it.
    """
    problem = _checked(Problem(query, key, value, bias, scale), query.ndim)
    return report("token_attention", _BACKENDS, problem, backend)


def reads_in_place(x: Tensor, num_heads: int) -> bool:
    """Return whether `window_attention` reads maps like ``x`` ``[B, H, W, C]`` where they lie, and cuts none."""
    if torch.is_grad_enabled():
        return False
    problem = Problem(head := x[..., : x.shape[-1] // num_heads], head, head, None, None)
    return _native_obstacle(problem) is None and _native_drawback(problem) is None


def _checked(problem: Problem, axes: int) -> Problem:
    query, key, value, bias, _ = problem
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # sizes may be open
        return problem
    if (
        {query.ndim, key.ndim, value.ndim} != {axes}
        or query.shape[-1] != key.shape[-1]
        or key.shape[:-1] != value.shape[:-1]
        or query.shape[: -2 if axes == 4 else -3] != key.shape[: -2 if axes == 4 else -3]
    ):
        names = "[B, heads, N, dim]" if axes == 4 else "[B, rows, columns, heads, height, width, dim]"
        raise ValueError(
            f"attention takes query, key and value {names}, of which key and value have as many tokens; "
            f"got {list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    return problem if bias is None else _checked_bias(problem, axes)


def _checked_bias(problem: Problem, axes: int) -> Problem:
    query, key, _, bias, _ = problem
    tokens = slice(2, 3) if axes == 4 else slice(4, 6)
    full = (query.shape[0] if axes == 4 else 1, query.shape[1 if axes == 4 else 3])
    full = (*full, query.shape[tokens].numel(), key.shape[tokens].numel())
    if bias.ndim != 4 or any(size not in (1, most) for size, most in zip(bias.shape, full, strict=True)):
        raise ValueError(f"attention needs a bias {list(full)}, or 1 for an axis; got {list(bias.shape)}")
    return problem
