"""What a run leaves in its folder besides checkpoints: its surroundings, a log, scalars, records of other tools."""

import csv
import importlib
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import TaskError, one_line
from ..checkpoints import write_whole
from .config import format_config

_PACKAGES = ("foveate", "torch", "torchvision", "timm", "mmengine", "albumentations", "opencv-python-headless", "numpy")


def describe_environment(device: torch.device, output: Path) -> dict[str, Any]:
    """Return, in plain types, where and from what a run is done, and the command that does it again."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    # With the build, such as +cu126, which the package's own record lacks.
    packages["torch"] = torch.__version__
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    again = ["foveate", "train", str(output / "config.py"), "--output", f"{output}-again"]
    if processes > 1:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        launch = ["torchrun", "--nnodes", str(processes // local), "--nproc-per-node", str(local)]
        again = [*launch, "-m", *again]
    return {
        "begun": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "folder": os.getcwd(),
        "again": shlex.join(again),
        "packages": packages,
        "revision": find_revision(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def find_revision() -> dict[str, Any] | None:
    """Return the git revision of the package and whether its files differ from it; None where it is no checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def ask(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return done.stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "changed": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


class RunFolder:
    """Writes what a run leaves, in the main process; a continued run adds to what is there.

    Attributes:
        path: The folder.

    Args:
        path: The folder.
        config: The run's, complete.
        device: Where it runs.
        speak: Whether lines also go to standard output.

    Raises:
        TaskError: If a backend of ``config["log"]`` is not installed.
    """

    def __init__(self, path: Path, config: dict[str, Any], device: torch.device, speak: bool):
        self.path, self._speak = path, speak
        self._backends: Sequence[Any] = [_BACKENDS[name](path, config) for name in config["log"]]
        text = format_config(config)
        write_whole(path / "config.py", lambda file: Path(file).write_text(text))
        self.environment = describe_environment(device, path)
        text = json.dumps(self.environment, indent=1)
        write_whole(path / "environment.json", lambda file: Path(file).write_text(text))

    def check(self) -> None:
        """Raise a TaskError if the folder is no longer there: what is written must not make half of it again."""
        if not (self.path / "config.py").is_file():
            raise TaskError(
                f"{self.path}: the run's folder was removed or renamed while it went on; continue it where it is now: "
                "--output FOLDER --resume"
            )

    def say(self, line: str) -> None:
        """Add a line to the log, with the time, and show it."""
        line = one_line(line)
        try:
            with open(self.path / "log.txt", "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")
        except OSError as error:
            raise TaskError(f"{self.path / 'log.txt'}: can't be written: {error.strerror}; free space there") from error
        if self._speak:
            # Above the bar, where there is one.
            tqdm.write(line)
            sys.stdout.flush()

    def write_scalars(self, history: list[dict[str, Any]]) -> None:
        """Write the scalars of all epochs, and tell the backends those of the last."""
        write_history(self.path, history)
        for backend in self._backends:
            backend.add(history[-1])

    def close(self) -> None:
        """Let the backends finish."""
        for backend in self._backends:
            backend.close()


def write_history(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write the scalars of all epochs, as JSON and as a table."""
    text = json.dumps(history, indent=1)
    write_whole(folder / "history.json", lambda file: Path(file).write_text(text))
    table = io.StringIO()
    columns = list(dict.fromkeys(key for entry in history for key in entry))
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_whole(folder / "history.csv", lambda file: Path(file).write_text(table.getvalue()))


def _require(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise TaskError(
            f"log={package} needs a package ({reason}); cure: pip install {package}, or leave it out"
        ) from error


class _TensorBoard:
    """Scalars as TensorBoard's events, in the run's folder."""

    def __init__(self, path: Path, config: dict[str, Any]):
        self._writer = _require("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(path / "tensorboard"))

    def add(self, entry: dict[str, Any]) -> None:
        for name, value in entry.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, entry["epoch"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """Scalars at Weights & Biases; a continued run goes on there too. Its own variables say where and as whom."""

    def __init__(self, path: Path, config: dict[str, Any]):
        wandb = _require("wandb", "wandb")
        number = path / "wandb_id.txt"
        if not number.exists():
            name = wandb.util.generate_id()
            write_whole(number, lambda file: Path(file).write_text(name))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "foveate"),
            name=path.name,
            id=number.read_text(),
            resume="allow",
            dir=str(path),
            config=config,
        )

    def add(self, entry: dict[str, Any]) -> None:
        self._run.log(entry, step=entry["epoch"])

    def close(self) -> None:
        self._run.finish()


_BACKENDS = {"tensorboard": _TensorBoard, "wandb": _WandB}
