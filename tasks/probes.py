"""What frozen features are worth: k-NN votes, a linear probe, and Efficient Probing's attention. ``foveate.probes``."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from ..blocks.published_names import rename_entries
from . import TaskError

# Similarities that are in memory at once.
_CHUNK = 2**24
# efficient-probing's names of parameters, a Sequential of pooling, norm and classifier, and ours.
_PUBLISHED = {"0.cls_token": "queries", "0.v.": "value.", "1.": "norm.", "2.": "head."}


class EfficientProbe(nn.Module):
    """Efficient Probing: learned queries gather patches, each into channels of its own (arXiv 2506.10178, section 3).

    A query attends with one head of full width, its scores being its products with the patches themselves; the values
    it gathers are its own slice of a projection. Pooled channels are normalised over the batch, without scale or
    shift, and classified. A state dict of the published code is understood.

    Args:
        dim: Channels of the features; divisible by ``d_out * queries``.
        num_classes: Classes.
        queries: Learned queries.
        d_out: By how much the values are narrower than the features.

    Raises:
        TaskError: If the channels can't be shared out.
    """

    def __init__(self, dim: int, num_classes: int, queries: int = 32, d_out: int = 1):
        super().__init__()
        if queries < 1 or d_out < 1 or dim % (d_out * queries):
            fitting = [count for count in range(1, dim // max(d_out, 1) + 1) if dim % (max(d_out, 1) * count) == 0]
            near = ", ".join(map(str, sorted(fitting, key=lambda count: abs(count - queries))[:3])) or "none"
            raise TaskError(
                f"{dim} channels can't be shared out among {queries} queries with d_out {d_out}; queries that fit: "
                f"{near}"
            )
        self.queries = nn.Parameter(torch.randn(1, queries, dim) * 0.02)
        self.value = nn.Linear(dim, dim // d_out, bias=False)
        self.norm = nn.BatchNorm1d(dim // d_out, affine=False, eps=1e-6)
        self.head = nn.Linear(dim // d_out, num_classes)
        self.register_load_state_dict_pre_hook(_rename)

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gather tokens ``[B, N, dim]`` into ``[B, dim / d_out]``; the weights ``[B, queries, N]`` come second."""
        attention = (x.shape[-1] ** -0.5 * self.queries @ x.transpose(1, 2)).softmax(-1)
        value = self.value(x).unflatten(-1, (self.queries.shape[1], -1))
        return torch.einsum("bqn,bnqc->bqc", attention, value).flatten(1), attention

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Map tokens ``[B, N, dim]`` to logits ``[B, num_classes]``, and if asked to weights ``[B, queries, N]``."""
        pooled, attention = self.pool(x)
        logits = self.head(self.norm(pooled))
        return (logits, attention) if return_attention else logits


def _rename(module: nn.Module, state: dict[str, Tensor], prefix: str, *args: object) -> None:
    """Give the entries of the published code our names."""
    rename_entries(state, prefix, _PUBLISHED)


class LinearProbe(nn.Module):
    """A linear classifier on pooled features, which are normalised over the batch without scale or shift.

    Efficient Probing and MAE measure so.
    """

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map features ``[B, dim]`` to logits ``[B, num_classes]``."""
        return self.head(self.norm(x))


def knn_votes(
    train: Tensor,
    train_labels: Tensor,
    features: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    classes: int | None = None,
) -> Tensor:
    """Let the nearest training features vote for their classes, as DINO evaluates (ICCV 2021, appendix F).

    Features are scaled to length 1; each of the ``k`` nearest by cosine votes with ``exp(cosine / temperature)``.

    Args:
        train: Training features ``[n, dim]``.
        train_labels: Their classes ``[n]``.
        features: Features to classify ``[m, dim]``.
        k: Neighbors.
        temperature: The smaller, the more the nearest count.
        classes: Number of classes; that of the greatest label if None.

    Returns:
        Votes ``[m, classes]``, in float32 or the features' wider type; the greatest is the answer.

    Raises:
        TaskError: If there are fewer than ``k`` training features, or an argument is out of range.
    """
    if train.ndim != 2 or features.ndim != 2 or train.shape[1] != features.shape[1] or len(train_labels) != len(train):
        raise TaskError(
            f"features are [n, dim] with a label each; got {list(train.shape)} with {len(train_labels)} labels, and "
            f"{list(features.shape)}"
        )
    if not 1 <= k <= len(train):
        raise TaskError(f"k is {k}, but there are {len(train)} training features; choose from 1 to {len(train)}")
    if not temperature > 0:
        raise TaskError(f"temperature is {temperature}, but must be greater than 0")
    greatest = int(train_labels.max()) + 1
    if classes is not None and classes < greatest:
        raise TaskError(f"classes is {classes}, but labels go up to {greatest - 1}")
    dtype = torch.promote_types(torch.promote_types(train.dtype, features.dtype), torch.float32)
    train, features = (F.normalize(part.to(dtype), dim=1) for part in (train, features))
    votes = features.new_zeros(len(features), classes or greatest)
    size = max(1, _CHUNK // len(train))
    for start in range(0, len(features), size):
        similarity, nearest = (features[start : start + size] @ train.T).topk(k)
        votes[start : start + size].scatter_add_(1, train_labels.long()[nearest], (similarity / temperature).exp())
    return votes


def accuracy(scores: Tensor, labels: Tensor, top: int = 1) -> float:
    """Return the share of rows of scores ``[n, classes]`` among whose ``top`` greatest is the label."""
    best = scores.topk(min(top, scores.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1).float().mean().item()


class Recipe(NamedTuple):
    """How probes are trained.

    Attributes:
        epochs: Passes over the training images.
        batch: Images of a step.
        lr: Learning rate at its greatest.
        warmup: Epochs in which it rises to that; then it falls to 0 by a cosine.
        optimizer: Makes the optimizer of the weights and the biases.
    """

    epochs: int
    batch: int
    lr: float
    warmup: int
    optimizer: Callable[[list[nn.Parameter], list[nn.Parameter]], torch.optim.Optimizer]


def quick_recipe(epochs: int = 100, batch: int = 256, lr: float = 3e-3) -> Recipe:
    """Return what suits stored features, of small sets too: AdamW without decay."""

    def optimizer(weights: list[nn.Parameter], biases: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([*weights, *biases], weight_decay=0)

    return Recipe(epochs, batch, lr, min(5, epochs // 2), optimizer)


def published_recipe(epochs: int = 90, batch: int = 4096, base: float = 0.1) -> Recipe:
    """Return Efficient Probing's, which is MAE's of linear probes: LARS, ten epochs of warm-up.

    Args:
        epochs: Passes over the training images.
        batch: Images of a step.
        base: Learning rate for 256 images; it grows with the batch.
    """

    def optimizer(weights: list[nn.Parameter], biases: list[nn.Parameter]) -> torch.optim.Optimizer:
        # The rate is adapted to weights alone.
        return Lars([{"params": weights, "always_adapt": True}, {"params": biases}], momentum=0.9)

    return Recipe(epochs, batch, base * batch / 256, min(10, epochs // 2), optimizer)


def train_probes(
    probes: Mapping[str, nn.Module],
    batches: Callable[[int], Iterable[tuple[Mapping[str, Tensor], Tensor]]],
    steps: int,
    recipe: Recipe,
) -> None:
    """Train probes side by side, on the same batches.

    Args:
        probes: Heads by name; put into evaluation mode when they are done.
        batches: Returns an epoch's batches: for each name its features, and the labels ``[B]``.
        steps: Batches of an epoch.
        recipe: How.

    Raises:
        TaskError: If a loss is no number.
    """
    optimizers = {}
    for name, probe in probes.items():
        parameters = list(probe.train().parameters())
        optimizers[name] = recipe.optimizer(
            [parameter for parameter in parameters if parameter.ndim > 1],
            [parameter for parameter in parameters if parameter.ndim <= 1],
        )
    for epoch in range(recipe.epochs):
        for step, (features, labels) in enumerate(batches(epoch)):
            rate = recipe.lr * _schedule(epoch + step / steps, recipe)
            for name, probe in probes.items():
                for group in optimizers[name].param_groups:
                    group["lr"] = rate
                loss = F.cross_entropy(probe(features[name]), labels)
                if not loss.isfinite():
                    raise TaskError(f"the {name} probe's loss became {loss.item()} in epoch {epoch + 1}; lower --lr")
                optimizers[name].zero_grad()
                loss.backward()
                optimizers[name].step()
    for probe in probes.values():
        probe.eval()


def _schedule(epoch: float, recipe: Recipe) -> float:
    if epoch < recipe.warmup:
        return epoch / recipe.warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - recipe.warmup) / max(1, recipe.epochs - recipe.warmup)))
