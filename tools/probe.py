"""Measure what frozen models know: k-NN, a linear probe and attentive probing on their features, side by side.

FOLDER holds train/CLASS/*.jpg and val/CLASS/*.jpg, or train.csv and val.csv with the columns path and label; `digits`
are the bundled ones. Features are computed once, without augmentation, and kept on the disk: a second call, of other
probes or other seeds, starts from there, and an interrupted one goes on. They are computed anew when the model, its
weights, the size or a file changes. With --published nothing is kept for the probes: they are trained as Efficient
Probing's authors do (random crops and flips, LARS, 90 epochs, batches of 4096), a forward pass of all images an epoch.

Accuracy is that of val/ after the last epoch, not of the best one; over several seeds, mean and standard deviation.
k-NN has none: the same features have the same neighbors.
"""

import argparse
from pathlib import Path

from .arguments import at_least

PROBES = ("knn", "linear", "attentive")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="labelled images, as above, or `digits`")
    parser.add_argument(
        "--models", required=True, metavar="A,B", help="timm names, ours or theirs, or classifiers' files, with commas"
    )
    parser.add_argument("--untrained", action="store_true", help="of names: random weights, as a baseline")
    parser.add_argument("--probes", default=",".join(PROBES), metavar="P,Q", help="%(default)s by default")
    parser.add_argument("--size", type=at_least(1), help="side of the input, in pixels; each model's own by default")
    parser.add_argument("--k", type=at_least(1), default=20, help="neighbors that vote; %(default)s by default")
    parser.add_argument("--temperature", type=float, default=0.07, help="of the votes; %(default)s by default")
    parser.add_argument(
        "--queries", type=at_least(1), help="of the attentive probe; by default the most up to 32 that fit"
    )
    parser.add_argument(
        "--d-out", type=at_least(1), default=1, help="by which its values are narrower; %(default)s by default"
    )
    parser.add_argument("--all-tokens", action="store_true", help="attend to class tokens and registers too")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="trainings of each probe; %(default)s by default")
    parser.add_argument("--epochs", type=at_least(1), help="of the probes; 100 by default, 90 with --published")
    parser.add_argument("--lr", type=float, help="learning rate; 0.003 by default, with --published 0.1 for 256 images")
    parser.add_argument("--batch", type=at_least(1), help="images of a step; 256 by default, 4096 with --published")
    parser.add_argument("--published", action="store_true", help="train as Efficient Probing's authors do, see above")
    parser.add_argument(
        "--batch-size", type=at_least(1), default=32, help="images in the model at once; %(default)s by default"
    )
    parser.add_argument(
        "--workers", type=at_least(1), default=4, help="threads that read images; %(default)s by default"
    )
    parser.add_argument("--cache", type=Path, help="folder of the features; OUTPUT/features by default")
    parser.add_argument("--output", type=Path, default=Path("runs/probe"), help="folder; %(default)s by default")
    parser.add_argument(
        "--device", default="auto", help="auto (CUDA if there is one), cpu, cuda:1, ...; %(default)s by default"
    )


def run(args: argparse.Namespace) -> None:
    """Probe every model, and print and write the table."""
    from ..tasks import TaskError, nearest
    from ..tasks.devices import choose_device
    from ..tasks.predictors import is_file
    from ..zoo.backbone import check_name
    from .pattern import names_in
    from .tables import as_markdown, save_table
    from .timing import machine

    models, probes = names_in(args.models), names_in(args.probes)
    if not models or not probes:
        raise TaskError("--models and --probes name at least one each, with commas between them")
    for name in probes:
        if name not in PROBES:
            raise TaskError(f"unknown probe {name!r}{nearest(name, PROBES)}")
    if args.lr is not None and not args.lr >= 0:
        raise TaskError(f"--lr is {args.lr}, but must be 0 or more")
    if not args.temperature > 0:
        raise TaskError(f"--temperature is {args.temperature}, but must be greater than 0")
    device = choose_device(args.device)
    for name in models:
        if not is_file(name):
            check_name(name)

    rows, title = [], _title(args, machine(str(device)))
    for name in models:
        rows.append(_probe(name, probes, args, device, tell=not rows))
        save_table(rows, args.output, "probe", title)  # a later model may fail
    print(f"\n{title}\n\n{as_markdown(rows)}\n\nwritten to {args.output}")


def _title(args: argparse.Namespace, where: str) -> str:
    recipe = "Efficient Probing's recipe, with augmentation" if args.published else "features without augmentation"
    return (
        f"{args.folder}: accuracy in % on val after the last epoch; {args.k} neighbors, temperature "
        f"{args.temperature:g}; linear and attentive probes on {recipe}, mean and standard deviation over "
        f"seeds, of which there are {args.seeds}; {where}"
    )


def _probe(name: str, probes: list[str], args: argparse.Namespace, device, tell: bool) -> dict:
    import statistics
    import time

    import torch

    from ..tasks.features import open_encoder
    from ..tasks.probes import EfficientProbe, LinearProbe, accuracy, knn_votes, train_probes

    torch.manual_seed(0)  # of random weights
    encoder, rule, white = open_encoder(name, args.size, args.untrained, args.all_tokens)
    parts = _open(args.folder, rule, white, tell)
    attends = "attentive" in probes
    features = [
        _features(encoder, part, split, rule, attends and not (args.published and split == "train"), args, device)
        for split, part in zip(("train", "val"), parts, strict=True)
    ]
    labels = [part.labels for part in features]
    classes = len(parts[0].classes)
    pooled = [torch.from_numpy(part.pooled.copy()) for part in features]
    dim = pooled[0].shape[1]
    row = {"model": name, "dim": dim}
    if "knn" in probes:
        k = min(args.k, len(pooled[0]))
        if k < args.k:
            print(f"{name}: {k} neighbors instead of {args.k}, which is all there are")
        row["k-NN"] = (
            f"{100 * accuracy(knn_votes(pooled[0], labels[0], pooled[1], k, args.temperature, classes), labels[1]):.1f}"
        )
    trained = [probe for probe in probes if probe != "knn"]
    if not trained:
        return row
    if attends:
        tokens, channels = features[1].tokens.shape[1:]
        fitting = [count for count in range(1, 33) if channels % (count * args.d_out) == 0]
        queries = args.queries or max(fitting, default=32)
        row |= {"tokens": f"{tokens} x {channels}", "queries": queries}
    make = {
        "linear": lambda: LinearProbe(dim, classes),
        "attentive": lambda: EfficientProbe(channels, classes, queries, args.d_out),
    }
    accuracies = {probe: [] for probe in trained}
    began = time.monotonic()
    for seed in range(args.seeds):
        heads = {}
        for probe in trained:
            torch.manual_seed(seed)  # each alike, whatever others there are
            heads[probe] = make[probe]().to(device)
        recipe, batches, steps = _training(encoder, parts[0], features[0], seed, rule, args, device)
        train_probes(heads, batches, steps, recipe)
        for probe, head in heads.items():
            scores = _scores(head, features[1].pooled if probe == "linear" else features[1].tokens, device)
            accuracies[probe].append(100 * accuracy(scores, labels[1]))
        shown = ", ".join(f"{probe} {values[-1]:.1f}" for probe, values in accuracies.items())
        print(f"{name}: seed {seed}: {shown}", flush=True)
    for probe, values in accuracies.items():
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        row[probe] = f"{statistics.mean(values):.1f}{spread}"
    row["seconds to train"] = round(time.monotonic() - began)
    return row


def _open(folder: str, rule, white: int | None, tell: bool):
    """Return the training and the held-out images, neither augmented."""
    from ..tasks import TaskError
    from ..tasks.classify import Classify
    from ..tasks.data.classification import Digits
    from ..tasks.data.formats import open_classes
    from ..tasks.data.images import to_pixels
    from ..tasks.data.occurrence import check_classes

    root, transform = Path(folder).expanduser(), rule.transform()
    if folder == "digits" and not root.exists():
        parts = [Digits(split, lambda image: transform(to_pixels(image, rule.channels))) for split in ("train", "val")]
    else:
        form = "csv" if (root / "train.csv").is_file() and not (root / "train").is_dir() else "folder"
        parts = open_classes({**Classify.DEFAULTS["data"], "name": form, "root": folder, "white": white}, rule)
        parts[0].transform = transform
    classes = list(parts[0].classes)
    if len(classes) < 2:
        raise TaskError(f"{folder}: has one class, {classes[0]!r}; probes tell at least two apart")
    for name, part in zip(("training", "validation"), parts, strict=True):
        for line in check_classes(name, ([target] for target in part.targets), classes, folder, "image"):
            if tell:
                print(line)
    return parts


def _features(encoder, part, split: str, rule, with_tokens: bool, args: argparse.Namespace, device):
    """Return the features of the training or the held-out images."""
    import dataclasses
    import sys

    from tqdm import tqdm

    from ..tasks.features import digest_files, digest_weights, keep_features

    files = part.inventory()
    facts = {
        "model": encoder.name,
        "weights": digest_weights(encoder.model),
        "input": dataclasses.asdict(rule),
        "tokens": "all" if args.all_tokens else "patches",
        "white": part.white,
        "files": digest_files(files) if files else f"{args.folder}, {split}",
    }
    folder = args.cache or args.output / "features"
    with tqdm(total=len(part), unit="image", desc=f"{encoder.name}, {split}", disable=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int) -> None:
            bar.update(done - bar.n)

        return keep_features(encoder, part, facts, folder, device, with_tokens, args.batch_size, args.workers, show)


def _training(encoder, images, features, seed: int, rule, args: argparse.Namespace, device):
    """Return the recipe, a function from an epoch to its batches, and their number."""
    import copy

    import torch

    from ..tasks.features import read_batches
    from ..tasks.probes import published_recipe, quick_recipe

    given = {key: value for key, value in (("epochs", args.epochs), ("batch", args.batch)) if value is not None}
    if args.lr is not None:
        given["base" if args.published else "lr"] = args.lr
    recipe = (published_recipe if args.published else quick_recipe)(**given)
    count, generator = len(features.labels), torch.Generator().manual_seed(seed)
    size = min(recipe.batch, count)
    # A rest that is too small to normalise over is left out.
    steps = max(1, count // size)

    def stored(epoch: int):
        order = torch.randperm(count, generator=generator)
        for indices in order[: steps * size].split(size):
            indices = indices.sort().values
            inputs = {"linear": features.pooled, "attentive": features.tokens}
            yield (
                {
                    name: torch.from_numpy(part[indices.numpy()]).to(device)
                    for name, part in inputs.items()
                    if part is not None
                },
                features.labels[indices].to(device),
            )

    def augmented(epoch: int):
        order = torch.randperm(count, generator=generator)[: steps * size].tolist()
        random = copy.copy(images)
        random.transform = _published_transform(images, rule)
        done, parts = 0, []
        for batch in read_batches(random, order, min(args.batch_size, size), args.workers):
            encoded = encoder(torch.stack([image for image, _ in batch]).to(device))
            parts.append((*encoded, torch.tensor([label for _, label in batch], device=device)))
            done += len(batch)
            if done >= size:
                linear, tokens, labels = (torch.cat(part) for part in zip(*parts, strict=True))
                yield {"linear": linear[:size], "attentive": tokens[:size]}, labels[:size]
                parts, done = [tuple(part[size:] for part in (linear, tokens, labels))], done - size

    return recipe, augmented if args.published else stored, steps


def _published_transform(images, rule):
    """Return MAE's augmentation of linear probes: a random crop of 8 to 100 % of the image, and a flip."""
    from ..tasks.data.images import to_pixels

    transform = rule.transform({"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5, "color_jitter": None})
    return lambda image: transform(to_pixels(image, rule.channels))


def _scores(head, features, device):
    import torch

    with torch.inference_mode():
        parts = [torch.from_numpy(features[i : i + 256].copy()) for i in range(0, len(features), 256)]
        return torch.cat([head(part.to(device)).cpu() for part in parts])
