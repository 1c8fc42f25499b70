"""Download published weights."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+")
    parser.add_argument(
        "--renew", action="store_true", help="fetch again, and take what comes for right even if it has changed"
    )


def run(args: argparse.Namespace) -> int:
    from ...tasks import one_line
    from ...zoo import weights

    failed = False
    for name in args.files:
        try:
            address = name.startswith(("http://", "https://"))
            path = weights.fetch(weights.entry_of(name) if address else weights.find(name), renew=args.renew)
        except weights.WeightsError as error:
            print(f"foveate: error: {one_line(str(error))}", file=sys.stderr)
            failed = True
            continue
        print(f"{path}  {path.stat().st_size} bytes  sha256 {weights.sha256_of(path)}")
    return 2 if failed else 0
