"""Describe published weights: authors' numbers, license, links, file."""

import argparse

from .stated import file_here, numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="model.tag, or a model with one classifier")


def run(args: argparse.Namespace) -> None:
    from ...zoo import weights
    from ...zoo.states import code_state, file_state

    entry = weights.find(args.name)
    kind = " ".join(filter(None, (entry.head, entry.schedule)))
    facts = [
        ("weights", entry.name),
        ("task", f"{entry.task}{f' ({kind})' if kind else ''}, trained on {entry.data}"),
        ("stated", numbers(entry.stated) or "nothing"),
        ("license", entry.license or "none is stated by the authors; ask them"),
        ("page", entry.page),
    ]
    facts.append(("state", file_state(entry)))
    if code := code_state(entry.model):
        facts.append(("code", code))
    if entry.note:
        facts.append(("note", entry.note))
    for source in entry.sources:
        when = f", {source.reported}" if source.reported else ""
        facts.append(("source", f"{source.kind}, {source.state}{when}: {source.address}"))
        if source.page and source.page != source.address:
            facts.append(("", f"page {source.page}"))
        known = (source.file and f"file {source.file}", source.size and f"{source.size} bytes", source.sha256)
        facts.append(("", ", ".join(filter(None, known)) or "no file name, size or hash is published"))
        pin = weights.pins().get(f"{entry.name}/{source.name}")
        if pin:
            facts.append(("", f"first fetched on {pin['date']}: {pin['size']} bytes, sha256 {pin['sha256']}"))
    facts.append(("here", str(file_here(entry) or "not fetched")))
    for label, fact in facts:
        print(f"{label:<9} {fact}")
