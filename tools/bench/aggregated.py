"""TransNeXt beside the plain formulation of its attention and feed-forward network, with the same weights."""

import argparse
import copy

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...blocks import AggregatedAttention2d
from ...blocks.aggregated import learned_weights, pool_map, pooled_size, unit_vectors
from ...blocks.continuous_bias import bias_axes, bias_of_rows
from ...kernels.aggregated import aggregated_reference
from ...tasks import TaskError
from ...tasks.cost import memory_growth
from ...zoo.backbone import check_name
from ...zoo.transnext import ConvGlu, TransNeXt
from ..timing import alternate


def measure(args: argparse.Namespace) -> list[dict]:
    rows = []
    for name in args.models:
        check_name(name)
        model = timm.create_model(name).eval().to(args.device)
        if not isinstance(model, TransNeXt):
            raise TaskError(f"foveate bench aggregated takes TransNeXt models; {name} is none")
        for height, width in args.sizes or [(args.size, args.size)]:
            images = torch.randn(args.batch, 3, height, width, device=args.device)
            rows += bench_aggregated(name, model, images, args.rounds)
    return rows


def bench_aggregated(name: str, model: TransNeXt, images: Tensor, rounds: int) -> list[dict]:
    """Time a model and its plain formulation: windows unfolded, all scores, biases and hidden channels at once.

    Returns:
        A row for each, with milliseconds, peak memory of the call, and the plain one's over ours.

    Raises:
        AssertionError: If they don't agree.
    """
    paths = {"ours": model, "unfolded": unfolded(model)}
    with torch.inference_mode():
        logits, expected = (path(images) for path in paths.values())
        torch.testing.assert_close(logits, expected, atol=1e-4 * expected.std().item(), rtol=0)
        calls = {path: lambda network=network: network(images) for path, network in paths.items()}
        memory = {path: memory_growth(call, images.device.type) for path, call in calls.items()}
        seconds = alternate(calls, rounds, images.device.type)
    return [
        {
            "model": name,
            "batch": len(images),
            "size": f"{images.shape[2]}x{images.shape[3]}",
            "path": path,
            "ms": round(seconds[path] * 1e3, 1),
            "peak MB": round(memory[path] / 2**20, 1),
            "times as fast": round(seconds["unfolded"] / seconds[path], 2),
            "of the memory": round(memory[path] / max(memory["unfolded"], 1), 2),
        }
        for path in paths
    ]


def unfolded(model: TransNeXt) -> TransNeXt:
    """Return a copy of a model that computes as the formulas stand."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, AggregatedAttention2d):
            module.forward = _Attend(module)
        elif isinstance(module, ConvGlu):
            module.forward = _FeedForward(module)
    return model


class _Attend:
    def __init__(self, layer: AggregatedAttention2d):
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        layer, size = self.layer, tuple(x.shape[1:3])
        pooled = pooled_size(size, layer.sr_ratio, layer.fixed_pool_size)
        tokens = layer.norm(pool_map(layer.act(layer.sr(x)), *pooled)).flatten(1, 2)
        slots = layer.window_size**2
        unit, *vectors = unit_vectors(
            layer.q(x), layer.kv(x), layer.kv(tokens), layer.temperature, layer.query_embedding, slots, pooled
        )
        axes = bias_axes(size, pooled, layer.sr_ratio, layer.cpb.trained_size)
        bias = bias_of_rows(layer.cpb(size, pooled, layer.sr_ratio), *axes, 0, size[0])
        added = learned_weights(unit, layer.learnable_tokens, layer.learnable_bias)
        out = aggregated_reference(*vectors, layer.relative_pos_bias_local, bias, added)
        return layer.proj(out.flatten(-2))


class _FeedForward:
    def __init__(self, layer: ConvGlu):
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        layer: nn.Module = self.layer
        gate, value = layer.fc1(x).chunk(2, -1)
        gate = F.conv2d(
            gate.permute(0, 3, 1, 2).contiguous(), layer.dwconv.weight, layer.dwconv.bias, 1, 1, groups=gate.shape[-1]
        )
        return layer.fc2(layer.act(gate.permute(0, 2, 3, 1)) * value)
