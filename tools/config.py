"""Print a recipe or config with every setting that it has, the defaults included, and overrides applied.

What is printed is itself a config: kept in a file, it gives the same run.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", help="recipe, such as classify/nat_atto_digits, or a Python file, which is run"
    )
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="such as epochs=3 optimizer.lr=1e-3")


def run(args: argparse.Namespace) -> None:
    """Print the config."""
    from ..tasks.engine.config import format_config, load_config

    print(format_config(load_config(args.config, args.overrides)), end="")
