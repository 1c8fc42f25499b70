"""Inference of a model where it was trained and where it may run: torch, torch.compile, onnxruntime, OpenVINO, int8."""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
from torch import Tensor

from ...tasks import TaskError
from ...tasks.export import Options, export_model
from ...tasks.export.quantize import calibrated
from ...tasks.exported import OnnxModel
from ...zoo.backbone import check_name
from ...zoo.maps import cfg_of
from ..tables import as_markdown, save_table
from ..timing import alternate
from . import title_of


def measure(args: argparse.Namespace) -> list[dict]:
    if args.device != "cpu":
        raise TaskError(f"--device is {args.device}, but exports are measured on CPUs")
    for name in args.models:
        check_name(name)
    rows = []
    for name in args.models:
        part = bench_exports(name, args.batch, args.size, args.rounds)
        rows += part
        # A model takes minutes, and a later one may fail.
        save_table(rows, args.output, args.what, title_of(args))
        print(as_markdown(part), flush=True)
    return rows


def bench_exports(name: str, batch: int, size: int, rounds: int) -> list[dict]:
    """Time a classifier with random weights in every runtime that is installed; images per second, ratios to eager.

    All get as many threads as torch has; of one thread, time is the processor's, which nothing else on the machine
    changes much. int8 is calibrated on noise: of its speed alone this tells.
    """
    print(f"{name}: getting ready ...", flush=True)
    fixed = {"img_size": size} if cfg_of(name).fixed_input_size else {}
    model = timm.create_model(name, **fixed).eval()
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        calls = dict(_runtimes(model, images, Path(folder)))
        print("compiling and timing ...", flush=True)
        times = alternate(
            calls, rounds, "cpu", time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        )
    return [
        {
            "model": name,
            "runtime": runtime,
            "batch": batch,
            "size": size,
            "images/s": round(batch / seconds, 1),
            "times eager": round(times["torch eager"] / seconds, 3),
        }
        for runtime, seconds in times.items()
    ]


def _runtimes(model: torch.nn.Module, images: Tensor, folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "torch eager", lambda: model(images)
    compiled = torch.compile(model)
    yield "torch.compile", lambda: compiled(images)
    plain, small = folder / "float32.onnx", folder / "int8.onnx"
    with torch.inference_mode(False):
        export_model(model, images, plain, {"task": "classify"}, Options(say=lambda line: print(line, flush=True)))
        print("quantising ...", flush=True)
        calibrated(plain, small, [images])
    threads = torch.get_num_threads()
    for runtime, file in (("onnxruntime", plain), ("onnxruntime int8", small)):
        network = OnnxModel(file, threads)
        yield runtime, lambda network=network: network(images)
    if importlib.util.find_spec("openvino") is not None:
        import openvino

        for runtime, file in (("OpenVINO", plain), ("OpenVINO int8", small)):
            request = openvino.compile_model(str(file), "CPU", {"INFERENCE_NUM_THREADS": threads})
            yield runtime, lambda request=request: request([images.numpy()])
