"""The dilated, strip and wide depthwise convolutions of VAN, MSCAN, OverLoCK and BiFormer, and 3x3, against torch's."""

import argparse
from collections.abc import Sequence
from functools import partial

import torch

from ...kernels import depthwise_backends, depthwise_conv2d
from ..timing import alternate, run_pass

# Of VAN, MSCAN, OverLoCK and BiFormer, and of the MLPs of many: heights and widths, and dilations.
KERNELS = {
    "3x3": ((3, 3), 1),
    "5x5": ((5, 5), 1),
    "7x7, dilation 3": ((7, 7), 3),
    "1x21": ((1, 21), 1),
    "21x1": ((21, 1), 1),
    "17x17": ((17, 17), 1),
}


def measure(args: argparse.Namespace) -> list[dict]:
    return bench_depthwise(((64, 56), (320, 14)), args.batch, args.rounds, args.device)


def bench_depthwise(shapes: Sequence[tuple[int, int]], batch: int, rounds: int, device: str) -> list[dict]:
    """Time depthwise convolutions of maps in both memory formats, by our choice and by torch's.

    Args:
        shapes: Channels of the maps, and their height and width.
        batch: Maps at once.
        rounds: See `alternate`.
        device: Where to run.
    """
    formats = {"NCHW": torch.contiguous_format, "channels last": torch.channels_last}
    rows = []
    for channels, side in shapes:
        for title, (kernel, dilation) in KERNELS.items():
            weight = torch.randn(channels, 1, *kernel, device=device)
            for layout, memory_format in formats.items():
                x = torch.randn(batch, channels, side, side, device=device).contiguous(memory_format=memory_format)
                for backward in (False, True):
                    inputs = [y.detach().requires_grad_(backward) for y in (x, weight)]
                    answers = depthwise_backends(*inputs, dilation=dilation)
                    fastest = next(name for name, answer in answers.items() if answer == "chosen")

                    def function(x, weight, dilation=dilation, backend=fastest):
                        return depthwise_conv2d(x, weight, dilation=dilation, backend=backend)

                    calls = {
                        "ours": partial(run_pass, function, inputs, backward),
                        "torch": partial(run_pass, partial(function, backend="convolution"), inputs, backward),
                    }
                    times = alternate(calls, rounds, device)
                    rows.append(
                        {
                            "map": f"{batch}x{channels}x{side}x{side}",
                            "kernel": title,
                            "layout": layout,
                            "pass": "forward+backward" if backward else "forward",
                            "path": fastest,
                            "ms": round(times["ours"] * 1e3, 2),
                            "torch ms": round(times["torch"] * 1e3, 2),
                            "times torch": round(times["torch"] / times["ours"], 2),
                        }
                    )
    return rows
