"""The public operators: their checks, and the table of their backends."""

import torch
from torch import Tensor

from ..backends import Backend, choose, is_exporting, report
from ..precision import full_precision
from ..triton_launch import off_gpu, triton_obstacle
from .chunked import scores_chunked, values_chunked
from .reference import scores_reference, values_reference
from .triton_ops import scores_triton, values_triton

_MAX_TRITON_DIM = 256


def _triton_obstacle(children: Tensor) -> str | None:
    return triton_obstacle(children, children.shape[4], _MAX_TRITON_DIM, multiplies_matrices=False)


def _triton_drawback(children: Tensor) -> str | None:
    if torch.are_deterministic_algorithms_enabled():
        return "its atomic sums are not deterministic"
    return off_gpu(children)


# In order of preference; each runs the scores and the values. The problem is the key or the value.
_BACKENDS: dict[str, Backend] = {
    "triton": Backend((scores_triton, values_triton), _triton_obstacle, _triton_drawback),
    "chunked": Backend((scores_chunked, values_chunked)),
    "reference": Backend((scores_reference, values_reference)),
}


def quadtree_scores(query: Tensor, key: Tensor, token_index: Tensor, *, backend: str | None = None) -> Tensor:
    """Products of queries with the children of the tokens chosen for them (QuadTree attention, arXiv 2201.02767).

    Queries are grouped by parent: four siblings share one list of chosen tokens, and the candidates are those tokens'
    children, ``out[b, h, n, f, 4 * k + c] = sum_d query[b, h, n, f, d] * key[b, h, token_index[b, h, n, k], c, d]``.
    Nothing is scaled. Scores are summed and returned in float32, so that the next choice of tokens does not depend on
    the precision of the inputs' products.

    Args:
        query: ``[B, heads, N, 4, dim]``, N parents of four queries.
        key: ``[B, heads, M, 4, dim]``, M tokens of four children; same dtype as ``query``.
        token_index: ``[B, heads, N, K]`` int64, tokens in ``[0, M)``. This is checked on the CPU, outside of compiled
            code; on a GPU the check would make the host wait, and the Triton path skips other tokens.
        backend: ``"triton"``, ``"chunked"`` or ``"reference"``; by default the fastest that runs, which is Triton on
            CUDA, unless ``torch.use_deterministic_algorithms`` forbids its atomic sums, and chunks elsewhere.

    Returns:
        ``[B, heads, N, 4, 4 * K]`` in float32; float64 for float64 inputs.

    Raises:
        ValueError: If shapes, dtypes, devices or backend don't fit; the message says which.
        IndexError: If ``token_index`` names a token that does not exist.
    """
    _check_token_index("quadtree_scores", "query", query, "key", key, token_index)
    if query.dtype != key.dtype or query.shape[4] != key.shape[4]:
        raise ValueError(
            f"quadtree_scores needs query and key of one dtype and dim; got {query.dtype} {list(query.shape)} "
            f"and {key.dtype} {list(key.shape)}"
        )
    with full_precision(key):
        return _BACKENDS[_backend_of("quadtree_scores", backend, key, query, token_index)].run[0](
            query, key, token_index
        )


def quadtree_values(weights: Tensor, value: Tensor, token_index: Tensor, *, backend: str | None = None) -> Tensor:
    """Weighted sums of the children of the tokens chosen for each query (QuadTree attention, arXiv 2201.02767).

    ``out[b, h, n, f, d] = sum_k,c weights[b, h, n, f, 4 * k + c] * value[b, h, token_index[b, h, n, k], c, d]``,
    summed in float32.

    Args:
        weights: ``[B, heads, N, 4, 4 * K]``, in float32 or in the dtype of ``value``.
        value: ``[B, heads, M, 4, dim]``, M tokens of four children.
        token_index: ``[B, heads, N, K]`` int64, as in `quadtree_scores`.
        backend: As in `quadtree_scores`.

    Returns:
        ``[B, heads, N, 4, dim]`` in the dtype of ``value``.

    Raises:
        ValueError: If shapes, dtypes, devices or backend don't fit; the message says which.
        IndexError: If ``token_index`` names a token that does not exist.
    """
    _check_token_index("quadtree_values", "weights", weights, "value", value, token_index)
    if weights.dtype not in (torch.float32, value.dtype):
        raise ValueError(f"quadtree_values needs weights in float32 or value's {value.dtype}; got {weights.dtype}")
    if weights.shape[4] != 4 * token_index.shape[3]:
        raise ValueError(
            f"quadtree_values needs a weight for each of the 4 children of {token_index.shape[3]} chosen tokens; "
            f"got {weights.shape[4]}"
        )
    with full_precision(value):
        return _BACKENDS[_backend_of("quadtree_values", backend, value, token_index)].run[1](
            weights, value, token_index
        )


def _backend_of(op: str, requested: str | None, children: Tensor, *others: Tensor) -> str:
    name = choose(op, _BACKENDS, children, requested)
    # Of nothing there is nothing to cut into chunks.
    return "reference" if any(0 in x.shape for x in (children, *others)) else name


def quadtree_backends(children: Tensor, *, backend: str | None = None) -> dict[str, str]:
    """Say which backends can run `quadtree_scores` and `quadtree_values`, and why the others cannot.

    Args:
        children: The key or the value, ``[B, heads, M, 4, dim]``.
        backend: As in `quadtree_scores`.

    Returns:
        Every backend in order of preference, with ``"chosen"``, ``"can run"`` or the reason against it.
    """
    return report("quadtree attention", _BACKENDS, children, backend)


def _check_token_index(
    op: str, first_name: str, first: Tensor, second_name: str, second: Tensor, token_index: Tensor
) -> None:
    for name, x in ((first_name, first), (second_name, second)):
        if x.ndim != 5 or x.shape[3] != 4:
            raise ValueError(f"{op} takes {name} as [B, heads, tokens, 4, ...]; got {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{op} needs {name} in a floating-point dtype; got {x.dtype}")
    if token_index.dtype != torch.int64 or token_index.ndim != 4:
        raise ValueError(
            f"{op} takes token_index as [B, heads, N, K] int64; got {list(token_index.shape)} {token_index.dtype}"
        )
    if first.shape[:3] != token_index.shape[:3] or first.shape[:2] != second.shape[:2]:
        raise ValueError(
            f"{op} needs {first_name} and token_index of one [B, heads, N], and {second_name} of one [B, heads]; "
            f"got {list(first.shape)}, {list(token_index.shape)} and {list(second.shape)}"
        )
    if not first.device == second.device == token_index.device:
        raise ValueError(
            f"{op} needs its tensors on one device; got {first.device}, {second.device} and {token_index.device}"
        )
    # Fake and functional tensors, which have no values to look at, are subclasses.
    if token_index.device.type == "cpu" and type(token_index) is Tensor and token_index.numel() and not _traced():
        least, most = (int(limit) for limit in token_index.aminmax())
        if least < 0 or most >= second.shape[2]:
            raise IndexError(
                f"{op} needs chosen tokens from 0 to {second.shape[2] - 1}, as {second_name} has them; "
                f"got {least} to {most}"
            )


def _traced() -> bool:
    mapped = torch._C._functorch.peek_interpreter_stack() is not None  # torch.func's tensors hide their values
    return torch.compiler.is_compiling() or is_exporting() or torch.jit.is_tracing() or mapped
