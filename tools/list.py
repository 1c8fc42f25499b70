"""List the models: parameters, input size, published weights, and the accuracy that their paper states."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", default="*", help="glob, such as 'nat_*'; quote it")
    parser.add_argument("--timm", action="store_true", help="list timm's own models too, by name only")


def run(args: argparse.Namespace) -> None:
    """List."""
    import timm
    import torch
    from timm.models import get_pretrained_cfg
    from torch.overrides import TorchFunctionMode

    from .. import list_models
    from ..tasks import TaskError, nearest

    methods = ("add_", "clamp_", "erfinv_", "fill_", "mul_", "normal_", "uniform_", "zero_")
    draws = {getattr(torch.Tensor, method) for method in methods}

    class WithoutInit(TorchFunctionMode):
        """Initialising weights that have no storage does nothing, slowly."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in draws and args[0].is_meta:
                return args[0]
            return func(*args, **(kwargs or {}))

    # A bare word means every name that holds it.
    pattern = args.pattern if any(sign in args.pattern for sign in "*?[") else f"*{args.pattern}*"
    ours = list_models(pattern)
    theirs = sorted(set(timm.list_models(pattern)) - set(ours)) if args.timm else []
    if not ours and not theirs:
        where = "foveate or timm" if args.timm else "foveate; --timm searches timm too"
        raise TaskError(
            f"no model matches {args.pattern!r} in {where}{nearest(args.pattern.strip('*'), list_models())}"
        )
    if ours:
        width = max(map(len, ours))
        print(f"{'model':<{width}}  params (M)  input  weights               paper")
    for name in ours:
        with WithoutInit():
            model = timm.create_model(name, device="meta")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        cfg = get_pretrained_cfg(name)
        tag = cfg.tag if cfg.has_weights else "none"
        note = "; ".join(note.removesuffix(" (paper)") for note in cfg.notes or ())
        print(
            f"{name:<{width}}  {parameters / 1e6:>10.2f}  {cfg.input_size[-1]:>5}  {tag:<20}  {note}".rstrip(),
            flush=True,
        )
    for name in theirs:
        print(name)


if __name__ == "__main__":
    import sys

    from foveate.tools.cli import main

    sys.exit(main(["list", *sys.argv[1:]]))
