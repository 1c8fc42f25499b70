"""Checkpoints of `foveate train`: plain tensors and types, written whole or not at all, loaded completely or not."""

import contextlib
import dataclasses
import errno
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..zoo import weights
from ..zoo.backbone import UnknownModelError
from ..zoo.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from ..zoo.library_errors import first_line
from ..zoo.maps import BackboneError
from . import TASKS, TaskError
from .adapters import fingerprint_base, is_new, merge
from .data.images import FULL_WHITE

# Of a config's dicts of options, those that say what a run starts from, and are of no use to rebuild its model.
_OF_THE_START = (
    *("reset_classifier", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_backbone"),
    *("checkpoint_path", "checkpoint", "backbone_checkpoint", "weights", "weights_backbone", "cache_dir"),
)
# How timm is told to fetch a model's description from elsewhere.
_SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:")
# Keys of cards, and of configs' models, that were called otherwise before.
_RENAMED = {"recipe": "setting", "segments": "output"}
_RENAMED_IN_MODEL = {"recipe": "setting", "task": "output"}
# Of files that are being written; a process that is killed leaves one.
_PARTIAL = ".partial-"
# A card or config holds no more things, nor deeper ones.
_MOST_SAID, _DEEPEST_SAID = 1_000_000, 32


def write_whole(path: str | Path, write: Callable[[str], None], durable: bool = False) -> None:
    """Let ``write`` fill a temporary file beside ``path`` and move it there; on any error nothing is left.

    Args:
        path: File to write; its folder is made if there is none.
        write: Gets the temporary file's name.
        durable: Whether the file must outlast a crash of the machine once this returns.

    Raises:
        TaskError: If the folder can't be written to, or the disk is full; what was there before is intact.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{_PARTIAL}{path.stem}-", suffix=path.suffix)
        os.close(handle)
        write(temporary)
        # mkstemp's files are private; the result gets the permissions any new file would.
        os.umask(mask := os.umask(0))
        os.chmod(temporary, 0o666 & ~mask)
        if durable:
            _flush(temporary)
        os.replace(temporary, path)
        temporary = None
        if durable:
            _flush(path.parent)
    except ValueError as error:  # of names, such as a NUL
        raise TaskError(f"{path.parent}: is no name of a folder ({first_line(error)}); choose another") from error
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        if temporary is not None:
            os.unlink(temporary)


def _unwritable(path: Path, error: OSError) -> TaskError:
    intact = "; the file that was there before is intact" if path.exists() else ""
    return TaskError(f"{path}: can't be written: {_reason(error, path.parent)}{intact}")


def write_together(folder: str | Path, name: str, write: Callable[[Path], list[Path]]) -> list[Path]:
    """Let ``write`` fill an empty folder, and move the files that it returns into ``folder``; on any error, none.

    Args:
        folder: Where the files are to be; it is made if there is none.
        name: Of the first of them.
        write: Gets the empty folder and returns its files, of which the first, which names the others, is moved last.

    Raises:
        TaskError: If the folder can't be written to, or the disk is full; what was there before is intact.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f"{_PARTIAL}{Path(name).stem}-") as temporary:
            files = write(Path(temporary))
            for file in reversed(files):
                os.replace(file, folder / file.name)
    except OSError as error:
        raise _unwritable(folder / name, error) from error
    return [folder / file.name for file in files]


def _flush(path: str | Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems have no fsync of folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _reason(error: OSError, folder: Path) -> str:
    """Return what is wrong, and what to do about it."""
    reason = (error.strerror or str(error) or type(error).__name__).splitlines()[0]
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(folder).free
        return f"{reason} ({free / 1e6:,.0f} MB are free); free space or choose another folder"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{reason}; make the folder writable or choose another one"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{reason}: a part of the path is a file; choose another folder"
    return f"{reason}; choose another folder"


def remove_partial(folder: Path) -> None:
    """Remove what a killed process had begun to write in a folder."""
    for file in folder.glob(f"{_PARTIAL}*"):
        file.unlink(missing_ok=True)


def check_folder(folder: Path, needed: int) -> None:
    """Make a folder and see that files can be written there, and that ``needed`` bytes would fit.

    Raises:
        TaskError: If not.
    """
    write_whole(folder / "probe", lambda file: Path(file).write_text("probe"))
    (folder / "probe").unlink()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TaskError(
            f"{folder}: {free / 1e9:.2f} GB are free, but the checkpoints of this run need about "
            f"{needed / 1e9:.2f} GB; free space, choose another --output, or lower checkpoint.keep"
        )


def save_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """Write a checkpoint of tensors and plain types; when this returns, it is on the disk.

    Raises:
        TaskError: If it can't be written.
    """

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            watched = _Watched(file)
            try:
                torch.save(checkpoint, watched)
            except RuntimeError as error:
                # torch reports its own failure after that of the file, or after Ctrl-C, which is the cause.
                cause = watched.error or _interruption(error)
                if cause is None:
                    raise
                raise cause from None

    write_whole(path, write, durable=True)


def _interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """Return the Ctrl-C during whose handling an error came up."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


class _Watched:
    """A file to write to that remembers why a write failed."""

    def __init__(self, file: BinaryIO):
        self._file, self.error = file, None

    def write(self, data) -> int:
        """Write, or keep the error and raise it."""
        try:
            return self._file.write(data)
        except (OSError, KeyboardInterrupt) as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Hand over what is buffered."""
        try:
            self._file.flush()
        except (OSError, KeyboardInterrupt) as error:
            self.error = self.error or error
            raise


def keep_copy(path: Path, copy: Path) -> None:
    """Keep a checkpoint under a second name: without copying it, where the file system can."""
    temporary = copy.with_name(f"{_PARTIAL}{copy.name}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        write_whole(copy, lambda file: shutil.copyfile(path, file), durable=True)
    else:
        os.replace(temporary, copy)


def read_checkpoint(path: str | Path | Checkpoint, task: str | None = None, merged: bool = True) -> dict:
    """Read a file that foveate wrote, by train, export or weights convert, without executing what it pickles.

    Args:
        path: Its file, or what `open_checkpoint` read of it.
        task: The task it must be of, if given.
        merged: Whether adapters are merged into the weights that they are of; else they are what there is.

    Returns:
        A dict with at least ``card``, a dict that says what the model is, and ``state_dict``, its weights.

    Raises:
        CheckpointError: If the file can't be read, or is no such checkpoint.
    """
    opened = open_merged(path) if merged else open_checkpoint(path)
    card, content = opened.card, opened.content
    if card is None:
        raise CheckpointError(f"{path}: not a checkpoint of `foveate train`: it doesn't say which model it holds")
    with taken_as_said(path):
        return _read(path, opened, card, content, task)


def open_merged(path: str | Path | Checkpoint) -> Checkpoint:
    """Read a checkpoint; of one that holds adapters alone, the whole model, of their base weights and them.

    Base weights are a file's of this machine, or published ones. No address is followed because a file says so: what it
    gave is used where it was fetched before.

    Raises:
        CheckpointError: If the file can't be read, or its base weights can't be had or are others.
    """
    opened = open_checkpoint(path)
    card = opened.card or {}
    if not card.get("lora"):
        return opened
    with taken_as_said(path):
        for said in (card, opened.content["config"]):
            _check_said(said)
        return _merged(path, opened, card)


def _merged(path: str | Path | Checkpoint, opened: Checkpoint, card: dict) -> Checkpoint:
    lora, task = card["lora"], card["task"]
    if task not in TASKS:
        raise CheckpointError(f"{path}: holds adapters of {_kind_of(card)}")
    try:
        model = _of_what_is_here(opened.content["config"]["model"])
        card = {**card, **_of_what_is_here({"kwargs": card["kwargs"]})}
        built = importlib.import_module(f".{task}.task", __package__).build_again(model, card)
    except (CheckpointError, TaskError) as error:
        raise CheckpointError(f"{path}: holds adapters of {lora['base']}, which can't be had: {error}") from error
    base, new = built.state_dict(), is_new(task, built)
    rest = {name: value for name, value in base.items() if not new(name)}
    if fingerprint_base(rest) != lora["sha256"]:
        raise CheckpointError(f"{path}: holds adapters of {lora['base']}, which is no longer the same; put it back")
    state = merge(base, opened.state, lora["alpha"] / lora["rank"])
    content = {**opened.content, "card": {**card, "lora": None}, "state_dict": state}
    return dataclasses.replace(opened, content=content)


def _of_what_is_here(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's ``model`` with files in the place of addresses, and options that name neither.

    Raises:
        CheckpointError: If what an address gives was not fetched before.
    """
    here = {}
    for key, value in model.items():
        if key in ("kwargs", "backbone_kwargs"):
            reset = {name: value[name] for name in ("reset_classifier",) if name in value}
            value = without_start(value) | reset  # which is needed to start as the run did
        elif isinstance(value, str) and "://" in value and key in _OF_THE_START:
            file = weights.cached(weights.entry_of(value))
            if file is None:
                raise CheckpointError(f"no address is followed on a file's word; run `foveate weights fetch {value}`")
            value = str(file)
        here[key] = value
    return here


def _read(path: str | Path | Checkpoint, opened: Checkpoint, card: dict, content: Mapping, task: str | None) -> dict:
    for said in (card, content.get("config")):
        _check_said(said)
    if task is not None and card.get("task") != task:
        raise CheckpointError(f"{path}: holds {_kind_of(card)}, not a model to {task}")
    model = card.get("model", card.get("backbone"))
    for name in model.values() if isinstance(model, Mapping) else (model,):
        if isinstance(name, str) and name.startswith(_SCHEMES):
            raise CheckpointError(f"{path}: names a model elsewhere, {name[:80]!r}; what it holds alone is opened")
    if not isinstance(content.get("state_dict"), dict):
        content = {"state_dict": opened.state}
    if isinstance(config := content.get("config"), dict):
        content = content | {"config": renamed(config)}
    return content | {"card": with_white(card, content)}


@contextlib.contextmanager
def taken_as_said(path: str | Path | Checkpoint) -> Iterator[None]:
    """Turn whatever comes of taking a file's card or config by its word into an error that names the file.

    Raises:
        CheckpointError: If entries are missing, of another type, or make no sense together.
    """
    try:
        yield
    except (TaskError, CheckpointError, BackboneError, UnknownModelError, torch.OutOfMemoryError):
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"{path}: what it says of its model or run makes no sense ({type(error).__name__}: {first_line(error)})"
        ) from error


def _check_said(said: Any) -> None:
    """Raise a ValueError if plain types are nested too deeply, hold themselves or mean very many things."""
    left, level = _MOST_SAID, [said]
    for _ in range(_DEEPEST_SAID):
        level = [
            inner
            for item in level
            for inner in (
                item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ()
            )
        ]
        left -= len(level)
        if not level:
            return
        if left < 0:
            break
    raise ValueError("it is nested endlessly, or means too much")


def renamed(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config or a card of a run under today's names; before, settings were called recipes, outputs tasks."""
    described = {_RENAMED.get(key, key): value for key, value in described.items()}
    model = described.get("model")
    if isinstance(model, Mapping):
        described["model"] = {_RENAMED_IN_MODEL.get(key, key): value for key, value in model.items()}
    return described


def with_white(card: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a card in today's words that says which value of 16-bit pixels is white, as those of older runs don't.

    They read the bundled micrograph as it is, and all other images of 16 bits by their full range.
    """
    config = checkpoint.get("config")
    data = config.get("data") if isinstance(config, Mapping) else None
    nuclei = isinstance(data, Mapping) and data.get("name") == "nuclei"
    return {"white": 255 if nuclei else FULL_WHITE} | renamed(card)


def _kind_of(card: dict) -> str:
    return "a backbone alone" if card.get("task") == "backbone" else f"a model to {card.get('task')}"


def without_start(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a model but those that say what it starts from: a file's may name no other file."""
    return {
        name: without_start(value) if isinstance(value, Mapping) else value
        for name, value in options.items()
        if name not in _OF_THE_START
    }


def rebuilt_from(model: Mapping[str, Any], checkpoint: str | Path | Checkpoint) -> dict[str, Any]:
    """Return a config's or a card's ``model`` such that all of it is read from a file that a run of it wrote."""
    options = {key: without_start(model[key]) for key in ("backbone_kwargs", "kwargs") if key in model}
    nothing = {"backbone_checkpoint": None} if "backbone_checkpoint" in model else {}
    checkpoint = open_merged(checkpoint) if isinstance(checkpoint, Checkpoint) else str(checkpoint)
    return {**model, **options, **nothing, "pretrained": False, "checkpoint": checkpoint}
