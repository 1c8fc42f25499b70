"""What each head of a model is like: how far it looks, how evenly, and what the model loses without it.

The measures are those of "How Does Attention Work in Vision Transformers?" and of the ViT paper
(arXiv 2010.11929, appendix D.7).
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...blocks.hilo import HiLoAttention2d
from ...blocks.record import spread_rows
from .. import TaskError
from .call import AttentionCall, land
from .cam import evaluating, target_logits
from .record import is_named, record_attention

# Numbers held at once.
_CHUNK = 2**22


class HeadFacts(NamedTuple):
    """A head on some images, the mean over images and queries.

    Attributes:
        layer: Name of the attention.
        kind: Its kind; see `blocks.record.Recorded`.
        head: Number of the head.
        distance: Mean distance to what it looks at, in pixels between centres of tokens; padding left out.
        entropy: Of its weights, in bits.
        possible: Entropy of equal weights on all that a query may look at, in bits.
        outside: Part of the weight that is on padding, beyond the map, and on prefix tokens.
        importance: What is lost without the head: accuracy, or probability of the class that the model chooses; None
            where its part can't be taken out.
    """

    layer: str
    kind: str
    head: int
    distance: float
    entropy: float
    possible: float
    outside: float
    importance: float | None


@torch.no_grad()
def describe_heads(
    model: nn.Module,
    x: Tensor,
    labels: Tensor | None = None,
    layers: str | Sequence[str] | None = None,
    ablate: bool = True,
    batch_size: int = 32,
) -> list[HeadFacts]:
    """Measure every head that mixes positions, and what the model loses when it puts out nothing.

    Args:
        model: A classifier that `record_attention` reads; for anything else say ``ablate=False``. It is run in
            evaluation mode and left as it was.
        x: Images ``[B, C, H, W]``, normalised.
        labels: Their classes ``[B]``: importance is then lost accuracy, else lost probability of the class that the
            whole model chooses.
        layers: Globs of attentions; all by default.
        ablate: Whether to measure importance: a forward pass for each head.
        batch_size: Images at once.

    Returns:
        Facts in call order, head by head.

    Raises:
        TaskError: If the model has no attention of positions there, or no logits to lose.
    """
    layers = [layers] if isinstance(layers, str) else layers
    batches = x.split(batch_size)
    parts = [None] * len(batches) if labels is None else labels.split(batch_size)
    with evaluating(model):
        per_batch = [_describe(model, *batch, layers, ablate) for batch in zip(batches, parts, strict=True)]
    return [_mean(facts, [len(batch) for batch in batches]) for facts in zip(*per_batch, strict=True)]


def _mean(facts: Sequence[HeadFacts], sizes: Sequence[int]) -> HeadFacts:
    """Return the mean of a head's facts on batches of so many images."""
    means = {}
    for name in ("distance", "entropy", "possible", "outside", "importance"):
        numbers = [getattr(fact, name) for fact in facts]
        if None not in numbers:
            means[name] = sum(number * size for number, size in zip(numbers, sizes, strict=True)) / sum(sizes)
    return facts[0]._replace(**means)


def _describe(
    model: nn.Module, x: Tensor, labels: Tensor | None, layers: Sequence[str] | None, ablate: bool
) -> list[HeadFacts]:
    """Return the facts of all heads on one batch."""
    with record_attention(model) as record:
        logits = model(x)
    calls = {
        name: call
        for name, call in record.items()
        if is_named(name.partition("#")[0], layers) and call.kind not in ("gate", "channel") and len(call.map_size) == 2
    }
    if not calls:
        raise TaskError(f"{type(model).__name__} has no attention between positions of that name")
    facts = []
    whole = _score(model, logits, logits, labels) if ablate else 0.0
    for name, call in calls.items():
        measured = zip(*_measure(call), strict=True)
        for head, (distance, entropy, possible, outside) in enumerate(measured):
            importance = None
            if ablate and (part := _part_of(call, head)) is not None:
                with _silenced(*part):
                    importance = whole - _score(model, model(x), logits, labels)
            facts.append(HeadFacts(name, call.kind, head, distance, entropy, possible, outside, importance))

    return facts


def _score(model: nn.Module, logits: Tensor, original: Tensor, labels: Tensor | None) -> float:
    if labels is not None:
        target_logits(model, logits, labels)
        return (logits.argmax(1) == labels.to(logits.device)).float().mean().item()
    classes = original.argmax(1) if isinstance(original, Tensor) and original.ndim == 2 else None
    target_logits(model, logits, classes)
    return logits.float().softmax(1).gather(1, classes[:, None]).mean().item()


def _measure(call: AttentionCall) -> tuple[list[float], ...]:
    """Return the mean distance, the entropy, that of equal weights, and the weight outside, of each head."""
    operator, recorded = call.operator(softmax_only=True), call.recorded
    prefix, (height, width), batch = call.prefix, call.map_size, call.values.shape[0]
    step_y, step_x = call.pixel_steps()
    token = torch.arange(height * width, device=operator.device)
    places = torch.stack([token // width * step_y, token % width * step_x], 1).double()
    sums = torch.zeros(4, operator.heads, dtype=torch.float64, device=operator.device)
    for queries, rows in operator.chunks(batch, operator.keys, first=prefix):
        # Weights of heads of a mixture do not add up to 1.
        weights = rows.weights.double()
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
        tokens = land(recorded, spread_rows(rows._replace(weights=weights), operator.keys), prefix + height * width)
        tokens = tokens[..., prefix:]
        inside = tokens.sum(-1)
        distance = torch.cdist(places[queries - prefix], places)
        sums[0] += ((tokens * distance).sum(-1) / inside.clamp(min=1e-12)).mean(0).sum(-1)
        sums[1] -= torch.special.xlogy(weights, weights.abs()).sum(-1).mean(0).sum(-1)
        if rows.keys is None:
            sums[2] += len(queries) * math.log(weights.shape[-1])
        else:
            seen = (rows.keys >= 0).sum(-1).double().log()
            sums[2] += seen.expand(batch, operator.heads, -1).mean(0).sum(-1)
        sums[3] += (1 - inside).mean(0).sum(-1)
    sums /= height * width
    sums[1:3] /= math.log(2)
    return tuple(part.tolist() for part in sums)


def _part_of(call: AttentionCall, head: int) -> tuple[nn.Module, int, int] | None:
    """Return the layer that projects a head, and its first and last input channel there."""
    module, heads = call.module, call.heads
    if isinstance(module, HiLoAttention2d):
        high = module.high_heads
        layer, head, heads = (
            (module.h_proj, head, high) if head < high else (module.l_proj, head - high, module.low_heads)
        )
    else:
        layer = getattr(module, "proj", None)
    if not isinstance(layer, (nn.Linear, nn.Conv2d)) or layer.weight.shape[1] % heads:
        return None
    width = layer.weight.shape[1] // heads
    return layer, head * width, (head + 1) * width


@contextlib.contextmanager
def _silenced(layer: nn.Module, first: int, end: int) -> Iterator[None]:
    """Let a layer see nothing of some of its input channels."""
    weight = layer.weight[:, first:end].clone()
    layer.weight[:, first:end] = 0
    try:
        yield
    finally:
        layer.weight[:, first:end] = weight
