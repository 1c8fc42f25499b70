"""Losses of a model's own: reported where they arise while it trains, collected by whoever trains it.

A model stays a model: its output is what it always is, so that a trainer that knows nothing of this, timm's for
instance, trains on that alone. One that does asks around the call::

    criterion = functools.partial(F.cross_entropy, target=targets)
    with collect_losses(criterion) as own:
        logits = model(images)
    loss = criterion(logits) + sum(own.values())

Modules report in their forward, in training only: `report_loss` what is a loss already, such as the balance of a
router, or `report_logits` further predictions of the same targets, such as an auxiliary head's. Nothing is kept on the
model, so copies (EMA), files and processes (DDP) see none of it, and `torch.compile` takes it into its graph.

A module inside a block that may be recomputed (gradient checkpointing) computes its loss whether or not it is
collected: the second pass, which must do what the first did, is nobody's to collect.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

# Of each collection under way, the innermost last: values by name, weighted logits by name, and if these are wanted.
_COLLECTIONS: list[tuple[dict[str, Tensor], dict[str, tuple[Tensor, float]], bool]] = []


@contextmanager
def collect_losses(criterion: Callable[[Tensor], Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
    """Collect the losses that modules report in this context; the innermost context gets them.

    Args:
        criterion: From logits to a scalar, as the model's own are judged. Without one, no logits are asked for.

    Yields:
        Weighted scalars by name, to be added to the loss; complete when the context is left.
    """
    collected: dict[str, Tensor] = {}
    logits: dict[str, tuple[Tensor, float]] = {}
    _COLLECTIONS.append((collected, logits, criterion is not None))
    try:
        yield collected
    finally:
        _COLLECTIONS.pop()
    for name, (prediction, weight) in logits.items():
        collected[name] = weight * criterion(prediction)


def wants_logits() -> bool:
    """Return whether logits are collected: else nobody has a use for an auxiliary head."""
    return bool(_COLLECTIONS) and _COLLECTIONS[-1][2]


def report_loss(name: str, value: Tensor) -> None:
    """Report a weighted scalar loss; those of one name are added up. Dropped where nobody collects."""
    if _COLLECTIONS:
        collected = _COLLECTIONS[-1][0]
        collected[name] = collected[name] + value if name in collected else value


def report_logits(name: str, logits: Tensor, weight: float) -> None:
    """Report logits ``[B, num_classes]`` whose loss counts with ``weight``. Dropped where they are not wanted.

    Raises:
        ValueError: If there are logits of this name: they can't be added up.
    """
    if wants_logits():
        taken = _COLLECTIONS[-1][1]
        if name in taken:
            raise ValueError(f"two modules report logits as {name!r}; give each a name of its own")
        taken[name] = (logits, weight)
