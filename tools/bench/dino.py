"""DINO by parts beside transformers' deformable DETR, and its encoder in training against grid_sample's formulation."""

import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ...blocks import multi_scale_deformable
from ...kernels import multi_scale_deformable_attention
from ...tasks.dense.detect import DINO, create_detector
from ...tasks.dense.detect.dino import Scene
from ..timing import alternate

PEER = "encoder, forward and backward, by grid_sample"
DETR = "deformable DETR of transformers: "


def bench_dino(names: Sequence[str], image_size: tuple[int, int], rounds: int, device: str) -> list[dict]:
    """Time DINO's parts on one image: in evaluation each, and the encoder forward and backward, ours and grid_sample's.

    Memory is what the encoder keeps for its backward pass. Where transformers is installed, its deformable DETR runs
    beside, on the same backbone, with as many queries and layers of the same width.
    """
    rows = []
    for name in names:
        model = create_detector("dino", name).eval().to(device)
        _scatter_points(model)
        batch = torch.randn(1, 3, *image_size, device=device)
        parts, maps, scene = _parts(model, batch, image_size)
        if importlib.util.find_spec("transformers") is not None:
            parts |= _peer_parts(name, batch, model.head.query_embedding.num_embeddings)
        training = {"encoder, forward and backward": None, PEER: "reference"}
        steps = {path: partial(_step, model, maps, scene, backend) for path, backend in training.items()}
        with torch.no_grad():
            times = alternate(parts, rounds, device)
        times |= alternate(steps, rounds, device)
        memory = {path: _kept(model, maps, scene, backend) for path, backend in training.items()}
        for path, seconds in times.items():
            rows.append(
                {
                    "backbone": name,
                    "image": "x".join(map(str, image_size)),
                    "part": path,
                    "ms": round(seconds * 1e3, 1),
                    "times transformers'": round(seconds / times[DETR + path], 3) if DETR + path in times else "-",
                    "kept MB": round(memory[path] / 1e6) if path in memory else "-",
                    "times grid_sample's time": round(seconds / times[PEER], 3) if path in memory else "-",
                    "times grid_sample's memory": round(memory[path] / memory[PEER], 3) if path in memory else "-",
                }
            )
    return rows


def _scatter_points(model: nn.Module) -> None:
    """Let points lie where trained ones may: fresh ones are the same for all queries."""
    for module in model.modules():
        if hasattr(module, "sampling_offsets"):
            for layer in (module.sampling_offsets, module.attention_weights):
                nn.init.normal_(layer.weight, std=0.05)


def _parts(
    model: DINO, batch: Tensor, size: tuple[int, int]
) -> tuple[dict[str, Callable[[], object]], list[Tensor], Scene]:
    head = model.head
    with torch.no_grad():
        features = model.backbone(batch)
        maps = model.neck(features)
        scene = Scene.of(maps, [size], size)
        memory = head.encode(maps, scene)
        proposals = head.propose(memory, scene)
        queries = head.query_embedding(torch.arange(proposals.index.shape[1], device=batch.device))[None]
        references = proposals.boxes.sigmoid()
    parts = {
        "backbone": lambda: model.backbone(batch),
        "neck": lambda: model.neck(features),
        "encoder": lambda: head.encode(maps, scene),
        "choice of proposals": lambda: head.propose(memory, scene),
        "decoder": lambda: head.decode(queries, references, memory, scene),
        "all, to boxes": lambda: model.find(batch),
    }
    return parts, maps, scene


def _peer_parts(backbone: str, batch: Tensor, queries: int) -> dict[str, Callable[[], object]]:
    """Return the parts of transformers' deformable DETR on a timm model, by the names of ours."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, TimmBackboneConfig

    # It takes no more queries than its four maps have positions.
    positions = sum(math.prod(-(-side // step) for side in batch.shape[2:]) for step in (8, 16, 32, 64))
    queries = min(queries, positions)
    config = DeformableDetrConfig(
        backbone_config=TimmBackboneConfig(backbone=backbone, out_indices=[-3, -2, -1], use_pretrained_backbone=False),
        num_queries=queries,
        two_stage_num_proposals=queries,
        two_stage=True,
        with_box_refine=True,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        num_labels=80,
    )
    model = DeformableDetrForObjectDetection(config).eval().to(batch.device)
    _scatter_points(model)
    mask = torch.ones(batch.shape[0], *batch.shape[2:], dtype=torch.long, device=batch.device)
    inputs: dict[nn.Module, tuple[tuple, dict]] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs[module] = args, kwargs

    parts = {"backbone": model.model.backbone, "encoder": model.model.encoder, "decoder": model.model.decoder}
    hooks = [part.register_forward_pre_hook(keep, with_kwargs=True) for part in parts.values()]
    with torch.no_grad():
        model(pixel_values=batch, pixel_mask=mask)
    for hook in hooks:
        hook.remove()
    return {
        **{DETR + name: partial(part, *inputs[part][0], **inputs[part][1]) for name, part in parts.items()},
        DETR + "all, to boxes": lambda: model(pixel_values=batch, pixel_mask=mask),
    }


def _encode(model: DINO, maps: Sequence[Tensor], scene: Scene, backend: str | None) -> Tensor:
    attend = partial(multi_scale_deformable_attention, backend=backend)
    with patch.object(multi_scale_deformable, "multi_scale_deformable_attention", attend), torch.enable_grad():
        return model.head.encode([x.detach().requires_grad_() for x in maps], scene)


def _step(model: DINO, maps: Sequence[Tensor], scene: Scene, backend: str | None) -> None:
    _encode(model, maps, scene, backend).sum().backward()


def _kept(model: DINO, maps: Sequence[Tensor], scene: Scene, backend: str | None) -> int:
    """Return the bytes that the encoder keeps for its backward pass, without parameters."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = _encode(model, maps, scene, backend)
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    del out
    return sum(storages.values())
