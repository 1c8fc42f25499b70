"""List the recipes: model, data, what they were run on here ("-": nothing yet), and the result to expect.

Numbers of recipes that weren't run here are the authors'. `foveate config RECIPE` prints one with every setting.
"""

import argparse
import re


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", default="*", help="glob, such as 'detect/*'; quote it")


def run(args: argparse.Namespace) -> None:
    """List."""
    import fnmatch

    from ..configs import list_recipes
    from ..tasks import TaskError, nearest
    from .pattern import as_glob
    from .tables import print_table

    names = fnmatch.filter(list_recipes(), as_glob(args.pattern))
    if not names:
        raise TaskError(f"no recipe matches {args.pattern!r}{nearest(args.pattern.strip('*'), list_recipes())}")
    print_table([("recipe", "model", "data", "run on", "result"), *((name, *_facts(name)) for name in names)])


def _facts(name: str) -> tuple[str, str, str, str]:
    """Return model, data, what a recipe was run on, and its result."""
    from ..configs import read_recipe
    from ..configs.published import published_recipes
    from ..tasks.engine.config import load_config

    text = " ".join(read_recipe(name).split('"""')[1].split())
    expect, cost = re.search(r"Expect: (.*) Cost: (.*)", text).groups()
    ran = "by us" not in cost
    if ran:
        # The rest of the sentence tells more than a table holds.
        expect, cost = (re.split(r"[;(]|\.(?: |$)", sentence)[0].strip() for sentence in (expect, cost))
    result = re.sub(r"; not run by us\.$|\. .*$|\.$", "", expect)
    if row := published_recipes().get(name):
        model, data = f"{row['head']} {row['backbone']}", row["data"]
    elif name.endswith("_imagenet"):
        model, _, data = name.partition("/")[2].rpartition("_")
    else:
        config = load_config(name)
        names = config["model"]
        model = names["name"] if config["task"] == "classify" else f"{names['head']} {names['backbone']}"
        data = config["data"]["name"]
    return model, data, cost if ran else "-", result
