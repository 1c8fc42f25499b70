"""Run a Python script with foveate's models registered with timm: timm's own train.py, validate.py and the like.

timm's scripts aren't installed with it; take them from its repository, in the release of the installed timm:
git clone --depth 1 --branch vVERSION https://github.com/huggingface/pytorch-image-models
Everything after SCRIPT is the script's own. On several GPUs:
torchrun --nproc-per-node 8 -m foveate run pytorch-image-models/train.py --model nat_tiny ...
"""

import argparse
import runpy
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("script", metavar="SCRIPT", type=Path, help="such as pytorch-image-models/validate.py")
    parser.add_argument(
        "arguments", metavar="...", nargs=argparse.REMAINDER, help="of the script, such as --model nat_tiny --help"
    )


def run(args: argparse.Namespace) -> int:
    """Run the script as if it were started alone; return its exit code."""
    import timm

    from ..tasks import TaskError

    if not args.script.is_file():
        raise TaskError(
            f"{args.script}: no such script; timm's are in its repository: git clone --depth 1 --branch "
            f"v{timm.__version__} https://github.com/huggingface/pytorch-image-models"
        )
    before = sys.argv, sys.path
    # Python does the same; timm is imported already, so that a checkout beside the script does not hide it.
    sys.argv = [str(args.script), *args.arguments]
    sys.path = [str(args.script.resolve().parent), *sys.path]
    try:
        runpy.run_path(str(args.script), run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    finally:
        sys.argv, sys.path = before
    return 0
