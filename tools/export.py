"""Write a trained or published model for use elsewhere; the ending of OUTPUT says how.

  .onnx         ONNX, run by onnxruntime and compared with the model; needs pip install 'foveate[export]'
  .pt2          torch.export, read again and compared; torch.export.load reads it
  .safetensors  the weights alone, read again and compared bit for bit

Classifiers give logits [B, classes], segmenters (Mask2Former too) logits [B, classes, H, W] of pixels. DINO gives boxes
[B, D, 4] in pixels of the input, scores and labels [B, D]. Other detectors can not be exported whole; --features writes
their backbone and neck, with maps [B, C, H, W]. The input is a batch of
normalised images [B, channels, H, W], float32. The metadata has, under "foveate" and as JSON, what a user needs:
the classes, and the mean and std of pixels 0..1.
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
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="greatest difference from the model, as a share of the largest output; %(default)s by default",
    )
    parser.add_argument("--untrained", action="store_true", help="of a name: random weights, such as to time it")


def run(args: argparse.Namespace) -> None:
    """Export."""
    import torch

    from ..tasks import TaskError
    from ..tasks.export import FORMATS, Detections, Pyramid, check_exportable, export_model, finds_a_fixed_number
    from ..zoo.library_errors import first_line

    if not args.tolerance >= 0:
        raise TaskError(f"--tolerance is {args.tolerance}, but must be 0 or more")
    if args.size is not None and len(args.size) > 2:
        raise TaskError(f"--size is {' '.join(map(str, args.size))}, but must be one or two numbers")
    model, card, (channels, height, width) = _open(args.source, args.untrained)
    if args.size is not None:
        height, width = args.size[0], args.size[-1]
    if args.features:
        model = Pyramid(model) if args.output.suffix != ".safetensors" else model
        card["output"] = "feature maps"
    elif finds_a_fixed_number(model) and args.output.suffix != ".safetensors":
        model = Detections(model)
        card["output"] = "detections"
    check_exportable(model, args.output)
    card |= {"shape": [args.batch, channels, height, width], "dynamic_batch": args.dynamic_batch}
    example = torch.randn(card["shape"], generator=torch.Generator().manual_seed(0))
    try:
        facts = export_model(model, example, args.output, card, args.tolerance, args.dynamic_batch)
    except (AssertionError, RuntimeError) as error:
        # The model itself refused the example.
        reason = first_line(error)
        raise TaskError(f"{args.source}: does not take images of {height}x{width} pixels: {reason}") from error
    kind, megabytes = FORMATS[args.output.suffix], args.output.stat().st_size / 1e6
    print(f"{args.output}: {kind}, {megabytes:.1f} MB")
    if args.output.suffix == ".safetensors":
        print(f"{len(model.state_dict())} tensors, read again and equal")
        return
    batch = "any number" if args.dynamic_batch else args.batch
    print(f"input: {batch} x {channels}x{height}x{width}; outputs: {', '.join(map(str, facts['outputs']))}")
    print(
        f"greatest difference from the model: {facts['difference']:.1e} of the largest output, {facts['largest']:.3g}; "
        f"allowed: {args.tolerance:g}"
    )
    if facts["operators"]:
        print(f"needs `import foveate` where it is loaded, for the operators {', '.join(facts['operators'])}")


def _open(source: str, untrained: bool):
    """Return the model of a checkpoint or a name, its card, and the shape ``(channels, height, width)`` of an image."""
    from ..tasks import TaskError
    from ..tasks.classify import Predictor, create_classifier
    from ..tasks.predictors import is_file, load_predictor
    from ..zoo.backbone import check_name

    path = Path(source)
    if path.is_dir():
        path /= "best.pth"
    if is_file(str(path)):
        if untrained:
            raise TaskError(f"{source}: --untrained is for a model's name")
        predictor = load_predictor(path)
        card = {key: value for key, value in predictor.card.items() if key != "metrics"}
    else:
        check_name(source)
        if untrained:
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
