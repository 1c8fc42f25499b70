"""Every explanation side by side with a random map and a centred Gaussian: measures, and what random weights say."""

import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import TaskError
from . import judge
from .cam import grad_cam, grad_cam_plus_plus, layer_cam
from .rollout import relevance, rollout

# From a classifier, images [B, C, H, W] and their classes [B] to maps [B, H, W].
Explain = Callable[[nn.Module, Tensor, Tensor], Tensor]


def random_map(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Return noise on cells of 1/7 of the image, enlarged: as smooth as the maps that it is compared with."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.rand(len(x), 1, 7, 7, generator=generator).to(x.device)
    return F.interpolate(cells, x.shape[-2:], mode="bilinear")[:, 0]


def centred_gaussian(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Return a Gaussian in the middle, of a quarter of the image's sides: photographers centre their objects."""
    lines = [torch.arange(length, device=x.device) - (length - 1) / 2 for length in x.shape[-2:]]
    rows, columns = (torch.exp(-8 * (line / len(line)) ** 2) for line in lines)
    return torch.outer(rows, columns).expand(len(x), -1, -1)


# Methods by name; a new one is a row.
METHODS: dict[str, Explain] = {
    "random map": random_map,
    "centred Gaussian": centred_gaussian,
    "rollout": lambda model, x, target: rollout(model, x, pixels=True),
    "relevance": lambda model, x, target: relevance(model, x, target, pixels=True, shortcut=False),
    "Grad-CAM": grad_cam,
    "Grad-CAM++": grad_cam_plus_plus,
    "LayerCAM": layer_cam,
}


def evaluate(
    model: nn.Module,
    x: Tensor,
    masks: Tensor | None = None,
    boxes: Sequence[Tensor] | None = None,
    methods: Mapping[str, Explain] | None = None,
    steps: int | None = 28,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Measure every method on the classes that a model gives to images.

    Maps are scaled to 0..1, each by itself. The pointing game's tolerance is 15 pixels of an image of 224.

    Args:
        model: A classifier.
        x: Images ``[B, C, H, W]``, normalised.
        masks: Where the objects are, ``[B, H, W]``; gives pixel AP, and with its objects' boxes the pointing game.
        boxes: The objects' boxes instead, as for `pointing_game`; gives that and MaxBoxAccV2.
        methods: `METHODS` by default.
        steps: Of insertion and deletion; None leaves them out, as where an image without its pixels keeps its class.
        batch_size: Images at once.

    Returns:
        For each method a dict: ``method``; ``insertion`` and ``deletion``, mean areas; ``pixel AP``, ``pointing`` and
        ``MaxBoxAccV2`` where they can be had; ``blank``, the share of maps without any evidence; ``as with a random
        classifier`` and ``as with random weights``, the mean rank correlation of its maps with those of the model
        with shuffled weights of the classifier, or of all layers (Adebayo et al., NeurIPS 2018): near 1, the map
        doesn't show what the model has learned; ``ms``, milliseconds an image; and ``note``, why a method is refused.
    """
    with judge.evaluating(model), torch.no_grad():
        target = torch.cat([model(part).argmax(1) for part in x.split(batch_size)])
    others = {
        "as with a random classifier": shuffled(model, classifier_only=True),
        "as with random weights": shuffled(model),
    }
    rows = []
    for name, method in (METHODS if methods is None else methods).items():
        row: dict[str, Any] = {"method": name}
        rows.append(row)
        began = time.perf_counter()
        try:
            maps = _explain(method, model, x, target, batch_size)
        except TaskError as error:
            row["note"] = str(error)
            continue
        row["ms"] = 1000 * (time.perf_counter() - began) / len(x)
        row["blank"] = (maps.flatten(1).amax(1) == 0).float().mean().item()
        row |= _measure(model, x, target, maps, masks, boxes, steps, batch_size)
        for column, other in others.items():
            row[column] = _similarity(maps, _explain(method, other, x, target, batch_size))
    return rows


def _explain(method: Explain, model: nn.Module, x: Tensor, target: Tensor, batch_size: int) -> Tensor:
    with warnings.catch_warnings():
        # Blank maps are counted.
        warnings.simplefilter("ignore", UserWarning)
        parts = zip(x.split(batch_size), target.split(batch_size), strict=True)
        maps = torch.cat([method(model, *part).detach() for part in parts]).float()
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)


def _measure(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    maps: Tensor,
    masks: Tensor | None,
    boxes: Sequence[Tensor] | None,
    steps: int | None,
    batch_size: int,
) -> dict[str, float]:
    scores = {}
    for name, measure in (("insertion", judge.insertion), ("deletion", judge.deletion)) if steps is not None else ():
        step = math.ceil(maps[0].numel() / steps)
        parts = zip(*(part.split(batch_size) for part in (x, maps, target)), strict=True)
        scores[name] = torch.cat([measure(model, *part, step=step)[1] for part in parts]).mean().item()
    if masks is not None:
        scores["pixel AP"] = judge.pixel_ap(maps, masks)
        objects = judge.boxes_of_masks(masks)
    elif boxes is not None:
        objects = boxes
        scores["MaxBoxAccV2"] = judge.max_box_acc_v2(maps, boxes)
    else:
        return scores
    scores["pointing"] = judge.pointing_game(maps, objects, 15 / 224 * max(maps.shape[1:]))
    return scores


def _similarity(maps: Tensor, others: Tensor) -> float:
    """Return the mean rank correlation of maps, on cells of 1/16 of the image: 0 where one is flat, nothing of both."""
    ranks = [_ranks(F.adaptive_avg_pool2d(part[:, None], 16).flatten(1)) for part in (maps, others)]
    ranks = [part - part.mean(1, keepdim=True) for part in ranks]
    shown = ranks[0].any(1) | ranks[1].any(1)
    return F.cosine_similarity(*(part[shown] for part in ranks), dim=1).mean().item() if shown.any() else math.nan


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of each value in its row, the mean one of those that are equal."""
    less = (values[:, None, :] < values[:, :, None]).sum(-1)
    return less + ((values[:, None, :] == values[:, :, None]).sum(-1) - 1) / 2


def shuffled(model: nn.Module, classifier_only: bool = False, seed: int = 0) -> nn.Module:
    """Return a copy of a model whose weights' entries are shuffled, tensor by tensor: of all layers or the classifier.

    Raises:
        TaskError: If the model doesn't tell its classifier.
    """
    model = copy.deepcopy(getattr(model, "_orig_mod", model))
    modules = [model]
    if classifier_only:
        if not hasattr(model, "get_classifier"):
            raise TaskError(
                f"{type(model).__name__}: has no get_classifier, so that its classifier can't be randomised"
            )
        classifier = model.get_classifier()
        modules = list(classifier) if isinstance(classifier, tuple) else [classifier]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (parameter for module in modules for parameter in module.parameters()):
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return model
