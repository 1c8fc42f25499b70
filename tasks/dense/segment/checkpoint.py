"""Published segmenters' files: which head they hold, in which variant, and their entries under our names.

Read are the containers of mmseg 0.x and 1.x, of detectron2-style Mask2Former and of OneFormer, and our own.
"""

import dataclasses
import logging
import re
from pathlib import Path

from torch import Tensor, nn

from ....zoo.checkpoint import Checkpoint, CheckpointError, LoadReport
from ....zoo.published import Origin
from ..build import DenseFile, load_dense
from ..neck import convert_pyramid
from .ham import convert_ham

_logger = logging.getLogger(__name__)

# How to know a head by an entry of its own.
_MARKS = {
    "upernet": re.compile(r"head\.psp_modules\."),
    "semantic_fpn": re.compile(r"head\.scale_heads\."),
    "ham_net": re.compile(r"head\.join\."),
    "light_ham": re.compile(r"head\.hamburger\."),
    "mca": re.compile(r"head\.cross_axis\."),
    "attention_unet": re.compile(r"head\.gates\."),
    "deeplabv3": re.compile(r"head\.classifier\.0\.convs\.|head\.aspp\.aspp_modules\.1\.conv\."),
    "deeplabv3_plus": re.compile(r"head\.(sep_bottleneck|c1_bottleneck|aspp\.aspp_modules\.1\.depthwise_conv)\."),
    "oneformer": re.compile(r"head\.predictor\.class_transformer\."),
    "mask2former": re.compile(r"head\.predictor\.query_feat\."),
}
# mmseg's name of MSCAN's depthwise convolutions, which the authors call dwconv.dwconv.
_OF_MMSEG = re.compile(r"backbone\.block\d\.\d+\.mlp\.dwconv\.weight")
# The prefix of Mask2Former's pixel decoder in its first files.
_OLD = re.compile(r"sem_seg_head\.(?!predictor\.|pixel_decoder\.)")
# Published prefixes and ours.
_NAMES = (
    ("decode_head.image_pool.", "head.aspp.image_pool."),
    ("decode_head.aspp_modules.", "head.aspp.aspp_modules."),
    ("decode_head.", "head."),
    ("auxiliary_head.", "aux_head."),
    *((f"neck.{part}_blocks.", f"head.neck.{part}_blocks.") for part in ("inner", "layer", "extra")),
    ("task_mlp.", "head.task_mlp."),
    ("sem_seg_head.", "head."),
)
# What the published files hold for training only: OneFormer's networks for text, and constants.
_NETWORKS = ("text_encoder.", "text_projector.", "prompt_ctx.")
_EXTRAS = (*_NETWORKS, "criterion.", "pixel_mean", "pixel_std", "data_preprocessor.")
# mmdet's and mmseg's names of Mask2Former and the authors', after the head's prefix; the first that matches counts.
_LAYER = r"transformer_decoder\.layers\.(\d+)\."
_MASK2FORMER = tuple(
    (re.compile(mm), theirs)
    for mm, theirs in (
        (r"pixel_decoder\.input_convs\.(\d)\.conv\.", "pixel_decoder.input_proj.{0}.0."),
        (r"pixel_decoder\.input_convs\.(\d)\.gn\.", "pixel_decoder.input_proj.{0}.1."),
        (r"pixel_decoder\.lateral_convs\.0\.conv\.", "pixel_decoder.adapter_1."),
        (r"pixel_decoder\.lateral_convs\.0\.gn\.", "pixel_decoder.adapter_1.norm."),
        (r"pixel_decoder\.output_convs\.0\.conv\.", "pixel_decoder.layer_1."),
        (r"pixel_decoder\.output_convs\.0\.gn\.", "pixel_decoder.layer_1.norm."),
        (r"pixel_decoder\.mask_feature\.", "pixel_decoder.mask_features."),
        (r"pixel_decoder\.level_encoding\.weight", "pixel_decoder.transformer.level_embed"),
        (
            r"pixel_decoder\.encoder\.layers\.(\d+)\.(?:self_attn|attentions\.0)\.",
            "pixel_decoder.transformer.encoder.layers.{0}.self_attn.",
        ),
        (r"pixel_decoder\.encoder\.layers\.(\d+)\.norms\.0\.", "pixel_decoder.transformer.encoder.layers.{0}.norm1."),
        (r"pixel_decoder\.encoder\.layers\.(\d+)\.norms\.1\.", "pixel_decoder.transformer.encoder.layers.{0}.norm2."),
        (
            r"pixel_decoder\.encoder\.layers\.(\d+)\.ffns?(?:\.0)?\.layers\.0\.0\.",
            "pixel_decoder.transformer.encoder.layers.{0}.linear1.",
        ),
        (
            r"pixel_decoder\.encoder\.layers\.(\d+)\.ffns?(?:\.0)?\.layers\.1\.",
            "pixel_decoder.transformer.encoder.layers.{0}.linear2.",
        ),
        (r"(query_feat|query_embed|level_embed)\.", "predictor.{0}."),
        (r"cls_embed\.", "predictor.class_embed."),
        (r"mask_embed\.0\.", "predictor.mask_embed.layers.0."),
        (r"mask_embed\.2\.", "predictor.mask_embed.layers.1."),
        (r"mask_embed\.4\.", "predictor.mask_embed.layers.2."),
        (r"transformer_decoder\.post_norm\.", "predictor.decoder_norm."),
        (
            _LAYER + r"(?:cross_attn|attentions\.0)\.attn\.",
            "predictor.transformer_cross_attention_layers.{0}.multihead_attn.",
        ),
        (
            _LAYER + r"(?:self_attn|attentions\.1)\.attn\.",
            "predictor.transformer_self_attention_layers.{0}.self_attn.",
        ),
        (_LAYER + r"ffns?(?:\.0)?\.layers\.0\.0\.", "predictor.transformer_ffn_layers.{0}.linear1."),
        (_LAYER + r"ffns?(?:\.0)?\.layers\.1\.", "predictor.transformer_ffn_layers.{0}.linear2."),
        (_LAYER + r"norms\.0\.", "predictor.transformer_cross_attention_layers.{0}.norm."),
        (_LAYER + r"norms\.1\.", "predictor.transformer_self_attention_layers.{0}.norm."),
        (_LAYER + r"norms\.2\.", "predictor.transformer_ffn_layers.{0}.norm."),
    )
)
_CLASSIFIERS = ("head.conv_seg.", "aux_head.conv_seg.", "head.classifier.4.", "head.predictor.class_embed.")


def read_segmenter(checkpoint: Checkpoint) -> DenseFile:
    """Return a segmenter's entries under our names, the backbone's as published, and what the file says of itself.

    Raises:
        CheckpointError: If it holds no segmenter.
    """
    file = DenseFile.of(checkpoint)
    state, extras = _renamed(file.state)
    if extras:
        kinds = sorted({key.split(".")[0] for key in extras})
        level = logging.WARNING if any(key.startswith(_NETWORKS) for key in extras) else logging.INFO
        _logger.log(level, f"{file.path}: left out {len(extras)} entries that only training needs: {', '.join(kinds)}")
    if not any(key.startswith("head.") for key in state):
        raise CheckpointError(f"{file.path}: holds no segmenter, only {', '.join(map(repr, list(state)[:3]))}, ...")
    if _aligns_corners(file.origin):
        raise CheckpointError(f"{file.path}: its head aligns corners when it resizes (align_corners), ours doesn't")
    return dataclasses.replace(file, state=state, constants=(*file.constants, *extras))


def held_segmenter(checkpoint: Checkpoint) -> str | None:
    """Return the name of the head that a segmenter's file holds; None if it holds none that is known here."""
    file = DenseFile.of(checkpoint)
    return None if _aligns_corners(file.origin) else _marked(_renamed(file.state)[0])


def _renamed(published: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return a segmenter's entries under our names, and the names of those that only training needs."""
    state, extras = {}, []
    masked = next(
        (head for head in ("decode_head.", "panoptic_head.") if f"{head}query_feat.weight" in published), None
    )
    pooled = any(key.startswith("decode_head.aspp_modules.") for key in published)
    # The neck of plain vision transformers has some names of a feature pyramid.
    for key, value in (published if neck_of(published) == "multilevel" else convert_pyramid(published)).items():
        if key.startswith(_EXTRAS):
            extras.append(key)
            continue
        if masked is not None:
            key = _as_authors(masked, key)
        if pooled and key.startswith("decode_head.bottleneck."):
            key = f"decode_head.aspp.{key.removeprefix('decode_head.')}"
        key = _OLD.sub("sem_seg_head.pixel_decoder.", key).replace(".static_query.", ".query_feat.")
        old_prefix, new_prefix = next((names for names in _NAMES if key.startswith(names[0])), ("", ""))
        state[new_prefix + key.removeprefix(old_prefix)] = value
    return convert_ham(state), extras


def _as_authors(head: str, key: str) -> str:
    """Return the authors' name of an entry of mmdet's or mmseg's Mask2Former, whose head is called ``head``."""
    if not key.startswith(head):
        return key
    name = key.removeprefix(head)
    for mm, theirs in _MASK2FORMER:
        if match := mm.match(name):
            return "sem_seg_head." + theirs.format(*match.groups()) + name[match.end() :]
    return key


def _aligns_corners(origin: Origin | None) -> bool:
    """Return whether a file's heads align corners when they resize, which ours don't."""
    return origin is not None and (
        bool(origin.part("decode_head").get("align_corners")) or "769x769" in origin.path.name
    )


def head_of(state: dict[str, Tensor], path: str | Path) -> str:
    """Return the name of the head that a state dict is of."""
    head = _marked(state)
    if head is None:
        raise CheckpointError(f"{path}: holds no head that is known; known: {', '.join(_MARKS)}")
    return head


def _marked(state: dict[str, Tensor]) -> str | None:
    """Return the name of the head that entries under our names are of; None if of none."""
    return next((head for head, mark in _MARKS.items() if any(mark.match(key) for key in state)), None)


def variant_of(head: str, state: dict[str, Tensor]) -> dict:
    """Return the class count and the head's options that the entries' names and shapes tell."""
    if head == "deeplabv3" and "head.classifier.4.weight" in state:
        return {"num_classes": state["head.classifier.4.weight"].shape[0]}
    if head in ("mask2former", "oneformer"):
        return _transformer_variant(state)
    num_classes, channels = state["head.conv_seg.weight"].shape[:2]
    variant = {"num_classes": num_classes, "channels": channels}
    if head == "deeplabv3":
        variant["design"] = "mmseg"
    if head == "deeplabv3_plus":
        variant["detail"] = state["head.c1_bottleneck.conv.weight"].shape[0]
    if head == "semantic_fpn":
        variant["neck_channels"] = state["head.neck.layer_blocks.0.0.weight"].shape[0]
    if head == "light_ham" and (inner := state["head.hamburger.ham_in.weight"].shape[0]) != channels:
        variant["ham_channels"] = inner
    if (bases := state.get("head.hamburger.bases")) is not None:
        variant["rank"] = bases.shape[-1]
    elif head == "light_ham" and any(_OF_MMSEG.fullmatch(key) for key in state):
        variant["rank"] = 16
    return variant


def _transformer_variant(state: dict[str, Tensor]) -> dict:
    encoder, decoder = "head.pixel_decoder.transformer.encoder.layers.", "head.predictor.transformer_ffn_layers."

    def layers(prefix: str) -> int:
        return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})

    num_queries, dim = state["head.predictor.query_embed.weight"].shape
    variant = {
        "num_classes": state["head.predictor.class_embed.weight"].shape[0] - 1,
        "num_queries": num_queries,
        "dim": dim,
        "encoder_layers": layers(encoder),
        "decoder_layers": layers(decoder),
    }
    for name, key in (
        ("encoder_hidden", f"{encoder}0.linear1.weight"),
        ("decoder_hidden", f"{decoder}0.linear1.weight"),
    ):
        if key in state:
            variant[name] = state[key].shape[0]
    return variant


def neck_of(state: dict[str, Tensor]) -> str:
    """Return which neck the entries hold; ``"auto"`` if none."""
    marks = {"neck.convs.": "multilevel", "neck.simfp_": "simple", "neck.levels.": "scaled"}
    return next((neck for mark, neck in marks.items() if any(key.startswith(mark) for key in state)), "auto")


def aux_channels_of(state: dict[str, Tensor]) -> int | None:
    """Return the channels of the auxiliary head, or None if the state dict has none."""
    if not any(key.startswith("aux_head.") for key in state):
        return None
    if "aux_head.conv_seg.weight" not in state:
        raise CheckpointError("the auxiliary head is not whole: 1 missing (aux_head.conv_seg.weight)")
    return state["aux_head.conv_seg.weight"].shape[1]


def load_segmenter(model: nn.Module, file: DenseFile, backbone_loaded: bool, reset_classifier: bool) -> LoadReport:
    """Load entries under our names into ``model``: all of them, and no others; report what was done.

    Args:
        model: The segmenter.
        file: What `read_segmenter` returned; the backbone's entries may have been renamed since.
        backbone_loaded: Whether the backbone has its weights already.
        reset_classifier: Whether the layers that know the classes keep their initial values.

    Raises:
        CheckpointError: If entries are missing, unexpected or of another shape.
    """
    if hasattr(model.head, "hamburger"):
        # No published file has the bases, which are drawn from a seed.
        bases = {"head.hamburger.bases": model.head.hamburger.bases}
        file = dataclasses.replace(file, state=bases | file.state)
    auxiliary = [key for key in file.state if key.startswith("aux_head.")]
    if not model.has_aux_head and auxiliary:
        _logger.info(f"{file.path}: left out the auxiliary head, which was not asked for")
        state = {key: value for key, value in file.state.items() if key not in auxiliary}
        file = dataclasses.replace(file, state=state, constants=(*file.constants, *auxiliary))
    return load_dense(model, file, backbone_loaded, lambda key: reset_classifier and key.startswith(_CLASSIFIERS))
