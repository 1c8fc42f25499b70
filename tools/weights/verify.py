"""Load a file strictly, run it on a photo, and measure it beside what its authors state."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import at_least
from .stated import numbers

if TYPE_CHECKING:
    from .card import Findings
    from .contents import Contents

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--model", metavar="NAME", help="model of the file, where it can't be found out")
    parser.add_argument("--setting", help="dense setting of a backbone alone; the model's first by default")
    parser.epilog, parser.formatter_class = _FOLDERS, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--images", nargs="+", metavar="IMAGE", help="photos instead of the one that is at hand")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="data set to measure it on, see below")
    parser.add_argument("--card", type=Path, metavar="FILE", help="write what was found as a card, such as README.md")
    parser.add_argument("--reference", type=Path, metavar="JSON", help="outputs recorded as in tests/golden")
    parser.add_argument(
        "--device", default="auto", help="auto (CUDA if there is one), cpu, cuda:1, ...; %(default)s by default"
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), help="of --data; 32 by default, 1 for detectors and segmenters"
    )
    parser.add_argument("--workers", type=at_least(0), default=4, help="of --data; %(default)s by default")


def run(args: argparse.Namespace) -> int | None:
    import torch

    from ...tasks import TaskError, one_line
    from ...tasks.devices import choose_device
    from .card import Findings
    from .contents import load_contents
    from .measure import measure_classifier, measure_dense

    if args.card and args.card.is_dir():
        raise TaskError(f"{args.card} is a folder; name the card's file, such as {args.card / 'README.md'}")
    device = choose_device(args.device)
    contents = load_contents(args.file, args.model, args.setting)
    file, entry = contents.file, contents.file.entry
    findings = Findings(data=str(args.data or ""))
    print(f"file       {file.path} ({file.path.stat().st_size} bytes, sha256 {file.sha256})")
    print(f"model      {contents.title}")
    print(f"loaded     {contents.report()}")
    if args.data and contents.task == "backbone":
        raise TaskError("--data measures classifiers, detectors and segmenters; a backbone alone gives maps")
    if args.data and contents.head:
        findings.measured = measure_dense(contents, args)
    contents.move(device)
    wrong = False
    with torch.inference_mode():
        if args.reference:
            matches, findings.difference = _compare(contents.model, args.reference, device)
            wrong, findings.reference = not matches, args.reference.name
        if reason := contents.obstacle():
            print(f"photo      not run: {reason}")
        else:
            for name, photo in _photos(args.images, contents.predictor.channels, contents.predictor.white):
                findings.answers[name] = contents.answer(photo)
                print(f"photo      {one_line(f'{name}: {findings.answers[name]}')}")
        if args.data and contents.task == "classify":
            findings.measured = measure_classifier(contents, args, device)
    if entry and entry.stated and contents.task != "backbone" and not args.data:
        print(f"stated     {numbers(entry.stated)}; give --data FOLDER to measure it")
    if args.card and not wrong:
        _write_card(contents, findings, args)
    return 2 if wrong else None


def _write_card(contents: "Contents", findings: "Findings", args: argparse.Namespace) -> None:
    """Write the card, and say what the table of weights may take from it."""
    from ...tasks.checkpoints import write_whole
    from .card import card_of, checked_row
    from .push import usage_of

    entry = contents.file.entry
    findings.command = f"foveate weights verify {args.file} --data {args.data}" if args.data else ""
    reference = entry.name if entry else contents.file.path.name
    text = card_of(contents, findings, entry.license if entry else None, usage_of(contents, f'"{reference}"'))
    write_whole(args.card, lambda path: Path(path).write_text(text, encoding="utf-8"))
    print(f"card       {args.card}")
    if entry and entry.state != "shipped":
        row = {"sha256": contents.file.sha256, "checked": checked_row(findings, "YOU, LINK OF THE PULL REQUEST")}
        print(f"row        {json.dumps(row)}; CONTRIBUTING.md says how it comes into zoo/weights.json")


def _photos(images: list[str] | None, channels: int, white: int) -> list[tuple[str, object]]:
    from ...tasks.data.images import find_images, read_image

    if images:
        paths = find_images(images)
    else:
        from matplotlib import cbook

        # The one photograph that is installed anyway: Grace Hopper in uniform, by the US Navy, in the public domain.
        paths = [Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))]
    return [(path.name, read_image(path, channels, white)) for path in paths]


def _compare(model, reference: Path, device) -> tuple[bool, float]:
    """Print how far the outputs are from recorded ones; return whether they match up to rounding, and how far."""
    import numpy as np
    import torch

    from ...tasks import TaskError

    try:
        spec = json.loads(reference.read_text(encoding="utf-8"))
        values = np.load(reference.with_suffix(".npz"))
        scales = {name: max(1.0, output["std"]) for name, output in spec["outputs"].items()}
        expected = {name: (values[f"{name}.index"], values[f"{name}.value"]) for name in scales}
        rule = spec["inputs"].get("x", spec["inputs"])
        generator = torch.Generator().manual_seed(rule.get("seed", 0))
        images = torch.randn(tuple(rule["shape"]), generator=generator, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TaskError(f"{reference}: not a recorded output beside its .npz ({error})") from error
    outputs = model(images.to(device))
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    if len(outputs) != len(expected):
        raise TaskError(f"{reference}: records {', '.join(expected)}, but the model gives {len(outputs)} outputs")
    matches, greatest = True, 0.0
    for output, (name, (index, value)) in zip(outputs, expected.items(), strict=True):
        output = output.float().cpu().contiguous().flatten()
        if output.numel() <= index.max():
            raise TaskError(f"{reference}: {name} is of another shape than the model's output")
        difference = (output[torch.from_numpy(index)] - torch.from_numpy(value)).abs().max().item()
        allowed = 1e-4 * scales[name]
        verdict = "match" if difference <= allowed else "NO MATCH"
        matches &= difference <= allowed
        greatest = max(greatest, difference)
        print(f"reference  {verdict}: {name} differs by at most {difference:.1e}, allowed are {allowed:.1e}")
    return matches, greatest
