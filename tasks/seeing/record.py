"""Recording what the attentions of a model do while it runs as ever: hooks on whole attention modules, none inside.

A hook inside an attention would turn its fused path off and with it the last bits of the output. So only what went into
the module and what came out is kept, and all else is computed from that when it is asked for.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...blocks.record import Recorded
from .. import TaskError, nearest
from .call import AttentionCall
from .timm_layers import NEED_PARENTS, PARENTS, READERS, Site

_NAMED_ATTENTION = re.compile(r"Attention|Attn")


class Record(Mapping[str, AttentionCall]):
    """The attention calls of a recording, by module name, in call order.

    Attributes:
        skipped: Why modules that attend, or that the layers named, are not recorded.
        watched: Names of the modules whose calls are kept.
    """

    def __init__(self, watched: Sequence[str] = ()) -> None:
        self.watched = list(watched)
        self.skipped: dict[str, str] = {}
        self._calls: dict[str, AttentionCall] = {}

    @property
    def layers(self) -> list[str]:
        """Names of the recorded modules in call order; a second call of one is ``name#2``."""
        return list(self._calls)

    def __getitem__(self, name: str) -> AttentionCall:
        if name in self._calls:
            return self._calls[name]
        if name in self.skipped:
            raise KeyError(f"{name} was not recorded: {self.skipped[name]}")
        raise KeyError(f"there is no recorded attention {name!r}{nearest(name, self._calls)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def __repr__(self) -> str:
        return f"Record of {len(self)} attention calls, {len(self.skipped)} skipped"

    def add(self, name: str, call: Callable[[str], AttentionCall]) -> None:
        """Keep a call under its module's name, or ``name#2`` and so on."""
        count = 1 + sum(other.partition("#")[0] == name for other in self._calls)
        name = name if count == 1 else f"{name}#{count}"
        self._calls[name] = call(name)


class _Plan(NamedTuple):
    """What is hooked: modules that tell their calls, with the modules that tell where they are."""

    sites: dict[str, Site]
    skipped: dict[str, str]


def is_named(name: str, layers: Sequence[str] | None) -> bool:
    """Return whether one of the globs fits a module's name; None fits all."""
    return layers is None or any(fnmatchcase(name, pattern) for pattern in layers)


def _reader(module: nn.Module) -> Callable[[nn.Module], object] | None:
    if hasattr(module, "recorded"):
        return None
    return next((READERS[kind] for kind in type(module).__mro__ if kind in READERS), None)


def _tells(module: nn.Module) -> bool:
    return hasattr(module, "recorded") or _reader(module) is not None


def _lost(module: nn.Module, parents: Mapping[int, nn.Module]) -> bool:
    needs = any(kind in NEED_PARENTS for kind in type(module).__mro__)
    return needs and not hasattr(module, "recorded") and id(module) not in parents


def _plan(model: nn.Module, layers: Sequence[str] | None) -> _Plan:
    sites, skipped, parents = {}, {}, {}
    parts: dict[int, str] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for part in PARENTS.get(type(module), ()):
            parents[id(getattr(module, part))] = module
        if id(module) in seen:
            continue
        seen.add(id(module))
        if id(module) in parts:
            if is_named(name, layers) and _tells(module):
                skipped[name] = f"it is recorded as a part of {parts[id(module)] or 'the model'}"
            continue
        if _lost(module, parents):
            if is_named(name, layers):
                skipped[name] = f"{type(module).__name__} is read only inside of timm's own blocks, which know the map"
        elif _tells(module):
            if is_named(name, layers):
                sites[name] = Site(module, parents.get(id(module)), _owner(model, name))
            for part in module.modules():
                parts[id(part)] = name
        elif is_named(name, layers):
            reason = getattr(module, "unrecorded", None)
            if reason is None and _NAMED_ATTENTION.search(type(module).__name__):
                if any(_tells(part) for part in module.modules()):
                    continue
                kind = f"{type(module).__module__}.{type(module).__name__}"
                reason = f"there is no reader for {kind}"
            if reason is not None:
                skipped[name] = reason
                for part in module.modules():
                    parts.setdefault(id(part), name)
    return _Plan(sites, skipped)


def _owner(model: nn.Module, name: str) -> nn.Module:
    """Return the innermost module around a name that says how many tokens stand before its map, or the model."""
    owner, at = model, model
    for part in name.split(".")[:-1]:
        at = getattr(at, part)
        if hasattr(at, "num_prefix_tokens"):
            owner = at
    return owner


class _Recorder:
    """The hooks of a recording."""

    def __init__(self, model: nn.Module, plan: _Plan, record: Record):
        self.model, self.plan, self.record = model, plan, record
        self.image_size: tuple[int, int] | None = None
        self.resized = False
        self.inside = 0
        self.around: dict[int, tuple] = {}
        self.called: set[str] = set()
        self.reductions = _reductions(model)

    def install(self, stack: ExitStack) -> None:
        add = stack.callback
        root = self.model.register_forward_pre_hook(self._enter, with_kwargs=True)
        add(root.remove)
        add(self.model.register_forward_hook(self._leave, always_call=True).remove)
        for child in self.model.children():
            # A plain layer's own fast path would see the hook.
            if any(child.children()):
                add(child.register_forward_pre_hook(self._enter_child).remove)
        for name, site in self.plan.sites.items():
            add(site.module.register_forward_hook(self._keep(name, site), with_kwargs=True).remove)
            if site.parent is not None:
                add(site.parent.register_forward_pre_hook(self._enter_parent(site), with_kwargs=True).remove)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.inside += 1
        if self.inside == 1:
            # An attention by itself is given its map: a token is a pixel.
            self.image_size = None if "" in self.plan.sites else _image_size((*args, *kwargs.values()))
            self.resized = False

    def _leave(self, module: nn.Module, args: tuple, output: object) -> None:
        self.inside -= 1

    def _enter_child(self, module: nn.Module, args: tuple) -> None:
        # `forward_features` and `forward_intermediates` don't call the model itself, and a detector resizes and pads
        # what it is given, one batch or a list, before its backbone sees it.
        if (
            (self.inside and self.resized)
            or "" in self.plan.sites
            or not args
            or not isinstance(args[0], Tensor)
            or args[0].ndim != 4
        ):
            return
        if args[0].shape[1] in (getattr(self.model, "in_chans", 3), 3):
            self.image_size, self.resized = tuple(args[0].shape[2:]), True

    def _enter_parent(self, site: Site) -> Callable:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.around[id(site.module)] = (args, kwargs)

        return enter

    def _steps(self, name: str) -> list[int]:
        """Return the reductions that a module's map may have, its stage's first."""
        own = [step for stage, step in self.reductions.items() if stage and name.startswith(f"{stage}.")]
        return [*own, *sorted(set(self.reductions.values()))]

    def _keep(self, name: str, site: Site) -> Callable:
        def keep(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            if torch._C._current_graph_task_id() != -1:
                return  # gradient checkpointing computes a former call again
            self.called.add(name)
            reason = _random(module)
            if reason is not None:
                self.record.skipped[name] = reason
                return
            versions = [(x, x._version) for x in args if isinstance(x, Tensor) and not x.is_inference()]
            given = [x.detach() if isinstance(x, Tensor) else x for x in args]
            keywords = {key: x.detach() if isinstance(x, Tensor) else x for key, x in kwargs.items()}
            around = self.around.get(id(module))
            size = self.image_size

            def recompute() -> Recorded:
                if any(x._version != version for x, version in versions):
                    raise TaskError(f"what went into {name} was overwritten since; ask before the next step")
                inputs = [_as_taken(module, x) for x in given]
                named = {key: _as_taken(module, x) for key, x in keywords.items()}
                if hasattr(module, "recorded"):
                    return module.recorded(*inputs, **named)
                return _reader(module)(site, around, size, *inputs, **named)

            training = [part.training for part in module.modules()]
            arguments = (module, recompute, training, output, size, self._steps(name))
            self.record.add(name, lambda unique: AttentionCall(unique, *arguments))

        return keep


def _as_taken(module: nn.Module, x: object) -> object:
    """Return an input in the precision of the module's parameters, where autocast gave it in a lower one."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    dtype = next((parameter.dtype for parameter in module.parameters()), x.dtype)
    return x.to(torch.promote_types(x.dtype, dtype)) if dtype.is_floating_point else x


def _random(module: nn.Module) -> str | None:
    dropout = getattr(module, "attn_drop", None)
    if module.training and isinstance(dropout, nn.Dropout) and dropout.p > 0:
        return f"its weights are dropped at random (attn_drop {dropout.p}); call model.eval() first"
    return None


def _image_size(arguments: Sequence[object]) -> tuple[int, int] | None:
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.ndim == 4:
            return tuple(argument.shape[2:])
        nested = argument.values() if isinstance(argument, Mapping) else argument
        if isinstance(argument, (Mapping, list, tuple)):
            size = _image_size(list(nested))
            if size is not None:
                return size
    return None


def _reductions(model: nn.Module) -> dict[str, int]:
    """Return of how many pixels, along an axis, a token of each stage is one; all powers of 2 if nobody says."""
    for name, module in model.named_modules():
        info = getattr(module, "feature_info", None)
        entries = getattr(info, "info", info)
        if isinstance(entries, (list, tuple)) and entries and isinstance(entries[0], Mapping):
            prefix = f"{name}." if name else ""
            return {
                f"{prefix}{entry.get('module', '')}": int(entry["reduction"])
                for entry in entries
                if "reduction" in entry
            }
    return {f"#{power}": 2**power for power in range(8)}


@contextmanager
def record_attention(model: nn.Module, layers: str | Sequence[str] | None = None) -> Iterator[Record]:
    """Record what each attention of a model does in the calls within the context.

    The model runs as ever, with its fused operators, and gives the same bits. Kept are the input and output of each
    attention; weights are computed from them, by the module's own parameters, when they are asked for. So ask before
    the parameters change. A compiled model runs eagerly within the context.

    Args:
        model: Any model, or an attention by itself. All of foveate's attentions are read, and timm's of ViT (with
            rotary positions too), Swin, DaViT, Twins, MaxViT, PVTv2 and HaloNet; others are named in
            ``record.skipped``.
        layers: Globs of module names, such as ``"stages.3.*"``; all by default.

    Yields:
        A `Record`: ``record.layers``, ``record[name]`` (see `call.AttentionCall`), ``record.skipped``.

    Raises:
        TaskError: If no module has such a name, or nothing was recorded when the context ends.

    Example:
        >>> model = timm.create_model("nat_atto").eval()
        >>> with foveate.record_attention(model, "stages.0.*") as record, torch.no_grad():
        ...     logits = model(torch.randn(1, 3, 64, 64))
        >>> record[record.layers[0]].at((20, 30)).shape
        torch.Size([1, 2, 64, 64])
    """
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner  # hooks belong to the model that a compiled one wraps
    layers = [layers] if isinstance(layers, str) else layers
    plan = _plan(model, layers)
    if layers is not None:
        names = [name for name, _ in model.named_modules()]
        for pattern in layers:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise TaskError(f"no module of {type(model).__name__} is named {pattern!r}{nearest(pattern, names)}")
    record = Record(list(plan.sites))
    record.skipped.update(plan.skipped)
    if not plan.sites:
        raise TaskError(_nothing(model, plan.skipped))
    recorder = _Recorder(model, plan, record)
    with ExitStack() as stack:
        # Hooks that come after a compilation are not called.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        recorder.install(stack)
        yield record
    for name in plan.sites:
        if name not in recorder.called:
            record.skipped[name] = "it was not called"
    if not record:
        raise TaskError(_nothing(model, record.skipped))


def _nothing(model: nn.Module, skipped: Mapping[str, str]) -> str:
    why = "; ".join(f"{name or type(model).__name__}: {reason}" for name, reason in list(skipped.items())[:3])
    more = f", and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    read = (
        "foveate's attentions, and timm's of ViT, EVA, DINOv3, Swin, DaViT, Twins, MaxViT, PVTv2 and HaloNet are read"
    )
    return f"nothing to record in {type(model).__name__}: {why or 'it has no attention that is known'}{more} ({read})"
