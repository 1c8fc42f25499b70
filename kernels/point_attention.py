"""Attention from every position of a map to points, with a bias by displacement (DAT, arXiv 2201.00520, eq. 9)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import Backend, choose, default_scale, exporting, graph, is_transforming, report
from .bilinear import sample_aligned
from .point_attention_native import obstacle, point_attention_native
from .rows import join_rows, rows_at_once, run_rows
from .token_attention import token_attention


class Problem(NamedTuple):
    """A call of `point_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    table: Tensor
    points: Tensor
    rows: Tensor
    columns: Tensor


def point_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    points: Tensor,
    rows: Tensor,
    columns: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Attend from every position of a map to points, whose scores get a bias by the displacement from the query.

    Half the displacement, query minus point, reads a table, bilinear and zero outside; -1 is the centre of the table's
    first row or column, 1 that of the last.

    Args:
        query: ``[B, H, W, heads, dim]``.
        key: ``[B, P, heads, dim]``.
        value: ``[B, P, heads, dim_v]``.
        table: ``[heads, rows, columns]``.
        points: Where the keys lie, ``[B, groups, P, 2]``, (y, x), for groups of neighboring heads; in float32 or
            float64.
        rows: Where the rows of queries lie, ``[H]``, evenly spaced.
        columns: Where their columns lie, ``[W]``, evenly spaced.
        backend: ``"native"`` (CPU, in float32, in C, where it was compiled: one pass, neither scores nor biases
            reach memory), ``"rows"`` (some rows of queries at a time, computed again in the backward pass)
            or ``"whole"``, the reference. By default native where it can run and rows are not short, rows where the
            scores are many, else whole, of which graphs are built.

    Returns:
        ``[B, H, W, heads, dim_v]`` in the dtype of ``value``. Gradients of any order flow to all but rows and columns.

    Raises:
        ValueError: If shapes don't fit, or there is no such backend or it cannot run; the message says why.

    Example:
        >>> query, key = torch.randn(1, 5, 7, 2, 16), torch.randn(1, 6, 2, 16)
        >>> places = torch.rand(1, 1, 6, 2) * 2 - 1
        >>> axes = torch.linspace(-1, 1, 5), torch.linspace(-1, 1, 7)
        >>> point_attention(query, key, key, torch.randn(2, 9, 13), places, *axes).shape
        torch.Size([1, 5, 7, 2, 16])
    """
    problem = _problem(query, key, value, table, points, rows, columns)
    name = choose("point_attention", _BACKENDS, problem, backend)
    return _BACKENDS["whole" if query.shape[0] == 0 else name].run(problem)


def point_attention_backends(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    points: Tensor,
    rows: Tensor,
    columns: Tensor,
    backend: str | None = None,
) -> dict[str, str]:
    """Say which backends can run a call of `point_attention`, whose arguments these are, and why the others cannot.

    Returns:
        Every backend in order of preference, with ``"chosen"``, ``"can run"`` or the reason against it.
    """
    return report("point_attention", _BACKENDS, _problem(query, key, value, table, points, rows, columns), backend)


def _problem(*tensors: Tensor) -> Problem:
    """Check the arguments of `point_attention`."""
    problem = Problem(*tensors)
    for (name, x), axes in zip(problem._asdict().items(), (5, 4, 4, 3, 4, 1, 1), strict=True):
        if x.ndim != axes:
            raise ValueError(f"point_attention takes {name} with {axes} axes; got {list(x.shape)}")
    query, key, value, table, points, rows, columns = (x.shape for x in problem)
    if exporting():  # lengths may be open
        return problem
    batch, height, width, heads, dim = query
    count, groups = key[1], points[1]
    expected = {
        "key": (key, (batch, count, heads, dim)),
        "value": (value, (batch, count, heads, value[3])),
        "table": (table, (heads, *table[1:])),
        "points": (points, (batch, groups, count, 2)),
        "rows": (rows, (height,)),
        "columns": (columns, (width,)),
    }
    for name, (actual, fitting) in expected.items():
        if tuple(actual) != tuple(fitting):
            raise ValueError(
                f"point_attention needs {name} of shape {list(fitting)} for a query of {list(query)}, {count} keys and "
                f"{groups} groups; got {list(actual)}"
            )
    if 0 in table:
        raise ValueError(f"point_attention needs a table of an entry or more for each head; got {list(table)}")
    if groups < 1 or heads % groups:
        raise ValueError(f"point_attention needs groups of neighboring heads; {groups} don't divide {heads} heads")
    return problem


def displacement_bias(table: Tensor, points: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the bias ``[B, heads, H * W, P]`` of `point_attention`, in the dtype of the points."""
    # TorchScript, which knows no graphs for other runtimes, leaves the other branch out.
    if torch.jit.is_scripting():
        return _read_each(table, points, rows, columns)
    else:
        products = exporting() and not graph().grid_sample
        return _read_lines(table, points, rows, columns) if products else _read_each(table, points, rows, columns)


def _read_each(table: Tensor, points: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    batch, groups = points.shape[0], points.shape[1]
    y, x = rows[:, None].expand(-1, columns.shape[0]), columns[None].expand(rows.shape[0], -1)
    tables = table.to(points.dtype).unflatten(0, (groups, -1)).expand(batch, -1, -1, -1, -1).flatten(0, 1)
    read = sample_aligned(tables, _displacements(y, x, points.flatten(0, 1)))
    return read.unflatten(0, (batch, groups)).flatten(1, 2)


def _read_lines(table: Tensor, points: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Do the same by products: of the table's rows with each row of queries' shares in them, then of its columns.

    Queries lie on a grid, so that a share is the product of a row's and a column's. Runtimes are quick at products, and
    read single numbers of a table in 20 times the time.
    """
    height, width = table.shape[1:]
    y, x = (points[:, :, None, :, None, i] for i in range(2))  # [B, groups, 1, P, 1]
    row_shares = _shares((rows - y)[..., None], torch.arange(height, device=x.device))
    column_shares = _shares((columns - x)[..., None, :], torch.arange(width, device=x.device)[:, None])
    tables = table.to(points.dtype).unflatten(0, (points.shape[1], -1))
    out = row_shares.flatten(3, 4) @ tables  # [B, groups, heads of a group, P * H, columns]
    out = out.unflatten(3, row_shares.shape[3:5]) @ column_shares  # [..., P, H, W]
    return out.flatten(4).transpose(3, 4).flatten(1, 2)


def _shares(displacement: Tensor, entry: Tensor) -> Tensor:
    """Return how much of the entries along an axis of a table bilinear reading takes."""
    place = (displacement * 0.5 + 1) * ((len(entry) - 1) / 2)
    return F.relu(1 - (place - entry.to(place.dtype)).abs())


def _displacements(y: Tensor, x: Tensor, points: Tensor) -> Tensor:
    # Halved and turned to grid_sample's (x, y) while there are few of them: the displacements are many.
    queries = torch.stack([x, y], dim=-1).flatten(0, 1) * 0.5
    return queries[:, None] - (points[:, None] * 0.5).flip(-1)


def _whole(problem: Problem) -> Tensor:
    query, key, value, *places = problem
    if query.shape[0] == 0:  # of nothing, torch's operators forget where gradients go
        nothing = sum(x.flatten()[:0].to(value.dtype) for x in problem[:5])
        return nothing.view(*query.shape[:-1], value.shape[-1])
    out = _attend(query.flatten(1, 2).transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), *places)
    return out.transpose(1, 2).unflatten(1, query.shape[1:3])


def _attend(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, points: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    bias = displacement_bias(table, points, rows, columns).to(query.dtype)
    # Torch's fused attention has no derivatives that are carried along, and under vmap none of the bias; of a bias that
    # has some, torch.export writes down another order of its output than it then decomposes it to.
    if is_transforming() or (exporting() and bias.requires_grad):
        return (query @ key.mT * default_scale(query) + bias).softmax(-1) @ value
    return token_attention(query, key, value, bias)


def _by_rows(problem: Problem) -> Tensor:
    query, key, value, table, points, rows, columns = problem
    height, width = query.shape[1:3]
    step = rows_at_once(height, _scores(problem))
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    parts = []
    for first in range(0, height, step):
        part = slice(first, first + step)
        queries = query[:, part].flatten(1, 2).transpose(1, 2)
        parts.append(run_rows(_attend, queries, key, value, table, points, rows[part], columns))
    return join_rows(parts).transpose(1, 2).unflatten(1, (height, width))


def _scores(problem: Problem) -> int:
    return problem.query.shape[:-1].numel() * problem.key.shape[1]


def _rows_drawback(problem: Problem) -> str | None:
    if torch.compiler.is_compiling() or exporting() or is_transforming():
        return "graphs and transforms take all rows at once"
    height = problem.query.shape[1]
    return "the scores are few" if rows_at_once(height, _scores(problem)) == height else None


def _again(*tensors: Tensor) -> Tensor:
    return _by_rows(Problem(*tensors))


def _native_obstacle(problem: Problem) -> str | None:
    if any(0 in x.shape for x in problem):
        return "it takes no empty tensors"
    return obstacle(problem)


def _native_drawback(problem: Problem) -> str | None:
    # Measured on maps of 7, 14 and 28.
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in problem)
    return "rows of so few queries fill no vectors" if problem.query.shape[2] < (24 if differentiated else 12) else None


# In order of preference.
_BACKENDS: dict[str, Backend] = {
    "native": Backend(lambda problem: point_attention_native(*problem, _again), _native_obstacle, _native_drawback),
    "rows": Backend(_by_rows, drawback=_rows_drawback),
    "whole": Backend(_whole),
}
