"""Entries of published state dicts whose modules are called otherwise here."""

from collections.abc import Mapping

from torch import Tensor


def rename_entries(state: dict[str, Tensor], prefix: str, names: Mapping[str, str]) -> list[str]:
    """Give entries under ``prefix`` our names, in place, and return these.

    Args:
        state: State dict.
        prefix: Of the module.
        names: From what published names begin with, after the prefix, to what ours do.
    """
    renamed = []
    for published, name in names.items():
        for key in [key for key in state if key.startswith(prefix + published)]:
            renamed.append(prefix + name + key.removeprefix(prefix + published))
            state[renamed[-1]] = state.pop(key)
    return renamed
