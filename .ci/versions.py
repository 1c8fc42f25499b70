"""The short suite on a table of Pythons, torches and timms: called by `.ci/wide versions` with a folder and rows.

The rows stand in versions.csv, and what came of each is written there and into README's table. Every row gets an
environment of its own, one at a time: each takes 6 GB of disk while it is tested.
"""

import csv
import datetime
import glob
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / ".ci" / "versions.csv"
MARK = "<!-- versions -->"
SUITE = (
    "-m",
    "versions and not heavy",
    "tests/contract/test_families.py",
    "tests/kernels",
    "tests/tasks/test_engine_runs.py",
)


def read_rows() -> list[dict[str, str]]:
    """Return the rows of versions.csv."""
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(rows: list[dict[str, str]]) -> None:
    """Write versions.csv, and README's table from it."""
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    readme = ROOT / "README.md"
    before, _, after = readme.read_text().split(MARK)
    readme.write_text(f"{before}{MARK}\n{render(rows)}\n{MARK}{after}")


def render(rows: list[dict[str, str]]) -> str:
    """Return README's table: a line for each torch, a column for each Python."""
    pythons = sorted({row["python"] for row in rows}, key=version)
    lines = ["| torch | torchvision | timm | " + " | ".join(f"Python {name}" for name in pythons) + " |"]
    lines.append("| " + " | ".join(["---"] * (3 + len(pythons))) + " |")
    for key in dict.fromkeys((row["torch"], row["torchvision"], row["timm"]) for row in rows):
        by_python = {row["python"]: row for row in rows if (row["torch"], row["torchvision"], row["timm"]) == key}
        lines.append("| " + " | ".join([*key, *(_outcome(by_python.get(name)) for name in pythons)]) + " |")
    return "\n".join(lines)


def version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _outcome(row: dict[str, str] | None) -> str:
    if row is None or not row["date"]:
        return "not run"
    if row["failed"] != "0":
        return f"{row['failed']} of {int(row['passed']) + int(row['failed'])} failed, {row['date']}"
    return f"{row['passed']} passed, {row['date']}"


def find_python(name: str) -> str:
    """Return an interpreter, from the path or from pyenv's folder."""
    folder = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    installed = sorted(glob.glob(f"{folder}/versions/{name}.*/bin/python"), key=version)
    candidates = [*installed[::-1], shutil.which(f"python{name}")]
    for candidate in filter(None, candidates):
        if subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    sys.exit(f"Python {name} is not here: put python{name} on the path, or install it with pyenv")


def measure(row: dict[str, str], work: Path) -> None:
    """Run the suite of ``work/tree`` on a row, in ``work/venv``, and enter what came of it."""
    subprocess.run([find_python(row["python"]), "-m", "venv", "--clear", work / "venv"], check=True)
    pins = work / "pins.txt"
    pins.write_text("".join(f"{name}=={row[name]}\n" for name in ("torch", "torchvision", "timm")))
    # The variable outweighs a machine's own constraints.
    settings = dict(cwd=work / "tree", env=os.environ | {"PIP_CONSTRAINT": str(pins), "PYTHONPATH": ""})
    python, report = work / "venv" / "bin" / "python", work / "report.xml"
    subprocess.run([python, "-m", "pip", "install", "-q", "-e", ".[test]"], **settings, check=True)
    report.unlink(missing_ok=True)
    workers = os.environ.get("WIDE_WORKERS", "auto")
    subprocess.run([python, "-m", "pytest", "-q", "-n", workers, f"--junitxml={report}", *SUITE], **settings)
    # A suite that died before its end leaves no report, and ends this script.
    suite = ET.parse(report).getroot().find("testsuite")
    tests, failures, errors, skipped = (int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped"))
    row |= {"passed": str(tests - failures - errors - skipped), "failed": str(failures + errors)}
    row |= {"date": datetime.date.today().isoformat()}


def main(work: Path, choices: list[str]) -> None:
    """Measure the chosen rows, or all, and exit with 1 if any test failed."""
    rows = read_rows()
    if unknown := [choice for choice in choices if not any(_matches(row, choice) for row in rows)]:
        sys.exit(f"no row of {TABLE.name} is {unknown[0]}")
    measured = [row for row in rows if not choices or any(_matches(row, choice) for choice in choices)]
    for row in measured:
        print(f"Python {row['python']}, torch {row['torch']}, timm {row['timm']}", flush=True)
        measure(row, work)
        write_rows(rows)
    if any(row["failed"] != "0" or row["passed"] == "0" for row in measured):
        sys.exit("some tests failed")


def _matches(row: dict[str, str], choice: str) -> bool:
    return choice in (row["python"], row["torch"], f"{row['python']}/{row['torch']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
