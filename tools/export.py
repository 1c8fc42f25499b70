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
import contextlib
import dataclasses
import tempfile
from pathlib import Path

from .arguments import at_least

DTYPES = ("float32", "float16", "bfloat16")


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
    parser.add_argument("--opset", type=at_least(1), default=18, help="of ONNX's operators; %(default)s by default")
    parser.add_argument(
        "--grid-sample",
        action="store_true",
        help="read points of maps by GridSample, which some runtimes compute wrongly, and not by gathers",
    )
    parser.add_argument(
        "--preprocess",
        choices=("hwc", "chw"),
        help="of classifiers: take images as they are, uint8 [1, H, W, C] or [1, C, H, W] of any size, and resize, "
        "crop and normalise them in the graph",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help="greatest difference from the model, in standard deviations of an output; %(default)s by default",
    )
    _add_smaller(parser)
    parser.add_argument("--untrained", action="store_true", help="of a name: random weights, such as to time it")


def _add_smaller(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--int8",
        action="store_true",
        help="quantise by images of --data, and measure it; .pt2 by torchao (pip install 'foveate[pt2e]')",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="float16, and of .pt2 bfloat16, is written and measured on --data; %(default)s by default",
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="for --int8 and --dtype: images, of classifiers in a folder a class"
    )
    parser.add_argument(
        "--calibration",
        type=at_least(1),
        default=32,
        help="for --int8: images of --data to calibrate by, not measured; %(default)s by default",
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        default=0.01,
        help="greatest loss that a smaller file may have, 0 to 1, of accuracy, or of agreement with float32; "
        "%(default)s by default",
    )


def run(args: argparse.Namespace) -> None:
    """Export."""

    from ..tasks import TaskError
    from ..tasks.export import Options, Pyramid, check_exportable, example_images, export_model, whole_model

    if not args.tolerance >= 0:
        raise TaskError(f"--tolerance is {args.tolerance}, but must be 0 or more")
    smaller = args.int8 or args.dtype != "float32"
    if smaller:
        _check_smaller(args)
    if args.size is not None and len(args.size) > 2:
        raise TaskError(f"--size is {' '.join(map(str, args.size))}, but must be one or two numbers")
    options = Options(
        dynamic_batch=args.dynamic_batch,
        dynamic_size=args.dynamic_size,
        opset=args.opset,
        grid_sample=args.grid_sample,
        tolerance=args.tolerance,
        say=lambda line: print(line, flush=True),
        called=str(args.output),
    )
    check_exportable(args.output, options)
    predictor, card, (channels, height, width) = _open(args.source, args.checkpoint, args.untrained, args.features)
    if smaller and args.output.suffix == ".pt2" and card["task"] != "classify":
        raise TaskError(f"{_smaller(args)} of detectors and segmenters is written as .onnx alone, not .pt2")
    if args.size is not None:
        height, width = args.size[0], args.size[-1]
        _resize_rule(args, predictor, card, (height, width))
    data = _data(args, card, predictor) if smaller else ()
    model = predictor.model.eval()
    if args.output.suffix != ".safetensors":
        model = Pyramid(model) if args.features else whole_model(model, args.answer or card.get("output"))
    if args.features:
        card["output"] = "feature maps"
    elif card["task"] == "detect":
        card["output"] = "detections"
    elif args.answer:
        card["output"] = args.answer
    shape = [args.batch, channels, height, width]
    example = example_images(*shape[1:], args.batch)
    if args.preprocess:
        model, example, options = _with_preprocessing(args, model, card, predictor, options)
        shape = list(example.shape)
    card |= {"shape": shape, "dynamic_batch": args.dynamic_batch, "dynamic_size": args.dynamic_size}
    with contextlib.ExitStack() as stack:
        output = args.output
        if smaller:
            output = Path(stack.enter_context(tempfile.TemporaryDirectory())) / args.output.name
        facts = export_model(model, example, output, card, options)
        if smaller:
            facts["files"] = _write_smaller(args, output, card, predictor, data)
    size = "any size" if options.dynamic_size else f"{height}x{width}"
    _report(args, facts, len(model.state_dict()), f"{channels} x {size}")
    test = card.get("test", {})
    if not args.features and (
        test.get("mode", "whole") != "whole" or test.get("flip") or len(test.get("scales", "1")) > 1
    ):
        print("the file answers whole images, at one scale; the checkpoint is set to windows, scales or mirror images")


def _report(args: argparse.Namespace, facts: dict, count: int, images: str) -> None:
    """Print what was written."""
    from ..tasks.export import FORMATS

    kind = FORMATS[args.output.suffix]
    for file in facts["files"]:
        print(f"{file}: {kind}, {file.stat().st_size / 1e6:.1f} MB")
    if args.output.suffix == ".safetensors":
        print(f"{count} tensors, read again and equal")
        return
    batch = "any number" if args.dynamic_batch else args.batch
    outputs = ", ".join(f"{name} {shape}" for name, shape in facts["outputs"].items())
    print(f"input: {batch} x {images}; outputs: {outputs}")
    difference = f"{facts['difference']:.1e} standard deviations"
    rounding = ", and twice the model's own rounding in float32" if facts["difference"] > args.tolerance else ""
    print(f"greatest difference from the model: {difference}; allowed: {args.tolerance:g}{rounding}")
    if facts["operators"]:
        packages = " and ".join(f"`import {name}`" for name in facts["operators"])
        print(f"needs {packages} where it is loaded, for operators that torch lacks")


def _smaller(args: argparse.Namespace) -> str:
    return "--int8" if args.int8 else f"--dtype {args.dtype}"


def _check_smaller(args: argparse.Namespace) -> None:
    from ..tasks import TaskError

    if args.int8 and args.dtype != "float32":
        raise TaskError("--int8 and --dtype exclude each other")
    what = _smaller(args)
    if args.output.suffix not in (".onnx", ".pt2"):
        raise TaskError(f"{what} writes .onnx and .pt2 alone, not {args.output.suffix or args.output}")
    if args.output.suffix == ".pt2":
        _check_smaller_program(args, what)
    elif args.dtype == "bfloat16":
        raise TaskError(
            "--dtype bfloat16: onnxruntime has next to no operators of it on CPUs; .onnx can be float16, .pt2 either"
        )
    if args.data is None:
        raise TaskError(f"{what} needs --data FOLDER, images to measure what it costs")
    if not args.data.is_dir():
        raise TaskError(f"{args.data}: no such folder; --data needs one of images")
    if args.features or args.preprocess:
        raise TaskError(f"{what} goes with neither --features nor --preprocess")
    if not 0 <= args.max_drop <= 1:
        raise TaskError(f"--max-drop is {args.max_drop}, but must be from 0 to 1")


def _check_smaller_program(args: argparse.Namespace, what: str) -> None:
    from ..tasks import TaskError
    from ..tasks.extras import require

    if args.int8:
        require("torchao")
        if args.dynamic_size:
            raise TaskError("--int8 of .pt2 and --dynamic-size exclude each other; .onnx takes both")
    if args.batch > 1 and not args.dynamic_batch:
        raise TaskError(f"{what} of .pt2 is measured on single images: take --dynamic-batch, or --batch 1")


def _resize_rule(args: argparse.Namespace, predictor, card: dict, size: tuple[int, int]) -> None:
    """Let a classifier's images be made as large as its file is to take them, and its metadata say so."""
    from ..tasks import TaskError
    from ..tasks.export.metadata import preprocessing_of

    if card["task"] != "classify":
        return
    if size[0] == size[1]:
        predictor.rule = dataclasses.replace(predictor.rule, size=size[0])
        predictor.transform = predictor.rule.transform()
        card["preprocessing"] = preprocessing_of(predictor)
    elif args.int8 or args.dtype != "float32":
        raise TaskError(
            f"--size is {size[0]} {size[1]}, but {_smaller(args)} is measured on square images: give one number"
        )


def _data(args: argparse.Namespace, card: dict, predictor) -> tuple[list, ...]:
    """Return what to calibrate int8 by, and what to measure on: normalised images and labels, or pictures' files."""
    from ..tasks.data.class_folder import LabelledFolder
    from ..tasks.data.class_names import folder_names
    from ..tasks.data.images import find_images
    from ..tasks.export.quantize import split, split_files

    calibration = args.calibration if args.int8 else 0
    if card["task"] != "classify":
        return split_files(find_images([args.data]), calibration)
    names = folder_names(card["classes"], args.data)
    folder = LabelledFolder(args.data, predictor.transform, predictor.channels, names)
    folder.white = predictor.white
    return split(folder, calibration)


def _write_smaller(args: argparse.Namespace, source: Path, card: dict, predictor, data: tuple[list, ...]) -> list[Path]:
    """Write the smaller file if it loses no more accuracy than it may; print how it compares with float32."""
    import shutil

    from ..tasks import TaskError
    from ..tasks.checkpoints import write_whole
    from ..tasks.data.images import read_image
    from ..tasks.export.quantize import calibrated, compared, halved, measured, network_inputs
    from ..tasks.exported import load_exported
    from ..zoo.library_errors import run_fault
    from .tables import as_markdown

    kind = "int8" if args.int8 else args.dtype
    target = source.with_name(f"{kind}{source.suffix}")
    files = {"float32": source, kind: target}
    calibration, images, *labels = data
    classifies = card["task"] == "classify"
    step = "made"
    try:
        if not classifies:
            calibration, images = ([read_image(path, 3, predictor.white) for path in paths] for paths in data)
            if args.int8:
                calibration = network_inputs(load_exported(source), calibration)
        if source.suffix == ".pt2":
            _write_smaller_program(args, target, card, predictor, calibration)
        elif args.int8:
            calibrated(source, target, calibration)
        else:
            halved(source, target)
        step = "measured"
        rows = measured(files, images, *labels) if classifies else compared(files, images)
    except TaskError:
        raise
    except Exception as error:
        # onnxruntime, its quantisation and torch.compile raise of many types.
        raise TaskError(f"{args.output}: not written: {kind} can't be {step}: {run_fault(error)}") from error
    measure = "accuracy" if classifies else "agreement"
    print(f"On {len(images)} {'held-out ' if args.int8 else ''}images of {args.data}; in one thread:")
    print(as_markdown([{key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()} for row in rows]))
    drop = rows[0][measure] - rows[1][measure]
    if drop > args.max_drop:
        raise TaskError(
            f"{args.output}: not written: {kind} loses {drop:.4f} of {measure}, more than --max-drop {args.max_drop:g}"
        )
    write_whole(args.output, lambda file: shutil.copyfile(target, file))
    return [args.output]


def _write_smaller_program(args: argparse.Namespace, target: Path, card: dict, predictor, calibration) -> None:
    """Write a classifier as a smaller .pt2, compared with the smaller module itself."""
    import copy

    import torch

    from ..tasks.export import Options, example_images, export_model
    from ..tasks.export.quantize_program import InDtype, calibrated_module

    shape = card["shape"]
    example = example_images(*shape[1:], 2 if args.dynamic_batch else 1)
    model = copy.deepcopy(predictor.model)
    if args.int8:
        model = calibrated_module(model, example, calibration, args.dynamic_batch)
    else:
        model = InDtype(model, getattr(torch, args.dtype)).eval()
    called = f"{args.output}, in {'int8' if args.int8 else args.dtype}"
    sizes = dict(dynamic_batch=args.dynamic_batch, dynamic_size=args.dynamic_size)
    facts = export_model(model, example, target, card, Options(**sizes, tolerance=args.tolerance, called=called))
    for module in facts["operators"]:
        print(f"needs `import {module}` where it is loaded")


def _with_preprocessing(args: argparse.Namespace, model, card: dict, predictor, options):
    """Return the module that takes images as they are, an image, and the options of its export."""
    from ..tasks import TaskError
    from ..tasks.export.preprocess import FromImages

    if card["task"] != "classify" or args.features:
        raise TaskError("--preprocess is for classifiers' answers; the metadata of other files say how to resize")
    for option, given in (("--batch", args.batch > 1), ("--size", args.size), ("--dynamic-size", args.dynamic_size)):
        if given:
            raise TaskError(f"{option} and --preprocess exclude each other: the file takes single images of any size")
    if args.output.suffix == ".safetensors":
        raise TaskError("--preprocess: .safetensors holds weights alone; .onnx and .pt2 hold a graph")
    model = FromImages(model, predictor.rule, args.preprocess).eval()
    card["layout"] = args.preprocess
    size = predictor.rule.size
    return model, model.example(size + 9, size + 4), dataclasses.replace(options, dynamic_size=True)


def _open(source: str, checkpoint: Path | None, untrained: bool, features: bool):
    """Return the predictor of a checkpoint or a name, its card, and an image's ``(channels, height, width)``."""
    from ..tasks import TaskError
    from ..tasks.classify import Predictor, create_classifier
    from ..tasks.export.metadata import license_of, preprocessing_of
    from ..tasks.predictors import is_file, is_published, load_predictor, load_published
    from ..zoo.backbone import check_name

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
        card = predictor.card | {"license": license_of(source)}
    else:
        check_name(source)
        if checkpoint is not None:
            if untrained:
                raise TaskError("--untrained and --checkpoint exclude each other")
            predictor = _with_weights(source, checkpoint, features)
        elif untrained:
            predictor = Predictor.from_model(source, create_classifier(source))
        else:
            try:
                predictor = Predictor.from_name(source)
            except TaskError as error:
                raise TaskError(f"{error}; --untrained exports random weights") from error
        license = None if untrained or checkpoint is not None else license_of(source, predictor.model)
        card = predictor.card | ({"weights": "random"} if untrained else {"license": license})
    rule = card.get("input", {})
    side = rule.get("size") or rule.get("short") or card.get("kwargs", {}).get("min_size") or 512
    if card["task"] == "detect":
        # The backbone takes what the transform pads to.
        side = -(-side // 32) * 32
    card |= {"preprocessing": preprocessing_of(predictor)}
    return predictor, card, (rule.get("channels", 3), side, side)


def _with_weights(name: str, file: Path, features: bool):
    """Return the predictor of a name with a file's weights, of as many classes and channels as the file has."""
    from ..tasks import TaskError
    from ..tasks.classify import Predictor
    from ..tasks.predictors import load_predictor
    from ..zoo.checkpoint import open_checkpoint
    from ..zoo.loading import create_model, input_of
    from ..zoo.variants import count_classes

    checkpoint = open_checkpoint(file)
    card = checkpoint.card or {}
    if card.get("task") == "classify":
        if card.get("model") != name.partition(".")[0]:
            raise TaskError(f"{file}: holds {card.get('model')}, not {name}; `foveate export {file}` needs no name")
        return load_predictor(checkpoint)
    how, classes = input_of(name, checkpoint), count_classes(name, checkpoint)
    if how:
        print(
            f"{file}: doesn't say how images of {how['in_chans']} channels are normalised; see mean and std in the file"
        )
    model = create_model(name, checkpoint, num_classes=classes or 0, **how).eval()
    if not classes and not features:
        raise TaskError(f"{file}: has no classifier, and so no answer; --features exports its maps")
    return Predictor.from_model(name, model)
