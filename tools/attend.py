"""See what a model's attention uses, on an image; measure its heads; judge explanations.

IMAGE draws on the photo, for places --at X,Y in its pixels, what each stage uses: windows, neighborhoods, routed
regions, sampled points, agents, levels of a tree; gates and channels where there are no others; or one map by --method
rollout, relevance or cam, of what the classifier reads. With --at, rollout and relevance begin at those places of the
last map instead, and cam marks them. Beside the picture are the numbers as arrays (npz) and in words (JSON). --animate
moves the query from one place to the next (GIF).

Of detectors and segmenters it is what the backbone used for a --box or --segment of theirs, the mean of all queries
within; the best object or largest segment by default. Panoptic segments have the numbers that `foveate predict` gives
them, objects are numbered as it lists them, and segments of labelled pixels from the largest on.

--table measures every head on IMAGEs, or on bundled digits: how far it looks, how evenly, what is lost without it.

--evaluate measures every method side by side, a random map and a centred Gaussian among them: insertion (greater is
better) and deletion (less is), pixel AP and the pointing game where there are masks, MaxBoxAccV2 where there are boxes;
and how like its maps are to those of the same model with a random classifier, or random weights throughout: near 1, a
method doesn't show what the model has learned.

Without FOLDER two small classifiers are trained for each model, in a minute or two each: of the bundled digits, and of
patches with a nucleus or of background alone, which have masks. They are kept in OUTPUT and not trained again.

FOLDER has images/, and masks/ with PNGs of the same names in which 0 is background, or annotations.json in COCO's
format. The classifier is that of --checkpoint, or a timm name with weights. Images without objects are left out.
"""

import argparse
from pathlib import Path

from .arguments import at_least
from .pattern import names_in

HOST = "foveate_host_atto"
BUNDLED = "bundled"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="files, folders or quoted globs")
    parser.add_argument("--table", action="store_true", help="measure heads, as above")
    parser.add_argument("--evaluate", nargs="?", const=BUNDLED, metavar="FOLDER", help="measure explanations, as above")
    parser.add_argument("--model", metavar="A,B", help="timm names, with commas; nat_atto by default")
    parser.add_argument("--untrained", action="store_true", help="with IMAGE or --table: random weights")
    parser.add_argument(
        "--at",
        nargs="+",
        metavar="X,Y",
        help="queries, in pixels of the image, upright; its centre by default. Rollout and relevance begin there",
    )
    parser.add_argument(
        "--box", nargs="+", metavar="N|X,Y", help="objects of a detector, the best is 1, or by a place within"
    )
    parser.add_argument(
        "--segment",
        nargs="+",
        metavar="N|X,Y",
        help="segments or objects' masks, numbered from 1, or by a place within",
    )
    parser.add_argument("--layers", nargs="+", metavar="GLOB", help="attentions; the last of each stage by default")
    parser.add_argument("--method", default="query", help="query, rollout, relevance or cam; %(default)s by default")
    parser.add_argument("--class", dest="target", type=int, metavar="C", help="explained; the likeliest by default")
    parser.add_argument("--heads", action="store_true", help="each head of one layer, instead of their mean")
    parser.add_argument("--animate", type=int, metavar="N", help="write a GIF of N pictures along the places of --at")
    parser.add_argument("--attention", metavar="A,B", help=f"instead of a model, {HOST} with each of these attentions")
    parser.add_argument("--checkpoint", metavar="FILE", help="a classifier of `foveate train`")
    parser.add_argument("--methods", metavar="A,B", help="all by default")
    parser.add_argument(
        "--images",
        dest="most",
        type=at_least(1),
        default=128,
        help="at most so many are measured; %(default)s by default",
    )
    parser.add_argument(
        "--epochs", type=at_least(1), help="of the bundled classifiers; 20 (digits) and 12 (nuclei) by default"
    )
    parser.add_argument("--seed", type=int, default=0, help="of their training; %(default)s by default")
    parser.add_argument("--batch-size", type=at_least(1), default=32, help="images at once; %(default)s by default")
    parser.add_argument("--output", type=Path, default=Path("runs/attend"), help="folder; %(default)s by default")
    parser.add_argument(
        "--device", default="auto", help="auto (CUDA if there is one), cpu, cuda:1, ...; %(default)s by default"
    )


def run(args: argparse.Namespace) -> None:
    """Draw, measure heads, or evaluate."""
    from ..tasks import TaskError
    from .attend_image import draw

    if args.evaluate is not None:
        if args.images or args.table:
            raise TaskError("--evaluate goes with neither an IMAGE nor --table")
        _evaluate(args)
    elif args.table:
        _measure_heads(args)
    elif args.images:
        draw(args)
    else:
        raise TaskError("say what to do: an IMAGE to draw on, --table or --evaluate")


def _classifier(args: argparse.Namespace):
    """Return the predictor of the one classifier that is named."""
    from ..tasks import TaskError
    from .attend_image import load_any

    predictor = load_any(args)
    if predictor.card["task"] != "classify":
        raise TaskError(
            f"{args.checkpoint or args.model}: is a model to {predictor.card['task']}; the table is of classifiers"
        )
    return predictor


def _measure_heads(args: argparse.Namespace) -> None:
    """Print and write a table of every head."""
    import torch

    from ..tasks.data.classification import Digits
    from ..tasks.data.images import find_images, read_image, to_pixels
    from ..tasks.seeing.heads import describe_heads
    from .tables import as_markdown, save_table

    predictor = _classifier(args)
    transform, labels = predictor.rule.transform(), None
    if args.images:
        paths = find_images(args.images)[: args.most]
        images = [transform(read_image(path, predictor.channels, predictor.white)) for path in paths]
        what = f"{len(images)} images"
    else:
        digits = Digits("val", lambda image: transform(to_pixels(image, predictor.channels, predictor.white)))
        images, labels = zip(*(digits[index] for index in range(min(args.most, len(digits)))), strict=True)
        labels = torch.tensor(labels) if tuple(predictor.classes) == digits.classes else None
        what = f"{len(images)} held-out digits"
    x = torch.stack(images).to(predictor.device)
    facts = describe_heads(predictor.model, x, labels, args.layers, batch_size=args.batch_size)
    lost = "lost accuracy" if labels is not None else "lost probability"
    table = [
        {
            "layer": fact.layer,
            "kind": fact.kind,
            "head": fact.head,
            "distance (px)": f"{fact.distance:.1f}",
            "entropy (bits)": f"{fact.entropy:.2f}",
            "of": f"{fact.possible:.2f}",
            "outside": f"{fact.outside:.1%}",
            lost: "" if fact.importance is None else f"{fact.importance:+.4f}",
        }
        for fact in facts
    ]
    title = f"heads of {args.checkpoint or args.model} on {what}"
    save_table(table, args.output, "heads", title)
    print(f"\n{title}\n\n{as_markdown(table)}\n\nwritten to {args.output}/heads.md and .csv")


def _evaluate(args: argparse.Namespace) -> None:
    """Evaluate, and print and write the tables."""
    from ..blocks.create import list_attentions
    from ..tasks import TaskError, nearest
    from ..tasks.devices import choose_device
    from ..tasks.seeing.evaluate import METHODS
    from ..zoo.backbone import check_name

    names = names_in(args.methods) or list(METHODS)
    for name in names:
        if name not in METHODS:
            raise TaskError(f"unknown method {name!r}{nearest(name, METHODS)}")
    methods = {name: METHODS[name] for name in names}
    device = choose_device(args.device)
    if args.evaluate != BUNDLED:
        if args.attention or (args.checkpoint is None) == (args.model is None):
            raise TaskError("with a FOLDER, name one classifier: --checkpoint FILE, or --model NAME with weights")
        _report([_of_folder(source, methods, args, device) for source in names_in(args.checkpoint or args.model)], args)
        return
    if args.checkpoint or (args.model and args.attention):
        raise TaskError("the bundled classifiers are trained: name them by --model or by --attention")
    models = {name: (name, {}) for name in names_in(args.model) or ([] if args.attention else ["nat_atto"])}
    for name in models:
        check_name(name)
    for name in names_in(args.attention):
        if name not in list_attentions():
            raise TaskError(f"unknown attention {name!r}{nearest(name, list_attentions())}")
        models[f"{HOST}, {name}"] = (HOST, {"attention": name})
    for data in (_digits, _nuclei):
        _report([data(label, *model, methods, args, device) for label, model in models.items()], args)


def _report(reports: list[tuple[str, str, list[dict]]], args: argparse.Namespace) -> None:
    """Print and write one table: of what data, and for each model its rows."""
    from .tables import as_markdown, save_table

    data = reports[0][0]
    columns = dict.fromkeys(column for _, _, rows in reports for row in rows for column in row)
    # Notes last.
    columns = [column for column in columns if column != "note"] + ["note"] * ("note" in columns)
    table = [
        {"model": label} | {column: _shown(column, row.get(column, "")) for column in columns}
        for _, label, rows in reports
        for row in rows
    ]
    stem = f"evaluate_{data.partition(' ')[0].rstrip(':')}"
    save_table(table, args.output, stem, data)
    print(f"\n{data}\n\n{as_markdown(table)}\n\nwritten to {args.output}/{stem}.md and .csv")


def _shown(column: str, value: object) -> object:
    return value if not isinstance(value, float) else f"{value:.1f}" if column == "ms" else f"{value:.3f}"


def _digits(label: str, name: str, options: dict, methods: dict, args: argparse.Namespace, device):
    """Return what is measured on held-out digits."""
    import torch

    from ..tasks.data.classification import Digits
    from ..tasks.seeing.evaluate import evaluate

    predictor = _trained("digits", label, name, options, args, args.epochs or 20, [])
    images = Digits("val", predictor.rule.transform())
    x = torch.stack([images[index][0] for index in range(min(args.most, len(images)))]).to(device)
    rows = evaluate(predictor.model.to(device), x, methods=methods, batch_size=args.batch_size)
    return f"digits: {len(x)} held-out digits of {x.shape[-1]} pixels, by classifiers of the bundled ones", label, rows


def _nuclei(label: str, name: str, options: dict, methods: dict, args: argparse.Namespace, device):
    """Return what is measured on held-out patches with nuclei."""
    import numpy as np
    import torch
    from PIL import Image

    from ..tasks.checkpoints import write_whole
    from ..tasks.data.images import to_bytes, white_of_depth
    from ..tasks.data.samples import load_nuclei_patches
    from ..tasks.seeing.evaluate import evaluate

    folder = args.output / "nuclei_patches"
    for split in ("train", "val"):
        patches, masks, labels = load_nuclei_patches(split)
        pixels = [Image.fromarray(to_bytes(patch, white_of_depth(int(patches.max())))) for patch in patches]
        for index, (image, kind) in enumerate(zip(pixels, labels, strict=True)):
            file = folder / split / ("background", "nucleus")[kind] / f"{index:04d}.png"
            if not file.exists():
                write_whole(file, image.save)
    data = ["data.name=folder", f"data.root={folder}", "data.size=64", "data.num_classes=2", "data.mean=[0.15]"]
    data += ["data.std=[0.1]", "data.augment.affine.fill=0"]
    predictor = _trained("nuclei", label, name, options, args, args.epochs or 12, data)
    transform, geometry = predictor.rule.transform(), _geometry(predictor.rule)
    # Of patches with a nucleus, evenly over the half.
    shown = np.flatnonzero(labels)
    shown = shown[np.linspace(0, len(shown) - 1, min(args.most, len(shown))).astype(int)]
    x = torch.stack([transform(pixels[index]) for index in shown]).to(device)
    objects = torch.stack([geometry(Image.fromarray(masks[index]).convert("L"))[0] > 0.5 for index in shown])
    # Without its pixels a patch of background and one of a nucleus are the same: there is nothing to insert or delete.
    rows = evaluate(predictor.model.to(device), x, objects, None, methods, None, args.batch_size)
    data = (
        f"nuclei: {len(x)} held-out patches with nuclei, {x.shape[-1]} pixels, by classifiers of nucleus or background"
    )
    return data, label, rows


def _trained(data: str, label: str, name: str, options: dict, args: argparse.Namespace, epochs: int, more: list[str]):
    """Return the predictor of a classifier that is trained now, or was before by the same settings."""
    from ..tasks import engine
    from ..tasks.classify import Predictor

    overrides = [f"model.name={name}", f"model.kwargs={options!r}", f"epochs={epochs}", f"seed={args.seed}", *more]
    overrides += [f"schedule.warmup_epochs={min(1, epochs - 1)}", f"device={args.device}"]
    config = engine.load_config("classify/nat_atto_digits", overrides)
    output = args.output / data / label.replace(", ", "_")
    print(f"training {label} on {data}, {epochs} epochs", flush=True)
    result = engine.train(config, output, resume=(output / "last.pth").exists(), progress=False)
    last = result["history"][-1]
    print(f"held-out accuracy {last['val/accuracy']:.3f}: {result['last']}", flush=True)
    return Predictor.from_checkpoint(result["last"])


def _geometry(rule):
    """Return the transform that moves a mask as the rule moves its image."""
    import dataclasses

    nothing = {"channels": 1, "mean": (0.0,), "std": (1.0,)}
    return dataclasses.replace(rule, interpolation="nearest", **nothing).transform()


def _of_folder(source: str, methods: dict, args: argparse.Namespace, device):
    """Return what is measured on a folder's images."""
    import torch

    from ..tasks import TaskError
    from ..tasks.classify import Predictor
    from ..tasks.data.images import choose_white, read_image
    from ..tasks.predictors import is_file, load_classifier
    from ..tasks.seeing.evaluate import evaluate
    from ..tasks.seeing.judge import boxes_of_masks

    root = Path(args.evaluate).expanduser()
    files = _find_objects(root)
    if is_file(source):
        predictor = load_classifier(source, "explanations are", device)
    else:
        predictor = Predictor.from_name(source, device)
    white = predictor.white if is_file(source) else choose_white([path for path, _ in files])
    transform, geometry = predictor.rule.transform(), _geometry(predictor.rule)
    images, masks, boxes = [], [], []
    for path, objects in files:
        image = read_image(path, predictor.channels, white)
        # One picture for each object, or one of all.
        shown = torch.cat([geometry(picture) for picture in objects(image.size)] or [torch.zeros(1, 1, 1)]) > 0.5
        shown = shown[shown.flatten(1).any(1)]
        if len(shown):  # some are cropped away
            images.append(transform(image))
            masks.append(shown[0])
            boxes.append(torch.cat([boxes_of_masks(part[None])[0] for part in shown]))
        if len(images) == args.most:
            break
    if not images:
        raise TaskError(f"{root}: no image shows an object after the model's crop")
    given = {"masks": torch.stack(masks)} if (root / "masks").is_dir() else {"boxes": boxes}
    x = torch.stack(images).to(device)
    rows = evaluate(predictor.model, x, methods=methods, batch_size=args.batch_size, **given)
    kind = " and ".join(given)
    return f"folder: {len(x)} images of {root} with {kind}, as {x.shape[-1]} pixels", source, rows


def _find_objects(root: Path) -> list:
    """Return each image with a function from its size to pictures of its objects, white on black."""
    from functools import partial

    from ..tasks import TaskError
    from ..tasks.data.coco import read_instances
    from ..tasks.data.images import list_images

    folder, listing = root / "images", root / "annotations.json"
    if not root.is_dir() or not folder.is_dir():
        raise TaskError(f"{folder}: no such folder; it holds the images, beside masks/ or annotations.json")
    if (root / "masks").is_dir():
        files = [
            (path, (root / "masks" / path.relative_to(folder)).with_suffix(".png")) for path in list_images(folder)
        ]
        for path, mask in files:
            if not mask.is_file():
                raise TaskError(f"{path}: has no mask {mask}")
        pictures = [(path, partial(_mask, mask)) for path, mask in files]
    elif listing.is_file():
        records, _, _ = read_instances(listing, folder, False, "refuse", False)
        pictures = [(record.file, partial(_rectangles, record.instances)) for record in records]
    else:
        raise TaskError(f"{root}: holds neither masks/ nor annotations.json, so that there is nothing to judge by")
    if not pictures:
        raise TaskError(f"{folder}: holds no image")
    return pictures


def _mask(path: Path, size: tuple[int, int]) -> list:
    from PIL import Image

    from ..tasks import TaskError
    from ..tasks.data.images import read_values

    values = read_values(path)
    if values.shape != size[::-1]:
        raise TaskError(f"{path}: is {values.shape[1]}x{values.shape[0]} pixels, but its image {size[0]}x{size[1]}")
    return [Image.fromarray(values > 0).convert("L")]


def _rectangles(instances, size: tuple[int, int]) -> list:
    from PIL import Image, ImageDraw

    pictures = []
    for left, top, right, bottom in instances.boxes[~instances.crowd]:
        picture = Image.new("L", size)
        ImageDraw.Draw(picture).rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), fill=255)
        pictures.append(picture)
    return pictures
