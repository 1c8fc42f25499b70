"""WebDataset's shards: read at their place, by each process its own, and refused in a line where they are broken."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from foveate.tasks import TaskError, engine
from foveate.tasks.classify import Task as Classify
from foveate.tasks.data.shards import expand_shards
from foveate.tasks.engine.hooks import SeedHook
from foveate.tasks.engine.loading import Order
from foveate.tools.cli import main
from PIL import Image


def png(value, size=(30, 20)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(file, "png")
    return file.getvalue()


def shard(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def labelled(values, form="cls"):
    files = {}
    for value in values:
        files[f"{value:03d}.png"] = png(value)
        label = str(value % 2).encode() if form == "cls" else json.dumps({"label": ["cat", "dog"][value % 2]}).encode()
        files[f"{value:03d}.{form}"] = label
    return files


@pytest.fixture
def root(tmp_path):
    for number in range(3):
        shard(tmp_path / f"train-{number:03d}.tar", labelled(range(number * 10, number * 10 + 4)))
    shard(tmp_path / "val-000.tar", labelled((100, 101)))
    return tmp_path


def task_of(root, *overrides):
    options = (f"data.root={root}", "model.name=nat_atto", "model.pretrained=False", "data.size=32", *overrides)
    return Classify(engine.load_config("classify/finetune", options))


def test_patterns_count_and_list(root):
    names = [f"{root}/train-00{number}.tar" for number in range(3)]
    assert [str(file) for file in expand_shards(f"{root}/train-{{000..002}}.tar")] == names
    assert [str(file) for file in expand_shards(f"{root}/train-00{{0,2}}.tar")] == [names[0], names[2]]
    assert [str(file) for file in expand_shards(f"{root}/train-*.tar")] == names
    with pytest.raises(TaskError, match=r"train-003\.tar: no such shard"):
        expand_shards(f"{root}/train-{{000..003}}.tar")


@pytest.mark.parametrize("by_hand", [True, False])
def test_images_and_labels_are_read(root, by_hand, capsys):
    named = ("data.name=webdataset", "data.train=train-{000..002}.tar", "data.val=val-000.tar")
    task = task_of(root, *(named if by_hand else ()))
    assert task.classes == ["0", "1"]
    assert task.train_set.targets == [0, 1] * 6
    values = [np.asarray(task.train_set.image(index))[0, 0, 0] for index in range(12)]
    assert values == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert [np.asarray(task.val_set.image(index))[0, 0, 0] for index in range(2)] == [100, 101]
    assert main(["data", "check", str(root)]) == 0
    assert "classes in the format webdataset, 2 classes" in capsys.readouterr().out


def test_names_come_from_a_list_or_from_json(root, tmp_path):
    (root / "classes.txt").write_text("cat\ndog\nbird\n")
    assert task_of(root).classes == ["cat", "dog", "bird"]
    shard(root / "val-000.tar", {"a.png": png(0), "a.cls": b"9" * 5000})  # more digits than Python takes for a number
    with pytest.raises(TaskError, match=r"val-000\.tar/a: there is no class '99.*'; known: bird, cat, dog"):
        task_of(root)
    (root / "classes.txt").unlink()
    with pytest.raises(TaskError, match=r"val-000\.tar/a: there is no class '99.*'; known: 0, 1"):
        task_of(root)
    for number in range(2):
        shard(tmp_path / "json" / f"train-{number}.tar", labelled(range(number * 8, number * 8 + 8), "json"))
    task = task_of(tmp_path / "json")
    assert task.classes == ["cat", "dog"]
    assert len(task.train_set) + len(task.val_set) == 16
    assert not {name for name, _ in task.train_set.samples} & {name for name, _ in task.val_set.samples}


def test_names_may_begin_with_the_folder_that_was_packed(root):
    """As ``tar -cf train-000.tar .`` writes them."""
    shard(root / "train-000.tar", {f"./{name}": content for name, content in labelled(range(4)).items()})
    assert task_of(root).train_set.samples[0] == ("train-000.tar/000", 0)


def test_processes_share_the_samples_out():
    orders = [Order(12, 3, rank, 3) for rank in range(3)]
    drawn = [[index for _, _, index in order] for order in orders]
    assert sorted(index for part in drawn for index in part) == list(range(12))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a.png": png(0)},
            r"train-000\.tar, a: has no label; it is in \.cls, or in \.json under label or cls or",
        ),
        ({"a.cls": b"0"}, r"train-000\.tar, a: has no image, but cls; known are"),
        ({"a.png": png(0), "a.json": b"{"}, r"train-000\.tar, a: its \.json can't be read"),
        ({"a.png": png(0), "a.json": b'{"label": [1]}'}, r"train-000\.tar, a: has no label"),
        ({"a.txt": b""}, r"train-000\.tar, a: has no image, but txt"),
        ({"a.png": png(0), "a.cls": b"\xff\xfe"}, r"train-000\.tar, a: its \.cls is not text in UTF-8"),
        ({"a.png": png(0), "a.jpg": png(1), "a.cls": b"0"}, r"train-000\.tar, a: has several images, png, jpg"),
        ({"a.png": png(0), "./a.png": png(1), "a.cls": b"0"}, r"train-000\.tar, a: has two files a\.png"),
        ({}, r"train-000\.tar: holds no image"),
    ],
)
def test_a_broken_sample_is_one_line(files, message, root):
    shard(root / "train-000.tar", files)
    (root / "train-001.tar").unlink()
    (root / "train-002.tar").unlink()
    with pytest.raises(TaskError, match=message) as caught:
        task_of(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [0, 100, 700, 1024, 2048, 5120])
def test_a_shard_that_is_cut_off_is_one_line(cut, root):
    path = root / "train-001.tar"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(TaskError, match=r"train-001\.tar: (no tar, compressed, or damaged|holds no image)"):
        task_of(root)


def test_a_broken_header_between_two_samples_is_one_line(root):
    """The library stops there, as if the shard ended."""
    path = root / "train-001.tar"
    with tarfile.open(path) as tar:
        place = tar.getmembers()[4].offset
    content = bytearray(path.read_bytes())
    content[place : place + 200] = b"\xaa" * 200
    path.write_bytes(content)
    with pytest.raises(TaskError, match=rf"train-001\.tar: .*damaged \(the header at byte {place} is broken\)"):
        task_of(root)


def test_a_compressed_shard_and_an_unknown_class_are_refused(root):
    with tarfile.open(root / "val-000.tar", "w:gz"):
        pass
    with pytest.raises(TaskError, match=r"val-000\.tar: no tar, compressed, or damaged .*; shards are plain tars"):
        task_of(root)
    shard(root / "val-000.tar", {"a.png": png(0), "a.cls": b"7"})
    with pytest.raises(TaskError, match=r"val-000\.tar/a: there is no class '7'"):
        task_of(root)


@pytest.mark.heavy
def test_a_run_goes_on_exactly_where_it_stopped(root, tmp_path, monkeypatch):
    options = [f"data.root={root}", "model.name=nat_atto", "model.pretrained=False", "workers=0", "data.size=32"]
    options += ["batch_size=4", "epochs=2", "checkpoint.interval=1", "device=cpu", "schedule.warmup_epochs=0"]
    config = engine.load_config("classify/finetune", options)
    straight = engine.train(config, tmp_path / "straight", progress=False)
    with monkeypatch.context() as patch:
        seed = SeedHook.before_train_iter

        def interrupted(self, runner, *args, **kwargs):
            if runner.iter == 4:
                raise KeyboardInterrupt
            seed(self, runner, *args, **kwargs)

        patch.setattr(SeedHook, "before_train_iter", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.train(config, tmp_path / "broken", progress=False)
    resumed = engine.train(config, tmp_path / "broken", resume=True, progress=False)
    left, right = (torch.load(run["last"], weights_only=True)["state_dict"] for run in (straight, resumed))
    assert all(torch.equal(left[name], right[name]) for name in left)
