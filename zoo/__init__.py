"""Backbones, one family a file; importing this package registers them with timm."""

from fnmatch import fnmatch

from . import (
    agent,
    biformer,
    dat,
    dual,
    ela,
    gated,
    host,
    inline,
    litv2,
    nat,
    overlock,
    quadtree,
    shiftvit,
    transnext,
    van,
)
from .backbone import Backbone, UnknownModelError, create_backbone
from .checkpoint import CheckpointError
from .maps import BackboneError

__all__ = ["Backbone", "BackboneError", "CheckpointError", "UnknownModelError", "create_backbone", "list_models"]

_FAMILIES = (
    *(nat, biformer, dual, quadtree, dat, agent, inline, litv2, shiftvit, transnext, van, overlock),
    *(ela, gated, host),
)


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of this package's models that match ``pattern``, a glob such as ``"nat_*"``."""
    names = {name.split(".")[0] for family in _FAMILIES for name in family.default_cfgs}
    return sorted(name for name in names if fnmatch(name, pattern))
