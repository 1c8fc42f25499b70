"""One call of an attention, answered when it is asked: rows and matrices, pixels, gradients, checks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...blocks.record import Operator, Recorded, Rows, exact, gather_keys, spread_rows

# Numbers held at once while queries are added up: 16 MB in float32.
_HELD = 2**22


class Use(NamedTuple):
    """What queries use of an attention's input.

    Attributes:
        weights: On the map's tokens, ``[B, heads, h, w]``.
        seen: Which tokens at least one of the queries sees, ``[B, heads, h, w]``, bool.
        whole: Which of them it sees one by one, not pooled with others or between sampled points.
        rest: The weight on padding, beyond the map and on prefix tokens, ``[B, heads]``.
    """

    weights: Tensor
    seen: Tensor
    whole: Tensor
    rest: Tensor


@contextmanager
def as_called(module: nn.Module, training: Sequence[bool]) -> Iterator[None]:
    """Let a module compute as in a former call, and leave no trace: no gradients, statistics or autocast.

    Args:
        module: The module.
        training: Whether each of ``module.modules()`` was in training.
    """
    modules = list(module.modules())
    modes = [part.training for part in modules]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()] if any(training) else []
    device = next((parameter.device.type for parameter in module.parameters()), "cpu")
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_without_autocast(device))
        for part, mode in zip(modules, training, strict=True):
            part.training = mode
        try:
            yield
        finally:
            for part, mode in zip(modules, modes, strict=True):
                part.training = mode
            for buffer, before in buffers:
                buffer.copy_(before)


def _without_autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False)


class AttentionCall:
    """One call of an attention: a sparse operator with a row for each query, computed when it is asked for.

    Queries N are the prefix tokens and the map's, row-major; values M are the prefix tokens, the map's tokens, then
    padding, unless ``values`` says otherwise.

    Args:
        name: Name of the module, and ``#2`` and so on if it was called before.
        module: The module.
        recompute: What gives its `Recorded`.
        training: Whether each of the module's modules was in training.
        output: What the module returned.
        image_size: Height and width of the image in pixels; None if the input is the map itself.
        reductions: Pixels, along an axis, to a token of each of the model's maps.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        recompute: Callable[[], Recorded],
        training: Sequence[bool],
        output: Tensor,
        image_size: tuple[int, int] | None = None,
        reductions: Sequence[int] = (),
    ):
        self.name, self.module, self.output = name, module, output
        self.image_size, self.reductions = image_size, tuple(reductions)
        self._recompute, self._training = recompute, list(training)
        self._kept: Recorded | None = None
        self._version = None if output.is_inference() else output._version

    def __repr__(self) -> str:
        size = "x".join(map(str, self.map_size))
        return f"AttentionCall({self.name!r}, {self.kind}, {size} map)"

    @property
    def recorded(self) -> Recorded:
        """What the module told of the call."""
        if self._kept is None:
            with self._as_called():
                self._kept = self._recompute()
        return self._kept

    def _as_called(self) -> AbstractContextManager:
        return as_called(self.module, self._training)

    @property
    def kind(self) -> str:
        """What kind of attention it is; see `Recorded`."""
        return self.recorded.kind

    @property
    def map_size(self) -> tuple[int, ...]:
        """Height and width of the map, or the lengths of its axes."""
        return self.recorded.map_size

    @property
    def prefix(self) -> int:
        """Number of tokens before the map."""
        return self.recorded.prefix

    @property
    def normalised(self) -> bool:
        """Whether a query's weights, those of padding and prefix included, add up to 1."""
        return self.recorded.normalised

    @property
    def signed(self) -> bool:
        """Whether weights may be negative."""
        return self.recorded.signed

    @property
    def note(self) -> str:
        """What else must be known of this attention's weights; empty for a plain softmax."""
        return self.recorded.note

    @property
    def heads(self) -> int:
        """Number of heads, or of groups of channels."""
        return self._operator.heads

    @property
    def values(self) -> Tensor:
        """What the weights mix, ``[B, heads, M, d]``.

        M are the prefix tokens, the map's tokens row-major, then padding; of deformable attention the sampled points,
        of a quadtree the tokens of all levels, the finest first; of channel attention the channels of a group, and d
        the positions.
        """
        self._need_operator()
        return self.recorded.values

    @property
    def local(self) -> Tensor | None:
        """What is added before the projection, ``[B, heads, N, d]``: LePE, a depthwise convolution; None if nothing."""
        if self.recorded.local is None:
            return None
        with self._as_called():
            return exact(self.recorded.local())

    @property
    def gate(self) -> Tensor:
        """What the input is multiplied by, broadcastable to ``[B, C, H, W]``.

        Raises:
            ValueError: If this is no gate.
        """
        if self.recorded.gate is None:
            raise ValueError(f"{self.name} is {self.kind} attention, no gate; its weights are matrix() and at((x, y))")
        return self.recorded.gate

    @property
    def details(self) -> dict[str, object]:
        """What pictures draw of this kind: ``"points"``, ``"references"``, ``"agents"``, ``"regions"``."""
        return self.recorded.details or {}

    @property
    def _operator(self) -> Operator:
        self._need_operator()
        return self.recorded.operator

    def _need_operator(self) -> None:
        if self.recorded.operator is None:
            raise ValueError(f"{self.name} is a gate, which mixes no positions; what it multiplies by is `gate`")

    def rows(self, queries: Sequence[int] | Tensor, softmax_only: bool = False) -> Rows:
        """Return the index sets and weights of some queries, numbered as the rows of `matrix`.

        Args:
            queries: Numbers ``[Q]``.
            softmax_only: Whether to leave out what some attentions add after the softmax; see ``note``.
        """
        operator = self.operator(softmax_only)
        with torch.no_grad():
            return operator.rows(torch.as_tensor(queries, device=operator.device).long())

    def operator(self, softmax_only: bool = False) -> Operator:
        """Return the operator itself, for what works through it row by row; arguments as in `rows`."""
        operator = self._operator
        return self.recorded.softmax or operator if softmax_only else operator

    @torch.no_grad()
    def matrix(self, softmax_only: bool = False) -> Tensor:
        """Return all weights, ``[B, heads, N, M]``; of channel attention ``[B, groups, d, d]``."""
        operator = self.operator(softmax_only)
        batch = self.values.shape[0]
        out = []
        for _, rows in operator.chunks(batch):
            out.append(spread_rows(rows, operator.keys))
        return torch.cat(out, 2)

    @torch.no_grad()
    def apply(self, v: Tensor) -> Tensor:
        """Return the matrix times ``v`` ``[B, heads, M, d]``: ``[B, heads, N, d]``."""
        operator = self._operator
        if tuple(v.shape[1:3]) != (operator.heads, operator.keys):
            raise ValueError(
                f"{self.name} mixes {operator.keys} values in {operator.heads} heads; got {list(v.shape)}, which is no "
                f"[B, {operator.heads}, {operator.keys}, d]"
            )
        out = []
        for _, rows in operator.chunks(max(1, v.shape[0] * v.shape[3] // 64)):
            if rows.keys is None:
                out.append(rows.weights.to(v.dtype) @ v)
            else:
                out.append((rows.weights.unsqueeze(3).to(v.dtype) @ gather_keys(v, rows.keys)).squeeze(3))
        return torch.cat(out, 2)

    def project(self, heads: Tensor) -> Tensor:
        """Return what the module makes of its heads' outputs ``[B, heads, N, d]``, without dropout."""
        self._need_operator()
        parameter = next(self.module.parameters(), heads)
        with self._as_called():
            return self.recorded.project(heads.to(parameter.dtype))

    def check(self) -> float:
        """Return how far the weights are from what the module computed, as a part of the output's largest entry.

        That is rounding, about 1e-6 in float32, unless the module has changed since it was called, was called under
        autocast or in half precision, or has dropout after its projection.

        Raises:
            ValueError: If the output was overwritten by what came after the module.
        """
        if self._version is not None and self.output._version != self._version:
            raise ValueError(f"the output of {self.name} was overwritten by what came after it")
        if self.recorded.gate is not None:
            with self._as_called():
                out = self.recorded.project(self.recorded.gate)
        else:
            out = self.apply(self.values)
            local = self.local
            out = self.project(out if local is None else out + local)
        expected = exact(self._arrange(self.output.detach()))
        largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
        return ((exact(out) - expected).abs().max() / largest).item()

    def gradient(self, score: Tensor) -> Tensor:
        """Return the derivative of a score by the matrix, ``[B, heads, N, M]``.

        That is the derivative by the heads' outputs times the values, also where the attention has no key: there the
        weight is 0, but the derivative is not. Images of a batch that don't influence each other may be summed.

        Args:
            score: A number, computed from the recorded call with gradients.

        Raises:
            ValueError: If the call was recorded without gradients, or the score does not depend on it.
        """
        return self.output_gradient(score) @ self.values.mT

    def output_gradient(self, score: Tensor) -> Tensor:
        """Return the derivative of a score by what the heads put out, ``[B, heads, N, d]``; see `gradient`."""
        if not self.output.requires_grad:
            raise ValueError(
                f"{self.name} was recorded without gradients; call the model with gradients enabled, on an input or "
                "with parameters that require them"
            )
        (upstream,) = torch.autograd.grad(score, self.output, retain_graph=True, allow_unused=True)
        if upstream is None:
            raise ValueError(f"the score does not depend on the recorded call of {self.name}")
        return self.heads_gradient(upstream)

    def heads_gradient(self, upstream: Tensor) -> Tensor:
        """Carry a derivative by the module's output back through its projection, to ``[B, heads, N, d]``."""
        values = self.values
        dropout = getattr(self.module, "proj_drop", None)
        if isinstance(dropout, nn.Dropout) and dropout.p > 0 and self._training[0]:
            upstream = upstream * (self.output.detach() != 0) / (1 - dropout.p)
        upstream = self._arrange(upstream)
        parameter = next(self.module.parameters(), values)
        with torch.enable_grad(), _without_autocast(values.device.type):
            mixed = values.new_zeros(values.shape[0], self.heads, self._operator.queries, values.shape[3])
            if self._nonlinear():
                local = self.local
                mixed = self.apply(values) + (0 if local is None else local)
            mixed = mixed.to(parameter.dtype).requires_grad_()
            out = self.recorded.project(mixed)
            (gradient,) = torch.autograd.grad(out, mixed, upstream.to(out.dtype))
        return exact(gradient)

    def _arrange(self, out: Tensor) -> Tensor:
        arrange = self.recorded.arrange
        return out if arrange is None else arrange(out)

    def _nonlinear(self) -> bool:
        # timm's attentions may norm the heads' outputs before the projection.
        return any(isinstance(part, nn.LayerNorm) for part in (getattr(self.module, "norm", None),))

    def token_at(self, place: tuple[float, float] | int) -> int:
        """Return the number of the query at a pixel ``(x, y)``, or of a prefix token ``0, 1, ...``."""
        recorded = self.recorded
        if isinstance(place, int):
            if not 0 <= place < recorded.prefix:
                raise ValueError(f"{self.name} has {recorded.prefix} prefix tokens; got {place}")
            return place
        self._need_places()
        (height, width), (step_y, step_x) = self._pixels(), self.pixel_steps()
        x, y = place
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"the image is {width}x{height} pixels; ({x}, {y}) is not on it")
        rows, columns = recorded.map_size
        row, column = min(int(y // step_y), rows - 1), min(int(x // step_x), columns - 1)
        return recorded.prefix + row * columns + column

    def _need_places(self) -> None:
        self._need_operator()
        if self.kind == "channel":
            raise ValueError(f"{self.name} mixes the channels of each position; its weights are matrix()")
        if len(self.map_size) != 2:
            raise ValueError(f"pixels are those of maps of two axes; {self.name} is on one of {self.map_size}")

    def _pixels(self) -> tuple[int, int]:
        return self.map_size if self.image_size is None else self.image_size

    def pixel_steps(self) -> tuple[int, int]:
        """Return of how many pixels, down and across, a token is one."""
        sizes = list(zip(self._pixels(), self.map_size, strict=True))
        for step in self.reductions:
            if all(length // step <= count <= -(-length // step) for length, count in sizes):
                return step, step
        return tuple(max(1, -(-length // count)) for length, count in sizes)

    def spread_on_pixels(self, tokens: Tensor) -> Tensor:
        """Spread numbers of the map's tokens ``[..., h, w]`` evenly over their pixels: ``[..., H, W]``."""
        for axis, length, step, count in zip((-2, -1), self._pixels(), self.pixel_steps(), self.map_size, strict=True):
            cell = torch.arange(length, device=tokens.device) // step
            inside = cell < count
            sizes = torch.bincount(cell[inside], minlength=count).clamp(min=1)
            shape = (-1, 1) if axis == -2 else (-1,)
            tokens = (tokens / sizes.view(shape)).index_select(axis, cell.clamp(max=count - 1)) * inside.view(shape)
        return tokens

    @torch.no_grad()
    def on_tokens(self, queries: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of queries ``[Q]`` on the attention's input, and what is left.

        Returns:
            Weights ``[B, heads, Q, prefix + map tokens]``, and those on padding and beyond the map ``[B, heads, Q]``.
        """
        self._need_places()
        rows = self.rows(queries)
        count = self.recorded.prefix + self.map_size[0] * self.map_size[1]
        spread = spread_rows(rows, self._operator.keys)
        total = spread.sum(-1)
        tokens = land(self.recorded, spread, count)
        return tokens, total - tokens.sum(-1)

    @torch.no_grad()
    def use(self, queries: Sequence[int] | Tensor) -> "Use":
        """Return what queries ``[Q]`` use on average; how many they are makes no difference to memory."""
        self._need_places()
        operator, batch = self._operator, self.values.shape[0]
        queries = torch.as_tensor(queries, device=operator.device).long()
        total = self.values.new_zeros(batch, operator.heads, operator.keys + 1)
        seen = torch.zeros_like(total)
        for part in queries.split(max(1, _HELD // max(1, batch * operator.row_size))):
            rows = operator.rows(part)
            if rows.keys is None:
                total[..., :-1] += rows.weights.sum(2)
                # Some of the heads see windows of it (HiLo).
                seen[..., :-1] += (rows.weights != 0).any(2)
            else:
                keys = torch.where(rows.keys < 0, operator.keys, rows.keys).expand_as(rows.weights).flatten(2)
                total.scatter_add_(2, keys, rows.weights.flatten(2))
                seen.scatter_(2, keys, 1.0)
        total, seen = total[..., :-1] / len(queries), seen[..., :-1]
        count = self.prefix + self.map_size[0] * self.map_size[1]
        tokens, landing = land(self.recorded, total, count), self.recorded.landing
        whole = seen[..., :count]
        if landing is not None:
            whole = landing._replace(shares=landing.shares * (landing.shares == 1)).land(seen, count)
        rest = total.sum(-1) - tokens[..., self.prefix :].sum(-1)
        seen = land(self.recorded, seen, count)
        maps = (part[..., self.prefix :].unflatten(-1, self.map_size) for part in (tokens, seen > 0, whole > 0))
        return Use(*maps, rest)

    def at(self, place: tuple[float, float] | int) -> Tensor:
        """Return the weights of the query at a pixel on the image, ``[B, heads, H, W]``.

        Args:
            place: ``(x, y)`` in input pixels, or the number of a prefix token.

        Returns:
            A value's weight lies evenly on its pixels. What lies on padding and prefix tokens is `outside`'s.
        """
        tokens, _ = self.on_tokens([self.token_at(place)])
        return self.spread_on_pixels(tokens[:, :, 0, self.recorded.prefix :].unflatten(-1, self.map_size))

    def outside(self, place: tuple[float, float] | int) -> Tensor:
        """Return the weight of a query on padding, beyond the map, and on prefix tokens, ``[B, heads]``."""
        tokens, rest = self.on_tokens([self.token_at(place)])
        return rest[:, :, 0] + tokens[:, :, 0, : self.recorded.prefix].sum(-1)


def land(recorded: Recorded, weights: Tensor, count: int) -> Tensor:
    """Return weights of values ``[B, ..., M]`` as those of the input's ``count`` tokens."""
    if recorded.landing is None:
        return weights[..., :count]
    return recorded.landing.land(weights, count)
