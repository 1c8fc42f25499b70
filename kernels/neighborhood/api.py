"""The public operators, and the table of their backends."""

import os

from torch import Tensor

from ..backends import Backend, check_name, choose, exporting, report
from ..triton_launch import off_gpu
from . import boxes, flex, native, natten_peer, tiled, triton_ops, triton_products
from .problem import AXIS_NAMES, make_problem
from .reference import neighborhood_reference

# In order of preference; flex, NATTEN and the reference run on request only.
_BACKENDS: dict[str, Backend] = {
    "native": Backend(native.neighborhood_native, native.obstacle),
    "triton": Backend(triton_ops.neighborhood_triton, triton_ops.obstacle, lambda problem: off_gpu(problem.query)),
    "boxes": Backend(
        boxes.neighborhood_boxes,
        drawback=lambda problem: None if exporting() or tiled.obstacle() else "tiled is faster, but makes large graphs",
    ),
    "tiled": Backend(tiled.neighborhood_tiled, lambda problem: tiled.obstacle()),
    "flex": Backend(
        flex.neighborhood_flex,
        flex.obstacle,
        lambda problem: "every shape is compiled, for some ten seconds, and on CPUs is slower than tiled then",
    ),
    "natten": Backend(
        natten_peer.neighborhood_natten,
        natten_peer.obstacle,
        lambda problem: "NATTEN itself runs on request only",
    ),
    "reference": Backend(neighborhood_reference),
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
            ``"tiled"`` (plain torch), ``"boxes"`` (the same as one batch, for exported graphs), ``"flex"`` (torch's
            FlexAttention, compiled for every shape; on CPUs without gradients), ``"natten"`` (an installed NATTEN of
            0.20 or later, without bias) or ``"reference"``. By default the fastest that can run; the last three run on
            request only.
        return_lse: Whether to return the log-sum-exp of the scores too.

    Returns:
        ``[B, H, W, heads, dim_v]``; with ``return_lse`` also ``[B, H, W, heads]``, natural logarithm, at least float32.

    What a query does not see has no part in its result, be it NaN, on the native, tiled and reference paths; Triton,
    FlexAttention, boxes and traced graphs of the tiled path multiply it by zero. Where derivatives are carried along
    (`torch.func.jvp`, dual numbers), boxes are the path. Where no backend is named, second derivatives
    exist on every path but Triton's.

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
    """Forget how maps are cut by the tiled path, the masks of the flex path, and Triton's tables of windows."""
    tiled.clear_plans()
    triton_products.clear_tables()
    flex.clear_masks()


_preferred: str | None = os.environ.get("FOVEATE_NEIGHBORHOOD_BACKEND") or None


def preferred(backend: str | None) -> str | None:
    """Return the backend of a call: the one that it names, or else what `set_neighborhood_backend` chose."""
    return backend or _preferred


def set_neighborhood_backend(name: str | None) -> None:
    """Choose the path of every later call that names none; None for the fastest that can run.

    The unfused operators `na1d_qk` to `na3d_av` obey too, and refuse a path that they don't have. The environment
    variable FOVEATE_NEIGHBORHOOD_BACKEND sets the same at import.

    Raises:
        ValueError: If there is no such backend.
    """
    global _preferred
    if name is not None:
        check_name("set_neighborhood_backend", _BACKENDS, name)
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
    if rank not in AXIS_NAMES:
        raise ValueError(f"query must have 4, 5 or 6 axes, [B, *spatial, heads, dim]; got {list(query.shape)}")
    tensors = (query, key, value, additional_keys, additional_values)
    problem = make_problem(rank, tensors, return_lse, kernel_size=kernel_size, **options)
    return report(f"na{rank}d", _BACKENDS, problem, preferred(backend))


def _neighborhood(
    rank: int, tensors: tuple[Tensor | None, ...], backend: str | None, return_lse: bool, **options
) -> Tensor | tuple[Tensor, Tensor]:
    problem = make_problem(rank, tensors, return_lse, **options)
    name = choose(f"na{rank}d", _BACKENDS, problem, preferred(backend))
    query, _, value = tensors[:3]
    if 0 in query.shape or 0 in value.shape:
        name = "tiled"  # kernels take nothing of length zero; over no channels every score is 0
    if name == "native" and preferred(backend) is None:
        # Nobody asked for the path, whose gradients have none: another one takes the second derivatives.
        output, lse = native.neighborhood_native(problem, differentiable_twice=True)
    else:
        output, lse = _BACKENDS[name].run(problem)
    return (output, lse) if return_lse else output
