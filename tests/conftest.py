"""Fixtures of all tests: reference outputs, and checkpoints rebuilt from them."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import foveate  # noqa: F401 (registers the models)
import numpy as np
import pytest
import torch

# `python -m pytest` puts the checkout there, where others that look for packages called kernels or tools, as
# transformers does, would import ours a second time.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).parents[1]]

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores, and so do the processes that tests start.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
# What ``notes.fill_override`` rescales to a standard deviation of 0.5, so that a misread bias shows in the output.
POSITION_BIAS = re.compile(r"((an|na|ah|aw|ha|wa|ac|ca)_bias|pos_embed\d*|relative_position_bias_table)$")


def _load_script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Fixture:
    """A reference output of published code: its weights and input are rebuilt from names, shapes and seeds."""

    def __init__(self, path: Path):
        self.golden = _load_script("tests/golden/golden.py")
        self.path = path
        self.name = path.stem
        self.spec = json.loads(path.read_text())
        self.samples = np.load(path.with_suffix(".npz"))

    def state(self) -> dict[str, torch.Tensor]:
        """The published checkpoint's state dict."""
        state = {name: self.golden.tensor_for(name, tuple(shape)) for name, shape in self.spec["state"].items()}
        if "fill_override" in self.spec["notes"]:
            for name in filter(POSITION_BIAS.search, state):
                state[name] *= 0.5 * (state[name].numel() / state[name].shape[0]) ** 0.5
        for name, operation, *arguments in self.spec["notes"].get("post_fill_ops", ()):
            if operation == "add_at":
                state[name][arguments[0]] += arguments[1]
            else:
                state[name] = getattr(state[name], operation)(*arguments)
        return state

    def checkpoint(self, folder: Path) -> Path:
        """Write the published checkpoint into ``folder``."""
        path = folder / f"{self.name}.pth"
        torch.save(self.state(), path)
        return path

    def input(self) -> torch.Tensor:
        spec = self.spec["inputs"].get("x", self.spec["inputs"])
        return self.golden.input_for(tuple(spec["shape"]), spec.get("seed", 0))

    def levels(self) -> list[torch.Tensor]:
        """The maps that a head gets, from the finest on."""
        levels = sorted(name for name in self.spec["inputs"] if name.startswith("level"))
        inputs = (self.spec["inputs"][name] for name in levels)
        return [self.golden.input_for(tuple(spec["shape"]), spec["seed"]) for spec in inputs]

    def assert_output(self, name: str, output: torch.Tensor, atol: float) -> None:
        """Compare an output with the sampled values of the published one."""
        assert list(output.shape) == self.spec["outputs"][name]["shape"]
        index = torch.from_numpy(self.samples[f"{name}.index"])
        expected = torch.from_numpy(self.samples[f"{name}.value"])
        actual = output.detach().float().contiguous().flatten()[index]
        error = (actual - expected).abs().max().item()
        assert error <= atol, f"{self.name}: {name} differs by {error:.2e}, allowed are {atol:.0e}"


@pytest.fixture(scope="session")
def open_fixture():
    """Open a reference output by its path below ``tests/golden``, without suffix."""
    return lambda name: Fixture(GOLDEN / f"{name}.json")


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return GOLDEN


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    """Forget what earlier tests compiled: their sizes would turn this one's into symbols."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(scope="session")
def golden_module() -> ModuleType:
    """Weights and inputs that depend on names and shapes alone."""
    return _load_script("tests/golden/golden.py")


@pytest.fixture(scope="session")
def load_script():
    """Import what belongs to no package, by its path in the repository: .ci/models.py, docs/pages.py."""
    return _load_script
