"""Images mixed by what the model itself attends to: SMMix and Attentive CutMix."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...blocks.losses import collect_losses
from .. import TaskError
from ..seeing.cam import evaluating
from ..seeing.record import record_attention

# Attentive CutMix pastes 6 of ResNet's 7x7 cells.
_CELLS = 6 / 49
# What SMMix adds to the loss.
EXTRAS = ("loss_regions", "loss_consistency")


class Mixed(NamedTuple):
    """Images into each of which a part of another one is pasted, that at the batch's other end.

    Attributes:
        images: ``[B, C, H, W]``.
        pasted: Which positions of the last map are the other image's, ``[B, h, w]``, bool.
        own_share: The share of the pixels that are the image's own, ``[B]``.
        logits: Of the images as they were, ``[B, classes]``, without gradients.
    """

    images: Tensor
    pasted: Tensor
    own_share: Tensor
    logits: Tensor


class _Look(NamedTuple):
    """How much each position of the last map is attended to ``[B, h, w]``, its step in pixels, and the logits."""

    importance: Tensor
    step: tuple[int, int]
    logits: Tensor


class AttentiveMixing:
    """Mixes a batch in one of two ways, or leaves it, as drawn from torch's generator.

    Both look with the model itself, in evaluation mode and without gradients: the weights of its last attention on the
    map's positions, the mean over heads and over the map's queries. That is SMMix's rule (ICCV 2023, arXiv 2212.12977)
    for ViTs. Ours are: the same for hierarchies, on their last map; and for Attentive CutMix (ICASSP 2020, arXiv
    2003.13048), which looks with a pretrained ResNet-50, on 7x7 cells of which it takes 6. Of other maps the same share
    is taken, a cell at least.

    Args:
        smmix: Probability of SMMix.
        attentive_cutmix: Probability of Attentive CutMix.
        smoothing: Share of the truth that is spread over all classes.
    """

    def __init__(self, smmix: float, attentive_cutmix: float, smoothing: float = 0.0):
        self._smmix, self._cutmix, self._smoothing = smmix, attentive_cutmix, smoothing
        self._layer: str | None = None

    @property
    def extras(self) -> tuple[str, ...]:
        """Names of the losses beside the mixed one, in every batch."""
        return EXTRAS if self._smmix else ()

    def prepare(self, model: nn.Module, images: Tensor) -> None:
        """Find the model's last attention, on images ``[B, C, H, W]`` of the size that it is trained with.

        Raises:
            TaskError: If its attention isn't recorded, or is not on the map that its classifier reads.
        """
        device = next(model.parameters()).device
        images = images.to(device)
        try:
            with evaluating(model), torch.no_grad(), record_attention(model) as record:
                model(images)
            with evaluating(model), torch.no_grad():
                features = _as_maps(model, model.forward_features(images), None)
        except (TaskError, AttributeError) as error:
            raise TaskError(f"{self._key} looks with the model's own attention: {error}") from error
        layers = [name for name, call in record.items() if call.kind not in ("gate", "channel")]
        if not layers or "#" in layers[-1]:
            raise TaskError(
                f"{self._key} looks with the model's own attention, but none of {type(model).__name__} mixes positions"
            )
        size = tuple(record[layers[-1]].map_size)
        if len(size) != 2 or size[0] * size[1] != features.shape[1]:
            raise TaskError(
                f"{self._key}: the last attention of {type(model).__name__}, {layers[-1]}, is on a map {list(size)}, "
                f"but what its classifier reads has {features.shape[1]} positions"
            )
        if min(size) < 2:
            raise TaskError(f"{self._key}: the last map is {size[0]}x{size[1]}; take larger images (data.size)")
        self._layer = layers[-1]

    @property
    def _key(self) -> str:
        return "loss.smmix" if self._smmix else "loss.attentive_cutmix"

    def draw(self) -> str | None:
        """Return ``"smmix"``, ``"attentive_cutmix"`` or None, as the probabilities say."""
        drawn = float(torch.rand(()))
        if drawn < self._smmix:
            return "smmix"
        return "attentive_cutmix" if drawn < self._smmix + self._cutmix else None

    def mix(self, model: nn.Module, images: Tensor, way: str) -> Mixed:
        """Return images mixed in a way that was drawn."""
        with evaluating(model), torch.no_grad(), record_attention(model, self._layer) as record:
            logits = model(images)
        call = record[self._layer]
        rows, columns = call.map_size
        use = call.use(range(call.prefix, call.prefix + rows * columns))
        look = _Look(use.weights.mean(1), call.pixel_steps(), logits.detach())
        return (paste_square if way == "smmix" else paste_cells)(images, look)

    def loss(
        self, model: nn.Module, mixed: Mixed, targets: Tensor, criterion: Callable[[Tensor, Tensor], Tensor], way: str
    ) -> dict[str, Tensor]:
        """Return the losses of mixed images: with SMMix also of both parts, and of the mixture's consistency.

        SMMix reads the mean of either part's positions by a second linear layer, which is thrown away after training.
        Ours is the model's own classifier instead: of networks that pool, it reads such means anyway.

        Args:
            model: The classifier.
            mixed: What it is given.
            targets: Of the images as they were, ``[B]``.
            criterion: From logits and shares of the classes ``[B, classes]`` to a scalar.
            way: How they were mixed.
        """
        own = smooth(targets, mixed.logits.shape[1], self._smoothing)
        own_share = mixed.own_share[:, None]
        shares = own_share * own + (1 - own_share) * own.flip(0)
        with collect_losses(lambda logits: criterion(logits, shares)) as reported:
            if way == "smmix":
                features = model.forward_features(mixed.images)
                logits = model.forward_head(features)
            else:
                logits = model(mixed.images)
        losses = {"loss": criterion(logits, shares)} | {f"loss_{name}": value for name, value in reported.items()}
        if way != "smmix":
            return losses | {name: torch.zeros_like(losses["loss"]) for name in self.extras}
        parts = (
            criterion(_read_part(model, features, ~mixed.pasted), own),
            criterion(_read_part(model, features, mixed.pasted), own.flip(0)),
        )
        expected = (own_share * mixed.logits + (1 - own_share) * mixed.logits.flip(0)).float().softmax(1)
        consistency = F.kl_div(F.log_softmax(logits.float(), 1), expected, reduction="batchmean")
        return losses | dict(zip(EXTRAS, (sum(parts) / 2, consistency), strict=True))


def paste_square(images: Tensor, look: _Look) -> Mixed:
    """Overwrite each image's least attended square with the other image's most attended one (SMMix).

    Its side, of a quarter to three quarters of the map's, is drawn from torch's generator.
    """
    rows, columns = look.importance.shape[1:]
    side = min(rows, columns)
    length = int(torch.randint(max(1, side // 4), max(1, side * 3 // 4) + 1, ()))
    attended = F.avg_pool2d(look.importance[:, None], length, 1)[:, 0]
    across = attended.shape[2]
    least, most = attended.flatten(1).argmin(1), attended.flip(0).flatten(1).argmax(1)
    out, other = images.clone(), images.flip(0)
    pasted = torch.zeros_like(look.importance, dtype=torch.bool)
    # Cells at the right and at the bottom may be cut: the square is moved so that it is whole.
    sizes = [length * step for step in look.step]
    ends = [edge - size for edge, size in zip(images.shape[2:], sizes, strict=True)]
    for index, (to, source) in enumerate(zip(least.tolist(), most.tolist(), strict=True)):
        (top, left), (y, x) = (
            [min(cell * step, end) for cell, step, end in zip(divmod(place, across), look.step, ends, strict=True)]
            for place in (to, source)
        )
        height, width = sizes
        out[index, :, top : top + height, left : left + width] = other[index, :, y : y + height, x : x + width]
        row, column = divmod(to, across)
        pasted[index, row : row + length, column : column + length] = True
    share = sizes[0] * sizes[1] / (images.shape[2] * images.shape[3])
    return Mixed(out, pasted, torch.full((len(images),), 1 - share, device=images.device), look.logits)


def paste_cells(images: Tensor, look: _Look) -> Mixed:
    """Copy the other image's most attended cells to the same places (Attentive CutMix)."""
    rows, columns = look.importance.shape[1:]
    count = max(1, round(_CELLS * rows * columns))
    attended = look.importance.flip(0).flatten(1).topk(count).indices
    pasted = torch.zeros_like(look.importance, dtype=torch.bool).flatten(1).scatter_(1, attended, True)
    pasted = pasted.unflatten(1, (rows, columns))
    cells = (
        (torch.arange(length, device=images.device) // step).clamp(max=number - 1)
        for length, step, number in zip(images.shape[2:], look.step, (rows, columns), strict=True)
    )
    row, column = cells
    covered = pasted[:, row][:, :, column]
    out = torch.where(covered[:, None], images.flip(0), images)
    return Mixed(out, pasted, 1 - covered.float().mean((1, 2)), look.logits)


def smooth(targets: Tensor, classes: int, smoothing: float) -> Tensor:
    """Return classes ``[B]`` as shares ``[B, classes]``, of which a part is spread over all of them."""
    return F.one_hot(targets, classes) * (1 - smoothing) + smoothing / classes


def _as_maps(model: nn.Module, features: Tensor, values: Tensor | None) -> Tensor:
    """Return the positions ``[B, n, C]`` of what `forward_features` gives, without tokens before the map.

    With ``values`` ``[B, C]`` return features in which every position, and every such token, has these instead.
    """
    if features.ndim == 3:
        if values is not None:
            return values[:, None].expand_as(features)
        return features[:, getattr(model, "num_prefix_tokens", 0) :]
    if features.ndim != 4:
        raise TaskError(f"what {type(model).__name__} makes of an image is no map")
    if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC"):
        return features.flatten(1, 2) if values is None else values[:, None, None].expand_as(features)
    return features.flatten(2).mT if values is None else values[:, :, None, None].expand_as(features)


def _read_part(model: nn.Module, features: Tensor, part: Tensor) -> Tensor:
    """Return what the classifier makes of the mean over a part ``[B, h, w]`` of the positions: ``[B, classes]``."""
    weights = part.flatten(1).to(features.dtype)
    weights = weights / weights.sum(1, keepdim=True)
    mean = (weights[:, None] @ _as_maps(model, features, None))[:, 0]
    return model.forward_head(_as_maps(model, features, mean))
