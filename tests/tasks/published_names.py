"""Models' entries under the names that mmdet, mmseg and detectron2 give them, and their files."""

import pickle
import re
from pathlib import Path

import torch

COUNTS = "num_batches_tracked"
SWIN = (
    (r"backbone\.out_norms\.(\d)\.", r"backbone.norm\1."),
    (r"backbone\.features\.patch_embed\.proj\.", "backbone.patch_embed.projection."),
    (
        r"backbone\.features\.layers_(\d)\.downsample\.",
        lambda match: f"backbone.stages.{int(match[1]) - 1}.downsample.",
    ),
    (r"backbone\.features\.layers_(\d)\.blocks\.(\d+)\.attn\.", r"backbone.stages.\1.blocks.\2.attn.w_msa."),
    (r"backbone\.features\.layers_(\d)\.blocks\.(\d+)\.mlp\.fc1\.", r"backbone.stages.\1.blocks.\2.ffn.layers.0.0."),
    (r"backbone\.features\.layers_(\d)\.blocks\.(\d+)\.mlp\.fc2\.", r"backbone.stages.\1.blocks.\2.ffn.layers.1."),
    (r"backbone\.features\.layers_(\d)\.", r"backbone.stages.\1."),
    (r"backbone\.features\.", "backbone."),
)
# DINO's head in mmdet.
DINO = (
    (r"head\.denoising\.", "dn_query_generator."),
    (r"head\.encoder\.layers\.(\d)\.linear1\.", r"encoder.layers.\1.ffn.layers.0.0."),
    (r"head\.encoder\.layers\.(\d)\.linear2\.", r"encoder.layers.\1.ffn.layers.1."),
    (r"head\.encoder\.layers\.(\d)\.norm1\.", r"encoder.layers.\1.norms.0."),
    (r"head\.encoder\.layers\.(\d)\.norm2\.", r"encoder.layers.\1.norms.1."),
    (r"head\.decoder\.layers\.(\d)\.self_attention\.self_attn\.", r"decoder.layers.\1.self_attn.attn."),
    (r"head\.decoder\.layers\.(\d)\.self_attention\.norm\.", r"decoder.layers.\1.norms.0."),
    (r"head\.decoder\.layers\.(\d)\.norm\.", r"decoder.layers.\1.norms.1."),
    (r"head\.decoder\.layers\.(\d)\.feed_forward\.linear1\.", r"decoder.layers.\1.ffn.layers.0.0."),
    (r"head\.decoder\.layers\.(\d)\.feed_forward\.linear2\.", r"decoder.layers.\1.ffn.layers.1."),
    (r"head\.decoder\.layers\.(\d)\.feed_forward\.norm\.", r"decoder.layers.\1.norms.2."),
    (r"head\.cls_branches\.", "bbox_head.cls_branches."),
    (r"head\.reg_branches\.(\d)\.layers\.0\.", r"bbox_head.reg_branches.\1.0."),
    (r"head\.reg_branches\.(\d)\.layers\.1\.", r"bbox_head.reg_branches.\1.2."),
    (r"head\.reg_branches\.(\d)\.layers\.2\.", r"bbox_head.reg_branches.\1.4."),
    (r"head\.", ""),
)
# Mask2Former's head in mmseg.
_LAYER = r"head\.predictor\.transformer_"
MASK2FORMER = (
    (r"head\.pixel_decoder\.input_proj\.(\d)\.0\.", r"decode_head.pixel_decoder.input_convs.\1.conv."),
    (r"head\.pixel_decoder\.input_proj\.(\d)\.1\.", r"decode_head.pixel_decoder.input_convs.\1.gn."),
    (r"head\.pixel_decoder\.adapter_1\.norm\.", "decode_head.pixel_decoder.lateral_convs.0.gn."),
    (r"head\.pixel_decoder\.adapter_1\.", "decode_head.pixel_decoder.lateral_convs.0.conv."),
    (r"head\.pixel_decoder\.layer_1\.norm\.", "decode_head.pixel_decoder.output_convs.0.gn."),
    (r"head\.pixel_decoder\.layer_1\.", "decode_head.pixel_decoder.output_convs.0.conv."),
    (r"head\.pixel_decoder\.mask_features\.", "decode_head.pixel_decoder.mask_feature."),
    (r"head\.pixel_decoder\.transformer\.level_embed", "decode_head.pixel_decoder.level_encoding.weight"),
    (r"head\.pixel_decoder\.transformer\.(.*)norm1\.", r"decode_head.pixel_decoder.\1norms.0."),
    (r"head\.pixel_decoder\.transformer\.(.*)norm2\.", r"decode_head.pixel_decoder.\1norms.1."),
    (r"head\.pixel_decoder\.transformer\.(.*)linear1\.", r"decode_head.pixel_decoder.\1ffn.layers.0.0."),
    (r"head\.pixel_decoder\.transformer\.(.*)linear2\.", r"decode_head.pixel_decoder.\1ffn.layers.1."),
    (r"head\.pixel_decoder\.transformer\.", "decode_head.pixel_decoder."),
    (r"head\.predictor\.class_embed\.", "decode_head.cls_embed."),
    (r"head\.predictor\.mask_embed\.layers\.0\.", "decode_head.mask_embed.0."),
    (r"head\.predictor\.mask_embed\.layers\.1\.", "decode_head.mask_embed.2."),
    (r"head\.predictor\.mask_embed\.layers\.2\.", "decode_head.mask_embed.4."),
    (r"head\.predictor\.decoder_norm\.", "decode_head.transformer_decoder.post_norm."),
    *(
        (f"{_LAYER}{ours}", rf"decode_head.transformer_decoder.layers.\1.{theirs}")
        for ours, theirs in (
            (r"cross_attention_layers\.(\d)\.multihead_attn\.", "cross_attn.attn."),
            (r"self_attention_layers\.(\d)\.self_attn\.", "self_attn.attn."),
            (r"ffn_layers\.(\d)\.linear1\.", "ffn.layers.0.0."),
            (r"ffn_layers\.(\d)\.linear2\.", "ffn.layers.1."),
            (r"cross_attention_layers\.(\d)\.norm\.", "norms.0."),
            (r"self_attention_layers\.(\d)\.norm\.", "norms.1."),
            (r"ffn_layers\.(\d)\.norm\.", "norms.2."),
        )
    ),
    (r"head\.predictor\.", "decode_head."),
)


def renamed(state: dict, *rules: tuple[str, str]) -> dict:
    """Return entries under new names, each by the first of the rules that fits."""
    result = {}
    for key, value in state.items():
        for ours, theirs in rules:
            if re.match(ours, key):
                key = re.sub(ours, theirs, key, count=1)
                break
        result[key] = value
    return result


def as_mm(model: torch.nn.Module) -> dict:
    """Return a detector's entries under mmdet's names."""
    state = model.state_dict()
    if any(key.startswith("head.denoising.") for key in state):
        return renamed(state, *SWIN, *DINO)
    extra = len(model.neck.inner_blocks)
    hidden = {"1": "0", "3": "1"}
    state = renamed(
        state,
        (r"backbone\.features\.", "backbone."),
        (r"neck\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
        (r"neck\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
        (r"neck\.extra_blocks\.convs\.0\.", f"neck.fpn_convs.{extra}.conv."),
        (r"neck\.extra_blocks\.convs\.1\.", f"neck.fpn_convs.{extra + 1}.conv."),
        (r"head\.(cls|reg)_tower\.(\d)\.0\.", r"bbox_head.\1_convs.\2.conv."),
        (r"head\.cls_logits\.", "bbox_head.retina_cls."),
        (r"head\.bbox_pred\.", "bbox_head.retina_reg."),
        (r"rpn\.head\.conv\.0\.0\.", "rpn_head.rpn_conv."),
        (r"rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
        (r"rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
        (r"roi_heads\.box_heads\.0\.cls_score\.", "roi_head.bbox_head.fc_cls."),
        (r"roi_heads\.box_heads\.0\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
        (r"roi_heads\.mask_heads\.0\.convs\.(\d)\.0\.", r"roi_head.mask_head.convs.\1.conv."),
        (r"roi_heads\.mask_heads\.0\.predictor\.conv5_mask\.", "roi_head.mask_head.upsample."),
        (r"roi_heads\.mask_heads\.0\.predictor\.mask_fcn_logits\.", "roi_head.mask_head.conv_logits."),
    )
    tower = re.compile(r"roi_heads\.box_heads\.0\.tower\.(\d)\.")
    return {
        tower.sub(lambda match: f"roi_head.bbox_head.shared_fcs.{hidden[match[1]]}.", key): value
        for key, value in state.items()
    }


def mm_file(state: dict, path: Path, config: str | None = None, **meta) -> Path:
    """Write a file as mmdet's and mmseg's publish_model.py does."""
    meta |= {} if config is None else {"config": config}
    torch.save({"meta": meta, "state_dict": state}, path, _use_new_zipfile_serialization=False)
    return path


def detectron_backbone(state: dict, prefix: str) -> dict:
    return renamed(
        state,
        (r"backbone\.features\.conv1\.", f"{prefix}stem.conv1."),
        (r"backbone\.features\.bn1\.", f"{prefix}stem.conv1.norm."),
        *(
            (rf"backbone\.features\.layer{level}\.(\d+)\.{ours}\.", rf"{prefix}res{level + 1}.\1.{theirs}.")
            for level in range(1, 5)
            for ours, theirs in (
                ("conv1", "conv1"),
                ("conv2", "conv2"),
                ("conv3", "conv3"),
                ("bn1", "conv1.norm"),
                ("bn2", "conv2.norm"),
                ("bn3", "conv3.norm"),
                (r"downsample\.0", "shortcut"),
                (r"downsample\.1", "shortcut.norm"),
            )
        ),
    )


def as_detectron(model: torch.nn.Module, first: int) -> dict:
    """Return a detector's entries under detectron2's names; the pyramid's first level has the stride 2 ** first."""
    state = detectron_backbone(model.state_dict(), "backbone.bottom_up.")
    levels = range(first, 6)
    retina = [
        (
            r"head\.(cls|reg)_tower\.(\d)\.0\.",
            lambda m: f"head.{'cls' if m[1] == 'cls' else 'bbox'}_subnet.{2 * int(m[2])}.",
        )
    ]
    state = renamed(
        state,
        *((rf"neck\.inner_blocks\.{level - first}\.0\.", f"backbone.fpn_lateral{level}.") for level in levels),
        *((rf"neck\.layer_blocks\.{level - first}\.0\.", f"backbone.fpn_output{level}.") for level in levels),
        (r"neck\.extra_blocks\.convs\.0\.", "backbone.top_block.p6."),
        (r"neck\.extra_blocks\.convs\.1\.", "backbone.top_block.p7."),
        *retina,
        (r"head\.cls_logits\.", "head.cls_score."),
        (r"rpn\.head\.conv\.0\.0\.", "proposal_generator.rpn_head.conv."),
        (r"rpn\.head\.cls_logits\.", "proposal_generator.rpn_head.objectness_logits."),
        (r"rpn\.head\.bbox_pred\.", "proposal_generator.rpn_head.anchor_deltas."),
        (r"roi_heads\.box_heads\.0\.tower\.(\d)\.", lambda m: f"roi_heads.box_head.fc{1 + int(m[1]) // 2}."),
        (r"roi_heads\.box_heads\.0\.(cls_score|bbox_pred)\.", r"roi_heads.box_predictor.\1."),
        (
            r"roi_heads\.mask_heads\.0\.convs\.(\d)\.0\.",
            lambda m: f"roi_heads.mask_head.mask_fcn{1 + int(m[1])}.",
        ),
        (r"roi_heads\.mask_heads\.0\.predictor\.conv5_mask\.", "roi_heads.mask_head.deconv."),
        (r"roi_heads\.mask_heads\.0\.predictor\.mask_fcn_logits\.", "roi_heads.mask_head.predictor."),
    )
    # Sizes are outside there: (size, ratio), here (ratio, size).
    for key in (key for key in state if key.startswith(("head.cls_score.", "head.bbox_pred."))):
        value = state[key]
        state[key] = value.reshape(3, 3, len(value) // 9, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
    return state


def detectron_file(state: dict, path: Path) -> Path:
    """Write a file as detectron2's model zoo has them."""
    arrays = {key: value.numpy() for key, value in state.items() if not key.endswith(COUNTS)}
    with open(path, "wb") as file:
        pickle.dump({"model": arrays, "__author__": "Detectron2 Model Zoo", "matching_heuristics": True}, file, 3)
    return path
