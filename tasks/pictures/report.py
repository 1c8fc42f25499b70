"""A run, or an evaluation, as one HTML file that can be sent: pictures are inside, and nothing is fetched."""

import base64
import html
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import printable
from ..checkpoints import write_whole

# Of more classes, a table shows the worst and the best.
_ROWS = 200
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; margin: .5em 0; }
th, td { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; min-width: 5em; }
@media (max-width: 500px) { th, td { padding: .2em .4em; } }
img { max-width: 100%; height: auto; } figure { margin: 1em 0; } figcaption { color: #555; }
pre { background: #f5f5f5; padding: 1em; overflow-x: auto; font-size: 13px; }
"""


def write_report(
    path: str | Path,
    title: str,
    facts: Mapping[str, Any],
    metrics: Mapping[str, float],
    classes: Sequence[Mapping[str, Any]],
    pictures: Sequence[tuple[str, str]],
    settings: str,
) -> None:
    """Write a report.

    Args:
        path: HTML to write; pictures are read from its folder.
        title: What was done.
        facts: Where and how, such as the command.
        metrics: What was measured, as a whole.
        classes: A row for each class: ``class``, and numbers of the same names in each.
        pictures: File and what it shows, in order.
        settings: The complete config.
    """
    folder, name = Path(path).parent, _text(title)
    parts = [f"<h1>{name}</h1>", _table([{"": key, " ": value} for key, value in facts.items()])]
    parts += ["<h2>Measured</h2>", _table([{"metric": key, "value": value} for key, value in metrics.items()])]
    for file, shows in pictures:
        content = (folder / file).read_bytes()
        # PNG's header says how large it is, so that nothing moves while it loads.
        width, height = struct.unpack(">II", content[16:24])
        source = base64.b64encode(content).decode()
        parts.append(
            f'<h2>{_text(shows[:1].upper() + shows[1:])}</h2><figure><img alt="{_text(shows)}" width="{width}" '
            f'height="{height}" src="data:image/png;base64,{source}"></figure>'
        )
    if classes:
        parts += ["<h2>By class</h2>", _table(_shortened(classes))]
    parts += ["<h2>Settings</h2>", f"<pre>{_text(settings)}</pre>"]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title>'
    body = "\n".join(parts)
    head += f"<style>{_STYLE}</style>"
    text = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
    write_whole(path, lambda file: Path(file).write_text(text, encoding="utf-8"))


def _shortened(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows, or of very many those with the least and the greatest of the first number."""
    if len(rows) <= _ROWS:
        return list(rows)
    column = next(key for key in rows[0] if key != "class")
    ordered = sorted(rows, key=lambda row: (row[column] is None, row[column] or 0))
    between = {key: f"{len(rows) - _ROWS} more" if key == "class" else None for key in rows[0]}
    return [*ordered[: _ROWS // 2], between, *ordered[-_ROWS // 2 :]]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{_text(key)}</th>" for key in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row.values()) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "-"
    return _text(f"{value:.4f}" if isinstance(value, float) else str(value))


def _text(text: str) -> str:
    return html.escape(printable(text))
