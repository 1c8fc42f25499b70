"""Tables as commands print and write them."""

import csv
from collections.abc import Sequence
from pathlib import Path


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells, aligned in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def as_markdown(rows: list[dict]) -> str:
    """Return rows, of which each names the same columns, as a markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(map(str, row.values())) + " |" for row in rows])


def save_table(rows: list[dict], folder: Path, stem: str, title: str) -> None:
    """Write a table as ``STEM.md`` and ``STEM.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.md").write_text(f"{title}\n\n{as_markdown(rows)}\n")
    with (folder / f"{stem}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
