"""Inference of whole models against a peer."""

import argparse
import copy
from collections.abc import Sequence

import timm
import torch
from timm.utils import reparameterize_model

from ...tasks.cost import count_macs
from ...zoo.backbone import check_name
from ...zoo.maps import cfg_of
from ..timing import alternate


def measure(args: argparse.Namespace) -> list[dict]:
    for name in (*args.models, args.peer):
        check_name(name)
    dtype = getattr(torch, args.dtype)
    return bench_models(args.models, args.peer, args.batch, args.size, args.rounds, args.device, dtype)


def bench_models(
    names: Sequence[str], peer: str, batch: int, size: int, rounds: int, device: str, dtype: torch.dtype
) -> list[dict]:
    """Time inference of every model and of the peer; images per second, and the ratios to the peer.

    What can be re-parameterised for inference is, before it is timed and its multiply-adds are counted.

    The second ratio is of multiply-adds per second: what the machine gets done, whatever the model's size.
    """
    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    models = {}
    for name in dict.fromkeys((*names, peer)):
        fixed = {"img_size": size} if cfg_of(name).fixed_input_size else {}
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
