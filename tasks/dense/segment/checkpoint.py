"""Published segmenters' files: which head they hold, in which variant, and their entries under our names.

Read are the containers of mmseg 0.x and 1.x, of detectron2-style Mask2Former and of OneFormer, and our own.
"""

import logging
import re
from pathlib import Path

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ....zoo import CheckpointError
from ....zoo._checkpoint import LoadReport, card_of, open_checkpoint, state_of
from ..build import load_dense
from ..neck import convert_pyramid

_logger = logging.getLogger(__name__)

# How to know a head by an entry of its own.
_MARKS = {
    "upernet": re.compile(r"head\.psp_modules\."),
    "semantic_fpn": re.compile(r"head\.scale_heads\."),
    "deeplabv3": re.compile(r"head\.classifier\.0\.convs\."),
    "oneformer": re.compile(r"head\.predictor\.class_transformer\."),
    "mask2former": re.compile(r"head\.predictor\.query_feat\."),
}
# The prefix of Mask2Former's pixel decoder in its first files.
_OLD = re.compile(r"sem_seg_head\.(?!predictor\.|pixel_decoder\.)")
# Published prefixes and ours.
_NAMES = (
    ("decode_head.", "head."),
    ("auxiliary_head.", "aux_head."),
    *((f"neck.{part}_blocks.", f"head.neck.{part}_blocks.") for part in ("inner", "layer", "extra")),
    ("task_mlp.", "head.task_mlp."),
    ("sem_seg_head.", "head."),
)
# What the published files hold for training only: OneFormer's networks for text, and constants.
_NETWORKS = ("text_encoder.", "text_projector.", "prompt_ctx.")
_EXTRAS = (*_NETWORKS, "criterion.", "pixel_mean", "pixel_std", "data_preprocessor.")
_CLASSIFIERS = ("head.conv_seg.", "aux_head.conv_seg.", "head.classifier.4.", "head.predictor.class_embed.")


def held_statistics(path: str | Path) -> dict[str, tuple[float, ...]]:
    """Return the ``mean`` and ``std`` of the images of a checkpoint of `foveate train`; ImageNet's of other files."""
    rule = (card_of(path, open_checkpoint(path)) or {}).get("input", {})
    usual = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return {key: tuple(rule.get(key, value)) for key, value in usual.items()}


def read_segmenter(path: str | Path) -> dict[str, Tensor]:
    """Read a segmenter's checkpoint; return its entries under our names, the backbone's as published.

    Raises:
        CheckpointError: If it can't be read, or holds no segmenter.
    """
    state, extras = {}, []
    held = state_of(open_checkpoint(path))
    # The neck of plain vision transformers has some names of a feature pyramid.
    for key, value in (held if neck_of(held) == "multilevel" else convert_pyramid(held)).items():
        if key.startswith(_EXTRAS):
            extras.append(key)
            continue
        key = _OLD.sub("sem_seg_head.pixel_decoder.", key).replace(".static_query.", ".query_feat.")
        published, ours = next((names for names in _NAMES if key.startswith(names[0])), ("", ""))
        state[ours + key.removeprefix(published)] = value
    if extras:
        kinds = sorted({key.split(".")[0] for key in extras})
        level = logging.WARNING if any(key.startswith(_NETWORKS) for key in extras) else logging.INFO
        _logger.log(level, f"{path}: left out {len(extras)} entries that only training needs: {', '.join(kinds)}")
    if not any(key.startswith("head.") for key in state):
        raise CheckpointError(f"{path}: holds no segmenter, only {', '.join(map(repr, list(state)[:3]))}, ...")
    return state


def head_of(state: dict[str, Tensor], path: str | Path) -> str:
    """Return the name of the head that a state dict is of."""
    for head, mark in _MARKS.items():
        if any(mark.match(key) for key in state):
            return head
    raise CheckpointError(f"{path}: holds no head that is known; known: {', '.join(_MARKS)}")


def variant_of(head: str, state: dict[str, Tensor]) -> dict:
    """Return the class count and the head's options that the entries' names and shapes tell."""
    if head == "deeplabv3":
        return {"num_classes": state["head.classifier.4.weight"].shape[0]}
    if head in ("mask2former", "oneformer"):
        return _transformer_variant(state)
    num_classes, channels = state["head.conv_seg.weight"].shape[:2]
    variant = {"num_classes": num_classes, "channels": channels}
    if head == "semantic_fpn":
        variant["neck_channels"] = state["head.neck.layer_blocks.0.0.weight"].shape[0]
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
    weight = state.get("aux_head.conv_seg.weight")
    return None if weight is None else weight.shape[1]


def load_segmenter(
    model: nn.Module, state: dict[str, Tensor], path: str | Path, backbone_loaded: bool, reset_classifier: bool
) -> LoadReport:
    """Load entries under our names into ``model``: all of them, and no others; report what was done.

    Args:
        model: The segmenter.
        state: What `read_segmenter` returned.
        path: Its file, for messages.
        backbone_loaded: Whether the backbone has its weights already.
        reset_classifier: Whether the layers that know the classes keep their initial values.

    Raises:
        CheckpointError: If entries are missing, unexpected or of another shape.
    """
    if not model.has_aux_head and any(key.startswith("aux_head.") for key in state):
        _logger.info(f"{path}: left out the auxiliary head, which was not asked for")
        state = {key: value for key, value in state.items() if not key.startswith("aux_head.")}
    return load_dense(
        model, state, path, backbone_loaded, lambda key: reset_classifier and key.startswith(_CLASSIFIERS)
    )
