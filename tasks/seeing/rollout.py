"""Attention carried through a network, from what the classifier reads down to the image: rollout and relevance.

A vector is carried, never a product of matrices: row i of ``M_L ... M_1`` is ``(M_1^T ... M_L^T e_i)^T``. So a
distribution over the last layer's tokens goes down through the transposed operator of each layer, sparse as it is, and
of what makes the map smaller between them.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from ...blocks.record import Rows, gather_keys, spread_rows
from .. import TaskError
from .call import AttentionCall, land
from .cam import Target, evaluating, target_logits
from .record import Record, is_named, record_attention


class Pixel(NamedTuple):
    """A place in pixels of the image, for ``read``: the position of the last map that it lies in."""

    x: float
    y: float


Read = str | tuple[int, int] | Pixel

_FUSES = ("mean", "min", "max")
# Numbers held at once where heads are compared, which takes all of a row.
_CHUNK = 2**22


class _Shrink(NamedTuple):
    """What made a map smaller: windows of ``kernel`` positions, ``stride`` apart.

    Attributes:
        before: How many attention calls came before.
        source: Height and width of what it was given.
        size: Height and width of what it made.
        kernel: Height and width of its window.
        stride: Positions from one window to the next.
        padding: Positions before the first window's first that are padding.
        dilation: Distance of a window's positions.
    """

    before: int
    source: tuple[int, int]
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def carry(self, r: Tensor, source: tuple[int, int]) -> Tensor:
        """Carry ``r`` ``[B, h, w]`` to the positions ``source`` that there are, evenly over each window."""
        axes = zip(source, self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        rows, columns = (_windows_of_axis(*axis, r) for axis in axes)
        return rows.T @ r @ columns


def _windows_of_axis(
    length: int, count: int, kernel: int, stride: int, padding: int, dilation: int, like: Tensor
) -> Tensor:
    """Return the matrix ``[count, length]`` of the means over the positions of each window that there are."""
    first = torch.arange(count) * stride - padding
    inside = torch.zeros(count, length, dtype=like.dtype)
    for tap in range(kernel):
        at = first + tap * dilation
        there = (at >= 0) & (at < length)
        inside[there.nonzero()[:, 0], at[there]] = 1
    return (inside / inside.sum(1, keepdim=True).clamp(min=1)).to(like.device)


class _Path(NamedTuple):
    """A recorded forward pass: what attended, what made maps smaller, and what came out."""

    record: Record
    shrinks: list[_Shrink]
    output: object
    image_size: tuple[int, int]
    dtype: torch.dtype


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _shrink(module: nn.Module, before: int, x: Tensor, out: Tensor) -> _Shrink | None:
    if isinstance(module, PatchMerging):
        size = tuple(out.shape[1:3])
        return _Shrink(before, tuple(x.shape[1:3]), size, (2, 2), (2, 2), (0, 0), (1, 1))
    source, size = tuple(x.shape[2:]), tuple(out.shape[2:])
    kernel, stride = _pair(module.kernel_size), _pair(module.stride or module.kernel_size)
    dilation = _pair(getattr(module, "dilation", 1))
    if isinstance(module.padding, str) or "Same" in type(module).__name__:
        # Padding as TensorFlow has it: what is missing, half of it before.
        axes = zip(source, size, kernel, stride, dilation, strict=True)
        padding = tuple(max(0, (m - 1) * s + (k - 1) * d + 1 - n) // 2 for n, m, k, s, d in axes)
    else:
        padding = _pair(module.padding)
    return _Shrink(before, source, size, kernel, stride, padding, dilation)


@contextlib.contextmanager
def _watch(model: nn.Module, record: Record, shrinks: list[_Shrink]) -> Iterator[None]:
    """Keep what makes maps smaller outside of attentions."""
    with contextlib.ExitStack() as stack:
        inside = {id(part) for name in record.watched for part in model.get_submodule(name).modules()}

        def keep(module: nn.Module, args: tuple, out: Tensor) -> None:
            if args[0].ndim == 4:
                shrinks.append(_shrink(module, len(record), args[0], out))

        for module in model.modules():
            strided = (
                isinstance(module, (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d))
                and max(_pair(module.stride or module.kernel_size)) > 1
            )
            if id(module) not in inside and (strided or isinstance(module, PatchMerging)):
                stack.callback(module.register_forward_hook(keep).remove)
        yield


def _run(model: nn.Module, x: Tensor, gradients: bool) -> _Path:
    if x.ndim != 4:
        raise TaskError(f"images are [B, C, H, W]; got {list(x.shape)}")
    model = getattr(model, "_orig_mod", model)
    shrinks: list[_Shrink] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        record = stack.enter_context(record_attention(model))
        stack.enter_context(_watch(model, record, shrinks))
        output = model(x.detach().clone().requires_grad_(gradients))
    unread = {name: reason for name, reason in record.skipped.items() if reason.startswith("there is no reader")}
    if unread:
        name, reason = next(iter(unread.items()))
        raise TaskError(
            f"{type(model).__name__} can't be carried through: {reason}, {name}, and {len(unread) - 1} more like it"
        )
    if not any(_mixes(call) for call in record.values()):
        raise TaskError(f"no attention of {type(model).__name__} mixes positions; it has gates or channels alone")
    return _Path(record, shrinks, output, tuple(x.shape[2:]), torch.promote_types(x.dtype, torch.float32))


def _mixes(call: AttentionCall) -> bool:
    return call.kind not in ("gate", "channel")


def _start(model: nn.Module, call: AttentionCall, size: tuple[int, int], path: _Path, read: Read) -> Tensor:
    """Return where the classifier reads, ``[B, prefix + h * w]``."""
    prefix, count, batch = call.prefix, size[0] * size[1], call.values.shape[0]
    r = torch.zeros(batch, prefix + count, dtype=torch.float64, device=call.values.device)
    if read == "auto":
        read, tokens = _reads(model, prefix)
    else:
        tokens = 1
    if read == "class":
        if not prefix:
            raise TaskError(f"{type(model).__name__} has no class token; read is 'mean' or (row, column)")
        r[:, :tokens] = 1 / tokens
    elif read == "mean":
        r[:, prefix:] = 1 / count
    else:
        if isinstance(read, Pixel):
            height, width = path.image_size
            if not (0 <= read.x < width and 0 <= read.y < height):
                raise TaskError(f"the image is {width}x{height} pixels; {tuple(read)} is not on it")
            steps = (step * own / new for step, own, new in zip(call.pixel_steps(), call.map_size, size, strict=True))
            axes = zip((read.y, read.x), steps, size, strict=True)
            read = tuple(min(int(place // step), length - 1) for place, step, length in axes)
        if isinstance(read, str) or len(read) != 2:
            raise TaskError(f"read is 'auto', 'class', 'mean' or (row, column); got {read!r}")
        row, column = read
        if not (0 <= row < size[0] and 0 <= column < size[1]):
            raise TaskError(f"the last map is {size[0]}x{size[1]}; it has no position {tuple(read)}")
        r[:, prefix + row * size[1] + column] = 1
    return r


def _reads(model: nn.Module, prefix: int) -> tuple[str, int]:
    """Return what a classifier reads, and how many class tokens."""
    pool = getattr(model, "global_pool", None)
    if pool == "map" or getattr(model, "attn_pool", None) is not None:
        raise TaskError(
            f"{type(model).__name__} pools by attention, which is not carried through; say read='mean', or 'class'"
        )
    if not prefix or (isinstance(pool, str) and pool not in ("token", "")):
        return "mean", 0
    # Heads of a distilled model read a token each, and their logits are averaged.
    return "class", 2 if getattr(model, "dist_token", None) is not None else 1


Step = Callable[[str, AttentionCall, Tensor], Tensor]


def _carry(
    model: nn.Module,
    path: _Path,
    read: Read,
    layers: Sequence[str] | str | None,
    every_layer: bool,
    pixels: bool,
    step: Step,
) -> Tensor | dict[str, Tensor]:
    """Carry what the classifier reads down through a forward pass; ``step`` goes through an attention."""
    layers = [layers] if isinstance(layers, str) else layers
    names = list(path.record)
    selected = [name for name in names if is_named(name.partition("#")[0], layers) and _mixes(path.record[name])]
    if not selected:
        raise TaskError(f"no attention is named {layers}; there are {', '.join(names[:4])}, ...")
    calls = {index: name for index, name in enumerate(names) if _mixes(path.record[name])}
    last = path.record[calls[max(calls)]]
    # What happens, from the last to the first: attentions by their number, and what makes maps smaller.
    events = [(index, 1, name) for index, name in calls.items()]
    events += [(shrink.before - 1, 2 + place, shrink) for place, shrink in enumerate(path.shrinks)]
    events = [event for *_, event in sorted(events, key=lambda event: event[:2], reverse=True)]
    size = next(
        (event.size for event in events[: events.index(calls[max(calls)])] if isinstance(event, _Shrink)),
        last.map_size,
    )
    prefix = last.prefix
    r = _start(model, last, size, path, read)
    maps = {}
    for place, event in enumerate(events):
        if isinstance(event, _Shrink):
            r, size = _descend(event, events[place + 1 :], r, size, prefix, path)
            continue
        call = path.record[event]
        if (call.map_size, call.prefix) != (tuple(size), prefix):
            raise TaskError(
                f"it cannot be told how the {_by(call.map_size)} map of {event} becomes the {_by(size)} one after it"
            )
        if event in selected:
            r = step(event, call, r)
            if every_layer or event == selected[0]:
                maps[event] = _finish(r, size, prefix, events[place + 1 :], path) if pixels else _map(r, size, prefix)
        if event == selected[0]:
            break
    maps = {name: part.to(path.dtype) for name, part in maps.items()}
    return {name: maps[name] for name in selected} if every_layer else maps[selected[0]]


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _map(r: Tensor, size: tuple[int, int], prefix: int) -> Tensor:
    return r[:, prefix:].unflatten(1, tuple(size))


def _descend(
    shrink: _Shrink, below: Sequence[object], r: Tensor, size: tuple[int, int], prefix: int, path: _Path
) -> tuple[Tensor, tuple[int, int]]:
    """Carry ``r`` to the larger map that a map was made from, or leave it if it is another map's."""
    if shrink.size != tuple(size):
        return r, size
    source = _source(shrink, below, path)
    larger = shrink.carry(_map(r, size, prefix), source)
    return torch.cat([r[:, :prefix], larger.flatten(1)], 1), source


def _source(shrink: _Shrink, below: Sequence[object], path: _Path) -> tuple[int, int]:
    """Return the size of the map before its padding to whole windows: that of what came before, else the image."""
    sizes = [event.size if isinstance(event, _Shrink) else path.record[event].map_size for event in below]
    for size in (*sizes, path.image_size):
        axes = zip(shrink.source, size, shrink.stride, strict=True)
        if all(0 <= given - length < step for given, length, step in axes):
            return tuple(size)
    return shrink.source


def _finish(r: Tensor, size: tuple[int, int], prefix: int, below: Sequence[object], path: _Path) -> Tensor:
    """Carry ``r`` to the image through what made maps smaller, without the attentions in between: ``[B, H, W]``."""
    for place, event in enumerate(below):
        if isinstance(event, _Shrink):
            r, size = _descend(event, below[place + 1 :], r, size, prefix, path)
    if tuple(size) == path.image_size:
        return _map(r, size, prefix)
    # What cuts the image is no layer that is known: cells of equal sides.
    rows, columns = (
        (torch.arange(length, device=r.device) * count // length)
        for length, count in zip(path.image_size, size, strict=True)
    )
    cells = _map(r, size, prefix)
    shares = torch.bincount(rows, minlength=size[0])[:, None] * torch.bincount(columns, minlength=size[1])
    return (cells / shares.clamp(min=1))[:, rows][:, :, columns]


def _scatter(rows: Rows, weights: Tensor, count: int) -> Tensor:
    """Return the sum over queries and heads of weights ``[B, heads, Q, K]``, for each value: ``[B, count]``."""
    if rows.keys is None:
        return weights.sum((1, 2))
    keys = rows.keys
    if keys.shape[1] == 1:
        weights = weights.sum(1, keepdim=True)
    keys = torch.where(keys < 0, count, keys).expand_as(weights).flatten(1)
    return weights.new_zeros(len(weights), count + 1).scatter_add_(1, keys, weights.flatten(1))[:, :count]


def _shares_on_map(call: AttentionCall, tokens: int, keys: int) -> Tensor:
    """Return how much of each value's weight lies on the input's tokens, not beyond: ``[B or 1, keys + 1]``."""
    landing = call.recorded.landing
    if landing is None:
        return (torch.arange(keys + 1, device=call.values.device) < tokens).double()[None]
    shares = landing.shares.double()
    out = shares.new_zeros(len(shares), keys + 1)
    return out.scatter_add_(1, landing.keys.expand_as(shares), shares)


def _roll_mean(call: AttentionCall, r: Tensor) -> Tensor:
    """Carry ``r`` ``[B, T]`` through the mean of the heads, its padding dropped, half and half with the identity."""
    operator, tokens = call.operator(softmax_only=True), r.shape[1]
    on_map = _shares_on_map(call, tokens, operator.keys)
    out, identity = r.new_zeros(len(r), operator.keys), r.clone()
    for queries, rows in operator.chunks(len(r)):
        weights = rows.weights.double() / operator.heads
        if rows.keys is None:
            total = (weights * on_map[:, None, None, :-1]).sum((1, 3))
        else:
            keys = torch.where(rows.keys < 0, operator.keys, rows.keys)
            batch = torch.arange(len(on_map), device=r.device)[:, None, None, None]
            total = (weights * on_map[batch, keys]).sum((1, 3))
        # A query that sees nothing but padding keeps what it has.
        seen = total > 0
        scale = torch.where(seen, r[:, queries] / total.where(seen, 1.0), 0.0) / 2
        identity[:, queries] -= torch.where(seen, r[:, queries], 0.0) / 2
        out += _scatter(rows, weights * scale[:, None, :, None], operator.keys)
    return identity + land(call.recorded, out, tokens)


def _fused(call: AttentionCall, tokens: int, batch: int, fuse: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield queries and their rows ``[B, Q, T]`` on the input's tokens, heads fused."""
    operator = call.operator(softmax_only=True)
    for queries, sparse in operator.chunks(batch, max(tokens, operator.keys)):
        rows = land(call.recorded, spread_rows(sparse, operator.keys), tokens).double()
        yield queries, rows.mean(1) if fuse == "mean" else rows.amin(1) if fuse == "min" else rows.amax(1)


def _roll(call: AttentionCall, r: Tensor, fuse: str, discard: float) -> Tensor:
    """Carry ``r`` through the fused heads plus the identity, rows brought to 1, the smallest entries discarded."""
    tokens = r.shape[1]
    if not discard:
        out = torch.zeros_like(r)
        for queries, rows in _fused(call, tokens, len(r), fuse):
            scale = r[:, queries] / (1 + rows.sum(2))
            out += (rows * scale[:, :, None]).sum(1)
            out[:, queries] += scale
        return out
    entries: list[list[tuple[Tensor, Tensor]]] = [[] for _ in r]
    for queries, rows in _fused(call, tokens, len(r), fuse):
        for image, part in enumerate(rows):
            row, column = part.nonzero(as_tuple=True)
            entries[image].append((queries[row] * tokens + column, part[row, column]))
    out = []
    for image, parts in enumerate(entries):
        place, value = (torch.cat(part) for part in zip(*parts, strict=True))
        dropped = value.topk(int(len(value) * discard), largest=False).indices
        if call.prefix:
            dropped = dropped[place[dropped] != 0]  # the class token's own
        value[dropped] = 0
        query, token = place // tokens, place % tokens
        scale = r[image] / r.new_ones(tokens).index_add(0, query, value)
        out.append(scale.index_add(0, token, value * scale[query]))
    return torch.stack(out)


@torch.no_grad()
def rollout(
    model: nn.Module,
    x: Tensor,
    fuse: str = "mean",
    discard: float = 0.0,
    read: Read = "auto",
    layers: str | Sequence[str] | None = None,
    every_layer: bool = False,
    pixels: bool = False,
) -> Tensor | dict[str, Tensor]:
    """Return where what the classifier reads comes from, by attention weights alone (rollout, arXiv 2005.00928).

    Each attention counts as the mean of its heads, half and half with the identity of its shortcut; that share is the
    paper's convention, not the network's. Weight on padding is dropped and the rest brought back to 1. Convolutions
    that are added to an attention, MLPs and gates are taken for the identity, and what makes a map smaller for a mean
    over its window: windows that overlap leave a faint grid, of positions that two of them share. The map says nothing
    of a class: see `relevance`.

    Args:
        model: A classifier or backbone of foveate, or of timm's that `record_attention` reads. It is run in
            evaluation mode and left as it was.
        x: Images ``[B, C, H, W]``, normalised.
        fuse: ``"mean"`` of the heads; ``"min"`` and ``"max"`` are brought to rows of 1 after the identity is added.
        discard: Part of the smallest entries of each attention that become 0, after the heads are fused.
        read: Where to begin: at the ``"class"`` token, at the ``"mean"`` of the last map, or at one of its positions
            ``(row, column)``, or at that of a `Pixel` of the image. ``"auto"``: what the classifier reads; both class
            tokens of a distilled model.
        layers: Globs of the attentions to count; others are taken for the identity.
        every_layer: Whether to return a map for each attention, of what it was given.
        pixels: Whether to go on to the pixels, through the convolutions of the stem.

    Returns:
        ``[B, h, w]`` on the tokens that the first of the layers is given, or ``[B, H, W]`` with ``pixels``; with
        ``every_layer`` a dict of such maps by layer, in call order. A map adds up to 1 together with the prefix tokens,
        which are left out.

    Raises:
        TaskError: If an argument is none of those, an attention of the model has no reader (CaiT) or weights below 0
            (InLine), or it cannot be told how one map becomes the next.

    Example:
        >>> model = timm.create_model("nat_atto").eval()
        >>> foveate.explain.rollout(model, torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 16, 24])
    """
    if fuse not in _FUSES:
        raise TaskError(f"fuse is one of {', '.join(map(repr, _FUSES))}; got {fuse!r}")
    if not 0 <= discard < 1:
        raise TaskError(f"discard is a part of the entries, from 0 to less than 1; got {discard}")
    path = _run(model, x, gradients=False)
    signed = [name for name, call in path.record.items() if _mixes(call) and call.signed and not call.recorded.softmax]
    if signed:
        raise TaskError(
            f"rollout needs weights that are not negative; those of {signed[0]} of {type(model).__name__} may be "
            "(linear attention). relevance takes them"
        )

    def step(name: str, call: AttentionCall, r: Tensor) -> Tensor:
        return _roll_mean(call, r) if fuse == "mean" and not discard else _roll(call, r, fuse, discard)

    return _carry(model, path, read, layers, every_layer, pixels, step)


def relevance(
    model: nn.Module,
    x: Tensor,
    target: Target = None,
    read: Read = "auto",
    layers: str | Sequence[str] | None = None,
    every_layer: bool = False,
    pixels: bool = False,
    shortcut: bool = True,
) -> Tensor | dict[str, Tensor]:
    """Return what speaks for a class, by attention weights times their gradients (arXiv 2103.15679, rules 5 and 6).

    Each attention adds ``C R`` to the relevance R, where C is the mean over the heads of the positive part of weights
    times the derivative of the class's logit by them. Nothing is normalised; weight on padding is dropped. Negative
    weights, of linear attention and of learned tokens, count like others.

    Args:
        model: As in `rollout`; it must give logits.
        x: Images ``[B, C, H, W]``, normalised.
        target: Class whose raw logit is explained, one for all images or one for each; the likeliest if None.
        read: As in `rollout`, like the other arguments.
        layers: Globs of the attentions to count: the last blocks alone where early ones blur (CLIP).
        every_layer: Whether to return a map for each attention.
        pixels: Whether to go on to the pixels.
        shortcut: Whether to count what came through the shortcuts of all layers. The rule does, and behind a class
            token it makes no difference, for none of it lies on the map. Where the last map is averaged it is 1/N at
            every position, many times what the attentions add, and all but hides them: False leaves it out.

    Returns:
        As `rollout`; maps do not add up to 1.

    Raises:
        TaskError: As `rollout`, or if the model gives no logits, or there is no such class.
    """
    path = _run(model, x, gradients=True)
    score = target_logits(model, path.output, target).sum()
    names = [name for name, call in path.record.items() if _mixes(call) and call.output.requires_grad]
    outputs = [path.record[name].output for name in names]
    gradients = torch.autograd.grad(score, outputs, allow_unused=True)
    upstream = dict(zip(names, gradients, strict=True))

    def step(name: str, call: AttentionCall, r: Tensor) -> Tensor:
        if upstream.get(name) is None:
            return r
        return _add_relevance(call, r, call.heads_gradient(upstream[name]))

    with torch.no_grad():
        if shortcut:
            return _carry(model, path, read, layers, every_layer, pixels, step)
        # What is left is small beside what is taken away.
        exact = path._replace(dtype=torch.float64)
        maps = _carry(model, exact, read, layers, True, pixels, step)
        alone = _carry(model, exact, read, layers, True, pixels, lambda name, call, r: r)
    maps = {name: (part - alone[name]).clamp(min=0).to(path.dtype) for name, part in maps.items()}
    return maps if every_layer else next(iter(maps.values()))


def _add_relevance(call: AttentionCall, r: Tensor, gradient: Tensor) -> Tensor:
    """Add the transposed C times ``r`` ``[B, T]``, for the derivative ``[B, heads, N, d]`` by the heads' outputs."""
    operator, values = call.operator(), call.values
    out = r.new_zeros(len(r), operator.keys)
    for queries, rows in operator.chunks(len(r) * max(1, values.shape[3] // 16)):
        upstream = gradient[:, :, queries]
        if rows.keys is None:
            slope = upstream @ values.mT
        else:
            slope = (gather_keys(values, rows.keys) @ upstream.unsqueeze(4)).squeeze(4)
        weights = (rows.weights * slope).clamp(min=0).double() / operator.heads
        out += _scatter(rows, weights * r[:, None, queries, None], operator.keys)
    return r + land(call.recorded, out, r.shape[1])
