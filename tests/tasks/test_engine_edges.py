"""Runs at their edges: two in one folder, killed between two files, interrupted while writing, with strange names."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from foveate.tasks import TaskError, engine, printable
from foveate.tasks.checkpoints import save_checkpoint
from foveate.tasks.data.augment import Augment
from foveate.tasks.data.classification import InputRule as ClassifierRule
from foveate.tasks.data.segmentation import InputRule as SegmenterRule
from foveate.tasks.dense.detect.transform import DetectorTransform
from foveate.tasks.engine.hooks import Metric, RunHook
from foveate.tasks.engine.lock import hold_folder
from foveate.tasks.engine.run_folder import RunFolder
from foveate.tasks.engine.runner import TaskRunner
from foveate.tasks.pictures.figures import new_figure, save_figure
from foveate.tasks.predictors import load_predictor
from foveate.tools.cli import main
from foveate.zoo import CheckpointError
from PIL import Image

QUICK = ("epochs=2", "schedule.warmup_epochs=0", "batch_size=7", "checkpoint.keep=2")


def train(config_file, output, *overrides, resume=False):
    config = engine.load_config(config_file, (*QUICK, *overrides))
    return engine.train(config, output, resume=resume, progress=False)


HOLD = """
import sys, time
from pathlib import Path
from foveate.tasks.engine.lock import hold_folder
with hold_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_run_in_a_folder_at_a_time_and_a_killed_one_leaves_no_lock(config_file, tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(TaskError, match=rf"process {other.pid} on {re.escape(os.uname().nodename)} .*--output"):
        train(config_file, tmp_path)
    other.kill()
    other.wait()
    assert (tmp_path / ".lock.json").exists()
    with hold_folder(tmp_path):
        assert json.loads((tmp_path / ".lock.json").read_text())["process"] == os.getpid()
    assert not list(tmp_path.glob(".lock*"))


def test_what_a_killed_run_left_out_is_made_again(config_file, tmp_path):
    run = tmp_path / "run"
    train(config_file, run)
    expected = {name: (run / name).read_bytes() for name in ("history.json", "history.csv", "epoch_0002.pth")}
    for name in expected:
        (run / name).unlink()
    (run / "history.json").write_text("[]")
    train(config_file, run, resume=True)
    assert {name: (run / name).read_bytes() for name in expected} == expected


@pytest.mark.parametrize("averaged", [False, True])
def test_pictures_and_report_of_a_run_killed_before_them_are_made_again(averaged, config_file, tmp_path, monkeypatch):
    run, overrides = tmp_path / "run", ("ema=0.5",) if averaged else ()
    monkeypatch.setattr(RunHook, "finish", lambda self: [])
    train(config_file, run, *overrides)
    assert not (run / "report.html").exists()
    history, last = (run / "history.json").read_bytes(), torch.load(run / "last.pth", weights_only=True)
    monkeypatch.undo()
    measured = []
    measure = Metric.evaluate
    monkeypatch.setattr(Metric, "evaluate", lambda *x: measured.append(measure(*x)) or measured[-1])
    result = train(config_file, run, *overrides, resume=True)
    files = {path.name for path in run.iterdir()}
    assert files >= {"report.html", "confusion.png", "curves.png", "worst.png"}
    assert {name for name, _ in result["pictures"]} <= files
    assert (run / "history.json").read_bytes() == history
    assert measured == [{key: last["history"][-1][key] for key in measured[0]}]
    written = (run / "report.html").stat().st_mtime_ns
    train(config_file, run, *overrides, resume=True)
    assert len(measured) == 1
    assert (run / "report.html").stat().st_mtime_ns == written


def test_a_folder_that_goes_away_ends_the_run(config_file, tmp_path, monkeypatch):
    run, save = tmp_path / "run", RunHook._end_epoch

    def rename(self, runner, metrics):
        if not self._history:
            run.rename(tmp_path / "elsewhere")
        save(self, runner, metrics)

    monkeypatch.setattr(RunHook, "_end_epoch", rename)
    with pytest.raises(TaskError, match=r"removed or renamed while it went on.*--resume"):
        train(config_file, run)
    assert not run.exists()


def test_a_refused_run_leaves_no_folder(config_file, tmp_path):
    with pytest.raises(TaskError, match=r"schedule.warmup_iterations=50.*epochs"):
        train(config_file, tmp_path / "run", "schedule.warmup_iterations=50", "schedule.name=step")
    assert not (tmp_path / "run").exists()


def test_no_checkpoint_is_written_that_can_not_be_continued(config_file, tmp_path, monkeypatch):
    step = TaskRunner.has_loss
    losses = []

    def diverged(self, batch):
        with torch.no_grad():
            if losses:
                next(self.net.parameters()).fill_(1e30)
        losses.append(step(self, batch))
        return losses[-1]

    monkeypatch.setattr(TaskRunner, "has_loss", diverged)
    with pytest.raises(TaskError, match=r"after the last step the loss is no number.*last.pth, after 2 batches"):
        train(config_file, tmp_path / "run")
    assert losses == [True, False]
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["meta"]["epoch"] == 1


def test_the_last_batch_is_seen_again_without_a_trace(config_file, tmp_path, monkeypatch):
    train(config_file, tmp_path / "checked")
    monkeypatch.setattr(TaskRunner, "has_loss", lambda self, batch: True)
    train(config_file, tmp_path / "unchecked")
    a, b = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("checked", "unchecked"))
    assert all(torch.equal(value, b["state_dict"][key]) for key, value in a["state_dict"].items())


class Interrupted:
    """Interrupts whoever pickles it."""

    def __reduce__(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["in python", "in the file"])
def test_ctrl_c_while_a_checkpoint_is_written_is_one(where, tmp_path, monkeypatch):
    content = {"x": torch.zeros(10)}
    if where == "in python":
        content["y"] = Interrupted()
    else:
        from foveate.tasks.checkpoints import _Watched

        class File:
            def write(self, data):
                raise KeyboardInterrupt

        monkeypatch.setattr(_Watched, "__init__", lambda self, file: self.__dict__.update(_file=File(), error=None))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(content, tmp_path / "last.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "setting",
    [
        *("optimizer.clip_grad=-1", "optimizer.clip_grad=0", "loss.mixup=-1", "loss.cutmix=-0.1", "optimizer.lr=-1"),
        *("optimizer.lr=1e999", "ema=0", "ema=2", "seed=-1", f"seed={2**70}", "schedule.warmup_factor=5"),
        *(
            f"batch_size={10**30}",
            "workers=100000",
            "loss.label_smoothing=2",
            f"epochs={10**30}",
            "optimizer.lr=-1e999",
            "ema=1",
            "data.size=0",
            "data.size=1000000",
            "optimizer.layer_decay=5",
            "schedule.steps=(3,'x')",
        ),
    ],
)
def test_settings_out_of_range_are_one_line(setting, config_file):
    with pytest.raises(TaskError) as error:
        engine.load_config(config_file, (setting,))
    assert re.fullmatch(rf"{re.escape(setting.partition('=')[0])} is [^\n]*, but must be [^\n]*", str(error.value))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.kwargs.depths=7", r"the model can't be built \(TypeError: .*look at model.kwargs"),
        ("model.kwargs.num_heads=(3,3,3,3)", r"the model can't be built \(ValueError: .*look at model.kwargs"),
        ("model.name=nat_tiny.nope", "unknown weights 'nat_tiny.nope'; known: nat_tiny.shi_in1k"),
        ("optimizer.kwargs.eps=-1", "optimizer.kwargs: "),
        ("data.augment.auto_augment=x", "data.augment: Unknown AA policy x"),
        ("data.interpolation=x", "data.interpolation is 'x'; known: bicubic"),
    ],
)
def test_options_that_nothing_can_be_built_with_are_one_line(setting, message, config_file, tmp_path, capsys):
    arguments = ["train", str(config_file), *QUICK, setting, "--output", str(tmp_path / "run")]
    assert main(arguments) == 2
    assert re.fullmatch(rf"foveate: error: {message}[^\n]*\n", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sides", [dict(crop=-3), dict(crop=10**7), dict(shorts=(0,)), dict(long=0)])
def test_images_are_not_augmented_to_sides_that_none_has(sides):
    with pytest.raises(TaskError, match=r"data.augment.\w+ is .*, but must be from 1 to 16384"):
        Augment(sides)


@pytest.mark.parametrize(
    ("output", "message"), [("", "--output is empty"), ("a\0b", "NUL"), ("x" * 300, "at most 255 bytes")]
)
def test_folders_of_no_name_are_one_line(output, message, capsys):
    assert main(["train", "classify/nat_atto_digits", "--output", output]) == 2
    assert re.fullmatch(rf"foveate: error: [^\n]*{message}[^\n]*\n", capsys.readouterr().err)


def test_what_settings_look_like_and_what_is_required_is_said(capsys):
    assert main(["train", "classify/nat_atto_digits", "--epochs", "3"]) == 2
    assert "settings are given as epochs=3" in capsys.readouterr().err
    assert main(["train"]) == 2
    error = capsys.readouterr().err
    assert "CONFIG" in error
    assert "KEY=VALUE" not in error


def test_names_are_neither_markup_nor_commands(folder, config_file, tmp_path, capsys):
    strange = "a$\\frac{$_^\x1b[2J"
    for split in ("train", "val"):
        (folder / split / "bright").rename(folder / split / strange)
    result = train(config_file, tmp_path / "run", "epochs=1")
    assert {name for name, _ in result["pictures"]} <= {path.name for path in (tmp_path / "run").iterdir()}
    image = next((folder / "val" / strange).glob("*.png"))
    moved = tmp_path / "b\x1b[31m.png"
    shutil.copy(image, moved)
    arguments = ["predict", str(moved), "--checkpoint", str(tmp_path / "run" / "best.pth")]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\\x1b[31m" in printed
    assert "\x1b" not in (tmp_path / "run" / "log.txt").read_text()
    assert printable("e\u0301 \u0645\u200c\u06cc \u202e") == "e\u0301 \u0645\u200c\u06cc \\u202e"
    damaged = tmp_path / "c\x1b[31m\r\n.png"
    damaged.write_bytes(b"no image")
    assert main([*arguments, str(damaged), "--output", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "\r" not in captured.err
    assert captured.err.count("\n") == 1


def test_pictures_show_dollars(tmp_path):
    pixels = []
    for title in ("a $x_1$ b", "a $x_1 b", "a x b"):
        figure = new_figure(3, 1)
        figure.suptitle(title)
        save_figure(figure, tmp_path / "picture.png")
        pixels.append(np.asarray(Image.open(tmp_path / "picture.png").convert("L")) < 128)
    # As many marks as letters, however they are read as markup.
    assert pixels[0].sum() > pixels[2].sum() + 20


def test_more_workers_than_cores_are_not_started():
    from foveate.tasks.engine.loading import fitting_workers

    assert fitting_workers(0) == 0
    assert fitting_workers(1000) == len(os.sched_getaffinity(0))


def test_a_folder_is_checked_by_what_lies_in_it(tmp_path):
    folder = RunFolder.__new__(RunFolder)
    folder.path = tmp_path
    with pytest.raises(TaskError, match="removed or renamed"):
        folder.check()


SAID = {"task": "classify", "model": "nat_atto", "kwargs": {}, "classes": ["a", "b"], "input": {}}
DOUBLED = [1]
for _ in range(40):
    DOUBLED = [DOUBLED, DOUBLED]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", 3),
        ("classes", None),
        ("input", None),
        ("kwargs", [1]),
        ("model", 7),
        ("model", None),
        ("white", DOUBLED),
    ],
    ids=["number", "no classes", "no input", "list", "seven", "no model", "doubled"],
)
def test_cards_that_make_no_sense_are_one_line(key, value, tmp_path):
    torch.save({"card": SAID | {key: value}, "state_dict": {"x": torch.zeros(1)}}, tmp_path / "strange.pth")
    with pytest.raises(CheckpointError, match=r"strange.pth: ") as error:
        load_predictor(tmp_path / "strange.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "rule",
    [
        lambda: ClassifierRule(10**6, 1, (0.5,), (0.5,)),
        lambda: SegmenterRule(10**6, 10**6, 1, (0.5,) * 3, (0.5,) * 3),
        lambda: DetectorTransform(min_size=10**6),
        lambda: DetectorTransform(divisor=0),
    ],
    ids=["classify", "segment", "detect", "no divisor"],
)
def test_no_card_makes_images_of_sides_that_none_has(rule):
    with pytest.raises(TaskError, match=r" is \d+, but must be from 1 to 16384"):
        rule()


def test_a_card_that_holds_itself_is_one_line(tmp_path):
    card = dict(SAID)
    card["kwargs"] = card
    torch.save({"card": card, "state_dict": {"x": torch.zeros(1)}}, tmp_path / "strange.pth")
    with pytest.raises(CheckpointError, match=r"makes no sense .*nested endlessly"):
        load_predictor(tmp_path / "strange.pth")


def test_the_config_in_a_checkpoint_is_data(config_file):
    given = {"task": "classify", "model": {"name": "nat_atto"}, "custom_hooks": ["somebody.Hook"], "log": ["wandb"]}
    given["data"] = {"root": "images", "augment": {"transforms": ["x"]}}
    config = engine.config_of({"config": given}, "last.pth", ["data.root=elsewhere"])
    assert (config["custom_hooks"], config["log"], config["data"]["augment"]) == ((), (), {})
    assert config["data"]["root"] == "elsewhere"
    with pytest.raises(TaskError, match=r"last.pth: holds no config; name one: foveate eval CONFIG last.pth"):
        engine.config_of({}, "last.pth")


def test_files_that_a_run_did_not_leave_are_not_listed(tmp_path, monkeypatch, capsys):
    """As where one that was complete is continued, which draws nothing new."""
    (tmp_path / "last.pth").touch()
    result = {"metric": "accuracy", "metrics": {"accuracy": 0.5}, "pictures": [("curves.png", "the curves")]}
    monkeypatch.setattr(engine, "train", lambda *_, **__: result)
    assert main(["train", "classify/nat_atto_digits", "--output", str(tmp_path)]) == 0
    assert f"run: {tmp_path} (last.pth)" in capsys.readouterr().out
