"""Backbones, one family a file; importing this package registers them with timm."""

from fnmatch import fnmatch

from . import agent, biformer, dat, dual, ela, host, nat, quadtree, shiftvit, transnext
from ._checkpoint import CheckpointError
from .backbone import Backbone, UnknownModelError, create_backbone

__all__ = ["Backbone", "CheckpointError", "UnknownModelError", "create_backbone", "list_models"]

_FAMILIES = (nat, biformer, dual, quadtree, dat, agent, shiftvit, transnext, ela, host)


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of this package's models that match ``pattern``, a glob such as ``"nat_*"``."""
    names = {name.split(".")[0] for family in _FAMILIES for name in family.default_cfgs}
    return sorted(name for name in names if fnmatch(name, pattern))
