"""Without the extras models, heads and weights work, and what needs an extra names it."""

import re
import subprocess
import sys

import pytest

from .test_requirements import required

ABSENT = "import sys; sys.modules.update(dict.fromkeys({names!r}))\n"
# What the extras bring, by the name that Python imports.
NAMES = [
    *("mmengine", "albumentations", "cv2", "torchmetrics", "faster_coco_eval", "scipy", "matplotlib"),
    *("onnx", "onnxruntime", "onnxscript"),
]


def run(code, *arguments):
    """Run code in a process of its own in which the extras' packages can't be found."""
    return subprocess.run(
        [sys.executable, "-c", ABSENT.format(names=NAMES) + code, *arguments], capture_output=True, text=True
    )


def test_the_core_requires_none_of_the_extras():
    core = {"torch", "torchvision", "timm", "safetensors", "huggingface-hub", "numpy", "filelock", "tqdm"}
    assert set(required("foveate")) == core
    known = {re.sub("_", "-", name) for name in NAMES} | {"mmengine-lite", "opencv-python-headless", "pyyaml"}
    assert {*required("foveate", "all"), *required("foveate", "export")} - core <= known


def test_models_and_heads_work_on_the_core():
    code = """
import foveate, timm, torch
from foveate.blocks import create_attention, list_attentions
assert timm.create_model("nat_atto").eval()(torch.randn(1, 3, 64, 64)).shape == (1, 10)
detector = foveate.create_detector("mask_rcnn", "nat_atto", num_classes=2, channels=16).eval()
assert len(detector([torch.rand(3, 64, 64)])) == 1
segmenter = foveate.create_segmenter("upernet", "nat_atto", num_classes=2, channels=16).eval()
assert segmenter(torch.rand(1, 3, 64, 64)).shape == (1, 2, 64, 64)
from foveate.tasks import TaskError
try:
    detector([torch.zeros(3, 64, 64, dtype=torch.uint8)])
    raise SystemExit("bytes were resized without OpenCV")
except TaskError as error:
    assert "pip install 'foveate[all]'" in str(error), error
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    [["list", "nat*"], ["info", "nat_atto"], ["weights", "list", "nat_*"], ["weights", "info", "nat_mini.shi_in1k"]],
)
def test_commands_on_models_and_weights_work_on_the_core(command):
    done = run("from foveate.tools.cli import main; sys.exit(main(sys.argv[1:]))", *command)
    assert done.returncode == 0, done.stderr
    assert "nat" in done.stdout


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["train", "classify/nat_atto_digits", "--output", "run"], "all"),
        (["browse", "classify/nat_atto_digits"], "all"),
        (["export", "nat_atto", "x.onnx", "--untrained"], "export"),
    ],
)
def test_commands_name_the_extra_that_they_need(command, extra, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("from foveate.tools.cli import main; sys.exit(main(sys.argv[1:]))", *command)
    assert done.returncode == 2, done.stderr
    line = rf"foveate: error: .* pip install 'foveate\[{extra}\]'"
    assert re.fullmatch(line, done.stderr.strip()), done.stderr
    assert not list(tmp_path.iterdir())
