"""What is required is what is claimed: the installed wheel's requirements, one OpenCV, README's table of versions."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def required(name: str, extra: str = "") -> dict[str, Requirement]:
    """Return what a package needs, without its extras or with one."""
    requirements = map(Requirement, importlib.metadata.requires(name) or ())
    needed = [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": extra})]
    return {re.sub(r"[-_.]+", "-", each.name).lower(): each for each in needed}


def all_required(name: str) -> set[str]:
    """Return what a package brings with it, directly or not."""
    found = set(required(name, "all"))
    rest = [*found]
    while rest:
        new = set(required(rest.pop())) - found
        found |= new
        rest += new
    return found


def test_one_opencv_is_brought():
    """Every distribution of OpenCV writes the same folder `cv2`: of two, the last one installed wins."""
    assert {name for name in all_required("foveate") if name.startswith("opencv")} == {"opencv-python-headless"}


@pytest.fixture
def versions(load_script):
    return load_script(".ci/versions.py")


def test_the_table_of_versions_is_the_one_that_was_measured(versions):
    """Regenerate it with ``.ci/wide versions``."""
    table = (ROOT / "README.md").read_text().split(versions.MARK)[1].strip()
    assert table == versions.render(versions.read_rows())


def test_nothing_that_is_claimed_has_failed(versions):
    needed = required("foveate")
    python = Requirement(f"python{importlib.metadata.metadata('foveate')['Requires-Python']}")
    rows = versions.read_rows()
    claimed = [row for row in rows if all(row[name] in needed[name].specifier for name in ("torch", "timm"))]
    claimed = [row for row in claimed if row["python"] in python.specifier]
    assert claimed
    assert not [row for row in claimed if row["failed"] not in ("", "0")]


def test_tables_say_what_failed_and_what_was_not_run(versions):
    keys = dict(torch="2.6.0", torchvision="0.21.0", timm="1.0.24", date="2026-01-02")
    rows = [keys | dict(python="3.10", passed="7", failed="0"), keys | dict(python="3.9", passed="5", failed="2")]
    rows.append(keys | dict(python="3.9", torch="2.7.0", passed="", failed="", date=""))
    lines = versions.render(rows).splitlines()
    assert lines[0] == "| torch | torchvision | timm | Python 3.9 | Python 3.10 |"
    assert lines[2] == "| 2.6.0 | 0.21.0 | 1.0.24 | 2 of 7 failed, 2026-01-02 | 7 passed, 2026-01-02 |"
    assert lines[3] == "| 2.7.0 | 0.21.0 | 1.0.24 | not run | not run |"
