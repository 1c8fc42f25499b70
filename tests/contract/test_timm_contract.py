"""timm's own contract: its ``tests/test_models.py``, unchanged, run over this package's models.

The file comes from the source distribution of the installed timm and is kept in pytest's cache. The smallest model of
each family runs always; ``pytest -m heavy tests/contract`` runs every registered name, a test for each
(``-k NAME`` chooses).
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import foveate
import pytest
import timm
from filelock import FileLock

SMALLEST = (
    "nat_atto",
    "dinat_mini",
    "nat_isotropic_small",
    "biformer_tiny",
    "quadtree_b0",
    "dat_tiny",
    "agent_deit_tiny",
    "agent_pvt_tiny",
    "inline_deit_tiny",
    "inline_swin_tiny",
    "litv2_small",
    "ela_t_resnet18",
    "overlock_xt",
    "shiftvit_light_tiny",
    "transnext_micro",
    "van_b0",
    "mscan_t",
    "foveate_davit_tiny",
    "foveate_host_atto",
)
# Only described, on the meta device, in tests/zoo/test_dual.py.
TOO_LARGE = ("foveate_davit_huge", "foveate_davit_giant")


@pytest.fixture(scope="session")
def timm_tests(request) -> Path:
    """Return a folder with the ``tests`` of the installed timm and without its package, which would shadow it."""
    folder = request.config.cache.mkdir(f"timm-{timm.__version__}-tests")
    with FileLock(folder / "lock"):  # of parallel workers, one fetches
        fetch_tests(folder)
    return folder


def fetch_tests(folder: Path) -> None:
    if not (folder / "tests" / "test_models.py").exists():
        download = folder / "download"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--dest", str(download), f"timm=={timm.__version__}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.fail(f"timm's tests could not be fetched: {done.stderr.strip().splitlines()[-1:]}")
        with tarfile.open(next(download.glob("timm-*.tar.gz"))) as archive:
            members = [member for member in archive.getmembers() if re.match(r"[^/]+/tests/", member.name)]
            archive.extractall(download, members, filter="data")
        shutil.move(next(download.glob("timm-*/tests")), folder / "tests")
        shutil.rmtree(download)


def run_contract(folder: Path, names: Sequence[str]) -> None:
    environment = os.environ | {
        "FOVEATE_CONTRACT_MODELS": ",".join(names),
        "PYTHONPATH": str(Path(__file__).parent),
        "TIMM_FUSED_ATTN": "1",
        "GITHUB_ACTIONS": "1",  # timm's own switch for its slowest combinations
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "plugin", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(folder), "-W", "ignore", str(folder / "tests" / "test_models.py")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= 8 * len(names), done.stdout[-1000:]


# Some at once: a process of their own is ten seconds of imports and of collecting timm's tests.
@pytest.mark.parametrize("names", [SMALLEST[start::5] for start in range(5)], ids=" ".join)
def test_smallest_models_pass_timms_tests(names, timm_tests):
    run_contract(timm_tests, names)


@pytest.mark.heavy
@pytest.mark.parametrize("name", sorted({*foveate.list_models()} - {*SMALLEST} - {*TOO_LARGE}))
def test_every_model_passes_timms_tests(name, timm_tests):
    run_contract(timm_tests, [name])
