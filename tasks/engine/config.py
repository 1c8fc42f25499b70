"""Configs: Python files that set some of the keys of `DEFAULTS` and of their task's, and may inherit by ``_base_``."""

import ast
import copy
import importlib
import math
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from timm.models import is_model
from timm.optim import list_optimizers

from ...configs import find_recipe, list_recipes, read_recipe, recipes_of_model
from ...zoo.library_errors import first_line
from .. import LONGEST_SIDE, TASKS, TaskError, nearest
from ..adapters import DEFAULT_RANK
from ..checkpoints import renamed
from .keys import meaning

# Every key that a config of any task may have, with its default; a task adds its own. `keys` says what they mean.
DEFAULTS = {
    "task": None,
    "seed": 0,
    "deterministic": False,
    "device": "auto",
    "precision": "float32",
    "batch_size": 64,
    "workers": 0,
    "epochs": 10,
    "iterations": None,
    "val_interval": 1,
    "sync_batchnorm": False,
    "grad_checkpointing": False,
    "channels_last": False,
    "compile": False,
    "damaged_images": "refuse",
    "log": (),
    "checkpoint": {
        "interval": None,
        "keep": 0,
    },
    "optimizer": {
        "name": "adamw",
        "lr": 1e-3,
        "lr_batch": None,
        "weight_decay": 0.05,
        "no_decay": None,
        "layer_decay": None,
        "factors": {},
        "clip_grad": None,
        "accumulate": 1,
        "kwargs": {},
    },
    "schedule": {
        "name": "cosine",
        "warmup_epochs": 0,
        "warmup_iterations": 0,
        "warmup_factor": 0.01,
        "final_factor": 0.01,
        "power": 1.0,
        "steps": (),
        "gamma": 0.1,
    },
    "freeze": (),
    "lora": {
        "rank": None,
        "alpha": 16.0,
        "dropout": 0.0,
        "targets": ("qkv", "proj", "fc1", "fc2"),
    },
    "ema": None,
    "ema_warmup": None,
    "early_stop": None,
    "custom_hooks": (),
}
FREE = ("optimizer.kwargs", "optimizer.factors")  # dicts with keys of their own
# Types of what may be None.
OPTIONAL = {
    "iterations": int,
    "workers": int,
    "checkpoint.interval": int,
    "optimizer.no_decay": tuple,
    "optimizer.layer_decay": float,
    "optimizer.clip_grad": float,
    "ema": float,
    "ema_warmup": int,
    "early_stop": int,
    "optimizer.lr_batch": int,
    "lora.rank": int,
}
_KINDS = {"batch_size": "size"}  # of keys that take more than their default's type
FINETUNE = "classify/nat_tiny_finetune"  # the recipe for any model
SCHEDULES = ("cosine", "poly", "step")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
BACKENDS = ("tensorboard", "wandb")

_TYPES = {
    "size": ('a whole number or "auto"', lambda value: value == "auto" or type(value) is int),
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    float: ("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
    str: ("a name", lambda value: isinstance(value, str)),
    tuple: ("a list", lambda value: isinstance(value, list | tuple)),
    object: ("a name or a list", lambda value: isinstance(value, str | list | tuple)),
    dict: ("a dict", lambda value: isinstance(value, dict)),
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a config and complete it with the defaults.

    Args:
        path: Name of a recipe, such as ``"classify/nat_atto_digits"``, or a Python file. Its ``_base_`` may name files
            and recipes.
        overrides: Assignments such as ``"optimizer.lr=1e-3"``; values are Python literals, or else strings.

    Returns:
        Nested dict with a value for every key.

    Raises:
        TaskError: If there is no such config, it can't be read, a key is unknown or a value is of another type than its
            default.
    """
    given = _read(Path(path))
    if Path(path).with_name("environment.json").is_file():  # beside a run's own config, perhaps of an older version
        given = renamed(given)
    return _complete(given, overrides, path)


def config_of(checkpoint: Mapping[str, Any], path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Complete the config that a checkpoint of a run holds as data: to measure by, no Python is run for it.

    What names code, reports elsewhere or changes training images alone is left out.

    Args:
        checkpoint: What `read_checkpoint` returned.
        path: Its file, for messages.
        overrides: As for `load_config`.

    Raises:
        TaskError: If it holds none, or as `load_config` does.
    """
    given = checkpoint.get("config")
    if not isinstance(given, Mapping):
        raise TaskError(f"{path}: holds no config; name one: foveate eval CONFIG {path}")
    given = {key: value for key, value in given.items() if key not in ("custom_hooks", "log")}
    if isinstance(given.get("data"), Mapping):
        given["data"] = {key: value for key, value in given["data"].items() if key != "augment"}
    return _complete(given, overrides, path)


def _complete(given: dict[str, Any], overrides: Sequence[str], path: str | Path) -> dict[str, Any]:
    """Return a config with every key, checked."""
    defaults = copy.deepcopy(DEFAULTS)
    task = given.get("task")
    if task not in TASKS:
        raise TaskError(f"{path}: task is {task!r}{nearest(str(task), TASKS)}")
    task_class = task_class_of(task)
    defaults |= copy.deepcopy(task_class.DEFAULTS)
    free = FREE + tuple(task_class.FREE)
    optional = OPTIONAL | {"task": str} | task_class.OPTIONAL
    config = copy.deepcopy(defaults)
    if given.get("lora") is True:
        given["lora"] = {"rank": DEFAULT_RANK}
    for key, value in leaves(given, free):
        _assign(config, defaults, free, optional, key, value, str(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise TaskError(f"{override!r}: an override is key=value, such as optimizer.lr=1e-3")
        if key == "lora" and _parse(text) is True:
            key, text = "lora.rank", str(DEFAULT_RANK)
        if key == "task":
            raise TaskError(f"{override}: a config is about its task, which is {task!r}; take another config")
        _assign(config, defaults, free, optional, key, _parse(text), override)
    _check_values(config)
    return config


def _read(path: Path) -> dict[str, Any]:
    """Return what a config gives, its bases included."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return Config.fromfile(_file_of(path, Path(folder)), lazy_import=False).to_dict()
        except TaskError:
            raise
        except Exception as error:
            reason = first_line(error)
            raise TaskError(f"{path}: {type(error).__name__}: {reason}") from error


def _file_of(path: Path, folder: Path, origin: str = "") -> Path:
    """Return the file of a config whose ``_base_`` are files, as mmengine asks; in a folder, unless it is one already.

    Args:
        path: Name of a recipe, or a file.
        folder: Where recipes are written.
        origin: The config that inherits from this one, for messages.
    """
    name = path.as_posix()
    file = find_recipe(name)
    if file.is_file():
        if file.suffix != ".py":
            raise TaskError(f"{path}: a config is a Python file")
        text = file.read_text(encoding="utf-8")
    elif name in list_recipes():
        text = read_recipe(name)
    else:
        raise TaskError(f"{origin}{_unknown(name)}")
    given = _bases(text)
    bases = [file.parent / base if base.endswith(".py") else Path(base) for base in given]
    files = [_file_of(base, folder, f"{path}: _base_: ") for base in bases]
    if file.is_file() and files == bases:
        return file
    written = folder / f"{len([*folder.iterdir()])}.py"
    # The first assignment is the one that counts.
    written.write_text(f"_base_ = {[str(file.absolute()) for file in files]!r}; {text}", encoding="utf-8")
    return written


def _bases(text: str) -> list[str]:
    """Return what a config lists in ``_base_``."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_base_":
            bases = ast.literal_eval(node.value)
            return [bases] if isinstance(bases, str) else list(bases)
    return []


def _unknown(name: str) -> str:
    """Return what to say of a name that is no config: of a model, its recipes."""
    if name.endswith(".py"):
        return f"{name}: no such config"
    if not is_model(name.partition(".")[0]):
        return f"unknown config {name!r}{nearest(name, list_recipes())}"
    if recipes := recipes_of_model(name):
        return f"{name} is a model, and a config a recipe of it: {', '.join(recipes)}"
    return f"{name} is a model without a recipe of its own; take another's, such as {FINETUNE} model.name={name}"


def format_config(config: dict[str, Any]) -> str:
    """Return a complete config as the Python file that gives it, with what each key means."""
    task = config["task"]
    free = FREE + tuple(task_class_of(task).FREE)
    lines = []

    def write(tree: dict, parents: tuple[str, ...]) -> None:
        indent, equals, end = "    " * len(parents), "=" if parents else " = ", "," if parents else ""
        for name, value in tree.items():
            key = ".".join((*parents, name))
            if isinstance(value, dict) and value and key not in free:
                lines.append(f"{indent}{name}{equals}dict(")
                write(value, (*parents, name))
                lines.append(f"{indent}){end}")
            else:
                comment = meaning(key, task)
                lines.append(f"{indent}{name}{equals}{value!r}{end}" + (f"  # {comment}" if comment else ""))

    write(config, ())
    return "\n".join(lines) + "\n"


def task_class_of(name: str):
    """Return the class of a task by its name."""
    return importlib.import_module(f"..{name}", __package__).Task


def leaves(tree: dict, free: Sequence[str], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield ``(dotted key, value)`` of a nested dict; a dict under a free key, or an empty one, is a value."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and key not in free:
            yield from leaves(value, free, f"{key}.")
        else:
            yield key, value


def _parse(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None, "null": None}.get(text.lower(), text)


def _assign(
    config: dict, defaults: dict, free: Sequence[str], optional: dict[str, type], key: str, value: Any, source: str
) -> None:
    """Set ``config[key]`` if the defaults know the key and a value of this type."""
    *parents, name = key.split(".")
    if any(".".join(parents[:depth]) in free for depth in range(1, len(parents) + 1)):
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
        return
    known = dict(leaves(defaults, free))
    if key not in known:
        own = [leaf for leaf in known if leaf.startswith(f"{key}.")]
        hint = f"; set one of its own keys: {', '.join(own)}" if own else nearest(key, known)
        raise TaskError(f"{source}: unknown key {key!r}{hint}")
    default = known[key]
    expected, fits = _TYPES[_KINDS.get(key) or optional.get(key, type(default))]
    may_be_none = default is None or key in optional
    if not fits(value) and not (value is None and may_be_none):
        example = f", such as {default!r}" if default not in (None, {}) else " or None" if default is None else ""
        raise TaskError(f"{source}: {key} takes {expected}{example}, not {value!r}")
    node = config
    for parent in parents:
        node = node[parent]
    node[name] = value


def _check_values(config: dict) -> None:
    optimizer, schedule, saving = config["optimizer"], config["schedule"], config["checkpoint"]
    lora = config["lora"]
    checks = (
        ("precision", config["precision"], config["precision"] in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
        ("val_interval", config["val_interval"], config["val_interval"] > 0, "at least 1"),
        (
            "damaged_images",
            config["damaged_images"],
            config["damaged_images"] in ("refuse", "skip"),
            "refuse or skip",
        ),
        ("log", config["log"], set(config["log"]) <= set(BACKENDS), f"a list of {', '.join(BACKENDS)}"),
        (
            "checkpoint.interval",
            saving["interval"],
            saving["interval"] is None or saving["interval"] > 0,
            "at least 1, or None",
        ),
        ("checkpoint.keep", saving["keep"], saving["keep"] >= 0, "at least 0"),
        ("lora.rank", lora["rank"], lora["rank"] is None or lora["rank"] > 0, "at least 1, or None"),
        ("lora.dropout", lora["dropout"], 0 <= lora["dropout"] < 1, "from 0 to less than 1"),
        ("optimizer.accumulate", optimizer["accumulate"], optimizer["accumulate"] > 0, "at least 1"),
        *(
            (key, value, value is None or (least < value <= most if open_ else least <= value <= most), rule)
            for key, value, least, most, open_, rule in _ranges(config)
        ),
        (
            "ema_warmup",
            config["ema_warmup"],
            config["ema_warmup"] is None or (config["ema"] is not None and config["ema_warmup"] > 0),
            "at least 1, with ema, or None",
        ),
        (
            "schedule.warmup_epochs",
            schedule["warmup_epochs"],
            schedule["warmup_epochs"] >= 0,
            "at least 0",
        ),
        (
            "schedule.warmup_iterations",
            schedule["warmup_iterations"],
            schedule["warmup_iterations"] >= 0 and not (schedule["warmup_iterations"] and schedule["warmup_epochs"]),
            "at least 0, and 0 with warmup_epochs",
        ),
        ("schedule.name", schedule["name"], schedule["name"] in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
        (
            "schedule.steps",
            schedule["steps"],
            all(type(step) is int for step in schedule["steps"])
            and list(schedule["steps"]) == sorted({0, *schedule["steps"]})[1:],
            "ascending epochs",
        ),
    )
    for key, value, holds, rule in checks:
        if not holds:
            raise TaskError(f"{key} is {value!r}, but must be {rule}")
    if optimizer["name"] not in list_optimizers():
        raise TaskError(
            f"optimizer.name: unknown optimizer {optimizer['name']!r}{nearest(optimizer['name'], list_optimizers())}"
        )


def _ranges(config: dict) -> Iterable[tuple[str, Any, float, float, bool, str]]:
    """Yield key, value, least and greatest value, whether the least itself is left out, and the rule in words."""
    optimizer, schedule, losses = config["optimizer"], config["schedule"], config.get("loss", {})
    largest = sys.float_info.max
    yield "seed", config["seed"], 0, 2**32 - 1, False, "from 0 to 2**32 - 1"
    size = None if config["batch_size"] == "auto" else config["batch_size"]
    yield "batch_size", size, 1, 10**6, False, "from 1 to 1000000"
    yield "workers", config["workers"], 0, 1000, False, "from 0 to 1000"
    for key in ("epochs", "iterations"):
        yield key, config[key], 1, 10**9, False, "from 1 to 10**9"
    yield "ema", config["ema"], 0, math.nextafter(1, 0), True, "more than 0 and less than 1, or None"
    yield "early_stop", config["early_stop"], 1, 10**9, False, "at least 1, or None"
    yield "optimizer.lr_batch", optimizer["lr_batch"], 1, 10**9, False, "at least 1, or None"
    yield "optimizer.lr", optimizer["lr"], 0, largest, False, "at least 0"
    yield "optimizer.weight_decay", optimizer["weight_decay"], 0, largest, False, "at least 0"
    yield "optimizer.clip_grad", optimizer["clip_grad"], 0, largest, True, "more than 0, or None"
    yield "optimizer.layer_decay", optimizer["layer_decay"], 0, 1, True, "more than 0 and at most 1, or None"
    yield "schedule.warmup_factor", schedule["warmup_factor"], 0, 1, True, "more than 0 and at most 1"
    yield "schedule.final_factor", schedule["final_factor"], 0, 1, False, "from 0 to 1"
    for key in ("power", "gamma"):
        yield f"schedule.{key}", schedule[key], 0, largest, True, "more than 0"
    for key in ("mixup", "cutmix"):
        yield f"loss.{key}", losses.get(key), 0, largest, False, "at least 0"
    for key in ("size", "short", "long", "divisor"):
        yield f"data.{key}", config["data"].get(key), 1, LONGEST_SIDE, False, f"from 1 to {LONGEST_SIDE}"
    yield "data.balance", config["data"].get("balance"), 0, 10, False, "from 0 to 10"
    for key in ("mosaic", "copy_paste"):
        yield f"data.{key}", config["data"].get(key), 0, 1, False, "a probability, from 0 to 1"
    for key in ("smmix", "attentive_cutmix"):
        yield f"loss.{key}", losses.get(key), 0, 1, False, "a probability, from 0 to 1"
    yield "loss.label_smoothing", losses.get("label_smoothing"), 0, 1, False, "from 0 to 1"


def plain(value: Any) -> Any:
    """Return nested containers as dicts and lists, as they come back from a file."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
