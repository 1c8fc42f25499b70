"""One level of QuadTree attention as an operator of torch, whose maps are read where they lie.

Tokens are numbered along the rows of their map, so that nothing is put into a tree's order and back.
"""

import struct
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Backend, choose, contiguous_rows, default_scale, export_obstacle, is_transforming, report
from ..neighborhood.native import load_function
from ..precision import full_precision
from ..second_order import differentiate_gradients
from .reference import accumulation_dtype

# `call` in native.c.
_CALL = struct.Struct("=12q2d61q")
_VECTOR = 16

_library, _missing = load_function(Path(__file__).with_name("_native.c.so"), "foveate_quadtree_level")


class Problem(NamedTuple):
    """A checked call of `quadtree_level`."""

    query: Tensor
    key: Tensor
    value: Tensor
    token_index: Tensor
    share: Tensor
    parent: Tensor
    base: Tensor
    topk: int
    scale: float


def _children(token_index: Tensor, columns: int) -> Tensor:
    """Return the children ``[..., 4 * K]`` of tokens ``[..., K]`` of a map of so many columns, by the next's rows."""
    corner = 2 * (token_index // columns) * 2 * columns + 2 * (token_index % columns)
    steps = torch.tensor([0, 1, 2 * columns, 2 * columns + 1], device=token_index.device)
    return (corner.unsqueeze(-1) + steps).flatten(-2)


def _siblings(x: Tensor) -> Tensor:
    """Return a map ``[B, H, W, heads, dim]`` as ``[B, heads, H / 2, W / 2, 4, dim]``."""
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5)


def _to_map(x: Tensor) -> Tensor:
    """Undo `_siblings`."""
    return x.unflatten(4, (2, 2)).permute(0, 2, 4, 3, 5, 1, 6).flatten(3, 4).flatten(1, 2)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Return rows ``[B, heads, ..., dim]`` of a map ``[B, H, W, heads, dim]`` at numbers ``[B, heads, ...]``."""
    rows = x.permute(0, 3, 1, 2, 4).flatten(2, 3)
    at = index.flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
    return rows.gather(2, at).unflatten(2, index.shape[2:])


def quadtree_level_reference(problem: Problem) -> tuple[Tensor, Tensor]:
    """One level by gathering; see `quadtree_level`."""
    query, key, value, token_index, share, parent, base, topk, scale = problem
    exact = accumulation_dtype(query.dtype)
    index = _children(token_index, key.shape[2] // 2)
    with full_precision(query):
        scores = torch.einsum(
            "bhrcfd,bhrckd->bhrcfk", _siblings(query).to(exact) * scale, _gather(key, index).to(exact)
        )
        best = scores.detach().topk(topk, sorted=False).indices
        weights = scores.softmax(-1)
        attended = torch.einsum("bhrcfk,bhrckd->bhrcfd", weights, _gather(value, index).to(exact))
    tokens = index.unsqueeze(4).expand(*index.shape[:4], 4, -1).gather(-1, best)
    tokens = _to_map(tokens).permute(0, 3, 1, 2, 4)
    message = (attended * share.to(exact)).to(value.dtype)
    out = _to_map(_siblings(base) + parent.permute(0, 3, 1, 2, 4).unsqueeze(4) + message)
    return out, tokens


def _layout(x: Tensor | None) -> tuple[int, ...]:
    return (0,) * 5 if x is None else (x.data_ptr(), *x.stride()[:4])


def _call(problem: Problem, out: Tensor | None, tokens: Tensor | None, gradients: tuple = (), bands: int = 0) -> None:
    if _library is None:
        raise RuntimeError(f"foveate's native path cannot run: {_missing}")
    query, key, value, token_index, share, parent, base, topk, scale = problem
    batch, height, width, heads, dim = query.shape
    numbers = (batch, height // 2, width // 2, key.shape[1] // 2, key.shape[2] // 2, heads, dim, value.shape[-1])
    maps = [number for x in (query, key, value, parent, base, out) for number in _layout(x)]
    *grads, grad_share = gradients or (None,) * 6
    # The sums of the bands lie behind each other.
    grad_maps = [n for x in grads for n in _layout(x if x is None or x.ndim == 5 else x[0])]
    steps = [0 if x is None else x.stride(0) for x in grads[2:4]]
    call = _CALL.pack(
        torch.get_num_threads(),
        _library.parallel,
        *numbers,
        token_index.shape[-1],
        topk,
        scale,
        float(share),
        *maps,
        token_index.data_ptr(),
        0 if tokens is None else tokens.data_ptr(),
        bands,
        *grad_maps,
        *steps,
        0 if grad_share is None else grad_share.data_ptr(),
    )
    if _library.call(call):
        raise RuntimeError("foveate's native QuadTree attention failed: out of memory")


def _ready(*problem) -> Problem:
    """Return the problem as the library reads it: maps whose channels lie side by side."""
    problem = Problem(*problem)
    maps = {name: contiguous_rows(getattr(problem, name)) for name in ("query", "key", "value", "parent", "base")}
    return problem._replace(token_index=problem.token_index.contiguous(), **maps)


def _check_tokens(token_index: Tensor, key: Tensor) -> None:
    tokens = key.shape[1] * key.shape[2] // 4
    least, most = (int(limit) for limit in token_index.aminmax())
    if least < 0 or most >= tokens:
        raise IndexError(f"quadtree_level needs chosen tokens from 0 to {tokens - 1}; got {least} to {most}")


@torch.library.custom_op("foveate::quadtree_level", mutates_args=(), device_types="cpu")
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    token_index: Tensor,
    share: Tensor,
    parent: Tensor,
    base: Tensor,
    topk: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _check_tokens(token_index, key)
    problem = _ready(query, key, value, token_index, share, parent, base, topk, scale)
    batch, height, width, heads, _ = query.shape
    out = query.new_empty(batch, height, width, heads, value.shape[-1])
    tokens = token_index.new_empty(batch, heads, height, width, topk)
    _call(problem, out, tokens)
    return out, tokens


@_operator.register_fake
def _(query, key, value, token_index, share, parent, base, topk, scale):
    batch, height, width, heads, _ = query.shape
    out = query.new_empty(batch, height, width, heads, value.shape[-1])
    return out, token_index.new_empty(batch, heads, height, width, topk)


@torch.library.custom_op("foveate::quadtree_level_backward", mutates_args=(), device_types="cpu")
def _operator_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    token_index: Tensor,
    share: Tensor,
    parent: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = _ready(query, key, value, token_index, share, parent, grad_out, 0, scale)  # what is added isn't asked for
    planes = query.shape[0] * query.shape[3]
    # A band has sums of its own, which take memory.
    bands = min(query.shape[1] // 2, -(-torch.get_num_threads() // planes))
    grads = [
        problem.base,
        query.new_empty(query.shape),
        *(x.new_zeros(bands, *x.shape) for x in (key, value)),
        parent.new_empty(parent.shape),
    ]
    shares = torch.empty(planes * bands, dtype=torch.float64)
    _call(problem, None, None, (*grads, shares), bands)
    key_sum, value_sum = (x[0] if bands == 1 else x.sum(0) for x in grads[2:4])
    return grads[1], key_sum, value_sum, shares.sum().to(share.dtype), grads[4]


@_operator_backward.register_fake
def _(grad_out, query, key, value, token_index, share, parent, scale):
    return tuple(x.new_empty(x.shape) for x in (query, key, value, share, parent))


def _save(ctx, inputs, output) -> None:
    *tensors, _, _, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad_out: Tensor, _):
    query, key, value, share, parent = _operator_backward(grad_out, *ctx.saved_tensors, ctx.scale)
    return query, key, value, None, share, parent, grad_out, None, None


def _save_backward(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_again(ctx, *grads: Tensor):
    """Differentiate the gradients by the reference."""
    grad_out, *operands = ctx.saved_tensors

    def compute(*operands: Tensor) -> tuple[Tensor, ...]:
        return quadtree_level_reference(Problem(*operands, grad_out, 0, ctx.scale))[:1]

    outer = *grads[:3], None, *grads[3:]  # the tokens' numbers have no gradients
    return *differentiate_gradients(compute, (grad_out,), operands, outer), None


_operator.register_autograd(_differentiate, setup_context=_save)
_operator_backward.register_autograd(_differentiate_again, setup_context=_save_backward)


def level_obstacle(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Return why the native path of `quadtree_level` cannot take such maps, once in float32, or None if it can."""
    if any(x.device.type != "cpu" for x in (query, key, value)):
        return f"it is for CPU tensors; query is on {query.device}"
    if any(x.dtype == torch.float64 for x in (query, key, value)):
        return "it computes in float32; got torch.float64"
    if query.shape[-1] % _VECTOR or value.shape[-1] % _VECTOR:
        return f"it needs dims of multiples of {_VECTOR}; got {query.shape[-1]} and {value.shape[-1]}"
    if any(0 in x.shape for x in (query, key, value)):
        return "it takes no empty tensors"
    if is_transforming():
        return "torch.func transforms no operator of torch.library"
    return export_obstacle() or _missing


def _native_obstacle(problem: Problem) -> str | None:
    dtypes = {x.dtype for x in problem[:7] if x.is_floating_point()}
    if dtypes != {torch.float32}:
        return f"it computes in float32; got {', '.join(sorted(map(str, dtypes)))}"
    if 0 in problem.token_index.shape:
        return "it takes no empty tensors"
    return level_obstacle(problem.query, problem.key, problem.value)


# In order of preference.
_BACKENDS: dict[str, Backend] = {
    "native": Backend(lambda problem: _operator(*problem), _native_obstacle),
    "reference": Backend(quadtree_level_reference),
}


def quadtree_level(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    token_index: Tensor,
    topk: int,
    *,
    share: Tensor,
    parent: Tensor,
    base: Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a level of QuadTree attention of type B to the coarser ones, and choose tokens (arXiv 2201.02767).

    Every query attends to the children of the tokens that were chosen for its parent, two by two on the map, by scores
    times ``dim ** -0.5``; tokens and children are numbered along the rows of their maps.

    Args:
        query: ``[B, H, W, heads, dim]``, H and W even.
        key: ``[B, H', W', heads, dim]``, likewise.
        value: ``[B, H', W', heads, dim_v]``.
        token_index: ``[B, heads, H / 2, W / 2, K]`` int64, tokens of the next coarser map of keys, below ``H' W' / 4``.
        topk: How many of its candidates each query hands down; 0 at the finest level.
        share: What the level's message is multiplied by, a number.
        parent: Sum of the coarser levels, ``[B, H / 2, W / 2, heads, dim_v]``, which is added to all four children.
        base: What else is added, ``[B, H, W, heads, dim_v]``.
        backend: ``"native"`` (CPU, float32, in C, where it was compiled: maps are read in place, and neither scores nor
            weights reach memory) or ``"reference"``. By default the first that runs.

    Returns:
        The sum ``[B, H, W, heads, dim_v]`` and the chosen tokens ``[B, heads, H, W, topk]`` int64, in no order. There
        are gradients of any order of the sum.

    Raises:
        ValueError: If shapes, dtypes, devices or backend don't fit; the message says which.
        IndexError: If the native path is given a token that does not exist.

    Example:
        >>> x = torch.randn(1, 4, 6, 2, 16)
        >>> tokens = torch.randint(6, (1, 2, 2, 3, 5))
        >>> share, parent = torch.tensor(0.5), torch.randn(1, 2, 3, 2, 16)
        >>> out, chosen = quadtree_level(x, x, x, tokens, 8, share=share, parent=parent, base=x)
        >>> out.shape, chosen.shape
        (torch.Size([1, 4, 6, 2, 16]), torch.Size([1, 2, 4, 6, 8]))
    """
    problem = _checked(Problem(query, key, value, token_index, share, parent, base, topk, default_scale(query)))
    return _BACKENDS[choose("quadtree_level", _BACKENDS, problem, backend)].run(problem)


def quadtree_level_backends(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    token_index: Tensor,
    topk: int,
    *,
    share: Tensor,
    parent: Tensor,
    base: Tensor,
    backend: str | None = None,
) -> dict[str, str]:
    """Say which backends can run a call of `quadtree_level`, whose arguments these are, and why the others cannot.

    Returns:
        Every backend in order of preference, with ``"chosen"``, ``"can run"`` or the reason against it.
    """
    problem = _checked(Problem(query, key, value, token_index, share, parent, base, topk, default_scale(query)))
    return report("quadtree_level", _BACKENDS, problem, backend)


def _checked(problem: Problem) -> Problem:
    """Return a problem whose shapes, dtypes and devices fit each other."""
    query, key, value, token_index, share, parent, base, topk, _ = problem
    maps = {"query": query, "key": key, "value": value, "parent": parent, "base": base}
    for name, x in maps.items():
        if x.ndim != 5 or (name != "parent" and (x.shape[1] % 2 or x.shape[2] % 2)):
            raise ValueError(
                f"quadtree_level takes {name} as [B, H, W, heads, dim] of even H and W; got {list(x.shape)}"
            )
        if x.dtype != query.dtype or x.device != query.device or not x.is_floating_point():
            raise ValueError(
                f"quadtree_level needs its maps in one floating-point dtype on one device; query is {query.dtype} on "
                f"{query.device}, {name} {x.dtype} on {x.device}"
            )
    batch, height, width, heads, dim = query.shape
    outputs = (batch, height, width, heads, value.shape[-1])
    if (
        (key.shape[0], key.shape[3], key.shape[4]) != (batch, heads, dim)
        or key.shape[:4] != value.shape[:4]
        or base.shape != outputs
        or parent.shape != (batch, height // 2, width // 2, *outputs[3:])
    ):
        raise ValueError(
            "quadtree_level needs query and key of one [B, heads, dim], value of the key's map, base of the query's "
            f"and parent of half its size; got {', '.join(f'{name} {list(x.shape)}' for name, x in maps.items())}"
        )
    if token_index.dtype != torch.int64 or token_index.shape[:-1] != (batch, heads, height // 2, width // 2):
        raise ValueError(
            "quadtree_level takes token_index as [B, heads, H / 2, W / 2, K] int64; "
            f"got {list(token_index.shape)} {token_index.dtype}"
        )
    if not 0 <= topk <= 4 * token_index.shape[-1]:
        raise ValueError(f"topk must be from 0 to 4 x {token_index.shape[-1]} candidates; got {topk}")
    if share.numel() != 1 or share.dtype != query.dtype or share.device != query.device:
        raise ValueError(f"share must be a number of the maps' dtype and device; got {list(share.shape)} {share.dtype}")
    return problem
