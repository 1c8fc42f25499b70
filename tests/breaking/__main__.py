"""Breaks foveate on purpose, with a seed and for so many seconds, and prints what was tried and what came of it.

    python tests/breaking [PART ...] [--seed 0] [--seconds 60]

Parts: operators (random calls, every backend against the reference), files (strange checkpoints), runs (strange run
folders), kills (runs killed at random moments, and continued), hosts (bad hosts and full disks). Each has its seconds.
The exit code is 1 if anything was lost, ran, crashed, hung, differed, or was answered by more than one line.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

from trial import Trial

PARTS = ("operators", "files", "runs", "kills", "hosts")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each part; %(default)s by default")
    parser.add_argument("--most", type=int, default=10**9, help="tries of each part")
    args = parser.parse_args()
    if strange := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(strange)}; there are {', '.join(PARTS)}")
    trials = []
    for part in args.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix=f"breaking-{part}-") as folder:
            trial = Trial(part, args.seed, args.seconds, args.most, Path(folder))
            importlib.import_module(part).run(trial)
        trials.append(trial)
    print("| part | tried | times | wrong |\n|---|---|---|---|")
    for trial in trials:
        print(trial.table(), end="")
    return any(trial.faults for trial in trials)


if __name__ == "__main__":
    sys.exit(main())
