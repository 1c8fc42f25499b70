"""Parameters in groups of one learning rate and one weight decay each, as a config's ``optimizer`` says."""

from typing import Any

from timm.models import group_parameters
from timm.optim import auto_group_layers
from torch import nn

from .. import TaskError
from ..frozen import stage_names


def layers_of(model: nn.Module) -> dict[str, int]:
    """Return the layer of every parameter, from 0 for the lowest on; what isn't named is above them all.

    Classifiers, and backbones of detectors and segmenters, have the layers that timm tells apart; where these are the
    stages of a backbone alone, those.

    Raises:
        TaskError: If there are none.
    """
    body = getattr(model, "backbone", None)
    if body is None:
        matcher = getattr(model, "group_matcher", None)
        layers = auto_group_layers(model) if matcher is None else group_parameters(model, matcher(), reverse=True)
    else:
        features = getattr(body, "features", body)
        inner = getattr(features, "model", features)
        if hasattr(inner, "group_matcher"):
            known = {id(value): name for name, value in model.named_parameters()}
            inside = group_parameters(inner, inner.group_matcher(), reverse=True)
            layers = {known[id(inner.get_parameter(name))]: layer for name, layer in inside.items()}
        else:
            layers = _stages_of(model, features)
    if len({*layers.values()}) < 2:
        raise TaskError(f"optimizer.layer_decay: {type(model).__name__} has no layers that timm tells apart")
    return layers


def _stages_of(model: nn.Module, features: nn.Module) -> dict[str, int]:
    """Return the stage of every parameter of a backbone that is a list of modules, one after the other."""
    stages, names, layer = stage_names(features), {}, 0
    for name, child in features.named_children():
        layer = stages.index(name) + 1 if name in stages else layer
        names |= dict.fromkeys(map(id, child.parameters()), layer)
    return {name: names[id(value)] for name, value in model.named_parameters() if id(value) in names}


def group(model: nn.Module, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the groups of what learns, each with its ``weight_decay`` and, of the learning rate, its ``lr_scale``.

    Args:
        model: The model.
        settings: As the config's ``optimizer``. Parts of names in ``no_decay`` and ``factors`` are looked for in
            parameters' names, of several factors the longest name's counts, and ``layer_decay`` is multiplied by it.

    Raises:
        TaskError: If a factor is of no parameter, or there are no layers.
    """
    groups: dict[tuple[float, float], dict] = {}
    unused = set(settings["factors"])
    layers = {} if settings["layer_decay"] is None else layers_of(model)
    top = 0
    if layers:
        # What isn't among the layers, neck and heads, is the last one's.
        every = {name for name, _ in model.named_parameters()}
        top = max(layers.values()) + bool(every - layers.keys())
    # What a model of timm's names by itself, unless the config does.
    own = getattr(model, "no_weight_decay", set)() if settings["no_decay"] is None and layers else set()
    for name, parameter in model.named_parameters():
        matches = sorted((part for part in settings["factors"] if part in name), key=len)
        unused -= {*matches}  # of what is frozen too: a recipe's factors needn't be taken back
        if not parameter.requires_grad:
            continue
        if settings["no_decay"] is None:
            spared = parameter.ndim <= 1 or name.endswith(".bias") or name in own
        else:
            spared = any(part in name for part in settings["no_decay"])
        decay, factor = (
            0.0 if spared else settings["weight_decay"],
            settings["factors"][matches[-1]] if matches else 1.0,
        )
        if layers:
            factor *= settings["layer_decay"] ** (top - layers.get(name, top))
        entry = groups.setdefault((decay, factor), {"params": [], "weight_decay": decay, "lr_scale": factor})
        entry["params"].append(parameter)
    if unused:
        raise TaskError(f"optimizer.factors: no parameter's name holds {min(unused)!r}")
    return list(groups.values())
