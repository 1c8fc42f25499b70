"""Look at the data of a recipe as the model sees it: images after augmentation, with classes, boxes, masks or labels.

Draws a sheet of images and prints how many there are. Classification is drawn with mixup and cutmix where the recipe
has them. The model is not built, and nothing is trained.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="recipe, such as classify/nat_atto_digits, or a Python file")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="such as data.root=FOLDER")
    parser.add_argument("--output", type=Path, help="PNG to write; runs/browse/RECIPE.png by default")
    parser.add_argument("--count", type=int, default=12, help="images; %(default)s by default")
    parser.add_argument(
        "--split", choices=("train", "val"), default="train", help="training or held-out data; %(default)s by default"
    )
    parser.add_argument(
        "--same", type=int, metavar="INDEX", help="draw one image, counted from 0, again and again: all that it becomes"
    )
    parser.add_argument("--seed", type=int, default=0, help="of choice and augmentation; %(default)s by default")


def run(args: argparse.Namespace) -> None:
    """Draw."""
    import random

    import numpy as np
    import torch

    from ..tasks import TaskError, one_line
    from ..tasks.engine.config import load_config, task_class_of

    if not 1 <= args.count <= 100:
        raise TaskError(f"--count is {args.count}, but must be from 1 to 100")
    config = load_config(args.config, args.overrides)
    task = task_class_of(config["task"])(config)
    train = args.split == "train"
    data = task.train_set if train else task.val_set
    if args.same is not None and not 0 <= args.same < len(data):
        raise TaskError(f"--same is {args.same}, but the images are counted from 0 to {len(data) - 1}")
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    drawn = torch.randperm(len(data))[: args.count].tolist()
    indices = drawn if args.same is None else [args.same] * args.count
    output = args.output or Path("runs/browse") / f"{Path(args.config).stem}.png"
    which = f"image {args.same}" if args.same is not None else f"{len(indices)} of {len(data)} images"
    title = f"{which} to train on, as the model sees them" if train else f"{which} held out, as the model sees them"
    task.draw_inputs([data[index] for index in indices], output, title, train)
    classes = ", ".join(one_line(str(name)) for name in task.classes[:10]) + (", ..." if len(task.classes) > 10 else "")
    print(f"{len(task.train_set)} images to train on, {len(task.val_set)} held out")
    print(f"{len(task.classes)} class{'es' if len(task.classes) != 1 else ''}: {classes}")
    print(f"picture: {output}")
