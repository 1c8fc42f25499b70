"""batch_size=auto: what fits is found by trying, where memory is measured."""

import pytest
import torch
from foveate.tasks import TaskError, engine
from foveate.tasks.engine import batch_size
from foveate.tasks.engine.batch_size import largest
from foveate.tools.cli import main


@pytest.mark.parametrize(("limit", "most", "found"), [(1, 99, 1), (5, 99, 4), (7, 99, 6), (50, 99, 48), (999, 20, 16)])
def test_the_largest_that_fits_is_found_and_no_larger_one_tried_than_the_first_that_does_not(limit, most, found):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    assert largest(fits, most) == found
    assert sum(size > limit for size in tried) <= 1
    assert tried == (sorted(tried) if limit > 1 else [2, 1])
    assert largest(lambda size: False, most) == 0


@pytest.fixture
def memory(monkeypatch):
    """A device of so many bytes, of which an image takes one and a model none; beyond it is out of memory."""
    state = {"room": 10, "tried": []}
    loss = engine.config.task_class_of("classify").loss

    def limited(task, model, images, targets):
        state["tried"].append(len(images))
        if len(images) > state["room"]:
            raise torch.OutOfMemoryError("out of memory")
        return loss(task, model, images, targets)

    monkeypatch.setattr(engine.config.task_class_of("classify"), "loss", limited)
    monkeypatch.setattr(batch_size, "measures_memory", lambda device: True)
    monkeypatch.setattr(batch_size, "_room", lambda device: state["room"])
    monkeypatch.setattr(batch_size, "_taken", lambda device: state["tried"][-1])
    monkeypatch.setattr(batch_size, "_kept", lambda model, config: 0)
    monkeypatch.setattr(batch_size, "_LEAST_BATCHES", 1)
    return state


def train(config_file, output, *overrides, resume=False):
    config = engine.load_config(config_file, ("batch_size=auto", "epochs=2", "schedule.warmup_epochs=0", *overrides))
    return engine.train(config, output, resume=resume, progress=False)


def test_a_run_takes_what_fits_and_goes_on_with_it(config_file, memory, tmp_path):
    train(config_file, tmp_path / "run", "schedule.name=step", "loss.mixup=0.2", "epochs=1")
    # 12 would be out of memory; 8 of 10 bytes are below the share that may be taken.
    assert memory["tried"][:5] == [2, 4, 6, 8, 12]
    assert "batch_size = 8 " in (tmp_path / "run" / "config.py").read_text()
    assert "batch_size=auto: 8, the largest tried that fits into cpu" in (tmp_path / "run" / "log.txt").read_text()
    # What fits now is another matter.
    memory["room"] = 20
    train(config_file, tmp_path / "run", "schedule.name=step", "loss.mixup=0.2", resume=True)
    assert "batch_size=auto: 8, as the run was begun" in (tmp_path / "run" / "log.txt").read_text()


def test_where_not_one_image_fits_that_is_said(config_file, memory, tmp_path):
    memory["room"] = 0
    with pytest.raises(TaskError, match="not even one image fits into the memory of cpu"):
        train(config_file, tmp_path / "run")


def test_without_cuda_the_size_is_fixed_and_said(config_file, tmp_path, capsys):
    assert main(["train", str(config_file), "--output", str(tmp_path / "run"), "batch_size=auto", "epochs=2"]) == 0
    assert "batch_size=auto: 16; what fits is tried on CUDA alone" in capsys.readouterr().out
    assert main(["eval", str(config_file), str(tmp_path / "run" / "best.pth"), "batch_size=auto"]) == 0
    capsys.readouterr()
    assert main(["train", str(config_file), "--output", str(tmp_path / "no"), "batch_size=most"]) == 2
    assert 'batch_size takes a whole number or "auto"' in capsys.readouterr().err
