"""README is true of what is there: its families, its commands, its example."""

import ast
import re
from pathlib import Path

import pytest
from foveate.tools.cli import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_families_are_the_site_s():
    """The first screen's table is the one of docs/pages.py."""
    assigned = [node for node in ast.parse((ROOT / "docs/pages.py").read_text()).body if isinstance(node, ast.Assign)]
    families = next(ast.literal_eval(node.value) for node in assigned if node.targets[0].id == "FAMILIES")
    assert all(f"| {title} | {what} |\n" in README for title, what in families.values())


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
    assert (ROOT / link).exists()
