"""README is true of what is there: its families, its commands, its example."""

import importlib.util
import re
from pathlib import Path

import pytest
from foveate.tools.cli import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_families_are_the_site_s():
    """The first screen's table is of docs/pages.py and the states of models and files; .ci/models.py writes it."""
    spec = importlib.util.spec_from_file_location("models_table", ROOT / ".ci" / "models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert README.split(module.MARK)[1].strip() == module.render()


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
