"""List the families of models, and of those that PATTERN names parameters, input size, published weights, accuracy.

Accuracy is what their authors state. Code is what the model's outputs were compared with: "compared" with those of its
authors' code, "as NAME" if that one was, of the same code; "after the paper" and "ours" if with none. File is whether
the weights were opened by us, and "measured" if their accuracy was. Weights are the tag that pretrained=True loads; "by
hand" and a page where there is a file that it doesn't, such as one whose license nobody states, or that only people can
fetch; "dead" where the links were reported dead; else "none".

With --detectors or --segmenters: the published detectors or segmenters, with the authors' numbers, the license, whether
the file was opened by us, and the state of their weights: shipped (in this package), listed (a direct link), derived (a
direct link made from a page), browser (a page for people only), dead, or none; of what is shipped the numbers are ours,
measured of the file.
"""

import argparse
import re
import sys
from collections.abc import Iterable

from .pattern import as_glob
from .tables import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", help="glob, such as 'nat_*' or '*'; quote it")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--timm", action="store_true", help="list timm's own models too, by name only")
    kind.add_argument("--detectors", action="store_true", help="list the published detectors")
    kind.add_argument("--segmenters", action="store_true", help="list the published segmenters")
    kind.add_argument("--markdown", action="store_true", help="print a table in markdown")


def run(args: argparse.Namespace) -> None:
    """List."""
    import timm

    from .. import list_models
    from ..tasks import TaskError, nearest
    from ..zoo.states import code_word

    if args.pattern is None and not (args.timm or args.detectors or args.segmenters or args.markdown):
        _print_families(list_models())
        return
    pattern = as_glob(args.pattern or "*")
    if args.detectors or args.segmenters:
        _print_published("detect" if args.detectors else "segment", pattern)
        return
    names = list_models(pattern)
    timm_names = sorted(set(timm.list_models(pattern)) - set(names)) if args.timm else []
    if not names and not timm_names:
        where = "foveate or timm" if args.timm else "foveate; --timm searches timm too"
        raise TaskError(f"no model matches {args.pattern!r} in {where}{nearest(pattern.strip('*'), list_models())}")
    if args.markdown:
        print(markdown(names))
        return
    if names:
        width, words = max(map(len, names)), max(len(code_word(name)) for name in names)
        print(f"{'model':<{width}}  params (M)  input  top-1  {'code':<{words}}  {'file':<10}  weights")
    for name, parameters, size, top1, code, file, tag in facts(names):
        print(
            f"{name:<{width}}  {parameters:>10}  {size:>5}  {top1:>5}  {code:<{words}}  {file:<10}  {tag}", flush=True
        )
    for name in timm_names:
        print(name)


def _print_families(names: Iterable[str]) -> None:
    """Print a line for each file of the zoo: how its models' names begin, how many there are, what they are."""
    from timm.models import model_entrypoint

    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(model_entrypoint(name).__module__, []).append(name)
    rows = [("models", "", "what they are")]
    for module, models in families.items():
        starts = sorted({_start(model) for model in models})
        rows.append((" ".join(starts), str(len(models)), sys.modules[module].__doc__.splitlines()[0].rstrip(".")))
    print_table(rows)
    print(f"\n{sum(map(len, families.values()))} models; their numbers: foveate list 'nat_*', or '*' for all")


def _start(model: str) -> str:
    words = model.split("_")
    # `foveate_` alone would be two families.
    return "_".join([*words[: 2 if words[0] == "foveate" else 1], "*"])


def _print_published(task: str, pattern: str) -> None:
    """Print the published models of a task whose name matches a glob."""
    import fnmatch

    from ..configs.published import read_published
    from ..tasks import TaskError, nearest
    from ..zoo.states import file_word
    from ..zoo.weights import table

    rows = read_published(task)
    matches = [row for row in rows if fnmatch.fnmatchcase(row["name"], pattern)]
    if not matches:
        raise TaskError(
            f"no published model matches {pattern!r}{nearest(pattern.strip('*'), [r['name'] for r in rows])}"
        )
    columns = ("name", "head", "backbone", "data", "schedule", "metrics", "license", "file", "state", "source")
    titles = dict(zip(columns, columns, strict=True)) | {"metrics": "authors' metrics", "state": "weights"}
    for row in matches:
        row["file"] = file_word(table()[row["name"]]) if row["name"] in table() else "-"
    print_table([[row[column] for column in columns] for row in (titles, *matches)])


def facts(names: Iterable[str]) -> Iterable[tuple[str, ...]]:
    """Yield name, millions of parameters, input size, the authors' top-1, states and the weights of each model."""
    import timm
    from timm.models import get_pretrained_cfg

    from ..zoo.states import code_word, file_word
    from ..zoo.variants import WithoutInit
    from ..zoo.weights import table

    for name in names:
        with WithoutInit():
            model = timm.create_model(name, device="meta")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        cfg = get_pretrained_cfg(name)
        stated = re.search(r"top-1 ([\d.]+)", " ".join(cfg.notes or ()))
        weights = cfg.tag if cfg.has_weights else _published_elsewhere(name)
        files = [entry for entry in table().values() if entry.model == name and entry.task == "classify"]
        file = file_word(table().get(f"{name}.{cfg.tag}", files[0])) if files else "-"
        top1 = stated[1] if stated else "-"
        yield name, f"{parameters / 1e6:.2f}", str(cfg.input_size[-1]), top1, code_word(name), file, weights


def _published_elsewhere(name: str) -> str:
    """Return the state of a classifier's files that timm isn't told of: ``by hand: PAGE``, ``dead`` or ``none``."""
    from ..zoo.weights import table

    entries = [entry for entry in table().values() if entry.model == name and entry.task == "classify"]
    page = next((entry.page for entry in entries if entry.state != "dead"), None)
    return f"by hand: {page}" if page else "dead" if entries else "none"


def markdown(names: Iterable[str]) -> str:
    """Return the facts as a table in markdown."""
    lines = ["| model | params (M) | input | top-1 | code | file | weights |"]
    lines.append("| --- | ---: | ---: | ---: | --- | --- | --- |")
    for row in facts(names):
        line = re.sub(r"by hand: (\S+)", r"by hand: [page](\1)", " | ".join(row))
        lines.append(f"| {line} |")
    return "\n".join(lines)
