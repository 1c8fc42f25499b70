"""Recipes: a file is a run. Its docstring states the command, the number to expect and the cost.

A file is named after its model and its data: ``classify/nat_atto_digits.py``. It sets some of the keys in
`tasks.engine.DEFAULTS` and its task's ``DEFAULTS``, and inherits the rest from the files it lists in ``_base_``.
"""

from pathlib import Path

ROOT = Path(__file__).parent


def list_recipes() -> list[str]:
    """Return the names of the recipes in this package, such as ``"classify/nat_atto_digits"``."""
    return sorted(
        path.relative_to(ROOT).with_suffix("").as_posix()
        for path in ROOT.glob("*/*.py")
        if not path.parent.name.startswith("_") and not path.name.startswith("_")
    )


def find_recipe(name: str) -> Path:
    """Return the file of a recipe, named as in `list_recipes` or by its path; it may not exist."""
    return ROOT / f"{name}.py" if name in list_recipes() else Path(name)
