import json
import subprocess
import sys

import pytest
import torch
from foveate.tasks import TaskError, engine
from foveate.tasks.checkpoints import write_whole
from foveate.tasks.classify import Predictor
from foveate.tasks.engine.hooks import RunHook
from foveate.zoo import CheckpointError, UnknownModelError


def train(config_file, output, *overrides, resume=False):
    return engine.train(engine.load_config(config_file, overrides), output, resume=resume, progress=False)


def states(path):
    checkpoint = torch.load(path, weights_only=True)
    flat = dict(checkpoint["state_dict"])
    for index, state in checkpoint["optimizer"]["state"].items():
        flat |= {f"{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    flat |= {f"ema.{name}": value for name, value in checkpoint.get("ema_state_dict", {}).items()}
    return flat


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def interrupt_in_epoch(monkeypatch, number):
    check = RunHook._check_finite

    def interrupted(self, runner, again=False):
        if runner.epoch + 1 == number:
            raise KeyboardInterrupt
        check(self, runner, again)

    monkeypatch.setattr(RunHook, "_check_finite", interrupted)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("ema=0.1", "precision=float16", "optimizer.clip_grad=1.0"),
        ("precision=bfloat16", "optimizer.accumulate=2", "workers=1", "loss.mixup=0.8", "val_interval=2"),
    ],
)
def test_an_interrupted_run_continues_to_the_same_bits(config_file, tmp_path, monkeypatch, settings):
    straight = train(config_file, tmp_path / "straight", *settings)
    with monkeypatch.context() as patch:
        interrupt_in_epoch(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(config_file, tmp_path / "broken", *settings)
    resumed = train(config_file, tmp_path / "broken", *settings, resume=True)
    assert_same(states(straight["last"]), states(resumed["last"]))
    without_time = [[{**entry, "seconds": 0} for entry in run["history"]] for run in (straight, resumed)]
    assert without_time[0] == without_time[1]


def test_a_seed_decides_the_run(config_file, tmp_path):
    runs = [train(config_file, tmp_path / str(i), "epochs=2", f"seed={seed}") for i, seed in enumerate((5, 5, 6))]
    same, again, other = (torch.load(run["last"], weights_only=True)["state_dict"] for run in runs)
    assert_same(same, again)
    assert not torch.equal(same["head.fc.weight"], other["head.fc.weight"])


def test_a_run_leaves_safe_and_complete_files(config_file, tmp_path):
    result = train(config_file, tmp_path / "run", "epochs=2")
    pictures = {"best.png", "confusion.png", "curves.png", "worst.png"}
    written = {"best.pth", "config.py", "environment.json", "history.csv", "history.json", "last.pth", "log.txt"}
    written.add("report.html")
    assert {path.name for path in (tmp_path / "run").iterdir()} == written | pictures
    for name in ("best.pth", "last.pth"):
        assert torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "run" / name) == []
    assert "optimizer" not in torch.load(result["best"], weights_only=True)
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [entry["epoch"] for entry in history] == [1, 2]
    config = engine.load_config(config_file, ["epochs=2"])
    assert engine.load_config(tmp_path / "run" / "config.py") == config
    metrics, predictions, targets = engine.evaluate(config, result["last"], progress=False)
    assert metrics == {key[4:]: value for key, value in history[-1].items() if key.startswith("val/")}
    assert targets == [0, 0, 0, 1, 1, 1]
    assert predictions[0].shape == (2,)


def test_a_run_is_neither_overwritten_nor_continued_with_other_settings(config_file, folder, tmp_path):
    train(config_file, tmp_path / "run", "epochs=2")
    with pytest.raises(TaskError, match="already holds a run"):
        train(config_file, tmp_path / "run", "epochs=2")
    with pytest.raises(TaskError, match=r"epochs=2 \(its learning rate has been scheduled for that; .*\), not 9"):
        train(config_file, tmp_path / "run", "epochs=9", resume=True)
    with pytest.raises(TaskError, match=r"optimizer\.lr=0\.001, not 0\.1"):
        train(config_file, tmp_path / "run", "epochs=2", "optimizer.lr=0.1", resume=True)
    with pytest.raises(CheckpointError, match="no such file"):
        train(config_file, tmp_path / "none", resume=True)


def test_weights_to_start_from_are_kept_and_not_initialised_again(config_file, tmp_path):
    first = train(config_file, tmp_path / "first", "epochs=1", "schedule.warmup_epochs=0")
    frozen = ("epochs=1", "schedule.warmup_epochs=0", "optimizer.lr=0.0", f"model.checkpoint={first['last']}")
    second = train(config_file, tmp_path / "second", *frozen)
    assert_same(*(torch.load(run["last"], weights_only=True)["state_dict"] for run in (first, second)))


def rates(config_file, output, *overrides):
    """The learning rate after every epoch of two batches; the scheduler has by then set it for the next."""
    history = train(config_file, output, "schedule.warmup_epochs=0", *overrides)["history"]
    return [entry["lr"] for entry in history]


def test_schedules_end_where_they_say(config_file, tmp_path):
    step = ("schedule.name=step", "schedule.steps=(1,3)", "schedule.gamma=0.5")
    assert rates(config_file, tmp_path / "step", *step) == pytest.approx([5e-4, 5e-4, 2.5e-4, 2.5e-4])
    poly = ("schedule.name=poly", "schedule.power=2.0", "schedule.final_factor=0.0")
    # Seven steps lie between the first of eight batches and the last.
    expected = [1e-3 * (1 - done / 7) ** 2 for done in (2, 4, 6)]
    assert rates(config_file, tmp_path / "poly", *poly)[:3] == pytest.approx(expected)
    warm = ("schedule.warmup_iterations=3", "schedule.warmup_factor=0.1", *step)
    assert rates(config_file, tmp_path / "warm", *warm)[-1] == pytest.approx(2.5e-4)


def test_a_run_may_be_told_its_iterations(config_file, tmp_path):
    result = train(config_file, tmp_path / "run", "iterations=5", "epochs=1", "val_interval=2")
    assert [entry["epoch"] for entry in result["history"]] == [1, 2, 3]
    assert ["val/accuracy" in entry for entry in result["history"]] == [False, True, True]
    last = torch.load(result["last"], weights_only=True)
    # Two batches make an epoch, of which the last has one.
    assert (last["meta"]["iter"], last["meta"]["epoch"]) == (5, 3)
    again = train(config_file, tmp_path / "run", "iterations=5", "epochs=1", "val_interval=2", resume=True)
    assert again["history"] == result["history"]
    warm = ("schedule.name=step", "schedule.warmup_epochs=0", "schedule.warmup_iterations=6")
    with pytest.raises(TaskError, match=r"the warmup of 6 batches .* must be shorter than the run, which has 5"):
        train(config_file, tmp_path / "warm", "iterations=5", *warm)


def test_parameters_are_told_apart_by_their_names(config_file, tmp_path):
    overrides = ("epochs=1", "schedule.warmup_epochs=0", "optimizer.no_decay=('norm','rpb')")
    run = train(config_file, tmp_path / "run", *overrides, "optimizer.factors={'head.': 10.0, 'stem.': 0.1}")
    groups = torch.load(run["last"], weights_only=True)["optimizer"]["param_groups"]
    found = {(group["weight_decay"], group["initial_lr"]): len(group["params"]) for group in groups}
    assert {rate for _, rate in found} == {1e-2, 1e-3, 1e-4}
    # The head's weight and bias decay: neither name is in the list.
    assert found[0.05, 1e-2] == 2
    assert found[0.0, 1e-3] > 4
    with pytest.raises(TaskError, match="no parameter's name holds 'haed'"):
        train(config_file, tmp_path / "wrong", "optimizer.factors={'haed': 10.0}")


def test_lower_layers_learn_more_slowly_under_layer_decay(config_file, tmp_path):
    run = train(config_file, tmp_path / "run", "epochs=1", "schedule.warmup_epochs=0", "optimizer.layer_decay=0.5")
    groups = torch.load(run["last"], weights_only=True)["optimizer"]["param_groups"]
    rates = {group["initial_lr"] for group in groups}
    assert max(rates) == 1e-3
    assert min(rates) < 2e-4


def test_a_diverging_run_stops_with_advice(config_file, tmp_path):
    with pytest.raises(TaskError, match=r"ceased to be a number .* lower optimizer\.lr"):
        train(config_file, tmp_path / "run", "optimizer.name=sgd", "optimizer.lr=1e30", "schedule.warmup_epochs=0")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_in_one_line(config_file, folder, tmp_path, workers):
    (folder / "train" / "dark" / "3.png").write_bytes(b"not a png")
    with pytest.raises(TaskError) as caught:
        train(config_file, tmp_path / "run", f"workers={workers}")
    assert str(caught.value).startswith(f"{folder}/train/dark/3.png: not an image, or damaged")
    assert "\n" not in str(caught.value)


class Malicious:
    def __reduce__(self):
        return eval, ("1/0",)


def test_bad_checkpoints_are_refused_with_the_reason(config_file, tmp_path):
    config = engine.load_config(config_file)
    good = train(config_file, tmp_path / "run", "epochs=1", "schedule.warmup_epochs=0")["best"]
    cut, evil, foreign, misfit = (tmp_path / f"{name}.pth" for name in ("cut", "evil", "foreign", "misfit"))
    cut.write_bytes(good.read_bytes()[:100_000])
    torch.save({"state_dict": Malicious()}, evil)
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, foreign)
    checkpoint = torch.load(good, weights_only=True)
    weight = checkpoint["state_dict"].pop("norm.weight")
    torch.save(checkpoint, misfit)
    for path, reason in (
        (cut, "truncated"),
        (evil, "could run code"),
        (foreign, "not a checkpoint of `foveate train`"),
        (misfit, r"1 missing \(norm.weight\)"),
        (tmp_path / "absent.pth", "no such file"),
    ):
        for use in (lambda path=path: engine.evaluate(config, path), lambda path=path: Predictor.from_checkpoint(path)):
            with pytest.raises(CheckpointError, match=reason) as caught:
                use()
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)
    checkpoint["state_dict"]["norm.weight"] = weight
    checkpoint["card"]["classes"] = ["cat", "dog"]
    torch.save(checkpoint, misfit)
    with pytest.raises(TaskError, match=r"its classes is \['cat', 'dog'\], but the config's is \['bright', 'dark'\]"):
        engine.evaluate(config, misfit)
    with pytest.raises(TaskError, match="its model is nat_atto, but the config's is nat_mini"):
        engine.evaluate(engine.load_config(config_file, ["model.name=nat_mini"]), good)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("optimizer.rl=1", r"unknown key 'optimizer\.rl'; did you mean 'optimizer\.lr'"),
        ("modle.name=x", r"did you mean 'model\.name'"),
        ("lr=1", r"did you mean 'optimizer\.lr'"),
        ("optimizer=1", r"set one of its own keys: optimizer\.name"),
        ("epochs", "an override is key=value"),
        ("epochs=many", "epochs takes a whole number, such as 10, not 'many'"),
        ("epochs=0", "epochs is 0, but must be from 1"),
        ("deterministic=1", "takes True or False"),
        ("ema=high", "ema takes a number or None"),
        ("precision=half", "one of float32, bfloat16, float16"),
        ("optimizer.name=adamv", "unknown optimizer 'adamv'; did you mean"),
        ("schedule.warmup_epochs=-1", "at least 0"),
        ("schedule.name=stairs", "one of cosine, poly, step"),
        ("schedule.steps=(3,2)", "must be ascending epochs"),
        ("iterations=0", "from 1"),
        ("task=cook", "a config is about its task, which is 'classify'"),
    ],
)
def test_a_wrong_override_is_answered_with_what_is_right(config_file, override, reason):
    with pytest.raises(TaskError, match=reason) as caught:
        engine.load_config(config_file, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("optimzer = dict(lr=1)", r"noise.py: unknown key 'optimzer\.lr'; did you mean 'optimizer\.lr'"),
        ("epochs = (", "SyntaxError"),
        ("epochs = undefined", "undefined"),
        ("_base_ = 'absent.py'", "absent.py"),
        ("task = 'cook'", "task is 'cook'; known: classify"),
    ],
)
def test_a_wrong_config_file_is_answered_in_one_line(config_file, line, reason):
    config_file.write_text(f"{config_file.read_text()}\n{line}\n")
    with pytest.raises(TaskError, match=reason) as caught:
        engine.load_config(config_file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.name=nat_atta", "did you mean 'nat_atto'"),
        ("model.kwargs.drop_path=0.1", "unexpected keyword argument 'drop_path'"),
        ("data.augment.hflop=0.1", "unexpected keyword argument 'hflop'"),
        ("optimizer.kwargs.nestorov=True", "nestorov"),
        ("model.pretrained=True model.name=foveate_host_atto", "No pretrained weights exist"),
        ("device=cuda:77", "CUDA"),
        ("device=gpu", "unknown device 'gpu'"),
        ("model.checkpoint=absent.pth", "absent.pth: no such file"),
    ],
)
def test_a_setting_that_cannot_be_done_is_refused(config_file, tmp_path, override, reason):
    with pytest.raises((TaskError, CheckpointError, UnknownModelError), match=reason) as caught:
        train(config_file, tmp_path / "run", *override.split())
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(temporary):
        with open(temporary, "w") as file:
            file.write("half")
        raise OSError("disk full")

    with pytest.raises(TaskError, match=r"file\.txt: can't be written: disk full.*before is intact"):
        write_whole(path, fail)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


@pytest.mark.heavy
def test_two_processes_train_together_and_measure_every_image_once(config_file, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "foveate", "train", str(config_file), "epochs=2", "device=cpu", "batch_size=3", "ema=0.1"]
    run = tmp_path / "run"
    done = subprocess.run(
        [*launch, *command, "--output", str(run)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    history = json.loads((run / "history.json").read_text())
    metrics, _, targets = engine.evaluate(engine.load_config(config_file, ["batch_size=3"]), run / "last.pth", False)
    assert len(targets) == 6
    assert history[-1]["val/accuracy"] == metrics["accuracy"]
    with pytest.raises(TaskError, match=r"was begun by 2 processes with batch_size=3, 6 images .* batch_size=6"):
        train(config_file, run, "epochs=2", "device=cpu", "batch_size=3", "ema=0.1", resume=True)
