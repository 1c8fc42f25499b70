"""What callers take from ``natten.types``, ``natten.utils`` and ``natten.flops``."""

import logging
import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from .v017 import bool_or_each

NoneType = type(None)
Dimension1DType, Dimension2DType, Dimension3DType = tuple[int], tuple[int, int], tuple[int, int, int]
CausalArg1DType, CausalArg2DType, CausalArg3DType = tuple[bool], tuple[bool, bool], tuple[bool, bool, bool]
DimensionType = Dimension1DType | Dimension2DType | Dimension3DType
CausalArgType = CausalArg1DType | CausalArg2DType | CausalArg3DType


def create_dim_from_int(na_dim: int, value: int) -> tuple[int, ...]:
    return (value,) * na_dim


def create_causal_arg_from_bool(na_dim: int, value: bool) -> tuple[bool, ...]:
    return (value,) * na_dim


TYPES = {
    "NoneType": NoneType,
    "DimensionType": DimensionType,
    "CausalArgType": CausalArgType,
    **{f"Dimension{i}DType": each for i, each in enumerate((Dimension1DType, Dimension2DType, Dimension3DType), 1)},
    **{f"CausalArg{i}DType": each for i, each in enumerate((CausalArg1DType, CausalArg2DType, CausalArg3DType), 1)},
    "Dimension1DTypeOrDed": int | Dimension1DType,
    "Dimension2DTypeOrDed": int | Dimension2DType,
    "Dimension3DTypeOrDed": int | Dimension3DType,
    "CausalArg1DTypeOrDed": bool | CausalArg1DType,
    "CausalArg2DTypeOrDed": bool | CausalArg2DType,
    "CausalArg3DTypeOrDed": bool | CausalArg3DType,
    "create_dim_from_int": create_dim_from_int,
    "create_causal_arg_from_bool": create_causal_arg_from_bool,
}
OLD_TYPES = {
    "ListOrNestedTensor": Sequence[Tensor] | Tensor,
    "FnaTileShapeType": tuple[DimensionType, DimensionType],
    "FnaForwardConfigType": tuple[DimensionType, DimensionType],
    "FnaBackwardConfigType": tuple[DimensionType, DimensionType, DimensionType, bool],
}
NEW_TYPES = {
    "DimensionTypeOrDed": int | DimensionType,
    "CausalArgTypeOrDed": bool | CausalArgType,
    "QKTileShapeType": tuple[DimensionType, DimensionType],
}


def _each(na_dim: int, name: str, value, kind: type) -> tuple:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * na_dim
    if len(values) != na_dim or not all(type(each) is kind for each in values):
        raise ValueError(f"{name} must be of {kind.__name__}, or {na_dim} of them; got {value!r}")
    return values


def check_kernel_size_arg(na_dim: int, kernel_size: int | Sequence[int]) -> tuple[int, ...]:
    """Return one kernel size for each axis.

    Raises:
        ValueError: If it is of another type or length, or below 2.
    """
    sizes = _each(na_dim, "kernel_size", kernel_size, int)
    if min(sizes) < 2:
        raise ValueError(f"kernel_size must be at least 2; got {kernel_size}")
    return sizes


def check_dilation_arg(na_dim: int, dilation: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return one dilation for each axis.

    Raises:
        ValueError: If it is of another type or length, or below 1.
    """
    dilations = _each(na_dim, "dilation", 1 if dilation is None else dilation, int)
    if min(dilations) < 1:
        raise ValueError(f"dilation must be at least 1; got {dilation}")
    return dilations


def check_causal_arg(na_dim: int, is_causal: bool | Sequence[bool] | None) -> tuple[bool, ...]:
    """Return for each axis whether it is causal.

    Raises:
        ValueError: If it is of another type or length.
    """
    return _each(na_dim, "is_causal", bool_or_each(is_causal), bool)


def check_input_size_arg(na_dim: int, input_size: int | Sequence[int]) -> tuple[int, ...]:
    """Return one length for each axis.

    Raises:
        ValueError: If it is of another type or length.
    """
    return _each(na_dim, "input_size", input_size, int)


def check_all_args(na_dim: int, kernel_size, dilation, is_causal) -> tuple[tuple, tuple, tuple]:
    """Return kernel size, dilation and causality, each with a value for every axis."""
    return (
        check_kernel_size_arg(na_dim, kernel_size),
        check_dilation_arg(na_dim, dilation),
        check_causal_arg(na_dim, is_causal),
    )


def check_all_args_with_stride(na_dim: int, kernel_size, stride, dilation, is_causal) -> tuple[tuple, ...]:
    """Return what `check_all_args` does, and the stride after the kernel size, as from 0.20 on."""
    sizes, *others = check_all_args(na_dim, kernel_size, dilation, is_causal)
    return sizes, _each(na_dim, "stride", 1 if stride is None else stride, int), *others


def get_num_na_weights(kernel_size: tuple[int, ...]) -> int:
    """Return the number of keys in a window.

    Raises:
        ValueError: If ``kernel_size`` is no tuple.
    """
    if not isinstance(kernel_size, tuple):
        raise ValueError(f"get_num_na_weights takes a tuple; got {kernel_size!r}")
    return math.prod(kernel_size)


def check_additional_keys(input: Tensor, additional_keys: Tensor | None) -> int:
    """Return how many additional keys there are.

    Raises:
        ValueError: If they are not ``[B, heads, N, dim]`` as ``input`` ``[B, heads, *spatial, dim]`` has it.
    """
    if additional_keys is None:
        return 0
    if (
        additional_keys.ndim != 4
        or additional_keys.shape[:2] != input.shape[:2]
        or additional_keys.shape[-1] != input.shape[-1]
    ):
        raise ValueError(
            f"additional_keys must be [B, heads, N, dim]; got {list(additional_keys.shape)} for {list(input.shape)}"
        )
    return additional_keys.shape[2]


def check_additional_values(
    attn: Tensor, additional_values: Tensor | None, value: Tensor, expected_kernel_elements: int
) -> int:
    """Return how many additional values there are.

    Raises:
        ValueError: If they don't fit ``value``, or ``attn`` lacks weights for them.
    """
    count = check_additional_keys(value, additional_values)
    if attn.shape[-1] != expected_kernel_elements + count:
        raise ValueError(f"attn must have {expected_kernel_elements} + {count} weights a query; got {attn.shape[-1]}")
    return count


def make_attn_tensor_from_input(input: Tensor, last_dim: int) -> Tensor:
    return input.new_empty(*input.shape[:-1], last_dim)


UTILS = {
    each.__name__: each
    for each in (
        check_additional_keys,
        check_additional_values,
        check_causal_arg,
        check_dilation_arg,
        check_input_size_arg,
        check_kernel_size_arg,
        get_num_na_weights,
        make_attn_tensor_from_input,
    )
}


def get_logger(name: str) -> logging.Logger:
    return logging.getLogger(name)


def add_natten_handle(flop_ctr: object) -> object:
    """Return fvcore's counter as it is: it counts the matrix products that our operators consist of where it traces."""
    return flop_ctr


def get_flops(model: nn.Module, input: Tensor, disable_warnings: bool = False) -> float:
    """Return the multiply-adds of a model, counted by fvcore, which must be installed."""
    from fvcore.nn import FlopCountAnalysis

    counter = FlopCountAnalysis(model, input)
    if disable_warnings:
        counter = counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return counter.total()


def _sizes(values: Sequence) -> list[list[int]]:
    return [list(each.type().sizes()) for each in values]


def _qk_count(inputs: Sequence, outputs: Sequence) -> int:
    """Return the multiply-adds of scores and bias, from fvcore's values: query, ... and scores."""
    query, scores = _sizes(inputs)[0], _sizes(outputs)[0]
    return math.prod(scores) * (query[-1] + 1)


def _av_count(inputs: Sequence, outputs: Sequence) -> int:
    """Return the multiply-adds of the sums of values, from fvcore's values: weights, ... and the result."""
    weights, out = _sizes(inputs)[0], _sizes(outputs)[0]
    return math.prod(out) * weights[-1]


def counts(*names: str) -> dict[str, Callable]:
    """Return handles of fvcore's by name, of scores or of values."""
    return {name: _qk_count if name.startswith("qk") else _av_count for name in names}


def na_qk_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int] | None = None,
    is_causal: Sequence[bool] | None = None,
    is_heads_last: bool = False,
    return_macs: bool = False,
) -> int:
    """Return the operations of the scores of a map of ``q_shape``, twice the multiply-adds; what is causal counts."""
    return math.prod(q_shape) * math.prod(kernel_size) * (1 if return_macs else 2)


def na_av_flop_count(
    a_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int] | None = None,
    is_causal: Sequence[bool] | None = None,
    is_heads_last: bool = False,
    return_macs: bool = False,
) -> int:
    """Return the operations of the sums of values of a map of ``v_shape``; see `na_qk_flop_count`."""
    return na_qk_flop_count(v_shape, v_shape, kernel_size, return_macs=return_macs)


def fna_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int] | None = None,
    is_causal: Sequence[bool] | None = None,
    is_heads_last: bool = True,
    return_macs: bool = False,
) -> int:
    """Return the operations of a fused call: scores and sums; see `na_qk_flop_count`."""
    return na_qk_flop_count(q_shape, k_shape, kernel_size, return_macs=return_macs) + na_qk_flop_count(
        v_shape, v_shape, kernel_size, return_macs=return_macs
    )
