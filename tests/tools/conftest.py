"""One short run on the digits, by the command, that all tests of the commands share."""

from pathlib import Path

import pytest
from foveate.tools.cli import main


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("digits")
    assert main(["train", "classify/nat_atto_digits", "epochs=4", "--output", str(output)]) == 0
    return output


@pytest.fixture
def refused(capsys):
    """Run a command that must fail: exit code 2, one line on stderr, which is returned."""

    def run(*argv: str) -> str:
        capsys.readouterr()
        assert main(argv) == 2
        message = capsys.readouterr().err
        assert message.startswith("foveate: error: ")
        assert message.count("\n") == 1
        return message

    return run
