"""NATTEN 0.17: settings for each axis, causal axes, and the fused operators, whose heads come last."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ... import kernels
from .heads_first import PerAxis, av, function_class, named, qk
from .modules import NeighborhoodModule

Causal = bool | Sequence[bool] | None


def _qk(rank: int) -> Callable:
    name = f"na{rank}d_qk"

    def na_qk(
        query: Tensor,
        key: Tensor,
        kernel_size: PerAxis,
        dilation: PerAxis | None = 1,
        additional_keys: Tensor | None = None,
        is_causal: Causal = False,
        rpb: Tensor | None = None,
    ) -> Tensor:
        return qk(name, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)

    return named(name, __name__, na_qk)


def _av(rank: int) -> Callable:
    name = f"na{rank}d_av"

    def na_av(
        attn: Tensor,
        value: Tensor,
        kernel_size: PerAxis,
        dilation: PerAxis | None = 1,
        additional_values: Tensor | None = None,
        is_causal: Causal = False,
    ) -> Tensor:
        return av(name, attn, value, kernel_size, dilation, additional_values, is_causal)

    return named(name, __name__, na_av)


def _fused(rank: int) -> Callable:
    operator = getattr(kernels, f"na{rank}d")

    def na(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: PerAxis,
        dilation: PerAxis | None = 1,
        is_causal: Causal = False,
        rpb: Tensor | None = None,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        xformers_kwargs: dict | None = None,
    ) -> Tensor:
        # `stride` came in 0.20, at the place that `dilation` has here; a scale of 0 is the default one.
        settings = (kernel_size, 1, 1 if dilation is None else dilation, bool_or_each(is_causal), scale or None)
        rpb = None if rpb is None else rpb.to(query.dtype)
        return operator(query, key, value, *settings, additional_keys, additional_values, rpb=rpb)

    return named(f"na{rank}d", __name__, na)


def bool_or_each(is_causal: Causal) -> bool | Sequence[bool]:
    """Return ``is_causal`` with None, which NATTEN took for False, as False."""
    return False if is_causal is None else is_causal


na1d_qk, na2d_qk, na3d_qk = _qk(1), _qk(2), _qk(3)
na1d_av, na2d_av, na3d_av = _av(1), _av(2), _av(3)
na1d, na2d, na3d = _fused(1), _fused(2), _fused(3)


def _qk_function(rank: int) -> type:
    operator = (na1d_qk, na2d_qk, na3d_qk)[rank - 1]

    def apply(query, key, bias, additional_key, kernel_size, dilation, is_causal=False) -> Tensor:
        return operator(query, key, kernel_size, dilation, additional_key, is_causal, bias)

    return function_class(f"NeighborhoodAttention{rank}DQKAutogradFunction", __name__, apply)


def _av_function(rank: int) -> type:
    operator = (na1d_av, na2d_av, na3d_av)[rank - 1]

    def apply(attn, value, additional_value, kernel_size, dilation, is_causal=False) -> Tensor:
        return operator(attn, value, kernel_size, dilation, additional_value, is_causal)

    return function_class(f"NeighborhoodAttention{rank}DAVAutogradFunction", __name__, apply)


def _fused_function(rank: int, with_lse: bool) -> type:
    operator = getattr(kernels, f"na{rank}d")

    def apply(
        query,
        key,
        value,
        rpb,
        kernel_size,
        dilation,
        is_causal,
        scale,
        tiling_config=None,
        tiling_config_backward=None,
    ):
        settings = (kernel_size, 1, dilation, bool_or_each(is_causal), scale or None)
        rpb = None if rpb is None else rpb.to(query.dtype)
        return operator(query, key, value, *settings, rpb=rpb, return_lse=with_lse)

    return function_class(f"FusedNeighborhoodAttention{rank}D", __name__, apply)


NeighborhoodAttention1DQKAutogradFunction = _qk_function(1)
NeighborhoodAttention2DQKAutogradFunction = _qk_function(2)
NeighborhoodAttention3DQKAutogradFunction = _qk_function(3)
NeighborhoodAttention1DAVAutogradFunction = _av_function(1)
NeighborhoodAttention2DAVAutogradFunction = _av_function(2)
NeighborhoodAttention3DAVAutogradFunction = _av_function(3)

# Up to 0.17.3 the result alone, from 0.17.4 on with the log-sum-exp.
FUSED_FUNCTIONS = {
    with_lse: {f"FusedNeighborhoodAttention{rank}D": _fused_function(rank, with_lse) for rank in (1, 2, 3)}
    for with_lse in (False, True)
}


def merge_attentions(output_fna: Tensor, output_sdpa: Tensor, lse_fna: Tensor, lse_sdpa: Tensor) -> Tensor:
    """Merge neighborhood attention with the attention of the same queries to additional keys.

    Args:
        output_fna: ``[B, *spatial, heads, dim]``.
        output_sdpa: ``[B, tokens, heads, dim]``.
        lse_fna: ``[B, *spatial, heads]``.
        lse_sdpa: ``[B, heads, tokens]``.

    Returns:
        ``[B, *spatial, heads, dim]``.
    """
    output_sdpa = output_sdpa.view_as(output_fna)
    return kernels.merge_attentions(
        [output_fna, output_sdpa], [lse_fna, lse_sdpa.transpose(1, 2).reshape(lse_fna.shape)]
    )[0]


class _NeighborhoodAttention(NeighborhoodModule):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: PerAxis,
        dilation: PerAxis | None = 1,
        is_causal: Causal = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
    ):
        dilation = 1 if dilation is None else dilation
        options = (rel_pos_bias, qkv_bias, qk_scale, attn_drop, proj_drop, bool_or_each(is_causal))
        super().__init__(dim, num_heads, kernel_size, dilation, *options)


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """Neighborhood attention on lines ``[B, L, dim]``, as in 0.17; see `modules.NeighborhoodModule`."""

    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Neighborhood attention on maps ``[B, H, W, dim]``, as in 0.17; see `modules.NeighborhoodModule`."""

    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """Neighborhood attention on volumes ``[B, D, H, W, dim]``, as in 0.17; see `modules.NeighborhoodModule`."""

    rank = 3
