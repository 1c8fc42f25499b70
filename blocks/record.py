"""What one call of an attention did: which values every position mixed, and how much of each.

An attention tells in its own file, by ``recorded``, what a call of it was: a `Recorded`, computed anew from the call's
inputs by the functions that its forward uses, when somebody asks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers held at once while rows are worked through: 16 MB in float32.
_CHUNK = 2**22


class Rows(NamedTuple):
    """Some rows of an operator.

    Attributes:
        keys: ``[B or 1, heads or 1, Q, K]``, what each query mixes, -1 where it has fewer; None for all, in order.
        weights: ``[B, heads, Q, K]``, how much; 0 where there is no key.
    """

    keys: Tensor | None
    weights: Tensor


def exact(x: Tensor) -> Tensor:
    """Return ``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gather_keys(x: Tensor, keys: Tensor) -> Tensor:
    """Return ``x`` ``[B, heads, M, d]`` at ``keys`` ``[B or 1, heads or 1, Q, K]``: ``[B, heads, Q, K, d]``."""
    keys = keys.clamp(min=0)
    if keys.shape[0] == keys.shape[1] == 1:
        return x[:, :, keys[0, 0]]
    batch = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1, 1)
    heads = torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1)
    return x[batch, heads, keys]


class Operator:
    """What maps values to a weighted sum for each query, row by row.

    Attributes:
        heads: Heads, or groups.
        queries: Queries N.
        keys: Values M.
        row_size: About how many numbers a row takes while it is made, for one image.
    """

    heads: int
    queries: int
    keys: int
    row_size: int
    device: torch.device

    def rows(self, queries: Tensor) -> Rows:
        """Return the rows of ``queries`` ``[Q]``."""
        raise NotImplementedError

    def chunks(self, batch: int, width: int = 0, first: int = 0) -> Iterator[tuple[Tensor, Rows]]:
        """Yield all rows, some at a time, with the numbers of their queries.

        Args:
            batch: Images.
            width: Of the matrix whose rows they are spread to, if they are; see `spread_rows`.
            first: Query to begin with.
        """
        step = max(1, _CHUNK // max(1, batch * max(self.row_size, self.heads * width)))
        for queries in torch.arange(first, self.queries, device=self.device).split(step):
            yield queries, self.rows(queries)


class Softmax(Operator):
    """Weights that are a softmax of scores over the keys of each query.

    Args:
        query: Queries ``[B, heads, N, d]``, scaled.
        key: Keys ``[B, heads, M, d]``.
        support: From queries ``[Q]`` to their keys, as in `Rows`; None if all see all.
        bias: From queries ``[Q]`` and their keys to what is added to the scores.
        added: From queries ``[Q]`` and their keys to what is added to the weights after the softmax, for the first of
            the keys.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        support: Callable[[Tensor], Tensor] | None = None,
        bias: Callable[[Tensor, Tensor | None], Tensor] | None = None,
        added: Callable[[Tensor], Tensor] | None = None,
    ):
        self.query, self.key = exact(query), exact(key)
        self.support, self.bias, self.added = support, bias, added
        self.heads, self.queries, self.keys = query.shape[1], query.shape[2], key.shape[2]
        self.device = query.device
        some = self.keys if support is None else support(torch.zeros(1, dtype=torch.long, device=query.device)).shape[3]
        self.row_size = self.heads * some * (2 if support is None else 1 + query.shape[3])

    def rows(self, queries: Tensor) -> Rows:
        query, keys = self.query[:, :, queries], None
        if self.support is None:
            scores = query @ self.key.mT
        else:
            keys = self.support(queries)
            scores = (gather_keys(self.key, keys) @ query.unsqueeze(-1)).squeeze(-1)
        if self.bias is not None:
            scores = scores + self.bias(queries, keys)
        if keys is not None:
            scores = scores.masked_fill(keys < 0, float("-inf"))
        weights = scores.softmax(-1)
        if self.added is not None:
            more = self.added(queries)
            more = more.masked_fill(keys[..., : more.shape[-1]] < 0, 0.0)
            weights[..., : more.shape[-1]] += more
        return Rows(keys, weights)


class Given(Operator):
    """Rows that a function gives.

    Args:
        rows: From queries ``[Q]`` to their rows.
        heads: As in `Operator`, like the others.
        queries: Queries.
        keys: Values.
        row_size: Numbers that a row takes.
        device: Where they are.
    """

    def __init__(
        self,
        rows: Callable[[Tensor], Rows],
        heads: int,
        queries: int,
        keys: int,
        row_size: int,
        device: torch.device,
    ):
        self._rows = rows
        self.heads, self.queries, self.keys, self.row_size, self.device = heads, queries, keys, row_size, device

    def rows(self, queries: Tensor) -> Rows:
        return self._rows(queries)


class Windows:
    """Windows that cut a map's tokens, and padding, into sets that see each other.

    Args:
        tokens: ``[windows, n]``, the tokens of each window as ``0 .. M - 1``, each in one window.
        hidden: ``[windows, n, n]``, which places of a window do not see which, or None.
    """

    def __init__(self, tokens: Tensor, hidden: Tensor | None = None):
        self.tokens, self.hidden = tokens, hidden
        self.order = tokens.flatten().argsort()
        self.window, self.place = self.order // tokens.shape[1], self.order % tokens.shape[1]

    def keys(self, queries: Tensor) -> Tensor:
        """Return the tokens that each query sees, ``[1, 1, Q, n]``."""
        keys = self.tokens[self.window[queries]]
        if self.hidden is not None:
            keys = keys.masked_fill(self.hidden[self.window[queries], self.place[queries]], -1)
        return keys[None, None]

    def bias(self, table: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Return the bias of places of a window ``[heads, n, n]`` as `Softmax` takes it."""
        return lambda queries, _: exact(table)[None, :, self.place[queries]]

    def join(self, x: Tensor) -> Tensor:
        """Return what windows hold, ``[B * windows, heads, n, d]``, as ``[B, heads, M, d]`` in the tokens' order."""
        x = x.unflatten(0, (-1, self.tokens.shape[0])).transpose(1, 2).flatten(2, 3)
        return x[:, :, self.order]


class Through(Operator):
    """Weights that are products: queries read from a few agents, which gather from the values.

    Args:
        read: How much each query reads from each agent, ``[B, heads, N, n]``; rows of windows one after another.
        gathered: How much each agent gathers of each value, ``[B, heads, n, M]``, in the same way.
        windows: Windows with agents of their own; None for one set of agents.
    """

    def __init__(self, read: Tensor, gathered: Tensor, windows: Windows | None = None):
        self.heads, self.device = read.shape[1], read.device
        self.queries = self.keys = read.shape[2] if windows is None else len(windows.order)
        if windows is not None:
            read, gathered = (part.unflatten(0, (-1, windows.tokens.shape[0])) for part in (read, gathered))
        self.read, self.gathered, self.windows = read, gathered, windows
        self.row_size = self.heads * gathered.shape[-1] * (2 if windows is None else 2 + gathered.shape[-2])

    def rows(self, queries: Tensor) -> Rows:
        if self.windows is None:
            return Rows(None, self.read[:, :, queries] @ self.gathered)
        window, place = self.windows.window[queries], self.windows.place[queries]
        read = self.read[:, window, :, place].permute(1, 2, 0, 3)  # [B, heads, Q, n]
        gathered = self.gathered[:, window].transpose(1, 2)  # [B, heads, Q, n, K]
        return Rows(self.windows.keys(queries), (read.unsqueeze(3) @ gathered).squeeze(3))


def number_box(size: Sequence[int], padded: Sequence[int], before: Sequence[int] | None = None) -> Tensor:
    """Return the numbers of a padded map's tokens: those of the map row-major, then those of the padding.

    Args:
        size: Lengths of the map's axes.
        padded: Lengths with padding.
        before: Padding before the map on each axis; none by default.

    Returns:
        A map of the lengths ``padded``, int64.
    """
    before = before or [0] * len(size)
    inside = torch.zeros(*padded, dtype=torch.bool)
    inside[tuple(slice(first, first + length) for first, length in zip(before, size, strict=True))] = True
    numbers = torch.empty(*padded, dtype=torch.long)
    numbers[inside] = torch.arange(int(inside.sum()))
    numbers[~inside] = torch.arange(int(inside.sum()), inside.numel())
    return numbers


class Landing(NamedTuple):
    """On which tokens of the attention's input the weight of each value lies, where values are no tokens.

    Attributes:
        keys: Values ``[E]``.
        tokens: The token of each entry, ``[B or 1, E]``: prefix tokens, then the map's.
        shares: How much of the value's weight lies on it, ``[B or 1, E]``.
    """

    keys: Tensor
    tokens: Tensor
    shares: Tensor

    def behind(self, tokens: int) -> "Landing":
        """Return the landing of values that come after so many tokens, which are values themselves."""
        first = torch.arange(tokens, device=self.keys.device)
        batch = len(self.tokens)
        return Landing(
            torch.cat([first, self.keys + tokens]),
            torch.cat([first.expand(batch, -1), self.tokens], 1),
            torch.cat([self.shares.new_ones(batch, tokens), self.shares], 1),
        )

    def land(self, weights: Tensor, count: int) -> Tensor:
        """Return ``weights`` ``[B, ..., M]`` of values as those of ``count`` tokens."""
        middle = weights.ndim - 2
        tokens, shares = (part.view(part.shape[0], *[1] * middle, -1) for part in (self.tokens, self.shares))
        parts = weights[..., self.keys] * shares.to(weights.dtype)
        out = parts.new_zeros(*weights.shape[:-1], count)
        return out.scatter_add_(-1, tokens.expand_as(parts), parts)


def land_by_axes(rows: Tensor, columns: Tensor, prefix: int = 0) -> Landing:
    """Return how values that are weighted means of a map's rows and columns lie on it.

    Args:
        rows: ``[h, H]``, how much of each of the map's rows is in each row of values.
        columns: ``[w, W]``, the same of columns.
        prefix: Tokens before the map that are values themselves.
    """
    y, row = rows.nonzero(as_tuple=True)
    x, column = columns.nonzero(as_tuple=True)
    keys = prefix + y[:, None] * columns.shape[0] + x
    tokens = prefix + row[:, None] * columns.shape[1] + column
    shares = rows[y, row][:, None] * columns[x, column]
    first = torch.arange(prefix, device=rows.device)
    keys, tokens = (torch.cat([first, part.flatten()]) for part in (keys, tokens))
    shares = torch.cat([shares.new_ones(prefix), shares.flatten()])
    return Landing(keys, tokens[None], shares[None])


def axis_blocks(length: int, step: int, count: int, device: torch.device | None = None) -> Tensor:
    """Return the matrix ``[count, length]`` of means over ``step`` positions each, padding at the end included."""
    position = torch.arange(length, device=device)
    inside = position // step == torch.arange(count, device=device)[:, None]
    return inside / float(step)


def pooling_axis(length: int, bins: int, device: torch.device | None = None) -> Tensor:
    """Return the matrix ``[bins, length]`` of adaptive average pooling of a line."""
    return F.adaptive_avg_pool1d(torch.eye(length, device=device)[:, None], bins)[:, 0].T


@dataclass
class Recorded:
    """A call of an attention, as its module tells it.

    Attributes:
        kind: What it is: ``"neighborhood"``, ``"routing"``, ``"quadtree"``, ``"deformable"``, ``"agent"``,
            ``"window"``, ``"stripes"``, ``"global"``, ``"channel"`` or ``"gate"``.
        map_size: Lengths of the map's axes.
        operator: Which values each query mixes, and with what weights; None for a gate.
        values: What is mixed, ``[B, heads, M, d]``; None for a gate.
        project: From ``[B, heads, N, d]`` to the module's output, without its dropout.
        local: What gives ``[B, heads, N, d]`` that is added before the projection; None for nothing.
        arrange: From the module's output to the layout of what ``project`` returns, where that is another.
        prefix: Tokens before the map, among the queries and the values.
        landing: Where values lie that are not the input's tokens.
        gate: Of a gate, what the input is multiplied by.
        normalised: Whether a query's weights add up to 1.
        signed: Whether weights may be negative.
        softmax: Where ``normalised`` is False because something is added to a softmax, the operator without that.
        note: What else must be known, a sentence.
        details: What pictures draw, by name: ``"points"``, ``"agents"``, ``"regions"``, ``"routes"``.
    """

    kind: str
    map_size: tuple[int, ...]
    operator: Operator | None = None
    values: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    local: Callable[[], Tensor] | None = None
    arrange: Callable[[Tensor], Tensor] | None = None
    prefix: int = 0
    landing: Landing | None = None
    gate: Tensor | None = None
    normalised: bool = True
    signed: bool = False
    softmax: Operator | None = None
    note: str = ""
    details: dict[str, object] | None = None


def tell_gate(x: Tensor, gate: Tensor, signed: bool = False, note: str = "") -> Recorded:
    """Tell of a call that multiplied ``x`` ``[B, C, H, W]`` by a gate."""
    note = note or "a convolution, which may be negative" * signed
    return Recorded("gate", tuple(x.shape[2:]), gate=gate, project=lambda by: x * by, signed=signed, note=note)


def heads_to_map(x: Tensor, map_size: Sequence[int]) -> Tensor:
    """Return ``[B, heads, N, d]`` as a map ``[B, *map_size, heads * d]``."""
    return x.transpose(1, 2).flatten(2).unflatten(1, tuple(map_size))


def map_to_heads(x: Tensor, heads: int) -> Tensor:
    """Return a map ``[B, ..., heads * d]`` as ``[B, heads, N, d]``."""
    return x.flatten(1, -2).unflatten(-1, (heads, -1)).transpose(1, 2)


def spread_rows(rows: Rows, count: int) -> Tensor:
    """Return rows as a matrix ``[B, heads, Q, count]``."""
    if rows.keys is None:
        return rows.weights
    weights, keys = rows.weights, rows.keys.expand_as(rows.weights)
    out = weights.new_zeros(*weights.shape[:3], count + 1)
    return out.scatter_add_(-1, torch.where(keys < 0, count, keys), weights)[..., :count]
