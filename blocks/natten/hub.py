"""transformers' DiNAT: its attention module repaired, and its answer to whether natten is there asked for again.

From 4.57 to 5.24 its attention module is broken with any natten: it takes maps for sequences (up to 5.0), or exchanges
heads and width on the way to the operator (5.24). The repair replaces the module's forward, in every version.
"""

import importlib.util
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType

from torch import Tensor, nn

from ...kernels import na2d, na2d_av, na2d_qk
from ..plain import is_plain
from .v015 import natten2dav, natten2dqkrpb

# NAT was retired long ago, and left in 5.0.
_MODULES = ("transformers.models.dinat.modeling_dinat", "transformers.models.deprecated.nat.modeling_nat")
_OPERATORS = {"natten2dqkrpb": natten2dqkrpb, "natten2dav": natten2dav}
_MISSING = object()

# What was replaced: the owner, the name, and what it was.
_replaced: list[tuple[object, str, object]] = []


def attend(self: nn.Module, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, ...]:
    """Attend as transformers' ``NeighborhoodAttention`` was meant to, up to 4.49 and in every later version.

    Args:
        self: The module: ``query``, ``key`` and ``value`` are its projections, ``rpb`` its bias.
        hidden_states: ``[B, H, W, C]``, padded to the window.
        output_attentions: Whether to return the weights too.

    Returns:
        ``[B, H, W, C]``, and the weights ``[B, heads, H, W, kernel_size ** 2]`` if asked for.
    """
    query, key, value = (
        layer(hidden_states).unflatten(-1, (self.num_attention_heads, self.attention_head_size))
        for layer in (self.query, self.key, self.value)
    )
    scale, rpb = self.attention_head_size**-0.5, self.rpb.to(query.dtype)
    dilation = getattr(self, "dilation", 1)
    if not output_attentions and is_plain(self.dropout) and not (self.training and self.dropout.p):
        return (na2d(query, key, value, self.kernel_size, 1, dilation, scale=scale, rpb=rpb).flatten(-2),)
    scores = na2d_qk(query * scale, key, self.kernel_size, dilation, rpb=rpb)
    weights = self.dropout(scores.softmax(-1).movedim(-2, 1))
    out = na2d_av(weights.movedim(1, -2), value, self.kernel_size, dilation).flatten(-2)
    return (out, weights) if output_attentions else (out,)


def _replace(owner: object, name: str, value: object) -> None:
    _replaced.append((owner, name, vars(owner).get(name, _MISSING)))
    setattr(owner, name, value)


def _repair(module: ModuleType) -> None:
    _replace(module.NeighborhoodAttention, "forward", attend)
    for name, operator in _OPERATORS.items():
        _replace(module, name, operator)


def _ask_again() -> None:
    """Make transformers look for natten again when it is next asked."""
    answers = sys.modules.get("transformers.utils.import_utils")
    if hasattr(answers, "_natten_available"):  # up to 4.57 the answer is a constant
        answers._natten_available = importlib.util.find_spec("natten") is not None
    if clear := getattr(getattr(answers, "is_natten_available", None), "cache_clear", None):
        clear()


def repair_imported() -> None:
    """Repair what of transformers has been imported."""
    _ask_again()
    for name in _MODULES:
        if hasattr(sys.modules.get(name), "NeighborhoodAttention"):
            _repair(sys.modules[name])


def spec_with_repair(name: str, path: object, finder: object) -> ModuleSpec | None:
    """Return the spec of a module of transformers that is repaired right after its import; None for other modules."""
    if name not in _MODULES:
        return None
    others = (each for each in sys.meta_path if each is not finder)
    spec = next(filter(None, (each.find_spec(name, path, None) for each in others)), None)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module = partial(_execute, spec.loader.exec_module)
    return spec


def _execute(execute, module: ModuleType) -> None:
    execute(module)
    _repair(module)


def undo_repair() -> None:
    """Put back what was replaced."""
    while _replaced:
        owner, name, value = _replaced.pop()
        if value is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, value)
    _ask_again()
