"""Published weights: list and fetch them, verify and convert a file, make a hub folder of it.

A FILE is a path, an address, or the name of published weights (model.tag).
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

# Actions, which have arguments of their own.
ACTIONS = {
    "list": "list published weights: the authors' numbers, and what is known of the links",
    "info": "say all about published weights",
    "fetch": "download weights into the cache",
    "verify": "load a file strictly, run it on a photo, measure it beside what its authors state",
    "convert": "write any published file as safetensors",
    "push": "make a folder for the Hugging Face hub, and upload it if --repo is given",
}
# What --data may be.
_FOLDERS = """\
FOLDER, by what the file was trained for; only held-out images need to be there:
  ImageNet    val/CLASS/*, the metric is top-1
  COCO        annotations/instances_val2017.json and val2017/: box AP, mask AP
  COCO        annotations/panoptic_val2017.json and its pictures, and val2017/: PQ
  ADE20K      images/validation/ and annotations/validation/: mIoU
  Cityscapes  leftImg8bit/val/ and gtFine/val/: mIoU
  otherwise as data.val of the published recipe says, see `foveate config RECIPE`
Images are resized as in the published tests; where the authors state only a multi-scale mIoU, several views are taken.
"""

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(ACTIONS))
    parsers = {name: actions.add_parser(name, help=what, description=what) for name, what in ACTIONS.items()}

    parsers["list"].add_argument("pattern", metavar="PATTERN", nargs="?", default="*", help="glob, such as 'nat_*'")
    parsers["list"].add_argument("--task", choices=("classify", "detect", "segment"))
    parsers["list"].add_argument("--json", action="store_true", help="print the table as JSON")
    parsers["info"].add_argument("name", metavar="NAME", help="model.tag, or a model with one classifier")
    parsers["fetch"].add_argument("files", metavar="FILE", nargs="+")
    parsers["fetch"].add_argument(
        "--renew", action="store_true", help="fetch again, and take what comes for right even if it has changed"
    )
    for name in ("verify", "convert", "push"):
        parsers[name].add_argument("file", metavar="FILE")
        parsers[name].add_argument("--model", metavar="NAME", help="model of the file, where it can't be found out")
    for name in ("verify", "convert"):
        parsers[name].add_argument("--setting", help="dense setting of a backbone alone; the model's first by default")
    verify = parsers["verify"]
    verify.epilog, verify.formatter_class = _FOLDERS, argparse.RawDescriptionHelpFormatter
    verify.add_argument("--images", nargs="+", metavar="IMAGE", help="photos instead of the one that is at hand")
    verify.add_argument("--data", type=Path, metavar="FOLDER", help="data set to measure it on, see below")
    verify.add_argument("--reference", type=Path, metavar="JSON", help="outputs recorded as in tests/golden")
    verify.add_argument(
        "--device", default="auto", help="auto (CUDA if there is one), cpu, cuda:1, ...; %(default)s by default"
    )
    verify.add_argument("--batch-size", type=int, help="of --data; 32 by default, 1 for detectors and segmenters")
    verify.add_argument("--workers", type=int, default=4, help="of --data; %(default)s by default")
    parsers["convert"].add_argument("output", metavar="OUTPUT", type=Path, help="file.safetensors")
    push = parsers["push"]
    push.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="must be new or empty")
    push.add_argument("--repo", metavar="OWNER/NAME", help="upload to this repository of the hub")
    push.add_argument("--license", help="of the weights, where it isn't known or is another")


def run(args: argparse.Namespace) -> int | None:
    """Do what was asked for."""
    return {"list": _list, "info": _info, "fetch": _fetch, "verify": _verify, "convert": _convert, "push": _push}[
        args.action
    ](args)


def _list(args: argparse.Namespace) -> None:
    import dataclasses
    from fnmatch import fnmatch

    from ..tasks import TaskError, nearest
    from ..zoo import weights
    from .list import as_glob, print_table

    pattern = as_glob(args.pattern)
    chosen = [
        entry for name, entry in weights.table().items() if fnmatch(name, pattern) and args.task in (None, entry.task)
    ]
    if not chosen:
        raise TaskError(f"no published weights match {args.pattern!r}{nearest(args.pattern, weights.table())}")
    if args.json:
        print(json.dumps({entry.name: dataclasses.asdict(entry) for entry in chosen}, indent=1))
        return
    pins = weights.pins()
    rows = [("weights", "stated by the authors", "licence", "link", "reported", "last good", "here")]
    for entry in chosen:
        good = [pins[key]["date"] for key in (f"{entry.name}/{source.name}" for source in entry.sources) if key in pins]
        stated = _numbers(entry.stated)
        here = "yes" if _cached(entry) else "-"
        licence = entry.license or "none"
        rows.append(
            (entry.name, stated or "-", licence, entry.state, entry.reported or "-", max(good, default="-"), here)
        )
    print_table(rows)
    print(
        f"\n{len(chosen)} files. Links as last reported: listed by the authors; derived from a share page; browser: "
        "for people only; dead.\nLast good: when the file was first fetched here."
    )


def _cached(entry) -> Path | None:
    from ..zoo import weights

    try:
        return weights.cached(entry)
    except weights.WeightsError:
        return None


def _info(args: argparse.Namespace) -> None:
    from ..zoo import weights

    entry = weights.find(args.name)
    kind = " ".join(filter(None, (entry.head, entry.schedule)))
    facts = [
        ("weights", entry.name),
        ("task", f"{entry.task}{f' ({kind})' if kind else ''}, trained on {entry.data}"),
        ("stated", _numbers(entry.stated) or "nothing"),
        ("licence", entry.license or "none is stated by the authors; ask them"),
        ("page", entry.page),
    ]
    if entry.note:
        facts.append(("note", entry.note))
    for source in entry.sources:
        when = f", {source.reported}" if source.reported else ""
        facts.append(("source", f"{source.kind}, {source.state}{when}: {source.address}"))
        if source.page and source.page != source.address:
            facts.append(("", f"page {source.page}"))
        known = (source.file and f"file {source.file}", source.size and f"{source.size} bytes", source.sha256)
        facts.append(("", ", ".join(filter(None, known)) or "no file name, size or hash is published"))
        pin = weights.pins().get(f"{entry.name}/{source.name}")
        if pin:
            facts.append(("", f"first fetched on {pin['date']}: {pin['size']} bytes, sha256 {pin['sha256']}"))
    facts.append(("here", str(_cached(entry) or "not fetched")))
    for label, fact in facts:
        print(f"{label:<9} {fact}")


def _fetch(args: argparse.Namespace) -> int:
    from ..zoo import weights

    failed = False
    for name in args.files:
        try:
            address = name.startswith(("http://", "https://"))
            path = weights.fetch(weights.entry_of(name) if address else weights.find(name), renew=args.renew)
        except weights.WeightsError as error:
            print(f"foveate: error: {error}", file=sys.stderr)
            failed = True
            continue
        print(f"{path}  {path.stat().st_size} bytes  sha256 {weights.sha256_of(path)}")
    return 2 if failed else 0


class _Loaded:
    """A file, and the model that it is of: a classifier, a detector, a segmenter or a dense backbone alone."""

    def __init__(self, reference: str, model: str | None, setting: str | None = None):
        from ..tasks.checkpoints import renamed, with_white
        from ..tasks.predictors import dense_head_of
        from ..zoo import weights
        from ..zoo.backbone import check_name

        if model:
            check_name(model)
        self.checkpoint = weights.read(reference)
        self.path = self.checkpoint.path
        self.sha256 = weights.sha256_of(self.path)
        # `convert` leaves a note of what the file is, and all that we write has a card.
        note, card = self.checkpoint.metadata, self.checkpoint.card
        self.card = with_white(card, self.checkpoint.content) if card else None
        self.entry = weights.table().get(reference) or weights.table().get(note.get("weights"))
        card = self.card or {}
        known = card.get("backbone") or card.get("model") or note.get("model") or (self.entry and self.entry.model)
        self._agree("--model", model, known)
        self._agree("--setting", setting, renamed(note).get("setting"))
        self.name = known or model or self._find()
        self.head = dense_head_of(self.checkpoint)
        self.task = self.head[0] if self.head else "classify"
        self.predictor = self.setting = None
        self.model = self._build(setting or renamed(note).get("setting"))

    def _agree(self, option: str, given: str | None, known: str | None) -> None:
        """Raise a CheckpointError if an option contradicts what the file says of itself."""
        from ..zoo import CheckpointError

        if given and known and given.split(".")[0] != known.split(".")[0]:
            raise CheckpointError(f"{self.path}: is of {known}, as it says itself, not of {given}; leave out {option}")

    def _find(self) -> str:
        from ..zoo import CheckpointError
        from ..zoo.published import likely_model_of

        names = self._fitting() or list(filter(None, [likely_model_of(self.checkpoint)]))
        if not names:
            raise CheckpointError(f"{self.path}: fits no model of foveate; if it is one of timm's, name it by --model")
        if len(names) > 1:
            raise CheckpointError(f"{self.path}: fits {' and '.join(names)} alike; say by --model which it is")
        return names[0]

    def _fitting(self) -> list[str]:
        from .. import list_models
        from ..zoo.variants import variants_of

        return [variant.model for variant in variants_of(self.checkpoint, list_models())]

    def _build(self, setting: str | None):
        from ..tasks.classify import Predictor, create_classifier
        from ..tasks.predictors import is_published, load_dense, load_predictor, load_published
        from ..zoo import CheckpointError, create_backbone, list_models
        from ..zoo.backbone import dense_settings_of
        from ..zoo.loading import classes_of
        from ..zoo.variants import variants_of

        try:
            if self.card and self.card.get("task") != "backbone":
                self.predictor = load_predictor(self.checkpoint)
            elif self.head and self.entry and is_published(self.entry.name):
                self.predictor = load_published(self.entry.name, weights=self.checkpoint)
            elif self.head:
                self.predictor = load_dense(self.head[1], self.name, self.checkpoint)
            if self.predictor:
                return self.predictor.model
            fitting = variants_of(self.checkpoint, [self.name]) if self.name in list_models() else []
            classes = fitting[0].classes if fitting else classes_of(self.name, self.checkpoint)
            if (fitting and fitting[0].dense) or (self.name not in list_models() and not classes):
                self.task, self.setting = "backbone", setting or next(iter(dense_settings_of(self.name)), None)
                return create_backbone(self.name, self.setting, self.checkpoint).eval()
            # Loaded with the classifier that it has, whatever its classes.
            model = create_classifier(self.name, classes, checkpoint=self.checkpoint).eval()
            self.predictor = Predictor.from_model(self.name, model)
            return model
        except CheckpointError as error:
            others = [name for name in self._fitting() if name != self.name]
            if not others:
                raise
            raise CheckpointError(f"{error}; the file is one of {' or '.join(others)}") from error

    @property
    def white(self) -> int:
        """Value of 16-bit pixels that is white, as the file's run read them."""
        from ..tasks.data.images import FULL_WHITE

        return self.predictor.white if self.predictor else FULL_WHITE

    def describe(self) -> str:
        """Return what was loaded, in one line."""
        report = getattr(self.model, "load_report", None)
        return str(report or f"{len(self.model.state_dict())} entries matched")

    def state(self) -> dict:
        """Return the model's state dict, with the names under which it is read again."""
        if self.task != "backbone":
            return self.model.state_dict()
        return getattr(self.model.features, "model", self.model.features).state_dict()

    def describe_model(self) -> dict:
        """Return what the file shall say of the model, so that every command that takes a file knows it."""
        if self.predictor:
            return self.predictor.card
        return {"task": "backbone", "model": self.name, "setting": self.setting}


def _verify(args: argparse.Namespace) -> int | None:
    import torch

    from ..tasks import TaskError
    from ..tasks.devices import choose_device

    device = choose_device(args.device)
    loaded = _Loaded(args.file, args.model, args.setting)
    print(f"file       {loaded.path} ({loaded.path.stat().st_size} bytes, sha256 {loaded.sha256})")
    head = f", {loaded.head[1]}" if loaded.head else ""
    print(f"model      {loaded.name}{head}")
    print(f"loaded     {loaded.describe()}")
    if args.data and loaded.task == "backbone":
        raise TaskError("--data measures classifiers, detectors and segmenters; a backbone alone gives maps")
    if args.data and loaded.head:
        _measure_dense(loaded, args)
    model = loaded.model.to(device)
    wrong = False
    with torch.inference_mode():
        if args.reference:
            wrong = not _compare(model, args.reference, device)
        if loaded.task == "backbone":
            print("photo      not run: a backbone alone gives maps, no classes")
        elif loaded.head:
            _show_dense(loaded, args.images, device)
        else:
            transform, classes = _inputs(loaded)
            _show_classes(loaded, model, transform, classes, args.images, device)
            if args.data:
                _measure(loaded, model, transform, classes, args, device)
    stated = loaded.entry.stated if loaded.entry and loaded.task != "backbone" else {}
    if stated and not args.data:
        print(f"stated     {_numbers(stated)}; give --data FOLDER to measure it")
    return 2 if wrong else None


def _inputs(loaded: _Loaded) -> tuple[Callable, list[str]]:
    """Return a classifier's transform of images and the names of its classes."""
    return loaded.predictor.rule.transform(), loaded.predictor.classes


def _photos(images: list[str] | None, channels: int, white: int) -> list[tuple[str, object]]:
    from ..tasks.data.images import find_images, read_image

    if images:
        paths = find_images(images)
    else:
        from matplotlib import cbook

        # The one photograph that is installed anyway: Grace Hopper in uniform, by the US Navy, in the public domain.
        paths = [Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))]
    return [(path.name, read_image(path, channels, white)) for path in paths]


def _show_classes(
    loaded: _Loaded, model, transform: Callable, classes: list[str], images: list[str] | None, device
) -> None:
    if not classes:
        print("photo      not run: the model has no classifier")
        return
    channels = getattr(model, "in_chans", 3)
    for name, image in _photos(images, channels, loaded.white):
        scores = model(transform(image)[None].to(device)).float().softmax(-1)[0]
        best = scores.topk(min(5, len(classes)))
        ranking = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        print(f"photo      {name}: {'; '.join(f'{classes[index]} {score:.1%}' for index, score in ranking)}")


def _show_dense(loaded: _Loaded, images: list[str] | None, device) -> None:
    predictor = loaded.predictor
    predictor.device = device
    for name, image in _photos(images, 3, loaded.white):
        (found,) = predictor([image])
        if loaded.task == "detect":
            rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
            best = [
                f"{predictor.classes[label]} {score:.1%} at {' '.join(f'{edge:.0f}' for edge in box)}"
                for label, score, box in rows
            ]
            print(f"photo      {name}: {'; '.join(best[:5]) or 'nothing found'}")
        else:
            print(f"photo      {name}: {predictor.headline(found)}")


def _compare(model, reference: Path, device) -> bool:
    """Print how far the outputs are from recorded ones, and return whether they are the same up to rounding."""
    import numpy as np
    import torch

    from ..tasks import TaskError

    try:
        spec = json.loads(reference.read_text(encoding="utf-8"))
        values = np.load(reference.with_suffix(".npz"))
        scales = {name: max(1.0, output["std"]) for name, output in spec["outputs"].items()}
        expected = {name: (values[f"{name}.index"], values[f"{name}.value"]) for name in scales}
        rule = spec["inputs"].get("x", spec["inputs"])
        generator = torch.Generator().manual_seed(rule.get("seed", 0))
        images = torch.randn(tuple(rule["shape"]), generator=generator, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TaskError(f"{reference}: not a recorded output beside its .npz ({error})") from error
    outputs = model(images.to(device))
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    if len(outputs) != len(expected):
        raise TaskError(f"{reference}: records {', '.join(expected)}, but the model gives {len(outputs)} outputs")
    matches = True
    for output, (name, (index, value)) in zip(outputs, expected.items(), strict=True):
        output = output.float().cpu().contiguous().flatten()
        if output.numel() <= index.max():
            raise TaskError(f"{reference}: {name} is of another shape than the model's output")
        difference = (output[torch.from_numpy(index)] - torch.from_numpy(value)).abs().max().item()
        allowed = 1e-4 * scales[name]
        verdict = "match" if difference <= allowed else "NO MATCH"
        matches &= difference <= allowed
        print(f"reference  {verdict}: {name} differs by at most {difference:.1e}, allowed are {allowed:.1e}")
    return matches


def _measure(loaded: _Loaded, model, transform: Callable, classes: list[str], args: argparse.Namespace, device) -> None:
    """Print the accuracy on a folder of labelled images, beside the stated one."""
    from timm.data import ImageNetInfo
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from ..tasks import TaskError
    from ..tasks.data.class_folder import LabelledFolder

    if not args.data.is_dir():
        raise TaskError(f"{args.data}: no such folder; --data needs CLASS/*.jpg")
    batch_size = _batch_size(args, 32)
    folder = args.data / "val" if (args.data / "val").is_dir() else args.data
    # ImageNet's folders are named after its synsets; other folders after the checkpoint's own classes.
    names = ImageNetInfo("imagenet-1k").label_names() if len(classes) == 1000 else classes
    images = LabelledFolder(folder, transform, getattr(model, "in_chans", 3), names)
    images.white = loaded.white
    right = 0
    for batch, labels in tqdm(
        DataLoader(images, batch_size, num_workers=args.workers), unit="batch", desc="measuring", disable=None
    ):
        right += (model(batch.to(device)).argmax(-1).cpu() == labels).sum().item()
    accuracy = 100 * right / len(images)
    print(
        f"accuracy   top-1 {accuracy:.2f} on {len(images)} images of {folder}{_beside(loaded.entry, 'top-1', accuracy)}"
    )


def _batch_size(args: argparse.Namespace, default: int) -> int:
    """Return the batch size to measure with, if it and the workers can be had."""
    from ..tasks import TaskError

    size = default if args.batch_size is None else args.batch_size
    if size < 1 or args.workers < 0:
        raise TaskError("--batch-size must be at least 1, --workers at least 0")
    return size


def _numbers(stated: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in stated.items())


def _beside(entry, name: str, value: float) -> str:
    """Return what the authors state of a measured number, and by how much it differs."""
    stated = entry and entry.stated.get(name)
    return f"; its authors state {stated:g}, {value - stated:+.2f}" if stated else ""


def _measure_dense(loaded: _Loaded, args: argparse.Namespace) -> None:
    """Print the metrics of a detector or segmenter on the held-out part of a data set, beside the stated ones."""
    from ..tasks import engine

    stated = loaded.entry.stated if loaded.entry else {}
    config = _test_config(loaded, args)
    multi_scale = list(stated) == [_MULTI_SCALE]
    if multi_scale:
        config["test"] |= _VIEWS
    metrics, _, targets = engine.evaluate(config)
    names = [name for name in stated or _SHOWN if _METRICS[name] in metrics and (multi_scale or name != _MULTI_SCALE)]
    for name in names:
        value = 100 * metrics[_METRICS[name]]
        beside = _beside(loaded.entry, name, value)
        print(f"measured   {name} {value:.2f} on {len(targets)} images of {args.data}{beside}")
    others = {name: value for name, value in stated.items() if name not in names}
    if others:
        print(f"stated     {_numbers(others)}; not measured: of another task, or of several views of each image")


def _test_config(loaded: _Loaded, args: argparse.Namespace) -> dict:
    """Return the config that tests a detector's or segmenter's file on a folder as its recipe does."""
    from ..tasks import engine

    config = engine.load_config(_recipe_of(loaded))
    config |= {"device": args.device, "workers": args.workers, "precision": "float32"}
    # Detectors pad the images of a batch to one size; the published numbers are of batches of one.
    config["batch_size"] = _batch_size(args, 1)
    config["model"] |= {"checkpoint": loaded.checkpoint, "pretrained": False, "backbone_checkpoint": None}
    # Nothing is trained, so that the held-out part may stand for the other.
    config["data"] |= {"root": str(args.data), "train": config["data"]["val"]}
    return config


def _recipe_of(loaded: _Loaded) -> str:
    """Return the recipe of a published detector or segmenter; one of the same head and backbone has the same tests."""
    from ..configs.published import read_published
    from ..tasks import TaskError

    kind = (loaded.head[1], loaded.name)
    rows = [row for row in read_published(loaded.task) if (row["head"], row["backbone"]) == kind]
    if loaded.entry:
        rows = [row for row in rows if row["name"] == loaded.entry.name]
    recipes = {(row["data"], row["setting"]): row["config"] for row in rows}
    if len(recipes) > 1:
        names = " or ".join(row["name"] for row in rows)
        raise TaskError(
            f"{loaded.path}: may be any of {names}, which are tested on other data; verify it by its name, with the "
            "file in FOVEATE_WEIGHTS_MIRROR"
        )
    recipe = next(iter(recipes.values()), "")
    if not recipe:
        name = loaded.entry.name if loaded.entry else " on ".join(kind)
        raise TaskError(f"no recipe tells how {name} is tested, so that --data can't measure it; leave it out")
    return recipe


def _convert(args: argparse.Namespace) -> None:
    from importlib.metadata import version

    import torch
    from safetensors.torch import load_file, save_file

    from ..tasks import TaskError
    from ..tasks.checkpoints import write_whole

    if args.output.suffix != ".safetensors":
        raise TaskError(f"{args.output}: the result is a file of safetensors; name it {args.output.stem}.safetensors")
    loaded = _Loaded(args.file, args.model, args.setting)
    state = {key: value.detach().cpu().contiguous().clone() for key, value in loaded.state().items()}
    metadata = {
        "format": "pt",
        "model": loaded.name,
        "task": loaded.task,
        "head": loaded.head[1] if loaded.head else "",
        "setting": loaded.setting or "",
        "num_classes": str(getattr(loaded.model, "num_classes", "")),
        "weights": loaded.entry.name if loaded.entry else "",
        "license": (loaded.entry and loaded.entry.license) or "",
        "source": loaded.path.name,
        "source_sha256": loaded.sha256,
        "report": loaded.describe(),
        "foveate": json.dumps(loaded.describe_model()),
        "writer": f"foveate {version('foveate')}",
    }

    def write(file: str) -> None:
        save_file(state, file, metadata)
        written = load_file(file)
        if written.keys() != state.keys() or not all(torch.equal(written[key], state[key]) for key in state):
            raise TaskError(f"{args.output}: what was written is not what was read; the disk may be failing")

    write_whole(args.output, write)
    head = f", {loaded.head[1]}" if loaded.head else ""
    print(f"{args.output}: {loaded.name}{head}, {len(state)} tensors; {loaded.describe()}")


def _push(args: argparse.Namespace) -> None:
    import os
    import shutil

    from timm.models import save_for_hf
    from timm.models._hub import generate_readme

    from ..tasks import TaskError

    if args.repo and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo):
        raise TaskError(f"--repo is {args.repo!r}, but must be OWNER/NAME")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise TaskError(f"{args.output}: exists already; name a new folder")
    loaded = _Loaded(args.file, args.model)
    if loaded.task != "classify":
        kind = loaded.head[1] if loaded.head else "backbone alone"
        raise TaskError(f"{loaded.path}: holds a {kind}; timm's hub folders are for classifiers")
    stated = args.license or (loaded.entry and loaded.entry.license)
    if args.repo and not stated:
        raise TaskError("the licence of these weights is not known, so that they can't be published; give --license")
    rule = loaded.predictor.rule if loaded.predictor else None
    data = rule and dict(
        input_size=(rule.channels, rule.size, rule.size),
        mean=rule.mean,
        std=rule.std,
        interpolation=rule.interpolation,
        crop_pct=rule.crop_pct,
        crop_mode=rule.crop_mode,
    )
    labels = {"label_names": loaded.predictor.classes} if loaded.predictor else None
    args.output.parent.mkdir(parents=True, exist_ok=True)
    folder = args.output.with_name(f".{args.output.name}-{os.getpid()}")
    folder.mkdir()
    try:
        save_for_hf(loaded.model, str(folder), model_config=labels, data_config=data, safe_serialization=True)
        card = generate_readme(_card(loaded, stated, args.repo), (args.repo or args.output.name).rpartition("/")[2])
        (folder / "README.md").write_text(card, encoding="utf-8")
        # safetensors' files are private otherwise.
        shutil.copymode(folder / "README.md", folder / "model.safetensors")
        if args.output.exists():
            args.output.rmdir()
        folder.rename(args.output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    print(
        f"{args.output}: timm.create_model('local-dir:{args.output}', pretrained=True) reads it, after import foveate"
    )
    if args.repo:
        _upload(args.output, args.repo)


def _card(loaded: _Loaded, stated: str | None, repo: str | None) -> dict:
    cfg = loaded.model.pretrained_cfg
    where = f"hf-hub:{repo}" if repo else "local-dir:FOLDER"
    details = {
        "Model Type": "Image classification",
        "Architecture": loaded.name,
        "Params (M)": f"{sum(parameter.numel() for parameter in loaded.model.parameters()) / 1e6:.1f}",
        "Origin": cfg.get("origin_url") or "not stated",
        "Papers": cfg.get("paper_ids") or "not stated",
        "File": f"{loaded.path.name}, sha256 {loaded.sha256}",
    }
    if loaded.entry:
        details |= {"Dataset": "ImageNet-1k" if loaded.entry.data == "imagenet-1k" else "ImageNet-22k"}
        details |= {f"Stated {name}": value for name, value in loaded.entry.stated.items()}
    unknown = {} if stated else {"license_name": "not-stated"}
    return unknown | {
        "license": stated or "other",
        "tags": ["image-classification", "timm", "foveate"],
        "description": f"{loaded.name}, converted by `foveate weights push`; the numbers are the authors'.",
        "details": details,
        "usage": (
            f'```python\nimport foveate, timm  # foveate registers the model\n\nmodel = timm.create_model("{where}", '
            "pretrained=True).eval()\n```"
        ),
    }


def _upload(folder: Path, repo: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    from ..tasks import TaskError
    from ..zoo.library_errors import first_line

    api = HfApi(library_name="foveate")
    try:
        api.create_repo(repo, exist_ok=True)
        print(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add model"))
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        reason = first_line(error)
        raise TaskError(f"{folder} is complete, but not uploaded to {repo}: {reason}") from error
