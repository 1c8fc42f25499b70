"""A file's metrics on held-out data, beside those that its authors state."""

import argparse

from torch.utils.data import DataLoader

from ...tasks import TaskError
from .contents import Classifier, Contents
from .stated import beside, numbers

# The authors' names of metrics, and the engine's.
_METRICS = {
    "box AP": "box_ap",
    "mask AP": "mask_ap",
    "AP": "mask_ap",
    "PQ": "pq",
    "PQ things": "pq_things",
    "PQ stuff": "pq_stuff",
    "mIoU": "miou",
    "mIoU multi-scale": "miou",
    "mAcc": "macc",
}
# Those that are shown where the authors' are not known.
_SHOWN = ("box AP", "mask AP", "PQ", "mIoU")
_MULTI_SCALE = "mIoU multi-scale"
# Of each image, for the multi-scale numbers.
_VIEWS = {"scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75), "flip": True}


def measure_classifier(contents: Classifier, args: argparse.Namespace, device) -> dict[str, float]:
    """Print the accuracy on a folder of labelled images, beside the stated one, and return it in percent."""
    from tqdm import tqdm

    from ...tasks.data.class_folder import LabelledFolder
    from ...tasks.data.class_names import folder_names

    if not args.data.is_dir():
        raise TaskError(f"{args.data}: no such folder; --data needs CLASS/*.jpg")
    batch_size = args.batch_size or 32
    folder = args.data / "val" if (args.data / "val").is_dir() else args.data
    predictor = contents.predictor
    names = folder_names(predictor.classes, folder)
    images = LabelledFolder(folder, predictor.rule.transform(), predictor.channels, names)
    images.white = predictor.white
    right = 0
    for batch, labels in tqdm(
        DataLoader(images, batch_size, num_workers=args.workers), unit="batch", desc="measuring", disable=None
    ):
        right += (contents.model(batch.to(device)).argmax(-1).cpu() == labels).sum().item()
    accuracy = 100 * right / len(images)
    stated = beside(contents.file.entry, "top-1", accuracy)
    print(f"accuracy   top-1 {accuracy:.2f} on {len(images)} images of {folder}{stated}")
    return {"top-1": accuracy}


def measure_dense(contents: Contents, args: argparse.Namespace) -> dict[str, float]:
    """Print the metrics of a detector or segmenter on the held-out part of a data set, beside the stated ones.

    They are returned, in percent.
    """
    from ...tasks import engine

    stated = contents.file.entry.stated if contents.file.entry else {}
    config = _test_config(contents, args)
    multi_scale = list(stated) == [_MULTI_SCALE]
    if multi_scale:
        config["test"] |= _VIEWS
    metrics, _, targets = engine.evaluate(config)
    names = [name for name in stated or _SHOWN if _METRICS[name] in metrics and (multi_scale or name != _MULTI_SCALE)]
    measured = {name: 100 * metrics[_METRICS[name]] for name in names}
    for name, value in measured.items():
        authors = beside(contents.file.entry, name, value)
        print(f"measured   {name} {value:.2f} on {len(targets)} images of {args.data}{authors}")
    others = {name: value for name, value in stated.items() if name not in names}
    if others:
        print(f"stated     {numbers(others)}; not measured: of another task, or of several views of each image")
    return measured


def _test_config(contents: Contents, args: argparse.Namespace) -> dict:
    """Return the config that tests a detector's or segmenter's file on a folder as its recipe does."""
    from ...tasks import engine

    config = engine.load_config(_recipe_of(contents))
    config |= {"device": args.device, "workers": args.workers, "precision": "float32"}
    # Detectors pad the images of a batch to one size; the published numbers are of batches of one.
    config["batch_size"] = args.batch_size or 1
    config["model"] |= {"checkpoint": contents.file.checkpoint, "pretrained": False, "backbone_checkpoint": None}
    # Nothing is trained, so that the held-out part may stand for the other.
    config["data"] |= {"root": str(args.data), "train": config["data"]["val"]}
    return config


def _recipe_of(contents: Contents) -> str:
    """Return the recipe of a published detector or segmenter; one of the same head and backbone has the same tests."""
    from ...configs.published import read_published

    file = contents.file
    kind = (contents.head, contents.name)
    rows = [row for row in read_published(contents.task) if (row["head"], row["backbone"]) == kind]
    if file.entry:
        rows = [row for row in rows if row["name"] == file.entry.name]
    recipes = {(row["data"], row["setting"]): row["config"] for row in rows}
    if len(recipes) > 1:
        names = " or ".join(row["name"] for row in rows)
        raise TaskError(
            f"{file.path}: may be any of {names}, which are tested on other data; verify it by its name, with the "
            "file in FOVEATE_WEIGHTS_MIRROR"
        )
    recipe = next(iter(recipes.values()), "")
    if not recipe:
        name = file.entry.name if file.entry else " on ".join(kind)
        raise TaskError(f"no recipe tells how {name} is tested, so that --data can't measure it; leave it out")
    return recipe
