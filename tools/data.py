"""Check a data set before it is trained on, or convert one.

`check` names the format of a folder, counts the images, objects and classes of each split, draws twelve samples and
lists faults; the exit code is then 2. `convert` writes a set of images with objects as COCO's or YOLO's, and names
first what the new format can't hold.
"""

import argparse
from pathlib import Path

ACTIONS = {
    "check": "name the format of a folder, count, draw twelve samples, list faults",
    "convert": "write a set of images with objects as COCO's or YOLO's",
}
SHOWN = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(ACTIONS))
    check, convert = (actions.add_parser(name, help=what, description=what) for name, what in ACTIONS.items())
    for action in (check, convert):
        action.add_argument("root", metavar="PATH", type=Path, help="folder of the data set")
    check.add_argument("--output", type=Path, default=Path("runs/data"), help="folder; %(default)s by default")
    convert.add_argument("output", metavar="OUT", type=Path, help="folder to write")
    convert.add_argument("--to", choices=("coco", "yolo"), required=True, help="format to write")
    convert.add_argument("--link", action="store_true", help="link to the images rather than copy them")
    convert.add_argument(
        "--drop", action="store_true", help="leave out images and objects that are broken, rather than refuse them"
    )


def run(args: argparse.Namespace) -> int | None:
    """Do what was asked for."""
    return {"check": _check, "convert": _convert}[args.action](args)


def _check(args: argparse.Namespace) -> int:
    from ..tasks import one_line
    from ..tasks.survey import survey

    folder = survey(args.root)
    print(f"{args.root}: {folder.kind} in the format {folder.format}, {len(folder.classes)} classes")
    if folder.note:
        print(folder.note)
    for part in folder.parts:
        print(f"{part.split}: {part.images} images, {sum(part.counts)} {folder.counted}")
        for name, count in zip(folder.classes, part.counts, strict=True):
            print(f"  {count:>8} {one_line(name)}")
    if len(folder.parts) == 1:
        print("no held-out images: data.name=auto holds out a share of these (data.holdout)")
    faults = [fault for part in folder.parts for fault in part.faults]
    damaged = [reason for part in folder.parts for reason in part.damaged]
    path = args.output / "samples.png"
    drawn = folder.draw(path, SHOWN)
    if drawn:
        print(f"{drawn} samples: {path}")
    for fault in faults + damaged:
        print(f"fault: {one_line(fault)}")
    # What is annotated wrongly is left out before training, what can't be decoded while it is read.
    settings = ["data.broken=drop"] * bool(faults) + ["damaged_images=skip"] * bool(damaged)
    print(f"correct them, or leave them out with {' '.join(settings)}" if settings else "no faults")
    return 2 if settings else 0


def _convert(args: argparse.Namespace) -> None:
    from ..tasks.data.convert import convert, count_lost
    from ..tasks.survey import read_objects

    name, splits, classes = read_objects(args.root, "drop" if args.drop else "refuse")
    for line in count_lost(splits, args.to):
        print(f"{args.to} can't hold: {line}")
    convert(splits, classes, args.output, args.to, args.link)
    counts = ", ".join(f"{len(records)} images of {split}" for split, records in splits.items())
    print(f"{name} to {args.to}: {counts}, {len(classes)} classes: {args.output}")
