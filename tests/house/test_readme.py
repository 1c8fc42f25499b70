"""README is true of what is there: its families, its commands, its example."""

import re
from pathlib import Path

import pytest
from foveate.tools.cli import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_tables_are_the_site_s(load_script):
    """Families are of docs/pages.py and the states of models and files, speeds of docs/speed.md: .ci/models.py."""
    tables = load_script(".ci/models.py").render()
    assert {mark: README.split(mark)[1].strip() for mark in tables} == tables
    assert all(len(table.splitlines()) > 12 for table in tables.values())


def test_every_figure_of_speed_stands_where_its_command_does():
    section = README.split("## Speed\n")[1].split("\n## ")[0]
    figures = set(re.findall(r"\d+\.\d+", section))
    assert len(figures) > 40
    assert figures <= set(re.findall(r"\d+\.\d+", (ROOT / "docs" / "speed.md").read_text()))


def test_what_was_broken_is_counted_right():
    """README's totals are the sums of docs/verified.md."""
    rows = [line.split("|") for line in (ROOT / "docs" / "verified.md").read_text().splitlines() if line[:2] == "| "]
    rows = [(int(row[4].split()[0].replace(",", "")), int(re.match(r"\d+", row[5].strip())[0])) for row in rows[1:]]
    operators, files, folders, hosts, kills = rows[:8], rows[8:12], rows[12:15], rows[15:17], rows[17:]
    tried = [f"{sum(row[0] for row in part):,}" for part in (operators, files, folders, hosts, kills)]
    told = README.split("breaks things on purpose: ")[1].split("\n*")[0]
    assert re.findall(r"[\d,]*\d", told)[:5] == tried
    assert f"{sum(row[1] for row in rows)} tries went wrong" in " ".join(told.split())


def test_commands_exist():
    named = set(re.findall(r"^foveate (\w+)", README, re.MULTILINE))
    assert named
    assert named <= set(COMMANDS)


def test_example_runs_as_it_stands():
    example = next(
        block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "import foveate" in block
    )
    offline = example.replace(", pretrained=True", "")
    assert offline != example
    exec(compile(offline, "README.md", "exec"), {"print": lambda *args: None})


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http|#)[^)]+)\)", README))
def test_links_lead_somewhere(link):
    path, _, anchor = link.partition("#")
    assert (ROOT / path).exists()
    headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.MULTILINE) if anchor else []
    assert not anchor or anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
