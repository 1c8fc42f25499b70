"""Checkpoints outlast interruptions of any kind, and a continued run ends where an uninterrupted one does."""

import json
import os
import subprocess
import sys

import pytest
import torch
from foveate.tasks import TaskError, engine
from foveate.tasks.checkpoints import check_folder, keep_copy, save_checkpoint, write_whole
from foveate.tasks.engine.hooks import SeedHook
from foveate.zoo import CheckpointError

# Seven batches an epoch.
SMALL = ("batch_size=2", "epochs=2", "schedule.warmup_epochs=0")


def train(config_file, output, *overrides, resume=False):
    return engine.train(engine.load_config(config_file, overrides), output, resume=resume, progress=False)


def flat(value, name=""):
    """Everything in a checkpoint but times, by name."""
    if isinstance(value, dict):
        return {key: item for part in value for key, item in flat(value[part], f"{name}.{part}").items()}
    if isinstance(value, list):
        return {key: item for i, part in enumerate(value) for key, item in flat(part, f"{name}.{i}").items()}
    return {} if name.endswith("seconds") else {name: value}


def assert_same(left, right):
    left, right = (flat(torch.load(path, weights_only=True)) for path in (left, right))
    assert left.keys() == right.keys()
    for name, value in left.items():
        same = torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
        assert same, name


def interrupt_at(monkeypatch, iteration):
    seed = SeedHook.before_train_iter

    def interrupted(self, runner, *args, **kwargs):
        if runner.iter == iteration:
            raise KeyboardInterrupt
        seed(self, runner, *args, **kwargs)

    monkeypatch.setattr(SeedHook, "before_train_iter", interrupted)


@pytest.mark.parametrize(
    ("settings", "iteration"),
    [
        (("checkpoint.interval=1", "ema=0.1", "loss.mixup=0.8"), 3),
        # Seven batches are no whole number of steps: gradients wait inside the epoch and at its end.
        (("checkpoint.interval=3", "optimizer.accumulate=2", "precision=float16", "optimizer.clip_grad=1.0"), 5),
        (("checkpoint.interval=2", "optimizer.accumulate=3", "ema=0.1", "val_interval=2"), 8),
    ],
)
def test_a_run_goes_on_from_inside_an_epoch_to_the_same_bits(config_file, tmp_path, monkeypatch, settings, iteration):
    straight = train(config_file, tmp_path / "straight", *SMALL, *settings)
    with monkeypatch.context() as patch:
        interrupt_at(patch, iteration)
        with pytest.raises(KeyboardInterrupt):
            train(config_file, tmp_path / "broken", *SMALL, *settings)
    meta = torch.load(tmp_path / "broken" / "last.pth", weights_only=True)["meta"]
    interval = int(settings[0].partition("=")[2])
    assert meta["iter"] == max(iteration // interval * interval, 7 * (iteration >= 7))
    resumed = train(config_file, tmp_path / "broken", *SMALL, *settings, resume=True)
    assert_same(straight["last"], resumed["last"])
    assert_same(straight["best"], resumed["best"])


def test_what_a_run_draws_does_not_depend_on_the_processes_that_load(config_file, tmp_path):
    here = train(config_file, tmp_path / "here", *SMALL, "epochs=1")
    there = train(config_file, tmp_path / "there", *SMALL, "epochs=1", "workers=2")
    here, there = (torch.load(run["last"], weights_only=True)["state_dict"] for run in (here, there))
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_the_latest_epochs_keep_their_checkpoints(config_file, tmp_path):
    run = tmp_path / "run"
    result = train(config_file, run, "epochs=4", "checkpoint.keep=2")
    assert sorted(path.name for path in run.glob("epoch_*")) == ["epoch_0003.pth", "epoch_0004.pth"]
    assert [torch.load(path, weights_only=True)["meta"]["epoch"] for path in sorted(run.glob("epoch_*"))] == [3, 4]
    assert_same(run / "epoch_0004.pth", result["last"])
    config = engine.load_config(config_file)
    metrics, _, _ = engine.evaluate(config, run / "epoch_0003.pth", progress=False)
    assert metrics["accuracy"] == result["history"][2]["val/accuracy"]


def test_a_kept_copy_is_made_where_files_can_have_but_one_name(tmp_path, monkeypatch):
    save_checkpoint({"card": {}}, tmp_path / "last.pth")

    def refuse(*args):
        raise OSError(1, "no links")

    monkeypatch.setattr(os, "link", refuse)
    keep_copy(tmp_path / "last.pth", tmp_path / "epoch_0001.pth")
    assert {path.name for path in tmp_path.iterdir()} == {"last.pth", "epoch_0001.pth"}
    assert (tmp_path / "epoch_0001.pth").read_bytes() == (tmp_path / "last.pth").read_bytes()


def test_what_a_killed_run_had_begun_to_write_is_removed(config_file, tmp_path):
    run = tmp_path / "run"
    train(config_file, run, "epochs=1", "schedule.warmup_epochs=0")
    (run / ".partial-last-abc.pth").write_bytes(b"half")
    train(config_file, run, "epochs=1", "schedule.warmup_epochs=0", resume=True)
    assert not list(run.glob(".*"))


def test_steps_can_be_extended_and_other_schedules_say_why_not(config_file, tmp_path):
    step = ("schedule.name=step", "schedule.steps=(2,3)", "schedule.warmup_epochs=0")
    straight = train(config_file, tmp_path / "straight", *step, "epochs=4")
    train(config_file, tmp_path / "run", *step, "epochs=2")
    extended = train(config_file, tmp_path / "run", *step, "epochs=4", resume=True)
    assert [entry["lr"] for entry in extended["history"]] == [entry["lr"] for entry in straight["history"]]
    assert_same(straight["last"], extended["last"])
    with pytest.raises(TaskError, match=r"begun with schedule\.gamma=0\.1, not 0\.5"):
        train(config_file, tmp_path / "run", *step, "epochs=4", "schedule.gamma=0.5", resume=True)
    train(config_file, tmp_path / "cosine", "epochs=2")
    with pytest.raises(TaskError, match=r"epochs=2 .*only schedule\.name=step can be extended.*model\.checkpoint="):
        train(config_file, tmp_path / "cosine", "epochs=4", resume=True)


FULL_DISK = """
import resource, sys, torch
from foveate.tasks import TaskError
from foveate.tasks.checkpoints import save_checkpoint
save_checkpoint({"weight": torch.ones(1000)}, sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
for size in (200_000, 10_000_000):
    try:
        save_checkpoint({"weight": torch.zeros(size), "list": list(range(50_000))}, sys.argv[1])
    except TaskError as error:
        print(error)
"""


def test_a_write_that_the_system_refuses_leaves_the_checkpoint_before_and_nothing_else(tmp_path):
    path = tmp_path / "last.pth"
    command = [sys.executable, "-c", FULL_DISK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(f"{path}: can't be written: File too large" in line and "before is intact" in line for line in lines)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pth"]
    assert torch.equal(torch.load(path, weights_only=True)["weight"], torch.ones(1000))


def test_a_folder_that_cannot_be_written_to_is_named_before_anything_is_loaded(config_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(TaskError, match=r"file/run/probe: can't be written: .*choose another"):
        train(config_file, tmp_path / "file" / "run")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(TaskError, match="Permission denied; make the folder writable or choose another one") as caught:
        train(config_file, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_space_is_looked_for_before_the_first_epoch(config_file, tmp_path):
    with pytest.raises(TaskError, match=r"GB are free, but the checkpoints .* lower checkpoint\.keep"):
        check_folder(tmp_path, 10**18)
    with pytest.raises(TaskError, match=r"GB are free, but the checkpoints"):
        train(config_file, tmp_path / "run", "checkpoint.keep=1000000000")
    assert not (tmp_path / "run" / "last.pth").exists()


def test_written_files_have_the_permissions_of_any_new_file(tmp_path):
    write_whole(tmp_path / "whole", lambda file: None, durable=True)
    (tmp_path / "plain").touch()
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


# Trains in a child process and kills it again and again; imports once, since that takes longest.
KILLER = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from foveate.tasks import engine
from foveate.tasks.checkpoints import read_checkpoint

config_file, folder, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
config = engine.load_config(config_file, sys.argv[5:])
draw = random.Random(seed)

def start(output):
    child = os.fork()
    if child == 0:
        try:
            engine.train(config, output, resume=(output / "last.pth").exists(), progress=False)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return child

def written(file):
    return file.stat().st_mtime_ns if file.exists() else None

assert os.waitpid(start(folder / "straight"), 0)[1] == 0
last = folder / "killed" / "last.pth"
killed, seen, over = 0, [], False
while killed < kills and not over:
    child = start(folder / "killed")
    # A random moment after a random number of checkpoints, so that there is progress.
    for _ in range(draw.randint(1, 3)):
        before = written(last)
        while written(last) == before and not over:
            time.sleep(0.001)
            over = os.waitpid(child, os.WNOHANG) != (0, 0)
    if not over:
        time.sleep(draw.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        over = os.waitpid(child, 0)[1] != signal.SIGKILL
        killed += not over
    for file in (folder / "killed").glob("[!.]*.pth"):
        seen.append(read_checkpoint(file)["meta"]["iter"])
assert os.waitpid(start(folder / "killed"), 0)[1] == 0
print(json.dumps({"killed": killed, "seen": seen}))
"""


def kill_again_and_again(config_file, folder, kills, *overrides):
    folder.mkdir()
    command = [sys.executable, "-c", KILLER, str(config_file), str(folder), str(kills), "5", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert_same(folder / "straight" / "last.pth", folder / "killed" / "last.pth")
    assert_same(folder / "straight" / "best.pth", folder / "killed" / "best.pth")
    histories = [json.loads((folder / name / "history.json").read_text()) for name in ("straight", "killed")]
    without_time = [[{**entry, "seconds": 0} for entry in history] for history in histories]
    assert without_time[0] == without_time[1]
    assert not list((folder / "killed").glob(".*"))
    return json.loads(done.stdout)


def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bits(config_file, tmp_path):
    settings = ("batch_size=2", "epochs=3", "checkpoint.interval=1", "checkpoint.keep=1", "optimizer.accumulate=2")
    report = kill_again_and_again(config_file, tmp_path / "runs", 3, *settings, "ema=0.1")
    assert report["killed"] == 3
    assert max(report["seen"]) > 0


@pytest.mark.heavy
@pytest.mark.parametrize("settings", [("workers=1",), ("workers=0", "ema=0.1", "precision=bfloat16")])
def test_ten_kills_in_a_row_change_nothing(config_file, tmp_path, settings):
    long = ("batch_size=2", "epochs=12", "checkpoint.interval=2", "checkpoint.keep=2", "loss.mixup=0.8")
    report = kill_again_and_again(config_file, tmp_path / "runs", 10, *long, *settings)
    assert report["killed"] == 10


def test_there_is_nothing_to_continue_before_the_first_checkpoint(config_file, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"last\.pth: no such file, so there is nothing to continue; begin without"
    ):
        train(config_file, tmp_path / "none", resume=True)
