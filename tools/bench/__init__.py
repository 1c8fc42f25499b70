"""``foveate bench``: our paths and their peers side by side, alternating in one process, medians and ratios.

``kernels`` times neighborhood attention at the shapes of the zoo and beyond, by every backend that can run, fused and
unfused, against FlexAttention with the same windows and bias, compiled and eager, and against a gather of every window;
then without bias, where an installed NATTEN is among the peers. ``models`` times backbones against peers, and over
their floor, the time of their linear and convolution layers alone; by ``--also`` training steps, bfloat16, compilers,
memory, latency, and the parts of a pass too: products, attention, norms and what else passes over a map; floor, memory
and parts of a training step as well, if both are named. ``detectors`` times Mask R-CNN's neck and heads against
torchvision's, with the same weights, on a backbone's maps of one image; with ``--head dino``, DINO by parts, beside
transformers' deformable DETR where it is installed, and its encoder in training against the usual formulation with
grid_sample. ``deformable`` times multi-scale deformable attention at Mask2Former's shapes, forward and backward,
against the usual formulation with grid_sample. ``aggregated`` times TransNeXt against its formulas as they stand, with
unfolded windows. ``depthwise`` times the dilated, strip and wide depthwise convolutions of VAN, MSCAN and OverLoCK
against torch's. ``loader`` times epochs of labelled JPEGs by our loader and by timm's, with the same augmentation.
``exports`` times classifiers in torch, compiled, and exported to onnxruntime and, if it is installed, OpenVINO, in
float32 and in int8. ``gpu`` measures kernels and models on a CUDA device in bfloat16, the most telling first, until
``--minutes`` are over. Tables are printed and written as markdown and csv; kernels also as a plot of time against size.
"""

import argparse
import importlib
from pathlib import Path

from ..arguments import at_least, image_size

# What can be timed. Each is a module of that name, with measure(args), which returns the rows of a table.
KINDS = ("kernels", "models", "detectors", "deformable", "aggregated", "depthwise", "loader", "exports", "gpu")
DTYPES = ("float32", "float16", "bfloat16")
# What `models` measures beside inference; see `bench.models.bench_models`.
EXTRAS = ("floor", "train", "bfloat16", "compile", "freeze", "memory", "latency", "parts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=KINDS,
        help="what to measure; see above",
    )
    parser.add_argument(
        "models", nargs="*", default=["nat_tiny"], metavar="MODEL", help="timm names; nat_tiny by default"
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        default=["swin_tiny_patch4_window7_224"],
        metavar="MODEL",
        help="models: timm models to compare with, ratios are to the first; %(default)s by default",
    )
    parser.add_argument("--batch", type=at_least(1), default=4, help="images at once; %(default)s by default")
    parser.add_argument(
        "--size", type=at_least(1), default=224, help="side of the images, in pixels; %(default)s by default"
    )
    parser.add_argument(
        "--sizes", type=image_size, nargs="+", metavar="SIZE", help="models: several sizes, such as 224 448 800x1344"
    )
    parser.add_argument("--batches", type=at_least(1), nargs="+", metavar="N", help="models: several batches")
    parser.add_argument(
        "--also",
        nargs="+",
        choices=EXTRAS,
        default=["floor"],
        help="models: what to measure beside inference; floor by default",
    )
    parser.add_argument("--quick", action="store_true", help="models: inference alone, in about two minutes")
    parser.add_argument(
        "--image",
        type=at_least(1),
        nargs=2,
        default=(800, 1344),
        metavar=("H", "W"),
        help="detectors: size of the image, in pixels; 800 1344 by default",
    )
    parser.add_argument(
        "--head", choices=("mask_rcnn", "dino"), default="mask_rcnn", help="detectors: %(default)s by default"
    )
    parser.add_argument(
        "--rounds",
        type=at_least(1),
        default=15,
        help="medians are over this many alternating calls; %(default)s by default",
    )
    parser.add_argument("--device", help="where to measure; cpu by default, cuda for gpu")
    parser.add_argument(
        "--minutes", type=at_least(0), default=6, help="gpu: no part begins after so many; %(default)s by default"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="kernels, models: %(default)s by default")
    parser.add_argument("--data", type=Path, help="loader: one folder of images a class; made-up JPEGs by default")
    parser.add_argument("--workers", type=at_least(0), default=2, help="loader: processes; %(default)s by default")
    parser.add_argument(
        "--backward", action="store_true", help="kernels: forward and backward; on CPUs without FlexAttention"
    )
    parser.add_argument("--no-flex", action="store_true", help="kernels: leave compiled FlexAttention out")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder; %(default)s by default")


def run(args: argparse.Namespace) -> None:
    """Measure, print the table, and write it."""
    # They import torch, which the command's help does without.
    from ...tasks.devices import choose_device

    args.device = str(choose_device(args.device or ("cuda" if args.what == "gpu" else "cpu")))
    module = importlib.import_module(f".{args.what}", __package__)
    from ..tables import as_markdown, save_table

    title = title_of(args)
    rows = module.measure(args)
    save_table(rows, args.output, args.what, title)
    print(title, as_markdown(rows), f"written to {args.output}", sep="\n\n")


def title_of(args: argparse.Namespace) -> str:
    """Return what stands above a table: where and how it was measured."""
    from ..timing import machine

    return f"Measured on {machine(args.device)}; medians of {args.rounds} alternating calls."
