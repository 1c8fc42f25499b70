"""LoRA: low-rank adapters beside frozen layers (arXiv 2106.09685), added by peft, saved alone, merged when read."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import TaskError
from .extras import require

DEFAULT_RANK = 4
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def is_target(name: str, targets: Sequence[str]) -> bool:
    """Return whether a layer is one of those named: by its last name, or its last word, such as ``proj`` in ``l_proj``.

    ``qkv`` is also ``q``, ``k``, ``v``, ``kv`` and ``qk``, as families split it.
    """
    last = name.rpartition(".")[2]
    word = last.rpartition("_")[2]
    return last in targets or word in targets or ("qkv" in targets and 0 < len(word) <= 3 and set(word) <= set("qkv"))


def add_adapters(net: nn.Module, body: nn.Module, new: Callable[[str], bool], settings: Mapping[str, Any]) -> None:
    """Put adapters beside layers of a model's body, and let these and what is new in the model learn alone.

    Args:
        net: The model.
        body: It, or its backbone.
        new: Tells of a parameter's name whether it is of what is new, which learns: a classifier, or neck and heads.
        settings: ``rank``, ``alpha``, ``dropout`` and ``targets``.

    Raises:
        TaskError: If peft isn't installed, or there is no such layer.
    """
    names = [
        name
        for name, module in body.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.groups == 1 and module.kernel_size == (1, 1))
    ]
    prefix = next(f"{name}." if name else "" for name, module in net.named_modules() if module is body)
    targets = [
        prefix + name for name in names if is_target(name, settings["targets"]) and not new(f"{prefix}{name}.weight")
    ]
    if not targets:
        common = Counter(name.rpartition(".")[2] for name in names).most_common(5)
        raise TaskError(
            f"lora.targets: no layer is called {', '.join(settings['targets'])}; there are "
            f"{', '.join(name for name, _ in common) or 'none'}"
        )
    peft = require("peft")
    config = peft.LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=targets,
        bias="none",
    )
    peft.inject_adapter_in_model(config, net)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(".lora_" in name or new(name))


def is_saved(name: str, new: Callable[[str], bool]) -> bool:
    """Return whether an entry is saved with adapters: they themselves, and what is new in the model."""
    return ".lora_" in name or new(name)


def is_new(task: str, net: nn.Module) -> Callable[[str], bool]:
    """Return what tells of an entry's name whether it is of what doesn't come with the base weights.

    Args:
        task: Of a classifier that is its classifier, of others all but the backbone.
        net: The model.
    """
    if task != "classify":
        return lambda name: not name.startswith("backbone.")
    heads = net.get_classifier()
    heads = heads if isinstance(heads, tuple | list) else [heads]
    prefixes = tuple(f"{name}." for name, module in net.named_modules() if any(module is head for head in heads))
    return lambda name: name.startswith(prefixes)


def fingerprint_base(state: Mapping[str, Tensor]) -> str:
    """Return what tells the base weights from others: a hash of their entries under the names without adapters."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {list(value.shape)} {value.dtype}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def describe_base(model: Mapping[str, Any]) -> str:
    """Return the name of the weights that a config's ``model`` starts from.

    Raises:
        TaskError: If it starts from none: adapters alone would be saved, and nothing they belong to.
    """
    for key in ("checkpoint", "backbone_checkpoint"):
        if model.get(key) is not None:
            return str(model[key])
    if model.get("pretrained"):
        return f"{model.get('name') or model.get('backbone')}, published"
    raise TaskError("lora adapts weights: set model.pretrained=True or model.checkpoint=FILE")


def without_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of a model with adapters under the names that they have without."""
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def merge(base: Mapping[str, Tensor], saved: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return base weights with adapters added, ``W + scale B A``, and with what is new.

    Args:
        base: Entries of the whole model.
        saved: Entries of adapters, and of what is new.
        scale: ``alpha / rank``.
    """
    state = dict(base)
    for name, value in saved.items():
        if name.endswith(_A):
            weight = f"{name.removesuffix(_A)}.weight"
            up = saved[name.replace(_A, _B)]
            change = up.flatten(1).double() @ value.flatten(1).double()
            state[weight] = (base[weight].double() + scale * change.view(base[weight].shape)).to(base[weight].dtype)
        elif not name.endswith(_B):
            state[name] = value
    return state
