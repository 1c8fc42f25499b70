"""The scripts that break things, for a minute each; `python tests/breaking --help` says more."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.heavy
@pytest.mark.parametrize("part", ["operators", "files", "runs", "kills", "hosts"])
def test_nothing_breaks(part):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent), part, "--seconds", "60"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout
