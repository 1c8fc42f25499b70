"""What a run leaves, options of speed and memory, and several processes."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
import types

import pytest
import torch
from foveate.tasks import TaskError, engine
from foveate.tasks.engine.run_folder import find_revision
from PIL import Image
from torch.torch_version import TorchVersion

QUICK = ("epochs=2", "schedule.warmup_epochs=0", "batch_size=4")


def train(config_file, output, *overrides, resume=False):
    config = engine.load_config(config_file, (*QUICK, *overrides))
    return engine.train(config, output, resume=resume, progress=False)


@pytest.mark.versions
def test_a_run_says_what_it_was_done_with_and_how_to_do_it_again(config_file, tmp_path):
    run = tmp_path / "run"
    result = train(config_file, run)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["device"] == "cpu"
    # None outside a checkout, as installed.
    assert (environment["revision"] or {}).keys() == (find_revision() or {}).keys()
    command = shlex.split(environment["again"])
    assert command == ["foveate", "train", f"{run}/config.py", "--output", f"{run}-again"]
    again = engine.train(engine.load_config(command[2]), command[4], progress=False)
    states = [torch.load(done["last"], weights_only=True)["state_dict"] for done in (result, again)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_scalars_are_a_table_too(config_file, tmp_path):
    result = train(config_file, tmp_path / "run", "val_interval=2", "epochs=4")
    with open(tmp_path / "run" / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert {"epoch", "lr", "train/loss", "val/accuracy", "seconds"} <= rows[0].keys()
    assert [row["val/accuracy"] == "" for row in rows] == [True, False, True, False]
    assert float(rows[3]["train/loss"]) == result["history"][3]["train/loss"]


def test_a_log_goes_on_where_a_run_goes_on(config_file, tmp_path):
    step = ("schedule.name=step", "schedule.steps=(1,)")
    train(config_file, tmp_path / "run", *step)
    train(config_file, tmp_path / "run", *step, "epochs=3", resume=True)
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)
    assert "14 training and 6 held-out samples, 2 classes; a batch of 2 forward and backward in" in lines[0]
    assert [line.split()[3] for line in lines if "  epoch" in line] == ["1/2", "2/2", "3/3"]
    assert "continued" in lines[7]


def test_galleries_show_the_surest_hits_and_the_worst_misses(config_file, tmp_path, monkeypatch):
    from foveate.tasks.pictures import classes as draw

    seen = {}
    gallery = draw.draw_gallery

    def note(images, truths, predictions, path, title, columns=10):
        seen[path.name] = [truth == ranking[0][0] for truth, ranking in zip(truths, predictions, strict=True)]
        gallery(images, truths, predictions, path, title, columns)

    monkeypatch.setattr(draw, "draw_gallery", note)
    result = train(config_file, tmp_path / "run", "epochs=6", "optimizer.lr=3e-3")
    assert dict(result["pictures"]).keys() == {"curves.png", "worst.png", "best.png", "confusion.png"}
    assert len(seen["best.png"]) == 6
    assert seen["best.png"] == sorted(seen["best.png"], reverse=True)
    assert seen["worst.png"] == sorted(seen["worst.png"])
    for name in dict(result["pictures"]):
        with Image.open(tmp_path / "run" / name) as picture:
            assert min(picture.size) > 150


class Writer:
    """Stands in for TensorBoard's."""

    def __init__(self, folder):
        self.folder, self.seen, self.closed = folder, [], False
        Writer.last = self

    def add_scalar(self, name, value, step):
        self.seen.append((name, value, step))

    def flush(self):
        pass

    def close(self):
        self.closed = True


def test_tensorboard_gets_every_scalar(config_file, tmp_path, monkeypatch):
    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    history = train(config_file, tmp_path / "run", "log=('tensorboard',)")["history"]
    writer = Writer.last
    assert writer.folder == str(tmp_path / "run" / "tensorboard")
    expected = [(name, value, entry["epoch"]) for entry in history for name, value in entry.items() if name != "epoch"]
    assert writer.seen == expected
    assert writer.closed


def test_wandb_is_told_every_epoch_and_a_continued_run_keeps_its_number(config_file, tmp_path, monkeypatch):
    begun, logged = [], []
    run = types.SimpleNamespace(log=lambda entry, step: logged.append(step), finish=lambda: None)

    def init(**settings):
        begun.append(settings)
        return run

    numbers = iter("ab")
    module = types.SimpleNamespace(init=init, util=types.SimpleNamespace(generate_id=lambda: next(numbers)))
    monkeypatch.setitem(sys.modules, "wandb", module)
    step = ("log=('wandb',)", "schedule.name=step")
    train(config_file, tmp_path / "run", *step)
    train(config_file, tmp_path / "run", *step, "epochs=3", resume=True)
    assert [settings["id"] for settings in begun] == ["a", "a"]
    assert logged == [1, 2, 3]


def test_memory_and_layout_are_options_that_do_not_change_what_is_learned(config_file, tmp_path):
    base = ("epochs=1", "model.kwargs.drop_path_rate=0.0")
    losses = [
        train(config_file, tmp_path / str(i), *base, option)["history"][0]["train/loss"]
        for i, option in enumerate(("seed=0", "grad_checkpointing=True", "channels_last=True"))
    ]
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-4)


def test_a_model_that_cannot_recompute_says_so(config_file, tmp_path):
    with pytest.raises(TaskError, match="can't recompute activations; set grad_checkpointing=False"):
        train(config_file, tmp_path / "run", "model.name=dla46_c", "grad_checkpointing=True", "model.kwargs={}")


@pytest.mark.heavy
@pytest.mark.versions
def test_a_compiled_run_learns_the_same_and_its_checkpoint_is_like_any_other(config_file, tmp_path):
    base = ("epochs=1", "model.name=test_resnet", "model.kwargs={}", "ema=0.5")
    plain = train(config_file, tmp_path / "plain", *base)
    if sys.version_info[:3] == (3, 13, 0) and TorchVersion(torch.__version__) < (2, 12):
        with pytest.raises(TaskError, match=r"on Python 3\.13\.0 would validate the model as in training"):
            train(config_file, tmp_path / "compiled", *base, "compile=True")
        return
    compiled = train(config_file, tmp_path / "compiled", *base, "compile=True")
    for before, after in zip(plain["history"], compiled["history"], strict=True):
        assert after["train/loss"] == pytest.approx(before["train/loss"], abs=1e-3)
    config = engine.load_config(config_file, (*QUICK, *base))
    metrics, _, _ = engine.evaluate(config, compiled["last"], progress=False)
    assert metrics["loss"] == pytest.approx(compiled["history"][-1]["val/loss"], abs=1e-4)


def launch(processes, tmp_path, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "foveate", "train", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.heavy
def test_two_processes_learn_what_one_does_and_measure_each_sample_once(config_file, folder, tmp_path):
    # Five held-out images: the second process gets one of them a second time.
    (folder / "val" / "dark" / "2.png").unlink()
    (folder / "val" / "bright" / "1.png").write_bytes(b"damaged")
    options = ["model.kwargs.drop_path_rate=0.0", "device=cpu", "epochs=3", "schedule.warmup_epochs=0"]
    options += ["damaged_images=skip", "ema=0.5", "optimizer.accumulate=2", "checkpoint.interval=1"]
    launch(2, tmp_path, str(config_file), *options, "batch_size=3", "--output", str(tmp_path / "two"))
    one = engine.train(engine.load_config(config_file, (*options, "batch_size=6")), tmp_path / "one", progress=False)
    two = json.loads((tmp_path / "two" / "history.json").read_text())
    for mine, theirs in zip(one["history"], two, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"seconds"}:
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4), name
    config = engine.load_config(config_file, (*options, "batch_size=3"))
    metrics, _, targets = engine.evaluate(config, tmp_path / "two" / "last.pth", progress=False)
    assert targets == [0, 0, 1, 1]
    assert {f"val/{name}": value for name, value in metrics.items()} == pytest.approx(
        {name: value for name, value in two[-1].items() if name.startswith("val/") and name != "val/damaged"}, abs=1e-5
    )


@pytest.mark.heavy
def test_two_processes_go_on_from_inside_an_epoch_to_the_same_bits(config_file, tmp_path):
    options = ["device=cpu", "epochs=2", "schedule.warmup_epochs=0", "batch_size=2", "optimizer.accumulate=3"]
    options += ["checkpoint.interval=1", "model.name=test_resnet", "model.kwargs={}", "data.augment={}"]
    launch(2, tmp_path, str(config_file), *options, "--output", str(tmp_path / "straight"))
    stop = "import sys; sys.argv = sys.argv[1:]\n"
    stop += "from foveate.tasks.engine.hooks import SeedHook\nfrom foveate.tools.cli import main\n"
    stop += "seed = SeedHook.before_train_iter\n"
    stop += "def stopped(self, runner, *args, **kwargs):\n"
    stop += "    if runner.iter == 4: raise KeyboardInterrupt\n"
    stop += "    seed(self, runner, *args, **kwargs)\n"
    stop += "SeedHook.before_train_iter = stopped\nsys.exit(main(sys.argv))\n"
    (tmp_path / "stop.py").write_text(stop)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "stop.py"), "train", str(config_file), *options, "--output", str(tmp_path / "broken")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert torch.load(tmp_path / "broken" / "last.pth", weights_only=True)["meta"]["iter"] == 4
    launch(2, tmp_path, str(config_file), *options, "--output", str(tmp_path / "broken"), "--resume")
    straight, broken = (
        torch.load(tmp_path / name / "last.pth", weights_only=True)["state_dict"] for name in ("straight", "broken")
    )
    assert all(torch.equal(value, broken[name]) for name, value in straight.items())


def test_an_epochs_line_says_what_its_seconds_went_into(config_file, tmp_path, capsys):
    """With a checkpoint within the epoch, from which a continued one would go on counting."""
    config = engine.load_config(config_file, (*QUICK, "checkpoint.interval=1"))
    engine.train(config, tmp_path / "run", progress=True)
    parts = r"\(steps ([\d.]+), data ([\d.]+), held out ([\d.]+), writing ([\d.]+)\)"
    lines = re.findall(rf"^epoch .* ([\d.]+) s {parts}", capsys.readouterr().out, re.MULTILINE)
    assert len(lines) == 2
    for total, *spent in lines:
        assert float(total) == pytest.approx(sum(map(float, spent)), abs=0.3)
