"""Recipes: each is a run, whose text states the command, the number to expect and the cost.

A recipe is called TASK/HEAD_BACKBONE_SCHEDULE_DATA, or classify/MODEL_DATA. Those that ran here, and those of our own,
are files, such as ``classify/nat_atto_digits.py``; the published ones are made by their names, from how the authors
trained (`training`) and what they published (`published`). A recipe sets some of the keys in `tasks.engine.DEFAULTS`
and its task's ``DEFAULTS``, and inherits the rest from what it lists in ``_base_``: files, or names of recipes and of
what they share, such as ``"_base_/coco_multi_scale"``.
"""

from pathlib import Path

from ..zoo.weights import table
from .published import SETTINGS, published_recipes
from .training import CLASSIFIERS, TEXTS, merged, settings_of

ROOT = Path(__file__).parent


def list_recipes() -> list[str]:
    """Return the names of the recipes, such as ``"classify/nat_atto_digits"``."""
    by_hand = (path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.glob("[!_]*/[!_]*.py"))
    return sorted({*by_hand, *published_recipes(), *(f"classify/{model}_imagenet" for model in CLASSIFIERS)})


def recipes_of_model(name: str) -> list[str]:
    """Return the recipes that train a model or use it as a backbone, by its name with or without a tag."""
    model = name.partition(".")[0]
    names = (f"_{model}_", f"_{model.removeprefix('foveate_')}_")
    return [recipe for recipe in list_recipes() if any(part in f"_{recipe.rpartition('/')[2]}" for part in names)]


def find_recipe(name: str) -> Path:
    """Return the file of a recipe that is kept as one, or of what recipes share; for other names it does not exist."""
    path = ROOT / f"{name}.py"
    return path if path.is_file() and not path.name.startswith("__") else Path(name)


def read_recipe(name: str) -> str:
    """Return a recipe's text, which is a Python file with the names of its bases in ``_base_``.

    Args:
        name: As in `list_recipes`, or what recipes share, such as ``"_base_/coco"``.

    Raises:
        KeyError: If there is no such recipe.
    """
    path = find_recipe(name)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if name not in list_recipes():
        raise KeyError(name)
    return _published(name)


def _published(name: str) -> str:
    """Return the text of a published recipe."""
    settings = settings_of(name)
    texts = {key: settings.pop(key, "") for key in TEXTS}
    task, _, stem = name.partition("/")
    if task == "classify":
        settings = merged({"model": {"name": stem.removesuffix("_imagenet")}}, settings)
        model = settings["model"]["name"]
        entry = next((entry for entry in table().values() if (entry.model, entry.data) == (model, "imagenet-1k")), None)
        title, source, metrics = f"{model} on ImageNet-1k", "", ""
        if entry is not None:
            source, metrics = entry.page, "; ".join(f"{metric} {value}" for metric, value in entry.stated.items())
    else:
        row = published_recipes()[name]
        model = {"head": row["head"], "backbone": row["backbone"]}
        if row["setting"] not in ("", SETTINGS[task]):
            model["setting"] = row["setting"]
        settings = merged({"model": model}, settings)
        title = f"{row['head']} on {row['backbone']}, {row['schedule']} on {row['data']}"
        metrics, source = row["metrics"], row.get("source", "")
    source = texts["source"] or source
    lines = [
        f"{title}: as published, {source}" if source else f"{title}: settings of our own, with which nothing ran yet",
        *(["", texts["note"]] if texts["note"] else []),
        "",
        " ".join(filter(None, [f"Command: foveate train {name} data.root=FOLDER", texts["arguments"]])),
        f"    by torchrun on {texts['gpus'] or 8} GPUs, as `foveate train --help` says"
        + (f"; other sizes by\n    model.name={texts['sizes']}" if texts["sizes"] else ""),
        f"Expect: {f'the authors state {metrics}' if metrics else 'no published result is known here'}; not run by us.",
        "Cost: not measured by us.",
    ]
    body = "\n".join(f"{key} = {value!r}" for key, value in {"task": task, **settings}.items())
    return '"""{}\n"""\n\n{}\n'.format("\n".join(lines), body)
