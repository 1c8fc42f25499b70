"""List the models: parameters, input size, published weights, and the accuracy that their authors state."""

import argparse
import re
from collections.abc import Iterable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", default="*", help="glob, such as 'nat_*'; quote it")
    parser.add_argument("--timm", action="store_true", help="list timm's own models too, by name only")
    parser.add_argument("--markdown", action="store_true", help="print the table of README")


def run(args: argparse.Namespace) -> None:
    """List."""
    import timm

    from .. import list_models
    from ..tasks import TaskError, nearest

    # A bare word means every name that holds it.
    pattern = args.pattern if any(sign in args.pattern for sign in "*?[") else f"*{args.pattern}*"
    ours = list_models(pattern)
    theirs = sorted(set(timm.list_models(pattern)) - set(ours)) if args.timm else []
    if not ours and not theirs:
        where = "foveate or timm" if args.timm else "foveate; --timm searches timm too"
        raise TaskError(
            f"no model matches {args.pattern!r} in {where}{nearest(args.pattern.strip('*'), list_models())}"
        )
    if args.markdown:
        print(markdown(ours))
        return
    if ours:
        width = max(map(len, ours))
        print(f"{'model':<{width}}  params (M)  input  top-1  weights")
    for name, parameters, size, top1, tag in facts(ours):
        print(f"{name:<{width}}  {parameters:>10}  {size:>5}  {top1:>5}  {tag}", flush=True)
    for name in theirs:
        print(name)


def facts(names: Iterable[str]) -> Iterable[tuple[str, str, str, str, str]]:
    """Yield name, millions of parameters, input size, the authors' top-1 and the default tag of each model."""
    import timm
    from timm.models import get_pretrained_cfg

    from ..zoo.variants import WithoutInit

    for name in names:
        with WithoutInit():
            model = timm.create_model(name, device="meta")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        cfg = get_pretrained_cfg(name)
        stated = re.search(r"top-1 ([\d.]+)", " ".join(cfg.notes or ()))
        tag = cfg.tag if cfg.has_weights else "none"
        yield name, f"{parameters / 1e6:.2f}", str(cfg.input_size[-1]), stated[1] if stated else "-", tag


def markdown(names: Iterable[str]) -> str:
    """Return the facts as the table that README shows."""
    lines = ["| model | params (M) | input | top-1 | weights |", "| --- | ---: | ---: | ---: | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in facts(names)]
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    from foveate.tools.cli import main

    sys.exit(main(["list", *sys.argv[1:]]))
