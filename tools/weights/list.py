"""List published weights."""

import argparse
import json

from ..pattern import as_glob
from ..tables import print_table
from .stated import file_here, numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", default="*", help="glob, such as 'nat_*'")
    parser.add_argument("--task", choices=("classify", "detect", "segment"))
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def run(args: argparse.Namespace) -> None:
    import dataclasses
    from fnmatch import fnmatch

    from ...tasks import TaskError, nearest
    from ...zoo import weights
    from ...zoo.states import file_word

    pattern = as_glob(args.pattern)
    entries = [
        entry for name, entry in weights.table().items() if fnmatch(name, pattern) and args.task in (None, entry.task)
    ]
    if not entries:
        raise TaskError(f"no published weights match {args.pattern!r}{nearest(args.pattern, weights.table())}")
    if args.json:
        print(json.dumps({entry.name: dataclasses.asdict(entry) for entry in entries}, indent=1))
        return
    pins = weights.pins()
    rows = [("weights", "stated by the authors", "license", "link", "file", "reported", "last good", "here")]
    for entry in entries:
        good = [pins[key]["date"] for key in (f"{entry.name}/{source.name}" for source in entry.sources) if key in pins]
        stated = numbers(entry.stated)
        here = "yes" if file_here(entry) else "-"
        license = entry.license or "none"
        rows.append(
            (
                *(entry.name, stated or "-", license, entry.state, file_word(entry)),
                *(entry.reported or "-", max(good, default="-"), here),
            )
        )
    print_table(rows)
    print(
        f"\n{len(entries)} files. Links as last reported: shipped with this package; listed by the authors; derived "
        "from a share page; browser: for people only; dead.\nFile: whether somebody reported to have opened it, or "
        "measured it.\nLast good: when the file was first fetched here."
    )
