"""What goes along with an exported model: how images become its input, its classes, the license of its weights."""

import dataclasses
import json
from typing import Any

from torch import nn

from ...zoo.weights import table

# Keys of the metadata that hold one plain value each, beside "foveate", the card as JSON.
PLAIN = ("task", "model", "head", "backbone", "license", "mean", "std", "channel_order", "resize", "classes")


def preprocessing_of(predictor: Any) -> dict[str, Any]:
    """Return, in plain types, how a predictor makes an image its model's input.

    Args:
        predictor: A classifier's, detector's or segmenter's.

    Returns:
        ``mean`` and ``std`` of pixels of 0 to 1, in the order ``channel_order``; ``channels``; ``resize``, a sentence;
        and ``rule``, the numbers behind it: an ``InputRule``'s, or `DetectorTransform`'s options.
    """
    transform = getattr(predictor.model, "transform", None)
    if getattr(predictor, "rule", None) is None:
        rule = {name: getattr(transform, name) for name in type(transform).OPTIONS}
        side = rule["min_size"][-1] if rule["min_size"] else None
        rule["min_size"] = side
        sizes = "keep the size"
        if side is not None:
            sizes = f"resize, bilinear without antialiasing, at the same ratio to fit into {side}x{rule['max_size']}"
        words = f"{sizes}; pad right and bottom to multiples of {rule['divisor']} with zeros after normalisation"
    else:
        rule = dataclasses.asdict(predictor.rule)
        words = _classifier_rule(rule) if "crop_pct" in rule else _segmenter_rule(rule)
    return {
        "mean": list(rule["mean"]),
        "std": list(rule["std"]),
        "channel_order": rule.get("channel_order", "rgb"),
        "channels": len(rule["mean"]),
        "resize": words,
        "rule": {key: list(value) if isinstance(value, tuple) else value for key, value in rule.items()},
    }


def _classifier_rule(rule: dict[str, Any]) -> str:
    size, scaled = rule["size"], int(rule["size"] / rule["crop_pct"])
    how = {
        "center": f"the shorter side to {scaled}",
        "squash": f"to {scaled}x{scaled}",
        "border": f"the longer side to {scaled}",
    }[rule["crop_mode"]]
    return f"resize, {rule['interpolation']} with antialiasing (Pillow's), {how}; crop the middle {size}x{size}"


def _segmenter_rule(rule: dict[str, Any]) -> str:
    if rule["short"] is None:
        return "keep the size"
    stretch = f"; stretch both sides to multiples of {rule['divisor']}" if rule["divisor"] > 1 else ""
    return (
        f"resize, bilinear without antialiasing, at the same ratio to fit into {rule['short']}x{rule['long']}{stretch}"
    )


def license_of(name: str, model: nn.Module | None = None) -> str | None:
    """Return the license of published weights, as our table or timm states it; None if neither does.

    Args:
        name: Such as ``"nat_tiny"`` or ``"nat_tiny.shi_mask_rcnn_coco_3x"``.
        model: A timm model that has loaded them, whose ``pretrained_cfg`` may tell.
    """
    if name in table():
        return table()[name].license
    return (getattr(model, "pretrained_cfg", None) or {}).get("license")


def plain_metadata(card: dict[str, Any]) -> dict[str, str]:
    """Return what a file's metadata hold: the card as JSON under ``foveate``, and the simplest of it in own keys.

    Lists are JSON; what isn't known has no key.
    """
    told = {**card, **card.get("preprocessing", {})}
    plain = {key: told[key] for key in PLAIN if told.get(key) is not None}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in plain.items()}
    return {"foveate": json.dumps(card), **texts}
