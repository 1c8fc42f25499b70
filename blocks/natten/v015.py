"""NATTEN 0.15: new names, volumes, additional keys; in three dimensions the depth has settings of its own."""

from collections.abc import Callable

from torch import Tensor

from . import v014
from .heads_first import av, function_class, named, qk
from .modules import NeighborhoodModule


def _qk(rank: int) -> Callable:
    name = f"na{rank}d_qk"

    def na_qk(query: Tensor, key: Tensor, kernel_size: int, dilation: int, additional_keys=None) -> Tensor:
        return qk(name, query, key, kernel_size, dilation, additional_keys)

    return named(name, __name__, na_qk)


def _qk_with_bias(rank: int) -> Callable:
    name = f"na{rank}d_qk_with_bias"

    def na_qk_with_bias(
        query: Tensor, key: Tensor, bias: Tensor | None, kernel_size: int, dilation: int, additional_keys=None
    ) -> Tensor:
        return qk(name, query, key, kernel_size, dilation, additional_keys, rpb=bias)

    return named(name, __name__, na_qk_with_bias)


def _av(rank: int) -> Callable:
    name = f"na{rank}d_av"

    def na_av(attn: Tensor, value: Tensor, kernel_size: int, dilation: int, additional_values=None) -> Tensor:
        return av(name, attn, value, kernel_size, dilation, additional_values)

    return named(name, __name__, na_av)


na1d_qk, na2d_qk = _qk(1), _qk(2)
na1d_qk_with_bias, na2d_qk_with_bias = _qk_with_bias(1), _qk_with_bias(2)
na1d_av, na2d_av = _av(1), _av(2)


def na3d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    return na3d_qk_with_bias(query, key, None, kernel_size_d, kernel_size, dilation_d, dilation, additional_keys)


def na3d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    windows = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
    return qk("na3d_qk", query, key, *windows, additional_keys, rpb=bias)


def na3d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_values: Tensor | None = None,
) -> Tensor:
    windows = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
    return av("na3d_av", attn, value, *windows, additional_values)


def natten1dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    return na1d_qk_with_bias(query, key, rpb, kernel_size, dilation)


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    return na2d_qk_with_bias(query, key, rpb, kernel_size, dilation)


def natten3dqkrpb(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
) -> Tensor:
    return na3d_qk_with_bias(query, key, rpb, kernel_size_d, kernel_size, dilation_d, dilation)


natten1dqk, natten2dqk, natten3dqk = na1d_qk, na2d_qk, na3d_qk
natten1dav, natten2dav, natten3dav = na1d_av, na2d_av, na3d_av


def _qk_function(rank: int) -> type:
    operator = na3d_qk_with_bias if rank == 3 else (na1d_qk_with_bias, na2d_qk_with_bias)[rank - 1]

    def apply(query: Tensor, key: Tensor, bias: Tensor | None, additional_key: Tensor | None, *windows: int) -> Tensor:
        return operator(query, key, bias, *windows, additional_keys=additional_key)

    return function_class(f"NeighborhoodAttention{rank}DQKAutogradFunction", __name__, apply)


def _av_function(rank: int) -> type:
    operator = (na1d_av, na2d_av, na3d_av)[rank - 1]

    def apply(attn: Tensor, value: Tensor, additional_value: Tensor | None, *windows: int) -> Tensor:
        return operator(attn, value, *windows, additional_values=additional_value)

    return function_class(f"NeighborhoodAttention{rank}DAVAutogradFunction", __name__, apply)


NeighborhoodAttention1DQKAutogradFunction = _qk_function(1)
NeighborhoodAttention2DQKAutogradFunction = _qk_function(2)
NeighborhoodAttention3DQKAutogradFunction = _qk_function(3)
NeighborhoodAttention1DAVAutogradFunction = _av_function(1)
NeighborhoodAttention2DAVAutogradFunction = _av_function(2)
NeighborhoodAttention3DAVAutogradFunction = _av_function(3)

NeighborhoodAttention1D, NeighborhoodAttention2D = v014.NeighborhoodAttention1D, v014.NeighborhoodAttention2D


class NeighborhoodAttention3D(NeighborhoodModule):
    """Neighborhood attention on volumes ``[B, D, H, W, dim]``, as in 0.15; see `modules.NeighborhoodModule`.

    ``kernel_size_d`` and ``dilation_d`` are those of the depth, by default the other axes'. Volumes that are too short
    are padded on every axis, also on the depth, which NATTEN forgot.
    """

    rank = 3
    pads = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        kernel_size_d: int | None = None,
        dilation: int | None = 1,
        dilation_d: int | None = None,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        kernel_size_d = kernel_size if kernel_size_d is None else kernel_size_d
        dilation = dilation or 1
        dilation_d = dilation if dilation_d is None else dilation_d
        for kernel in (kernel_size_d, kernel_size):
            if kernel % 2 == 0 or kernel < 3:
                raise ValueError(f"NeighborhoodAttention3D needs odd kernel sizes greater than 1; got {kernel}")
        windows = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
        super().__init__(dim, num_heads, *windows, bias, qkv_bias, qk_scale, attn_drop, proj_drop)
        self.kernel_size, self.kernel_size_d = kernel_size, kernel_size_d
        self.dilation, self.dilation_d = dilation, dilation_d
        self.window_size, self.window_size_d = kernel_size * dilation, kernel_size_d * dilation_d
