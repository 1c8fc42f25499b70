"""Two nodes of two processes each, on this machine by torchrun: training, evaluation, and going on with fewer."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from foveate.tasks import TaskError, engine
from PIL import Image

pytestmark = pytest.mark.heavy
OPTIONS = ["device=cpu", "schedule.name=step", "schedule.warmup_epochs=0", "model.kwargs.drop_path_rate=0.0"]


@pytest.fixture
def sixteen(folder):
    """As many images as four processes share out evenly."""
    for name, low in (("bright", 128), ("dark", 0)):
        pixels = np.random.default_rng(low).integers(low, low + 128, (23, 37, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "train" / name / "7.png")


def on_two_nodes(tmp_path, *arguments):
    """Run a command on two nodes that meet on loopback; return what both said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    launch += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [*launch, "--node-rank", str(rank), "-m", "foveate", *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    return said


def test_two_nodes_train_measure_and_hand_on_to_fewer(sixteen, config_file, tmp_path):
    four, two = tmp_path / "four", tmp_path / "two"
    run = ["train", str(config_file), *OPTIONS, "batch_size=2", "--output", str(four)]
    first, second = on_two_nodes(tmp_path, *run, "epochs=1")
    # One process speaks for all.
    assert "accuracy" in first
    assert "accuracy" not in second
    environment = json.loads((four / "environment.json").read_text())
    assert environment["processes"] == 4

    # No held-out image counts twice, though six are not shared out evenly among four.
    metrics = tmp_path / "metrics.json"
    on_two_nodes(tmp_path, "eval", str(config_file), str(four / "last.pth"), "device=cpu", "--json", str(metrics))
    alone, _, targets = engine.evaluate(engine.load_config(config_file, ["device=cpu"]), four / "last.pth", False)
    assert len(targets) == 6
    assert json.loads(metrics.read_text()) == pytest.approx(alone, abs=1e-6)
    history = json.loads((four / "history.json").read_text())
    assert history[-1]["val/accuracy"] == pytest.approx(alone["accuracy"], abs=1e-6)

    # Fewer go on with the same samples; that the bits differ is said.
    two.mkdir()
    for file in four.iterdir():
        (two / file.name).write_bytes(file.read_bytes())
    on_two_nodes(tmp_path, *run, "epochs=2", "--resume")
    config = engine.load_config(config_file, [*OPTIONS, "batch_size=2", "epochs=2"])
    with pytest.raises(TaskError, match=r"was begun by 4 processes with batch_size=2, 8 images .* batch_size=8"):
        engine.train(config, two, resume=True, progress=False)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["-m", "foveate", "train", str(config_file), *OPTIONS, "batch_size=4", "epochs=2", "--resume"]
    done = subprocess.run([*launch, "--output", str(two)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "was begun by 4 processes; 2 go on with the same samples, but not to the same bits" in done.stdout
    by_four, by_two = (json.loads((output / "history.json").read_text()) for output in (four, two))
    assert [entry["epoch"] for entry in by_two] == [1, 2]
    assert by_two[1]["train/loss"] == pytest.approx(by_four[1]["train/loss"], rel=1e-3)
