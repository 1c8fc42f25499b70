"""The one way in which the families build their models: timm's factory, with checkpoints read strictly."""

from collections.abc import Callable

from timm.models import build_model_with_cfg
from torch import Tensor, nn

from ._checkpoint import filter_for, open_checkpoint

# What the families' tables of weights have in common: ImageNet-1k classifiers at 224 pixels.
IMAGENET_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "classifier": "head.fc",
}


def build(
    cls: type[nn.Module],
    name: str,
    pretrained: bool,
    convert: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]],
    **kwargs,
) -> nn.Module:
    """Build a registered model.

    Args:
        cls: Model class.
        name: Registered name, without tag.
        pretrained: Whether to load weights: those of the model's table, or ``pretrained_cfg_overlay=dict(file=path)``.
        convert: Renames a published state dict to the model's names. It must leave the model's own names alone.
        **kwargs: Options of timm's factory and of ``cls``.

    Raises:
        CheckpointError: If the file cannot be read or is not one of this model.
    """
    features = bool(kwargs.get("features_only", False))
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    path = overlay.get("file") if pretrained else None
    if path is not None:
        overlay["state_dict"] = open_checkpoint(path)
    model = build_model_with_cfg(
        cls,
        name,
        pretrained,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=filter_for(convert, name, features),
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )
    if path is not None:
        model.pretrained_cfg.pop("state_dict", None)
    return model
