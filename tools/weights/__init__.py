"""Published weights: list and fetch them, verify and convert a file, make a hub folder of it.

A FILE is a path, an address, or the name of published weights (model.tag).
"""

import argparse
import importlib

# Actions. Each is a module of that name, with add_arguments(parser) and run(args).
ACTIONS = {
    "list": "list published weights: the authors' numbers, and what is known of the links",
    "info": "say all about published weights",
    "fetch": "download weights into the cache",
    "verify": "load a file strictly, run it on a photo, measure it beside what its authors state",
    "convert": "write any published file as safetensors",
    "push": "make a folder for the Hugging Face hub, and upload it if --repo is given",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(ACTIONS))
    for name, what in ACTIONS.items():
        _module_of(name).add_arguments(actions.add_parser(name, help=what, description=what))


def run(args: argparse.Namespace) -> int | None:
    """Do what was asked for."""
    return _module_of(args.action).run(args)


def _module_of(action: str):
    return importlib.import_module(f".{action}", __package__)
