"""A release is one version, one wheel for every Python, and C that compiles without a warning where a compiler is."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*.c"))
FLAGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror")
# Compilers for other systems: ziglang is clang with their headers (`.ci/wide release` installs it).
TARGETS = ("x86_64-windows-gnu", "aarch64-linux-gnu", "aarch64-macos", "x86_64-macos")


def test_one_version():
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M) == [version]
    assert re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version


def test_the_workflow_tests_then_builds_then_publishes():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert {name.split("-")[0] for name in jobs["test"]["strategy"]["matrix"]["os"]} == {"ubuntu", "macos", "windows"}
    assert jobs["wheel"]["needs"] == jobs["sdist"]["needs"] == "test"
    assert jobs["publish"]["needs"] == ["wheel", "sdist"]
    (check,) = [step["run"] for step in jobs["sdist"]["steps"] if "GITHUB_REF_NAME" in step.get("run", "")]
    if sys.version_info < (3, 11):
        pytest.skip("the check is written for the workflow's Python 3.11, which has tomllib")
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    check = check.replace("python -c", f"{sys.executable} -c")
    for tag, code in ((f"v{version}", 0), ("v999", 1)):
        environment = {"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"}
        assert subprocess.run(["bash", "-c", check], cwd=ROOT, env=environment, capture_output=True).returncode == code


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_c_compiles_without_a_warning(compiler):
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} isn't here")
    for source in SOURCES:
        done = subprocess.run([compiler, *FLAGS, "-fsyntax-only", source], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.heavy
@pytest.mark.parametrize("target", TARGETS)
def test_the_c_compiles_for_other_systems(target, tmp_path):
    pytest.importorskip("ziglang")
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-O1", "-c", "-fvisibility=hidden"]
    for source in SOURCES:
        command = [*zig, *FLAGS, "-o", tmp_path / "object.o", source]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
