"""What goes wrong before and in training is said in one line that names the cause and the cure."""

import re
import sys

import pytest
import torch
from foveate.tasks import TaskError, engine
from foveate.tasks.classify import Classify
from foveate.tools.cli import main
from foveate.zoo import CheckpointError

QUICK = ("epochs=2", "schedule.warmup_epochs=0", "batch_size=4")


def train(config_file, output, *overrides, resume=False):
    config = engine.load_config(config_file, (*QUICK, *overrides))
    return engine.train(config, output, resume=resume, progress=False)


def refused(config_file, output, *overrides, resume=False):
    with pytest.raises((TaskError, CheckpointError)) as caught:
        train(config_file, output, *overrides, resume=resume)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_malicious_checkpoint_is_refused_and_never_run(config_file, tmp_path):
    mark = tmp_path / "executed"
    run = tmp_path / "run"
    train(config_file, run, "epochs=1")
    checkpoint = torch.load(run / "last.pth", weights_only=True)
    torch.save(checkpoint | {"begun": Payload(mark)}, run / "last.pth")
    torch.load(run / "last.pth", weights_only=False)
    assert mark.exists()  # the payload works
    mark.unlink()
    assert f"{run}/last.pth" in refused(config_file, run, "epochs=1", resume=True)
    assert "could run code" in refused(config_file, tmp_path / "new", f"model.checkpoint={run}/last.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        engine.evaluate(engine.load_config(config_file), run / "last.pth", progress=False)
    assert main(["predict", str(tmp_path), "--checkpoint", str(run / "last.pth")]) == 2
    assert not mark.exists()


def test_a_run_is_not_continued_from_what_is_no_checkpoint_of_it(config_file, tmp_path):
    run = tmp_path / "run"
    train(config_file, run, "epochs=1")
    whole = (run / "last.pth").read_bytes()
    (run / "last.pth").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refused(config_file, run, "epochs=1", resume=True)
    (run / "last.pth").write_bytes(whole)
    assert "model.name='nat_atto', not 'nat_mini'" in refused(
        config_file, run, "epochs=1", "model.name=nat_mini", resume=True
    )
    message = refused(config_file, run, "epochs=1", "model.kwargs.kernel_size=5", resume=True)
    assert "was begun with" in message
    (run / "last.pth").write_bytes((run / "best.pth").read_bytes())
    assert "holds no state of the optimizer" in refused(config_file, run, "epochs=1", resume=True)


def test_a_changed_data_set_is_noticed(config_file, folder, tmp_path):
    train(config_file, tmp_path / "run", "epochs=1")
    (folder / "train" / "dark" / "6.png").unlink()
    message = refused(config_file, tmp_path / "run", "epochs=1", resume=True)
    assert "was begun with 14 training samples, now there are 13; the data set changed" in message


def test_a_loss_that_is_no_number_stops_before_it_reaches_a_checkpoint(config_file, tmp_path, monkeypatch):
    loss = Classify.loss
    seen = []

    def broken(self, model, images, targets):
        result = loss(self, model, images, targets)
        if not torch.is_grad_enabled():  # a checkpoint's own look at the last batch
            return result
        seen.append(0)
        # Of three batches an epoch, after the one that is tried.
        return {"loss": result["loss"] * (float("nan") if len(seen) == 6 else 1)}

    monkeypatch.setattr(Classify, "loss", broken)
    message = refused(config_file, tmp_path / "run", "checkpoint.interval=1")
    assert "the loss ceased to be a number in epoch 2; lower optimizer.lr (now 0.001)" in message
    checkpoint = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert checkpoint["meta"]["iter"] == 4
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    assert message.endswith(f"the last good checkpoint is {tmp_path}/run/last.pth, after 4 batches")


def written(run) -> list[dict]:
    """Every checkpoint of a run; all that is in them must be finite."""
    checkpoints = [torch.load(path, weights_only=True) for path in run.glob("*.pth")]
    for checkpoint in checkpoints:
        assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    return checkpoints


@pytest.mark.parametrize("interval", ["None", "1"])
@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        ("adamw", "can't make a step of optimizer.lr=1e+38: "),
        ("sgd", "in epoch 1; lower optimizer.lr (now 1e+38), set optimizer.clip_grad=1.0"),
        ("lion", "in epoch 1; lower optimizer.lr (now 1e+38), set optimizer.clip_grad=1.0"),
    ],
)
def test_weights_beyond_all_numbers_are_not_written(config_file, tmp_path, interval, optimizer, reason):
    settings = ("optimizer.lr=1e38", f"optimizer.name={optimizer}", f"checkpoint.interval={interval}")
    message = refused(config_file, tmp_path / "run", *settings)
    assert reason in message
    assert optimizer == "adamw" or message.endswith("no checkpoint was written yet")
    assert written(tmp_path / "run") == []


@pytest.mark.parametrize(("interval", "last", "good"), [("None", 4, 2), ("1", 3, 2)])
def test_a_step_that_ruins_the_weights_just_before_a_checkpoint_stops_the_run(
    config_file, tmp_path, monkeypatch, interval, last, good
):
    """The loss of that batch is a number, its gradient is not."""
    loss, seen = Classify.loss, []

    def broken(self, model, images, targets):
        value = loss(self, model, images, targets)["loss"]
        if not torch.is_grad_enabled():  # a checkpoint's own look at the last batch
            return {"loss": value}
        seen.append(0)
        # One was the batch that is tried.
        if len(seen) == last + 1:
            value.register_hook(lambda gradient: gradient * float("nan"))
        return {"loss": value}

    monkeypatch.setattr(Classify, "loss", broken)
    message = refused(config_file, tmp_path / "run", "batch_size=6", f"checkpoint.interval={interval}", "epochs=3")
    assert "the weights ceased to be finite in epoch 2" in message
    assert message.endswith(f"the last good checkpoint is {tmp_path}/run/last.pth, after {good} batches")
    assert max(checkpoint["meta"]["iter"] for checkpoint in written(tmp_path / "run")) == good
    monkeypatch.undo()
    (entry, *_) = train(config_file, tmp_path / "run", "batch_size=6", "epochs=3", resume=True)["history"]
    assert entry["epoch"] == 1


def test_what_cannot_work_is_said_before_the_first_epoch(config_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Classify, "loss", lambda *_: {"loss": torch.tensor(float("inf"), requires_grad=True)})
        assert "the loss of the first batch is inf" in refused(config_file, tmp_path / "run")
    with monkeypatch.context() as patch:

        def fail(*_):
            raise RuntimeError("sizes of tensors must match\nand more")

        patch.setattr(Classify, "predict", fail)
        message = refused(config_file, tmp_path / "run")
        assert "a first batch of 2 fails (RuntimeError: sizes of tensors must match); look at" in message

    def exhaust(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Classify, "loss", exhaust)
    assert "does not fit into the memory of cpu; lower batch_size" in refused(config_file, tmp_path / "run")
    assert not (tmp_path / "run" / "last.pth").exists()


def test_trying_a_batch_leaves_no_trace(config_file, tmp_path, monkeypatch):
    from foveate.tasks.engine.runner import TaskRunner

    settings = ("model.name=test_resnet", "epochs=1")
    tried = train(config_file, tmp_path / "tried", *settings)
    monkeypatch.setattr(TaskRunner, "_try", lambda self, model: False)
    untried = train(config_file, tmp_path / "untried", *settings)
    states = [torch.load(run["last"], weights_only=True)["state_dict"] for run in (tried, untried)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_skipped_and_counted_on_request(config_file, folder, tmp_path, workers):
    damaged = [folder / "train" / "dark" / "3.png", folder / "val" / "bright" / "1.png"]
    for path in damaged:
        path.write_bytes(b"not a png")
    message = refused(config_file, tmp_path / "refused", f"workers={workers}")
    assert message.startswith((f"{damaged[0]}: not an image", f"{damaged[1]}: not an image"))
    config = ("damaged_images=skip", f"workers={workers}")
    result = train(config_file, tmp_path / "run", *config)
    assert [(entry["train/damaged"], entry["val/damaged"]) for entry in result["history"]] == [(1, 1), (1, 1)]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("skipped 1 damaged") == 2
    assert all(f"{path}: not an image" in log for path in damaged)
    config = engine.load_config(config_file, (*QUICK, *config))
    metrics, predictions, targets = engine.evaluate(config, result["last"], progress=False)
    assert targets == [0, 0, 1, 1, 1]
    right = sum(int(logits.argmax()) == target for logits, target in zip(predictions, targets, strict=True))
    assert metrics["accuracy"] == pytest.approx(right / 5)


def test_a_data_set_without_a_good_image_is_refused(config_file, folder, tmp_path):
    for path in folder.glob("train/*/*.png"):
        path.write_bytes(b"")
    assert "every image of the data set is damaged" in refused(config_file, tmp_path / "run", "damaged_images=skip")


def test_classes_are_counted_before_training(config_file, folder, tmp_path):
    assert "has 2 classes" in refused(config_file, tmp_path / "run", "data.num_classes=3")
    (folder / "train" / "grey").mkdir()
    message = refused(config_file, tmp_path / "run")
    assert message.startswith(f"{folder}/train/grey: the class has no image")


@pytest.mark.parametrize("backend", ["tensorboard", "wandb"])
def test_a_backend_that_is_not_installed_is_named_with_the_cure(config_file, tmp_path, monkeypatch, backend):
    for module in ("tensorboard", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    message = refused(config_file, tmp_path / "run", f"log=('{backend}',)")
    assert message.startswith(f"log={backend} needs a package")
    assert f"cure: pip install {backend}" in message
    assert not (tmp_path / "run" / "last.pth").exists()


def test_unknown_backends_are_refused(config_file, tmp_path):
    assert "must be a list of tensorboard, wandb" in refused(config_file, tmp_path / "run", "log=('tensorbord',)")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("damaged_images=ignore", "must be refuse or skip"),
        ("checkpoint.interval=0", "at least 1, or None"),
        ("checkpoint.keep=-1", "at least 0"),
        ("checkpoint.kept=1", r"did you mean 'checkpoint\.keep'"),
    ],
)
def test_settings_of_checkpoints_are_checked(config_file, override, reason):
    with pytest.raises(TaskError, match=reason):
        engine.load_config(config_file, [override])


def test_the_command_answers_a_folder_it_cannot_write_to_in_one_line(config_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", str(config_file), "--output", str(tmp_path / "file" / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "can't be written" in error


def test_a_run_goes_on_where_its_data_has_moved_to(config_file, folder, tmp_path):
    run = tmp_path / "run"
    train(config_file, run, "epochs=1", "schedule.name=step", "schedule.warmup_epochs=0")
    again = ("epochs=2", "schedule.name=step", "schedule.warmup_epochs=0")
    moved = folder.rename(tmp_path / "elsewhere")
    train(config_file, run, *again, f"data.root={moved}", resume=True)
    assert str(moved) in (run / "config.py").read_text()
    (moved / "train").rename(moved / "first")
    train(config_file, run, "epochs=3", *again[1:], f"data.root={moved}", "data.train=first", resume=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda root: (root / "val" / "dark" / "2.png").unlink(),
            r"other val data: its files differ \(6 then, 5 now\)",
        ),
        (
            lambda root: (root / "train" / "dark" / "6.png").rename(root / "train" / "dark" / "9.png"),
            "other train data: its names or labels differ",
        ),
        (
            lambda root: (root / "train" / "dark" / "6.png").write_bytes(
                (root / "train" / "bright" / "6.png").read_bytes() + b" "
            ),
            "other train data: its lengths of the files differ",
        ),
    ],
)
def test_other_data_is_no_place_to_go_on(config_file, folder, tmp_path, change, reason):
    train(config_file, tmp_path / "run", "epochs=1")
    moved = folder.rename(tmp_path / "elsewhere")
    change(moved)
    message = refused(config_file, tmp_path / "run", "epochs=1", f"data.root={moved}", resume=True)
    assert re.search(reason, message)
    assert "data.root" in message
