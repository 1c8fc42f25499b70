"""Runs killed at random moments and continued: they end with the bits of one that nobody interrupted."""

import os
import shutil
import signal
import time
import traceback
from pathlib import Path

import torch
from foveate.tasks import engine
from trial import Trial, Wrong

SETTINGS = ("epochs=2", "schedule.warmup_epochs=0", "batch_size=360", "checkpoint.keep=2", "checkpoint.interval=1")
RECIPE = "classify/nat_atto_digits"


def run(trial: Trial) -> None:
    whole = trial.folder / "whole"
    begun = time.monotonic()
    if (status := os.waitpid(_begin(whole), 0)[1]) != 0:
        raise Wrong(f"a run ends with {status}")
    length = time.monotonic() - begun
    for number in trial.numbers():
        kills = []
        trial.check("killed and continued", number, lambda: _break(trial, whole, length, kills), limit=600)  # noqa: B023
        for _ in kills:
            trial.note("kills", number, None)


def _begin(folder: Path) -> int:
    """Begin a run, or continue it, in a process of its own."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            config = engine.load_config(RECIPE, SETTINGS)
            engine.train(config, folder, resume=(folder / "last.pth").exists(), progress=False)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return process


def _break(trial: Trial, whole: Path, length: float, kills: list[int]) -> None:
    """Kill a run and its continuations, and continue to the end; ``kills`` gets those that were not over before."""
    folder = trial.folder / "killed"
    shutil.rmtree(folder, ignore_errors=True)
    for _ in range(trial.draw.choice((1, 3, 6))):
        process = _begin(folder)
        time.sleep(trial.draw.uniform(0.02, 0.8) * length)
        os.kill(process, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(process, 0)[1]):
            kills.append(process)
    if os.waitpid(_begin(folder), 0)[1] != 0:
        raise Wrong("it can't be continued")
    for file in sorted(whole.glob("*.pth")):
        expected, actual = (torch.load(path, weights_only=True) for path in (file, folder / file.name))
        _same(expected["state_dict"], actual["state_dict"], file.name)
    for name in ("history.json", "history.csv", "curves.png", "report.html"):
        if not (folder / name).is_file():
            raise Wrong(f"{name} is missing")
    if left := [path.name for path in folder.iterdir() if path.name.startswith(".")]:
        raise Wrong(f"{left} is left behind")


def _same(expected: dict, actual: dict, name: str) -> None:
    different = [key for key, value in expected.items() if not torch.equal(value, actual[key])]
    if different:
        raise Wrong(f"{name}: {different[0]} differs")
