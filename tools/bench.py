"""``foveate bench``: our paths and their peers side by side, alternating in one process, medians and ratios.

``kernels`` times neighborhood attention at the shapes of the zoo and beyond, by every backend that can run, fused and
unfused, against FlexAttention with the same windows and bias, compiled and eager, and against a gather of every window;
then without bias, where an installed NATTEN is among the peers. ``models`` times backbones against a peer.
``detectors`` times Mask R-CNN's neck and heads against torchvision's, with the same weights, on a backbone's maps of
one image. ``dino`` times DINO by parts, and its encoder in training against the usual formulation with grid_sample.
``deformable`` times multi-scale deformable attention at Mask2Former's shapes, forward and backward, against
the usual formulation with grid_sample. ``depthwise`` times the dilated, strip and wide depthwise convolutions of VAN,
MSCAN and OverLoCK against torch's. ``loader`` times epochs of labelled JPEGs by our loader and by timm's, with the same
augmentation. Tables are printed and written as markdown and csv; kernels also as a plot of time against size.
"""

import argparse
import copy
import csv
import functools
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

# Batch, height, width, heads, head dim, kernel size: NAT's first stage alone and batched, and larger maps.
SHAPES = (
    (1, 56, 56, 2, 32, 7),
    (4, 56, 56, 2, 32, 7),
    (1, 128, 128, 4, 32, 7),
    (1, 64, 64, 4, 64, 13),
)
# The same for GPUs, which small batches leave idle.
GPU_SHAPES = (
    (64, 56, 56, 2, 32, 7),
    (64, 14, 14, 8, 32, 7),
    (8, 128, 128, 4, 32, 7),
    (8, 64, 64, 4, 64, 13),
)
# Of VAN, MSCAN and OverLoCK: heights and widths, and dilations.
LARGE_KERNELS = {
    "7x7, dilation 3": ((7, 7), 3),
    "1x21": ((1, 21), 1),
    "21x1": ((21, 1), 1),
    "17x17": ((17, 17), 1),
}
SIDES = (28, 56, 84, 112)
DTYPES = ("float32", "float16", "bfloat16")

SAMPLE_SECONDS = 0.02


def alternate(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Call everything in turn, ``rounds`` times over, and return the median seconds of a call of each.

    Whatever is timed is called once before, so that nobody pays for the caches that the one before it has filled, and
    a short call is repeated until it has taken ``SAMPLE_SECONDS``, as timeit does.
    """

    def seconds(call: Callable[[], object], number: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(number):
            call()
        if device != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - start) / number

    for call in calls.values():  # compile, plan, warm up
        seconds(call)
    numbers = {name: max(1, round(SAMPLE_SECONDS / seconds(call))) for name, call in calls.items()}
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds(call)
            times[name].append(seconds(call, numbers[name]))
    return {name: statistics.median(samples) for name, samples in times.items()}


def flex_attention_of(
    height: int, width: int, kernel_size: int, rpb: Tensor | None, device: str, compiled: bool
) -> Callable[..., Tensor]:
    """Return FlexAttention on ``[B, H, W, heads, dim]`` with neighborhood windows and bias.

    Compiled it is the best that torch itself has; eager, with all scores in memory, it is NATTEN 0.21's path on CPUs.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    half = kernel_size // 2

    def visible(batch, head, query, key):
        row = (query // width - half).clamp(0, height - kernel_size)
        column = (query % width - half).clamp(0, width - kernel_size)
        inside = (key // width >= row) & (key // width < row + kernel_size)
        return inside & (key % width >= column) & (key % width < column + kernel_size)

    def biased(score, batch, head, query, key):
        row = (key // width - query // width + kernel_size - 1).clamp(0, 2 * kernel_size - 2)
        column = (key % width - query % width + kernel_size - 1).clamp(0, 2 * kernel_size - 2)
        return score + rpb[head, row, column]

    tokens = height * width
    mask = create_block_mask(visible, None, None, tokens, tokens, device=device)
    # Every shape is compiled for itself, as if it were the only one.
    torch.compiler.reset()
    function = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def run(query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Tensor:  # the bias is in the scores' function
        flat = [x.flatten(1, 2).transpose(1, 2) for x in (query, key, value)]
        out = function(*flat, score_mod=None if rpb is None else biased, block_mask=mask)
        return out.transpose(1, 2).unflatten(1, (height, width))

    return run


def gather_of(height: int, width: int, kernel_size: int, device: str) -> Callable[..., Tensor]:
    """Return the usual formulation in plain torch: copy every window, then softmax over it; its indices made once."""
    half = kernel_size // 2
    offsets = torch.arange(kernel_size, device=device)
    rows, columns = (
        (torch.arange(length, device=device) - half).clamp(0, length - kernel_size)[:, None] + offsets
        for length in (height, width)
    )
    window = (height, width, kernel_size, kernel_size)
    tokens = (rows[:, None, :, None] * width + columns[None, :, None, :]).expand(window).flatten(2).flatten(0, 1)
    row_entries, column_entries = (
        keys - torch.arange(len(keys), device=device)[:, None] + kernel_size - 1 for keys in (rows, columns)
    )
    entries = row_entries[:, None, :, None] * (2 * kernel_size - 1) + column_entries[None, :, None, :]
    entries = entries.expand(window).flatten(2).flatten(0, 1)

    def run(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None = None) -> Tensor:
        query, key, value = (x.flatten(1, 2) for x in (query, key, value))
        scores = torch.einsum("bnhd,bnkhd->bnhk", query * query.shape[-1] ** -0.5, key[:, tokens])
        if rpb is not None:
            scores = scores + rpb.flatten(1)[:, entries].transpose(0, 1).to(scores.dtype)
        out = torch.einsum("bnhk,bnkhd->bnhd", scores.softmax(-1), value[:, tokens])
        return out.unflatten(1, (height, width))

    return run


def bench_kernels(
    shapes: Sequence[tuple[int, ...]],
    rounds: int,
    device: str,
    flex: bool,
    backward: bool,
    dtype: torch.dtype,
    bias: bool = True,
) -> list[dict]:
    """Time one call of every path, and of its peers, at every shape, with relative position bias or without.

    Memory is what one call adds at its peak, its results included. FlexAttention has no gradient on CPUs.
    """
    from ..kernels import neighborhood_backends, unfused_neighborhood_backends
    from ..tasks.cost import memory_growth

    matmul = matmul_rate(device, 15, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    flex = flex and not (backward and device == "cpu")
    rows = []
    for batch, height, width, heads, dim, kernel_size in shapes:
        query, key, value = torch.randn(3, batch, height, width, heads, dim, device=device, dtype=dtype).unbind()
        rpb = torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1, device=device) if bias else None
        report = neighborhood_backends(query, key, value, kernel_size, rpb=rpb)
        has_natten = neighborhood_backends(query, key, value, kernel_size)["natten"] == "can run"  # without bias only
        running = [name for name, answer in report.items() if answer in ("chosen", "can run")]
        # FlexAttention is among the peers, compiled for these windows alone.
        names = [name for name in running if name not in ("reference", "flex")]
        functions = {name: partial(_neighborhood, kernel_size, name) for name in names}
        unfused = unfused_neighborhood_backends(query, key, kernel_size)
        functions |= {
            f"unfused, {name}": partial(_unfused, kernel_size, name)
            for name, answer in unfused.items()
            if answer in ("chosen", "can run") and name != "reference"
        }
        expected = _neighborhood(kernel_size, "reference", query, key, value, rpb)
        inputs = [x.requires_grad_(backward) for x in (query, key, value, rpb) if x is not None]
        peers = {"gather": gather_of(height, width, kernel_size, device)}
        if flex:
            peers["flex (compiled)"] = flex_attention_of(height, width, kernel_size, rpb, device, compiled=True)
            if batch * heads * (height * width) ** 2 <= 2**27:  # all scores, some times over
                peers["flex (eager)"] = flex_attention_of(height, width, kernel_size, rpb, device, compiled=False)
        functions |= peers
        calls, memory = {}, {}
        for name, function in functions.items():
            calls[name] = partial(_step, function, inputs, backward)
            with torch.inference_mode():
                torch.testing.assert_close(function(*inputs), expected, atol=tolerance, rtol=tolerance)
            calls[name]()
            memory[name] = memory_growth(calls[name], device)
        times = alternate(calls, rounds, device)
        shown = ["gather", *(["flex (compiled)", "flex (eager)"] if flex else []), *(["natten"] if has_natten else [])]
        # Useful work: a query-key pair costs a multiply-add per channel, for the score and again for the value.
        useful = batch * height * width * heads * kernel_size**2 * dim * 4 * (3.5 if backward else 1)
        for name, seconds in times.items():
            rate = useful / seconds / 1e9
            rows.append(
                {
                    "shape": f"{batch}x{height}x{width}x{heads}x{dim} k{kernel_size}",
                    "pass": "forward+backward" if backward else "forward",
                    "dtype": str(dtype).removeprefix("torch."),
                    "bias": "yes" if bias else "no",
                    "path": name,
                    "ms": round(seconds * 1e3, 3),
                    "useful GFLOP/s": round(rate, 1),
                    "of matmul": f"{rate / matmul:.0%}",
                    "peak MB": round(memory[name] / 2**20, 1),
                    **{f"times {peer}": round(times[peer] / seconds, 1) if peer in times else "-" for peer in shown},
                }
            )
    return rows


def _neighborhood(
    kernel_size: int, backend: str, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None = None
) -> Tensor:
    from ..kernels import na2d

    return na2d(query, key, value, kernel_size, rpb=rpb, backend=backend)


def _unfused(
    kernel_size: int, backend: str, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None = None
) -> Tensor:
    """Scores, torch's softmax, and sums of values: what NATTEN's users composed."""
    from ..kernels import na2d_av, na2d_qk

    scores = na2d_qk(query * query.shape[-1] ** -0.5, key, kernel_size, rpb=rpb, backend=backend)
    return na2d_av(scores.softmax(-1), value, kernel_size, backend=backend)


def _step(function: Callable[..., Tensor], inputs: list[Tensor], backward: bool) -> None:
    if backward:
        torch.autograd.grad(function(*inputs).sum(), inputs)
    else:
        with torch.inference_mode():
            function(*inputs)


@functools.cache
def matmul_rate(device: str, rounds: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the GFLOP/s of a product of two square matrices: what the machine can do."""
    side = 1024 if device == "cpu" else 8192
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / alternate({"matmul": lambda: a @ a}, rounds, device)["matmul"] / 1e9


def bench_models(
    names: Sequence[str], peer: str, batch: int, size: int, rounds: int, device: str, dtype: torch.dtype
) -> list[dict]:
    """Time inference of every model and of the peer; images per second, and the ratios to the peer.

    What can be re-parameterised for inference is, before it is timed and its multiply-adds are counted.

    The second ratio is of multiply-adds per second: what the machine gets done, whatever the model's size.
    """
    import timm
    from timm.utils import reparameterize_model

    from ..tasks.cost import count_macs

    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    models = {}
    for name in dict.fromkeys((*names, peer)):
        fixed = {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
        model = timm.create_model(name, **fixed).eval().to(device, dtype)
        models[name] = reparameterize_model(model, inplace=True)
    with torch.inference_mode():
        times = alternate({name: lambda m=model: m(images) for name, model in models.items()}, rounds, device)
    macs = {name: count_macs(copy.deepcopy(model).to("meta"), (3, size, size)) for name, model in models.items()}
    return [
        {
            "model": name,
            "batch": batch,
            "size": size,
            "M parameters": round(sum(p.numel() for p in models[name].parameters()) / 1e6, 1),
            "GMACs": round(macs[name] / 1e9, 3),
            "images/s": round(batch / seconds, 1),
            f"times {peer}": round(times[peer] / seconds, 3),
            f"MACs/s times {peer}": round(times[peer] / seconds * macs[name] / macs[peer], 3),
        }
        for name, seconds in times.items()
    ]


def bench_detectors(names: Sequence[str], image_size: tuple[int, int], rounds: int, device: str) -> list[dict]:
    """Time Mask R-CNN after the backbone, from its maps to pasted masks, and torchvision's with the same weights.

    The weights are random, but such that there are as many detections as there may be.
    """
    from ..tasks.dense.detect import create_detector

    rows = []
    for name in names:
        model = create_detector("mask_rcnn", name).eval().to(device)
        with torch.inference_mode():
            # A fresh classifier is sure of nothing, and then there are no masks to make.
            model.roi_heads.box_heads[0].cls_score.weight *= 30
            features = model.backbone(torch.randn(1, 3, *image_size, device=device))
            calls = {
                "foveate": lambda m=model, x=features: m.predict_from_features(x, [image_size]),
                "torchvision": partial(_torchvision_twin(model, image_size), features),
            }
            counts = {path: len(call()[0]["boxes"]) for path, call in calls.items()}
            times = alternate(calls, rounds, device)
        for path, seconds in times.items():
            rows.append(
                {
                    "backbone": name,
                    "image": "x".join(map(str, image_size)),
                    "neck and heads": path,
                    "detections": counts[path],
                    "ms": round(seconds * 1e3, 1),
                    "times torchvision's time": round(seconds / times["torchvision"], 2),
                }
            )
    return rows


def _torchvision_twin(model: torch.nn.Module, image_size: tuple[int, int]) -> Callable[[list[Tensor]], list[dict]]:
    """Return torchvision's Mask R-CNN after the backbone, with the weights of ours, as a function of the maps."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.rpn import AnchorGenerator

    neck = torch.nn.Module()
    neck.out_channels = model.neck.channels[0]
    anchors = AnchorGenerator(tuple((8 * 2**level,) for level in range(2, 7)), ((0.5, 1.0, 2.0),) * 5)
    twin = MaskRCNN(neck, model.num_classes + 1, rpn_anchor_generator=anchors, rpn_head=model.rpn.head)
    box_head, mask_head = model.roi_heads.box_heads[0], model.roi_heads.mask_heads[0]
    twin.roi_heads.box_head.fc6, twin.roi_heads.box_head.fc7 = box_head.tower[1], box_head.tower[3]
    twin.roi_heads.mask_head, twin.roi_heads.mask_predictor = mask_head.convs, mask_head.predictor
    twin.to(box_head.cls_score.weight.device).eval()
    predictor = twin.roi_heads.box_predictor
    for leaf in ("weight", "bias"):
        # torchvision's background is the first class, ours the last, and it has offsets of its own there.
        getattr(predictor.cls_score, leaf).copy_(getattr(box_head.cls_score, leaf).roll(1, 0))
        getattr(predictor.bbox_pred, leaf)[4:].copy_(getattr(box_head.bbox_pred, leaf))

    def call(features: list[Tensor]) -> list[dict]:
        pyramid = dict(zip("0123p", model.neck(features), strict=True))
        images = ImageList(features[0].new_zeros(1, 3, *image_size), [image_size])
        proposals, _ = twin.rpn(images, pyramid)
        detections, _ = twin.roi_heads(pyramid, proposals, [image_size])
        return twin.transform.postprocess(detections, [image_size], [image_size])

    return call


def bench_deformable(sides: Sequence[int], rounds: int, device: str) -> list[dict]:
    """Time multi-scale deformable attention among the pixels of 1/32, 1/16 and 1/8 of square images."""
    from ..kernels import deformable_backends, multi_scale_deformable_attention

    rows = []
    for side in sides:
        shapes = [(side // stride, side // stride) for stride in (32, 16, 8)]
        pixels = sum(height * width for height, width in shapes)
        value = torch.randn(1, pixels, 8, 32, device=device)
        locations = 0.5 + 0.3 * torch.randn(1, pixels, 8, 3, 4, 2, device=device)
        weights = torch.randn(1, pixels, 8, 12, device=device).softmax(-1).unflatten(-1, (3, 4))
        backends = deformable_backends(value, shapes, locations, weights)
        names = [name for name, answer in backends.items() if answer in ("chosen", "can run")]
        for backward in (False, True):
            inputs = [x.detach().requires_grad_(backward) for x in (value, locations, weights)]
            calls = {}
            for name in names:

                def function(value, locations, weights, shapes=shapes, name=name):
                    return multi_scale_deformable_attention(value, shapes, locations, weights, name)

                calls[name] = partial(_step, function, inputs, backward)
            times = alternate(calls, rounds, device)
            rows += [
                {
                    "image": side,
                    "pass": "forward+backward" if backward else "forward",
                    "path": {"reference": "grid_sample"}.get(name, name)
                    + (" (chosen)" if backends[name] == "chosen" else ""),
                    "ms": round(seconds * 1e3, 2),
                    "times grid_sample": round(times["reference"] / seconds, 2),
                }
                for name, seconds in times.items()
            ]
    return rows


def bench_depthwise(shapes: Sequence[tuple[int, int]], batch: int, rounds: int, device: str) -> list[dict]:
    """Time the depthwise convolutions of large kernels on maps in both memory formats, by our choice and by torch's.

    Args:
        shapes: Channels of the maps, and their height and width.
        batch: Maps at once.
        rounds: See `alternate`.
        device: Where to run.
    """
    from ..kernels import depthwise_backends, depthwise_conv2d

    formats = {"NCHW": torch.contiguous_format, "channels last": torch.channels_last}
    rows = []
    for channels, side in shapes:
        for title, (kernel, dilation) in LARGE_KERNELS.items():
            weight = torch.randn(channels, 1, *kernel, device=device)
            for layout, memory_format in formats.items():
                x = torch.randn(batch, channels, side, side, device=device).contiguous(memory_format=memory_format)
                answers = depthwise_backends(x, weight, dilation=dilation)
                chosen = next(name for name, answer in answers.items() if answer == "chosen")
                for backward in (False, True):
                    inputs = [y.detach().requires_grad_(backward) for y in (x, weight)]

                    def function(x, weight, dilation=dilation, backend=chosen):
                        return depthwise_conv2d(x, weight, dilation=dilation, backend=backend)

                    calls = {
                        "ours": partial(_step, function, inputs, backward),
                        "torch": partial(_step, partial(function, backend="convolution"), inputs, backward),
                    }
                    times = alternate(calls, rounds, device)
                    rows.append(
                        {
                            "map": f"{batch}x{channels}x{side}x{side}",
                            "kernel": title,
                            "layout": layout,
                            "pass": "forward+backward" if backward else "forward",
                            "path": chosen,
                            "ms": round(times["ours"] * 1e3, 2),
                            "torch ms": round(times["torch"] * 1e3, 2),
                            "times torch": round(times["torch"] / times["ours"], 2),
                        }
                    )
    return rows


def bench_loader(data: Path | None, size: int, batch: int, workers: int, rounds: int) -> list[dict]:
    """Time epochs of our loader of labelled folders and of timm's, with the same augmentation.

    Args:
        data: One folder a class; made-up JPEGs of 500x375 pixels if None.
        size: Of the input.
        batch: Images in a batch.
        workers: Processes that load.
        rounds: Epochs of each loader.
    """
    import tempfile

    from timm.data import ImageDataset, create_loader

    from ..tasks.data.class_folder import LabelledFolder
    from ..tasks.data.classification import InputRule, keep_posterize_total
    from ..tasks.engine.loading import build_loader

    settings = {
        "crop and flip": {},
        "RandAugment, erasing": {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"},
        "evaluation": None,
    }
    rule = InputRule(size, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop_pct=0.875)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = data if data is not None else _draw_photos(Path(scratch), 128)
        for name, augment in settings.items():
            ours = LabelledFolder(folder, rule.transform(augment), 3)
            seed = None if augment is None else 0
            theirs = create_loader(
                ImageDataset(str(folder)),
                (3, size, size),
                batch,
                is_training=augment is not None,
                use_prefetcher=False,
                mean=rule.mean,
                std=rule.std,
                interpolation=rule.interpolation,
                crop_pct=rule.crop_pct,
                num_workers=workers,
                persistent_workers=workers > 0,
                **{"color_jitter": 0.4, **(augment or {})},
            )
            keep_posterize_total(theirs.dataset.transform)
            loaders = {"ours": build_loader(ours, batch, workers, seed), "timm": theirs}
            calls = {who: partial(_exhaust, loader) for who, loader in loaders.items()}
            times = alternate(calls, rounds, "cpu")
            counts = {who: _exhaust(loader) for who, loader in loaders.items()}
            rates = {who: counts[who] / times[who] for who in times}
            rows.append(
                {
                    "augmentation": name,
                    "workers": workers,
                    "images/s": round(rates["ours"], 1),
                    "timm images/s": round(rates["timm"], 1),
                    "times timm": round(rates["ours"] / rates["timm"], 3),
                }
            )
    return rows


def _exhaust(loader: Iterable) -> int:
    """Load an epoch; return its number of images."""
    return sum(len(images) for images, _ in loader)


def _draw_photos(folder: Path, count: int) -> Path:
    """Write JPEGs that are about as detailed as photos, in two classes."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for index in range(count):
        path = folder / str(index % 2) / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375), Image.BICUBIC)
        pixels = np.asarray(coarse) + draw.normal(0, 12, (375, 500, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder


def as_markdown(rows: list[dict]) -> str:
    """Return rows as a markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(map(str, row.values())) + " |" for row in rows])


def machine(device: str) -> str:
    """Describe what the numbers were measured on."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def save(rows: list[dict], folder: Path, stem: str, title: str) -> None:
    """Write a table as ``STEM.md`` and ``STEM.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.md").write_text(f"{title}\n\n{as_markdown(rows)}\n")
    with (folder / f"{stem}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: list[dict], path: Path, title: str) -> None:
    """Draw milliseconds against the side of the map, a line for each path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name in dict.fromkeys(row["path"] for row in rows):
        mine = [row for row in rows if row["path"] == name]
        sides = [int(row["shape"].split("x")[1]) for row in mine]
        axes.plot(sides, [row["ms"] for row in mine], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="side of the map, tokens", ylabel="ms", title=title)
    axes.set_xticks(SIDES, map(str, SIDES), minor=False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=("kernels", "models", "detectors", "dino", "deformable", "depthwise", "loader"),
        help="what to measure; see above",
    )
    parser.add_argument(
        "models", nargs="*", default=["nat_tiny"], metavar="MODEL", help="timm names; nat_tiny by default"
    )
    parser.add_argument(
        "--peer", default="swin_tiny_patch4_window7_224", help="timm model to compare with; %(default)s by default"
    )
    parser.add_argument("--batch", type=int, default=4, help="images at once; %(default)s by default")
    parser.add_argument("--size", type=int, default=224, help="side of the images, in pixels; %(default)s by default")
    parser.add_argument(
        "--image",
        type=int,
        nargs=2,
        default=(800, 1344),
        metavar=("H", "W"),
        help="detectors, dino: size of the image, in pixels; 800 1344 by default",
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="medians are over this many alternating calls; %(default)s by default"
    )
    parser.add_argument("--device", default="cpu", help="where to measure; %(default)s by default")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="kernels, models: %(default)s by default")
    parser.add_argument("--data", type=Path, help="loader: one folder of images a class; made-up JPEGs by default")
    parser.add_argument("--workers", type=int, default=2, help="loader: processes; %(default)s by default")
    parser.add_argument(
        "--backward", action="store_true", help="kernels: forward and backward; on CPUs without FlexAttention"
    )
    parser.add_argument("--no-flex", action="store_true", help="kernels: leave compiled FlexAttention out")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder; %(default)s by default")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write it."""
    title = f"Measured on {machine(args.device)}; medians of {args.rounds} alternating calls."
    dtype = getattr(torch, args.dtype)
    if args.what == "models":
        from ..zoo.backbone import check_name

        for name in (*args.models, args.peer):
            check_name(name)
        rows = bench_models(args.models, args.peer, args.batch, args.size, args.rounds, args.device, dtype)
    elif args.what == "detectors":
        rows = bench_detectors(args.models, tuple(args.image), args.rounds, args.device)
    elif args.what == "dino":
        from .bench_dino import bench_dino

        rows = bench_dino(args.models, tuple(args.image), args.rounds, args.device)
    elif args.what == "loader":
        rows = bench_loader(args.data, args.size, args.batch, args.workers, args.rounds)
    elif args.what == "deformable":
        rows = bench_deformable((128, 256, 512), args.rounds, args.device)
    elif args.what == "depthwise":
        rows = bench_depthwise(((64, 56), (320, 14)), args.batch, args.rounds, args.device)
    else:
        on_cpu = args.device == "cpu"
        measure = {"rounds": args.rounds, "device": args.device, "backward": args.backward, "dtype": dtype}
        shapes = SHAPES if on_cpu else GPU_SHAPES
        rows = bench_kernels(shapes, flex=not args.no_flex, **measure)
        plain = bench_kernels(shapes[:1], flex=False, bias=False, **measure)  # FlexAttention's columns stay as they are
        rows += [{name: row.get(name, "-") for name in rows[0]} for row in plain]
        sizes = [(1 if on_cpu else 64, side, side, 2, 32, 7) for side in SIDES]
        # A GPU's kernel of FlexAttention is compiled for minutes at so many sizes.
        sweep = bench_kernels(sizes, flex=on_cpu and not args.no_flex, **measure)
    save(rows, args.output, args.what, title)
    if args.what == "kernels":
        plot(sweep, args.output / "kernels.png", "Neighborhood attention, kernel 7, 2 heads of 32")
    print(title, as_markdown(rows), f"written to {args.output}", sep="\n\n")
    return 0
