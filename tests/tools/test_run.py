"""``foveate run``: scripts that know timm alone get this package's models."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from foveate.tools.cli import main
from PIL import Image

# What timm's scripts do: arguments, the model by its name, the data by timm's loader, an exit code.
SCRIPT = """
import argparse, sys
import beside
import timm, torch
from timm.data import create_dataset, create_loader, resolve_data_config

parser = argparse.ArgumentParser(description="stand-in")
parser.add_argument("data")
parser.add_argument("--model")
parser.add_argument("--img-size", type=int)

if __name__ == "__main__":
    args = parser.parse_args()
    model = timm.create_model(args.model, num_classes=2).eval()
    config = resolve_data_config({"img_size": args.img_size}, model=model)
    loader = create_loader(
        create_dataset("", args.data), input_size=config["input_size"], batch_size=3, num_workers=1,
        use_prefetcher=False, interpolation=config["interpolation"], device=torch.device("cpu"),
    )
    shapes = [tuple(model(images).shape) for images, _ in loader]
    print(timm.__file__, beside.NAME, shapes)
    sys.exit(3)
"""


@pytest.fixture
def images(tmp_path) -> Path:
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / "validation" / name).mkdir(parents=True)
        for index in range(4):
            pixels = draw.integers(0, 256, (41, 57, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / "validation" / name / f"{index}.png")
    return tmp_path / "images" / "validation"


def test_a_script_of_timm_s_kind_finds_our_models(tmp_path, images, capsys):
    checkout = tmp_path / "checkout"
    # As in a clone, timm's sources lie beside the script; the installed ones are used.
    (checkout / "timm").mkdir(parents=True)
    (checkout / "timm" / "__init__.py").write_text("raise ImportError('the wrong timm')")
    (checkout / "beside.py").write_text("NAME = 'a neighbor'")
    (checkout / "script.py").write_text(SCRIPT)
    before = list(sys.argv), list(sys.path)
    argv = ["run", str(checkout / "script.py"), str(images), "--model", "nat_atto", "--img-size", "64"]
    assert main(argv) == 3
    assert capsys.readouterr().out.strip().endswith("__init__.py a neighbor [(3, 2), (3, 2), (2, 2)]")
    assert (sys.argv, sys.path) == before
    sys.modules.pop("beside")


def test_arguments_are_the_script_s_own(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1:], __name__)")
    assert main(["run", str(script), "--help", "-x", "--", "a b"]) == 0
    assert capsys.readouterr().out.strip() == "['--help', '-x', '--', 'a b'] __main__"
    script.write_text("import sys; sys.exit('it went wrong')")
    assert main(["run", str(script)]) == 1
    assert capsys.readouterr().err == "it went wrong\n"


def test_where_scripts_come_from_is_said(refused):
    message = refused("run", "train.py", "--model", "nat_tiny")
    assert "train.py: no such script" in message
    assert f"--branch v{timm.__version__} https://github.com/huggingface/pytorch-image-models" in message


@pytest.fixture(scope="session")
def scripts(tmp_path_factory) -> Path:
    """timm's own scripts: of the checkout that ``TIMM_SCRIPTS`` names, or of its repository."""
    if "TIMM_SCRIPTS" in os.environ:
        return Path(os.environ["TIMM_SCRIPTS"])
    folder = tmp_path_factory.mktemp("timm") / "checkout"
    url = "https://github.com/huggingface/pytorch-image-models"
    git = shutil.which("git")
    if git is None:
        pytest.skip("no git to fetch timm's scripts with")
    command = [git, "clone", "--quiet", "--depth", "1", "--branch", f"v{timm.__version__}", url, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"GIT_TERMINAL_PROMPT": "0"}
    )
    if done.returncode:
        pytest.skip(
            f"timm's repository is out of reach; TIMM_SCRIPTS=FOLDER names a checkout ({done.stderr.strip()[:90]})"
        )
    return folder


def run_script(script: Path, *arguments: str, cwd: Path) -> str:
    if not script.is_file():
        pytest.skip(f"{script} is not there")
    command = [sys.executable, "-m", "foveate", "run", str(script), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


SMALL = ("--model", "nat_atto", "--img-size", "32", "--batch-size", "4", "--device", "cpu")


@pytest.mark.heavy
def test_timm_s_train_and_validate_work(scripts, images, tmp_path):
    shutil.copytree(images, tmp_path / "images" / "train")
    data = (str(tmp_path / "images"), "--num-classes", "2", "--workers", "1")
    output = ("--epochs", "1", "--cooldown-epochs", "0", "--warmup-epochs", "0", "--output", str(tmp_path / "out"))
    run_script(scripts / "train.py", *data, *SMALL, *output, "--experiment", "run", cwd=tmp_path)
    checkpoint = tmp_path / "out" / "run" / "last.pth.tar"
    text = run_script(scripts / "validate.py", *data, *SMALL, "--checkpoint", str(checkpoint), cwd=tmp_path)
    assert re.search(r'"top1": [\d.]+', text)


@pytest.mark.heavy
def test_timm_s_benchmark_works(scripts, tmp_path):
    limits = ("--bench", "inference", "--num-warm-iter", "1", "--num-bench-iter", "10")
    text = run_script(scripts / "benchmark.py", *SMALL, *limits, cwd=tmp_path)
    assert re.search(r'"infer_samples_per_sec": [\d.]+', text)
