"""NATTEN 0.20 and 0.21: fused operators only, with a stride, and dense attention in their layout."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ... import kernels
from .heads_first import PerAxis, named
from .modules import NeighborhoodModule
from .v017 import Causal, bool_or_each


def _refuse_backend(operator: str, backend: str | None) -> None:
    if backend is not None:
        raise ValueError(
            f"{operator}'s backend {backend!r} is one of NATTEN's own, which are not here; leave it out, or call "
            "foveate.kernels, whose backends have names of their own"
        )


def _fused(rank: int) -> Callable:
    operator = getattr(kernels, f"na{rank}d")
    name = f"na{rank}d"

    def na(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: PerAxis,
        stride: PerAxis | None = 1,
        dilation: PerAxis | None = 1,
        is_causal: Causal = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: dict | None = None,
        backend: str | None = None,
        q_tile_shape: tuple[int, ...] | None = None,
        kv_tile_shape: tuple[int, ...] | None = None,
        backward_q_tile_shape: tuple[int, ...] | None = None,
        backward_kv_tile_shape: tuple[int, ...] | None = None,
        backward_kv_splits: tuple[int, ...] | None = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: object = None,
        torch_compile: bool = False,
        try_fuse_additional_kv: bool = False,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        _refuse_backend(name, backend)
        windows = (kernel_size, 1 if stride is None else stride, 1 if dilation is None else dilation)
        settings = (*windows, bool_or_each(is_causal), scale or None)
        return operator(query, key, value, *settings, additional_keys, additional_values, return_lse=return_lse)

    return named(name, __name__, na)


na1d, na2d, na3d = _fused(1), _fused(2), _fused(3)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: object = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query to every key, heads last, as in 0.21.5; see `kernels.attention`.

    Raises:
        ValueError: If a backend of NATTEN's, or sequences of several lengths, are asked for.
    """
    _refuse_backend("attention", backend)
    lengths = (seqlens_Q, seqlens_KV, cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV)
    if any(each is not None for each in lengths):
        raise ValueError("foveate.natten's attention takes no packed sequences of several lengths; call it for each")
    return kernels.attention(query, key, value, is_causal, scale or None, return_lse=return_lse)


def early_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: object = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` as until 0.21.1, with the scale where ``is_causal`` is later."""
    return attention(query, key, value, False, scale, backend=backend, return_lse=return_lse)


def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """Merge attentions of the same queries to disjoint sets of keys; see `kernels.merge_attentions`."""
    return kernels.merge_attentions(outputs, lse_tensors)


class _NeighborhoodAttention(NeighborhoodModule):
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: PerAxis,
        stride: PerAxis | None = 1,
        dilation: PerAxis | None = 1,
        is_causal: Causal = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ):
        super().__init__(
            embed_dim,
            num_heads,
            kernel_size,
            1 if dilation is None else dilation,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            proj_drop=proj_drop,
            is_causal=bool_or_each(is_causal),
            stride=1 if stride is None else stride,
        )
        self.embed_dim = embed_dim


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """Neighborhood attention on lines ``[B, L, dim]``, from 0.20.1 on; see `modules.NeighborhoodModule`."""

    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Neighborhood attention on maps ``[B, H, W, dim]``, from 0.20.1 on; see `modules.NeighborhoodModule`."""

    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """Neighborhood attention on volumes ``[B, D, H, W, dim]``, from 0.20.1 on; see `modules.NeighborhoodModule`."""

    rank = 3


class _EarlyNeighborhoodAttention(_NeighborhoodAttention):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: PerAxis,
        stride: PerAxis | None = 1,
        dilation: PerAxis | None = 1,
        is_causal: Causal = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim, num_heads, kernel_size, stride, dilation, is_causal, qkv_bias, qk_scale, proj_drop)


class EarlyNeighborhoodAttention1D(_EarlyNeighborhoodAttention):
    """`NeighborhoodAttention1D` as in 0.20.0, which calls its channels ``dim``."""

    rank = 1


class EarlyNeighborhoodAttention2D(_EarlyNeighborhoodAttention):
    """`NeighborhoodAttention2D` as in 0.20.0, which calls its channels ``dim``."""

    rank = 2


class EarlyNeighborhoodAttention3D(_EarlyNeighborhoodAttention):
    """`NeighborhoodAttention3D` as in 0.20.0, which calls its channels ``dim``."""

    rank = 3
