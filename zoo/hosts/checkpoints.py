"""Published checkpoints of the hosts, whatever attends in them: their names, layouts and tables of positions."""

import re

import torch
from torch import Tensor, nn

from ...blocks.position import resize_map
from ...blocks.relative_bias import resize_bias_table
from ...blocks.window import from_swin_table
from .cswin import CSWin
from .deit import DeiT
from .pvt import PVT

# From the published names to ours.
_SWIN_NAMES = (
    (r"^patch_embed\.", lambda m: "stem."),
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^layers\.", lambda m: "stages."),
    (r"^norm(\d)\.", lambda m: f"out_norms.{m[1]}."),
    (r"\.relative_position_bias_table$", lambda m: ".rpb"),
)
_PVT_NAMES = (
    (r"^patch_embed1\.proj\.", lambda m: "stem.conv."),
    (r"^patch_embed1\.norm\.", lambda m: "stem.norm."),
    (r"^pos_embed1$", lambda m: "stem.pos_embed"),
    (r"^patch_embed(\d)\.proj\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.conv."),
    (r"^patch_embed(\d)\.norm\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.norm."),
    (r"^pos_embed(\d)$", lambda m: f"stages.{int(m[1]) - 1}.downsample.pos_embed"),
    (r"^block(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
)
_CSWIN_NAMES = (
    (r"^stage1_conv_embed\.0\.", lambda m: "stem.conv."),
    (r"^stage1_conv_embed\.2\.", lambda m: "stem.norm."),
    (r"^merge(\d)\.", lambda m: f"stages.{m[1]}.downsample."),
    (r"^stage(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
    (r"\.(qkv|proj)\.", lambda m: f".attn.{m[1]}."),
    (r"\.attns\.(\d)\.get_v\.", lambda m: f".attn.lepe.{m[1]}."),
)


def published_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a published state dict of a host under ``model``'s names and in its layouts, whatever the image size.

    What the published code recomputes (``relative_position_index``, ``attn_mask``) is dropped.
    """
    if isinstance(model, DeiT):
        quarter = len(model.stages[0].blocks)
        names = (
            (r"^patch_embed\.", lambda m: "stem."),
            (r"^blocks\.(\d+)\.", lambda m: f"stages.{int(m[1]) // quarter}.blocks.{int(m[1]) % quarter}."),
        )
    elif isinstance(model, PVT):
        names = _PVT_NAMES
    elif isinstance(model, CSWin):
        names = _CSWIN_NAMES
    else:
        names = _SWIN_NAMES
    renamed = {}
    for key, value in state.items():
        if key.endswith((".relative_position_index", ".attn_mask")):
            continue
        if key.endswith("relative_position_bias_table"):
            value = from_swin_table(value)
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        if key.endswith(".pos_embed") and value.ndim == 3:
            side = round(value.shape[1] ** 0.5)
            value = value.unflatten(1, (side, side))
        renamed[key] = value
    for key in [key for key in renamed if ".attn.q." in key]:
        kv = key.replace(".attn.q.", ".attn.kv.")
        if kv in renamed:
            renamed[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat([renamed.pop(key), renamed.pop(kv)])
    return renamed


def resize_positions(key: str, value: Tensor, size: torch.Size, model: nn.Module) -> tuple[Tensor, str] | None:
    """Resample a host's bias table or position embedding to ``model``'s image size, bicubic, as published."""
    if isinstance(model, DeiT) and key == "pos_embed":
        side = round((value.shape[1] - 1) ** 0.5)
        if side * side != value.shape[1] - 1:
            return None
        # A class token, then patches.
        grid = resize_map(value[:, 1:].unflatten(1, (side, side)), model.map_height, model.map_width, "bicubic")
        return torch.cat([value[:, :1], grid.flatten(1, 2)], dim=1), "bicubic"
    if value.ndim != len(size):
        return None
    if key.endswith(".rpb") and value.shape[0] == size[0]:
        return resize_bias_table(value, list(size[1:])), "bicubic"
    if key.endswith(".pos_embed") and value.shape[-1] == size[-1]:
        return resize_map(value, size[1], size[2], "bicubic"), "bicubic"
    return None
