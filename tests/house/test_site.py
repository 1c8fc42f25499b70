"""The site is true of what is there: its code runs as it stands, its table counts right, its links lead somewhere."""

import csv
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import foveate
import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
# Pages that train, or take many seconds for other reasons.
LONG = {
    "docs/index.md",
    "docs/python.md",
    "docs/explaining.md",
    "docs/tutorials/classify.md",
    "docs/tutorials/detect.md",
    "docs/tutorials/segment.md",
    "docs/tutorials/finetune.md",
    "docs/tutorials/look.md",
    "docs/tutorials/export.md",
}
_BLOCK = re.compile(r"(<!-- skip: (?P<why>[^>]+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)


def blocks_of(page):
    """Return language and code of a page's blocks, those that are marked as skipped with a reason left out."""
    blocks = [match for match in _BLOCK.finditer((ROOT / page).read_text()) if match["language"] in ("python", "sh")]
    assert all(match["why"] is None or len(match["why"].split()) > 1 or match["why"] == "installs" for match in blocks)
    return [(match["language"], match["code"]) for match in blocks if match["why"] is None]


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.heavy if page in LONG else ()) for page in PAGES if blocks_of(page)]
)
def test_code_runs_as_it_stands(page, tmp_path, monkeypatch):
    """In the page's order, in one namespace and one folder; trainings end after a few batches."""
    from foveate.tools.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    namespace = {"__name__": "__main__"}
    for language, code in blocks_of(page):
        if language == "python":
            with redirect_stdout(io.StringIO()):
                exec(compile(code, page, "exec"), namespace)
            continue
        for line in code.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "foveate", line
            if arguments[0] == "train":
                arguments += ["iterations=4", "schedule.warmup_iterations=0", "schedule.warmup_epochs=0"]
            assert main(arguments) == 0, line


def test_commands_and_recipes_of_skipped_blocks_exist():
    from foveate.configs import list_recipes
    from foveate.tools.cli import COMMANDS

    names = set(list_recipes())
    for page in PAGES:
        text = (ROOT / page).read_text()
        assert set(re.findall(r"^(?:\| `)?foveate (\w+)", text, re.MULTILINE)) <= set(COMMANDS)
        for recipe in re.findall(r"foveate train ((?:classify|detect|segment)/\w+)", text):
            assert recipe in names, f"{page}: {recipe}"


def test_the_tables_of_models_name_them_all_and_count_right(load_script):
    """Written by ``python .ci/models.py``; the smallest model of each family is counted anew."""
    module = load_script(".ci/models.py")
    tables = {}
    for path, function in module.TABLES.items():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["model"] for row in rows] == foveate.list_models()
        tables[function] = {row["model"]: row for row in rows}
    smallest = {}
    for row in sorted(tables[module.count].values(), key=lambda row: -float(row["GMACs"])):
        smallest[row["family"]] = row["model"]
    for name in smallest.values():
        for function, rows in tables.items():
            assert function(name) == rows[name]
    assert all(module.state(name) == row for name, row in tables[module.state].items())


def test_a_family_s_page_shows_its_attention_and_no_speed_but_what_was_measured(load_script):
    pages = load_script("docs/pages.py")
    models = pages._models()
    speeds, measured = (ROOT / "docs" / "speed.md").read_text(), 0
    assert set(pages._drawn()) == set(pages.FAMILIES)
    for family in pages.FAMILIES:
        names = [row["model"] for row in models if row["family"] == family]
        assert pages._drawn()[family] in names
        speed = pages._speed(names)
        rows = re.findall(r"^\| `(\w+)` ((?:\| [\d.]+ ){4}\|)$", speed, re.MULTILINE)
        assert bool(rows) != speed.startswith("Not measured")
        assert all(f"\n| {name} {numbers}\n" in speeds for name, numbers in rows)
        measured += len(rows)
    assert measured >= 10


@pytest.mark.parametrize("package", ["blocks", "kernels"])
def test_the_reference_names_all_that_a_package_exports(package, load_script):
    exported = importlib.import_module(f"foveate.{package}").__all__
    reference = load_script("docs/pages.py")._reference(package, package)
    named = re.findall(rf"^::: foveate\.{package}\.[\w.]+\.(\w+)$", reference, re.MULTILINE)
    assert set(exported) <= set(named)


def test_builds_strictly(tmp_path):
    """With every link and anchor checked."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_environment())
    assert result.returncode == 0, result.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("index.html")}
    assert {"index.html", "models/nat/index.html", "reference/blocks/index.html", "tutorials/look/index.html"} <= pages


def _environment():
    return os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
