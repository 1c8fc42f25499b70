"""NATTEN's unfused operators in NATTEN's layout, for every rank; each release line names and orders them its own way.

Maps are ``[B, heads, *spatial, dim]``, weights ``[B, heads, *spatial, window + additional]``. Results are contiguous,
as NATTEN's are: callers ``view`` them.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from ...kernels import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk

_QK = {1: na1d_qk, 2: na2d_qk, 3: na3d_qk}
_AV = {1: na1d_av, 2: na2d_av, 3: na3d_av}
_AXES = {1: "L", 2: "H, W", 3: "D, H, W"}

PerAxis = int | Sequence[int]


def named(name: str, module: str, function: Callable) -> Callable:
    """Return a function under a name of NATTEN's, by which it is pickled too."""
    function.__name__ = function.__qualname__ = name
    function.__module__ = module
    return function


def function_class(name: str, module: str, function: Callable) -> type:
    """Return a class whose ``apply`` is an operator, in place of NATTEN's classes of autograd functions."""
    members = {"apply": staticmethod(function), "__module__": module, "__doc__": f"`apply` is `{function.__name__}`."}
    return type(name, (), members)


def _check(operator: str, rank: int, first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    for name, x in ((first_name, first), (second_name, second)):
        if x.is_nested:
            raise ValueError(f"{operator} takes no nested tensors; call it for each of {name}'s")
        if x.ndim != rank + 3:
            raise ValueError(
                f"{operator} takes {name} with its heads first, [B, heads, {_AXES[rank]}, ...]; got {x.ndim} axes: "
                f"{list(x.shape)}"
            )
    if first.shape[:-1] != second.shape[:-1]:
        raise ValueError(
            f"{operator} needs {first_name} and {second_name} of one [B, heads, {_AXES[rank]}]; got "
            f"{list(first.shape[:-1])} and {list(second.shape[:-1])}"
        )


def _additional(operator: str, name: str, like: Tensor, x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    if x.is_nested or x.ndim != 4 or x.shape[:2] != like.shape[:2] or x.shape[-1] != like.shape[-1]:
        expected = f"[{like.shape[0]}, {like.shape[1]}, N, {like.shape[-1]}]"
        raise ValueError(f"{operator} needs {name} as [B, heads, N, dim] = {expected}; got {list(x.shape)}")
    return x.transpose(1, 2)


def _settings(kernel_size: PerAxis, dilation: PerAxis | None, is_causal: bool | Sequence[bool] | None) -> tuple:
    return kernel_size, 1 if dilation is None else dilation, False if is_causal is None else is_causal


def qk(
    operator: str,
    query: Tensor,
    key: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: bool | Sequence[bool] | None = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """Return the scores ``[B, heads, *spatial, window + additional]`` of queries over their windows, not scaled.

    Args:
        operator: The name that the caller knows it by; its digit is the rank.
        query: ``[B, heads, *spatial, dim]``.
        key: Same shape.
        kernel_size: Length of the window, or one for each axis.
        dilation: Distance between neighbors; None for 1.
        additional_keys: ``[B, heads, N, dim]``.
        is_causal: Whether windows end with the query; None for False.
        rpb: Relative position bias ``[heads, 2 * kernel_size - 1, ...]``, cast to the dtype of ``key``.

    Raises:
        ValueError: If shapes or settings don't fit.
    """
    rank = _rank(operator)
    _check(operator, rank, "query", query, "key", key)
    additional_keys = _additional(operator, "additional_keys", query, additional_keys)
    scores = _QK[rank](
        query.contiguous().movedim(1, -2),
        key.movedim(1, -2),
        *_settings(kernel_size, dilation, is_causal),
        additional_keys,
        None if rpb is None else rpb.to(key.dtype),
    )
    return scores.movedim(-2, 1).contiguous()


def av(
    operator: str,
    attn: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None = 1,
    additional_values: Tensor | None = None,
    is_causal: bool | Sequence[bool] | None = False,
) -> Tensor:
    """Return the sums ``[B, heads, *spatial, dim]`` of the values of windows by weights as `qk` orders its scores.

    Raises:
        ValueError: If shapes or settings don't fit; ``attn`` must have a weight for each key.
    """
    rank = _rank(operator)
    _check(operator, rank, "attn", attn, "value", value)
    additional_values = _additional(operator, "additional_values", value, additional_values)
    out = _AV[rank](
        attn.movedim(1, -2),
        value.contiguous().movedim(1, -2),
        *_settings(kernel_size, dilation, is_causal),
        additional_values,
    )
    return out.movedim(-2, 1).contiguous()


def _rank(operator: str) -> int:
    return next(int(letter) for letter in operator if letter.isdigit())
