"""Parts of a model that don't learn: stages by number, modules and parameters by name."""

from collections.abc import Sequence

from torch import nn

from . import TaskError, nearest


def freeze(net: nn.Module, parts: Sequence[int | str]) -> list[nn.Module]:
    """Let parts of a model not learn; return their modules, whose norms shall keep their statistics.

    Args:
        net: A classifier of timm's, or a model with a ``backbone``.
        parts: Stages of the backbone, counted from 0, the first with what precedes it; or names, such as ``"stem"``,
            ``"blocks.3"`` or ``"pos_embed"``, of the model or of its backbone.

    Raises:
        TaskError: If there is no such part, or nothing is left to learn.
    """
    body = getattr(net, "backbone", net)
    body = getattr(body, "features", body)
    body = getattr(body, "model", body)  # that timm's FeatureGetterNet asks for maps
    frozen: list[nn.Module] = []
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TaskError(f"freeze holds {part!r}; it takes numbers of stages and names")
        frozen += _stage(body, part) if isinstance(part, int) else _named(net, body, part)
    if parts and not any(parameter.requires_grad for parameter in net.parameters()):
        raise TaskError(f"freeze={tuple(parts)} leaves nothing to learn")
    return frozen


def stage_names(body: nn.Module) -> list[str]:
    """Return the names of a backbone's stages, of its own modules or of timm's list of features."""
    returned = getattr(body, "return_layers", None)
    if returned:
        return [name for name, _ in body.named_children() if name in returned]
    modules = dict(body.named_modules())
    infos = [info["module"] for info in (getattr(body, "feature_info", None) or ()) if isinstance(info, dict)]
    # ResNets tell their first activation too, which learns nothing.
    names = [name for name in infos if name in modules and next(modules[name].parameters(), None) is not None]
    return [name for name in dict.fromkeys(names) if "stem" not in name]


def _stage(body: nn.Module, number: int) -> list[nn.Module]:
    names = stage_names(body)
    if not 0 <= number < len(names):
        has = f"has {len(names)}, counted from 0" if names else "has no stages that timm tells apart"
        raise TaskError(f"freeze holds stage {number}, but {type(body).__name__} {has}; name a module")
    modules = [body.get_submodule(names[number])]
    if number == 0:
        top = names[0].partition(".")[0]
        for name, module in body.named_children():
            if name == top:
                break
            modules.append(module)
        # Position embeddings and tokens.
        for parameter in body.parameters(recurse=False):
            parameter.requires_grad_(False)
    return [module.requires_grad_(False) for module in modules]


def _named(net: nn.Module, body: nn.Module, name: str) -> list[nn.Module]:
    for owner in (net, body):
        modules, parameters = dict(owner.named_modules()), dict(owner.named_parameters())
        if name and name in modules:
            return [modules[name].requires_grad_(False)]
        if name in parameters:
            parameters[name].requires_grad_(False)
            return []
    known = [key for key in dict(body.named_modules()) if key.count(".") < 2 and key]
    raise TaskError(f"freeze holds {name!r}, which is no module{nearest(name, known)}")
