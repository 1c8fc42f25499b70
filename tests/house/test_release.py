"""A release is one version, one wheel for every Python, and C that compiles without a warning where a compiler is."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*.c"))
# What of the packages' folders is part of a release.
PARTS = (".py", ".c", ".h", ".csv", ".json", ".gz", ".png", ".txt", ".md", ".safetensors")
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


def test_the_sdist_is_whole_and_makes_a_wheel_without_a_compiler(tmp_path):
    """One that any Python takes; `.ci/wide release` builds the one with libraries, and asks twine and auditwheel."""
    build = [sys.executable, "setup.py", "-q"]
    command = [*build, "egg_info", "--egg-base", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("foveate-*/")
    packages = ("blocks", "configs", "kernels", "tasks", "tools", "zoo")
    parts = {path for name in packages for path in (ROOT / name).rglob("*") if path.suffix in PARTS}
    names = {path.relative_to(ROOT).as_posix() for path in parts}
    assert names >= {"kernels/lanes.h", "zoo/weights.json", "zoo/shipped/nat_atto.foveate_digits.safetensors"}
    assert [name for name in names | {"README.md", "pyproject.toml"} if not (source / name).is_file()] == []
    environment = os.environ | {"CC": "no-such-compiler"}
    command = [*build, "bdist_wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, env=environment)
    (wheel,) = tmp_path.glob("foveate-*-py3-none-*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    assert {f"foveate/{name}" for name in names if not name.endswith((".c", ".h"))} <= set(held)
    assert not [name for name in held if name.endswith(".so") or name.startswith(("foveate/tests", "foveate/docs"))]


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
