"""Write a trained or published model for use elsewhere; the ending of OUTPUT says how.

  .onnx         ONNX, run by onnxruntime and compared with the model; needs pip install 'foveate[export]'
  .pt2          torch.export, read again and compared; torch.export.load reads it
  .safetensors  the weights alone, read again and compared bit for bit

The input is a batch of normalised images [B, channels, H, W], float32, called images. Classifiers give logits
[B, classes]; segmenters labels [B, H, W] of pixels; detectors boxes [B, D, 4] in pixels of the input, scores and labels
[B, D], masks [B, D, H, W] if they find them, and their number, count [B], which says how many of the D there are.
Mask2Former and OneFormer give what --answer says: labels of pixels, instances as a detector's, or panoptic segments
[B, H, W] with category_ids, isthing, areas and scores [B, Q] of segment 1, 2 and so on, and count [B]. --features gives
maps [B, C, H, W]. The metadata has, under "foveate" and as JSON, what a user needs: the classes, and the mean and std
of pixels 0..1.
"""

import argparse
from pathlib import Path

from .arguments import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="best.pth or last.pth of a run, a converted one, the run's folder, or a timm name with weights",
    )
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="file.onnx, file.pt2 or file.safetensors")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="of a name: its weights, published or trained")
    parser.add_argument("--answer", choices=("semantic", "instance", "panoptic"), help="of Mask2Former and OneFormer")
    parser.add_argument("--features", action="store_true", help="export the feature maps instead of the answer")
    parser.add_argument(
        "--size",
        type=at_least(1),
        nargs="+",
        metavar="PIXELS",
        help="side, or height and width, of the images, in pixels; the model's own by default",
    )
    parser.add_argument("--batch", type=at_least(1), default=1, help="images at once; %(default)s by default")
    parser.add_argument("--dynamic-batch", action="store_true", help="take any number of images at once")
    parser.add_argument("--dynamic-size", action="store_true", help="take images of any height and width")
    parser.add_argument("--opset", type=int, default=18, help="of ONNX's operators; %(default)s by default")
    parser.add_argument(
        "--grid-sample",
        action="store_true",
        help="read points of maps by GridSample, which some runtimes compute wrongly, and not by gathers",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help="greatest difference from the model, in standard deviations of an output; %(default)s by default",
    )
    parser.add_argument("--untrained", action="store_true", help="of a name: random weights, such as to time it")


def run(args: argparse.Namespace) -> None:
    """Export."""

    from ..tasks import TaskError
    from ..tasks.export import FORMATS, Options, Pyramid, check_exportable, example_images, export_model, whole_model
    from ..zoo.library_errors import first_line

    if not args.tolerance >= 0:
        raise TaskError(f"--tolerance is {args.tolerance}, but must be 0 or more")
    if args.size is not None and len(args.size) > 2:
        raise TaskError(f"--size is {' '.join(map(str, args.size))}, but must be one or two numbers")
    options = Options(
        dynamic_batch=args.dynamic_batch,
        dynamic_size=args.dynamic_size,
        opset=args.opset,
        grid_sample=args.grid_sample,
        tolerance=args.tolerance,
        say=lambda line: print(line, flush=True),
    )
    check_exportable(args.output, options)
    model, card, (channels, height, width) = _open(args.source, args.checkpoint, args.untrained)
    if args.size is not None:
        height, width = args.size[0], args.size[-1]
    if args.output.suffix != ".safetensors":
        model = Pyramid(model) if args.features else whole_model(model, args.answer or card.get("output"))
    if args.features:
        card["output"] = "feature maps"
    elif card["task"] == "detect":
        card["output"] = "detections"
    elif args.answer:
        card["output"] = args.answer
    shape = [args.batch, channels, height, width]
    card |= {"shape": shape, "dynamic_batch": args.dynamic_batch, "dynamic_size": args.dynamic_size}
    try:
        facts = export_model(model, example_images(*shape[1:], args.batch), args.output, card, options)
    except (AssertionError, RuntimeError) as error:
        # The model itself refused the example.
        reason = first_line(error)
        raise TaskError(f"{args.source}: does not take images of {height}x{width} pixels: {reason}") from error
    kind = FORMATS[args.output.suffix]
    for file in facts["files"]:
        print(f"{file}: {kind}, {file.stat().st_size / 1e6:.1f} MB")
    if args.output.suffix == ".safetensors":
        print(f"{len(model.state_dict())} tensors, read again and equal")
        return
    batch = "any number" if args.dynamic_batch else args.batch
    size = "any size" if args.dynamic_size else f"{height}x{width}"
    outputs = ", ".join(f"{name} {shape}" for name, shape in facts["outputs"].items())
    print(f"input: {batch} x {channels} x {size}; outputs: {outputs}")
    difference = f"{facts['difference']:.1e} standard deviations"
    print(f"greatest difference from the model: {difference}; allowed: {args.tolerance:g}")
    if facts["operators"]:
        packages = " and ".join(f"`import {name}`" for name in facts["operators"])
        print(f"needs {packages} where it is loaded, for operators that torch lacks")


def _open(source: str, checkpoint: Path | None, untrained: bool):
    """Return the model of a checkpoint or a name, its card, and the shape ``(channels, height, width)`` of an image."""
    from ..tasks import TaskError
    from ..tasks.classify import Predictor, create_classifier
    from ..tasks.predictors import is_file, is_published, load_predictor, load_published
    from ..zoo.backbone import check_name
    from ..zoo.loading import create_model

    path = Path(source)
    if path.is_dir():
        path /= "best.pth"
    if is_file(str(path)):
        if untrained:
            raise TaskError(f"{source}: --untrained is for a model's name")
        if checkpoint is not None:
            raise TaskError(f"{source}: is a file itself; --checkpoint is for a model's name")
        predictor = load_predictor(path)
        card = {key: value for key, value in predictor.card.items() if key != "metrics"}
    elif is_published(source):
        if untrained:
            raise TaskError(f"{source}: --untrained is for a classifier's name")
        predictor = load_published(source, weights=checkpoint)
        card = predictor.card
    else:
        check_name(source)
        if checkpoint is not None:
            if untrained:
                raise TaskError("--untrained and --checkpoint exclude each other")
            predictor = Predictor.from_model(source, create_model(source, checkpoint))
        elif untrained:
            predictor = Predictor.from_model(source, create_classifier(source))
        else:
            try:
                predictor = Predictor.from_name(source)
            except TaskError as error:
                raise TaskError(f"{error}; --untrained exports random weights") from error
        card = predictor.card | ({"weights": "random"} if untrained else {})
    rule = card.get("input", {})
    side = rule.get("size") or rule.get("short") or card.get("kwargs", {}).get("min_size") or 512
    if card["task"] == "detect":
        # The backbone takes what the transform pads to.
        side = -(-side // 32) * 32
    return predictor.model.eval(), card, (rule.get("channels", 3), side, side)
