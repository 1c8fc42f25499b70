"""The one way in which the families build their models: timm's factory, with checkpoints read strictly."""

from pathlib import Path

from timm.models import build_model_with_cfg, generate_default_cfgs, resolve_pretrained_cfg
from torch import nn

from ..blocks.context_broadcasting import broadcast_context
from . import weights
from .checkpoint import Checkpoint, CheckpointError, filter_for
from .checkpoint.fitting import Convert, Resize
from .library_errors import needs_unpickling

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


def cfgs_with_links(cfgs: dict[str, dict]) -> dict:
    """Return timm's table of a family: ``cfgs`` by ``model.tag``, with links, licenses and notes of the weights."""
    return generate_default_cfgs(
        {name: cfg | (weights.published_cfg(name) if name in weights.table() else {}) for name, cfg in cfgs.items()}
    )


def build(
    cls: type[nn.Module],
    name: str,
    pretrained: bool,
    convert: Convert,
    resize: Resize | None = None,
    context_broadcasting: bool = False,
    **kwargs,
) -> nn.Module:
    """Build a registered model.

    Args:
        cls: Model class.
        name: Registered name, without tag.
        pretrained: Whether to load weights: those that `weights` knows by the name and the tag, or
            ``pretrained_cfg_overlay=dict(file=...)``, a path, an address, another ``model.tag`` or a `Checkpoint`.
        convert: Renames a published state dict to the model's names. It must leave the model's own names alone.
        resize: Resamples entries that were made for another size of images.
        context_broadcasting: Whether every MLP ends with Context Broadcasting; see `blocks.broadcast_context`.
        **kwargs: Options of timm's factory and of ``cls``.

    Raises:
        CheckpointError: If the weights cannot be had or read, or are not those of this model.
        ValueError: If there are no MLPs to broadcast in.
    """
    features = bool(kwargs.get("features_only", False))
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    checkpoint = _weights(name, kwargs.get("pretrained_cfg"), overlay, kwargs.get("cache_dir")) if pretrained else None
    if checkpoint is not None:
        # timm copies what it is given, and what else a stranger's file holds may have no end.
        overlay |= {"state_dict": checkpoint.state, "source": None}
        overlay |= {"file": str(checkpoint)} if isinstance(overlay.get("file"), Checkpoint) else {}
    try:
        model = build_model_with_cfg(
            cls,
            name,
            pretrained,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=filter_for(convert, name, features, "num_classes" in kwargs, resize),
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
            **kwargs,
        )
    except RuntimeError as error:
        # timm's own text, for files in a folder or on the hub, advises to switch the safety off.
        if not needs_unpickling(error):
            raise
        raise CheckpointError(
            f"{name}: the checkpoint is not read: it pickles objects, which could run code when read"
        ) from error
    if checkpoint is not None:
        model.pretrained_cfg.pop("state_dict", None)
    return broadcast_context(model) if context_broadcasting else model


def _weights(name: str, pretrained_cfg, overlay: dict, cache_dir: str | Path | None) -> Checkpoint | None:
    """Return the weights asked for; None if it is for timm to find them, or to say that there are none."""
    for key in ("file", "url"):
        if overlay.get(key):
            return weights.read(overlay[key], cache_dir)
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, overlay)
    if cfg.source or cfg.state_dict or overlay.get("hf_hub_id"):
        return None
    published = weights.table().get(f"{name}.{cfg.tag}")
    # timm is told of a file of this package by its path; the table knows its hash.
    own = published and (not cfg.file or Path(cfg.file).parent == weights.SHIPPED)
    reference = published.name if own else cfg.file or cfg.url
    return weights.read(reference, cache_dir) if reference else None
