"""README is true of what is there: its table of models, its commands, its example."""

import re
from pathlib import Path

import foveate
import pytest
from foveate.tools.cli import COMMANDS
from foveate.tools.list import markdown

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_table_of_models_is_the_one_that_the_command_prints():
    """Regenerate it with ``foveate list --markdown``."""
    table = README.split("<!-- models -->")[1].split("<!-- /models -->")[0].strip()
    assert table == markdown(foveate.list_models())


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


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_links_lead_somewhere(link):
    assert (Path(__file__).parents[2] / link).exists()
