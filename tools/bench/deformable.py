"""Multi-scale deformable attention at Mask2Former's shapes against the usual formulation with grid_sample."""

import argparse
from collections.abc import Sequence
from functools import partial

import torch

from ...kernels import deformable_backends, multi_scale_deformable_attention
from ..timing import alternate, run_pass


def measure(args: argparse.Namespace) -> list[dict]:
    return bench_deformable((128, 256, 512), args.rounds, args.device)


def bench_deformable(sides: Sequence[int], rounds: int, device: str) -> list[dict]:
    """Time multi-scale deformable attention among the pixels of 1/32, 1/16 and 1/8 of square images."""
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

                calls[name] = partial(run_pass, function, inputs, backward)
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
