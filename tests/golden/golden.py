"""Deterministic weights and inputs, so that a reference output of a few kilobytes pins a whole network.

A tensor's values depend only on its name in the reference checkpoint and on its shape, so nobody has to
ship the weights: rebuild them from the name/shape list, load them through the checkpoint converter, run
the same input, and compare the output.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch


def tensor_for(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the fp32 tensor of `shape` that belongs to the reference parameter or buffer `name`."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var":
        return 1.0 + 0.4 * noise.tanh()
    if leaf == "running_mean":
        return 0.1 * noise
    if noise.ndim >= 2:
        fan_in = max(1, noise.numel() // shape[0])
        return noise * fan_in**-0.5
    if leaf == "weight":  # a norm's gain
        return 1.0 + 0.1 * noise
    if leaf.startswith(("gamma", "layer_scale", "ls")):
        return 0.5 + 0.1 * noise
    return 0.1 * noise


def input_for(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Return the reference input batch of `shape`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def fill(module: torch.nn.Module) -> dict[str, list[int]]:
    """Overwrite every floating-point entry of `module`'s state dict; return {name: shape} of those."""
    spec = {}
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                value.copy_(tensor_for(name, tuple(value.shape)))
                spec[name] = list(value.shape)
    return spec


def sample(output: torch.Tensor, count: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` evenly strided flat indices of `output` and the fp32 values there."""
    flat = output.detach().float().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(count, flat.numel())).long().unique()
    return index.numpy(), flat[index].numpy()


def record(path, *, model: str, spec: dict, inputs: dict, outputs: dict[str, torch.Tensor], notes: dict) -> None:
    """Write PATH.json (names, shapes, notes) and PATH.npz (sampled outputs with their shape, mean and std)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays, meta = {}, {}
    for key, value in outputs.items():
        assert torch.isfinite(value).all(), key
        index, values = sample(value)
        arrays[f"{key}.index"], arrays[f"{key}.value"] = index, values
        meta[key] = {"shape": list(value.shape), "mean": float(value.float().mean()), "std": float(value.float().std())}
    np.savez_compressed(path.with_suffix(".npz"), **arrays)
    path.with_suffix(".json").write_text(
        json.dumps({"model": model, "inputs": inputs, "outputs": meta, "notes": notes, "state": spec}, indent=1)
    )
