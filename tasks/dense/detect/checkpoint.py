"""Published detectors' files: which detector they hold, in which variant, and their entries under our names.

Read are the containers of mmdet 2.x and 3.x, whose heads have the same names, and our own.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ....zoo import CheckpointError
from ....zoo._checkpoint import LoadReport, card_of, open_checkpoint, state_of
from ..build import load_dense
from ..neck import convert_pyramid

_HEADS = ("rpn.", "roi_heads.", "head.")
# Published prefixes and ours; the stage of a cascade is a group.
_NAMES = tuple(
    (re.compile(published), ours)
    for published, ours in (
        (r"rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
        (r"rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
        (r"rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
        (r"roi_head\.bbox_head\.(?:(\d+)\.)?shared_convs\.(\d+)\.conv\.", "roi_heads.box_heads.{}.tower.{}.0."),
        (r"roi_head\.bbox_head\.(?:(\d+)\.)?shared_convs\.(\d+)\.bn\.", "roi_heads.box_heads.{}.tower.{}.1."),
        (r"roi_head\.bbox_head\.(?:(\d+)\.)?fc_cls\.", "roi_heads.box_heads.{}.cls_score."),
        (r"roi_head\.bbox_head\.(?:(\d+)\.)?fc_reg\.", "roi_heads.box_heads.{}.bbox_pred."),
        (r"roi_head\.mask_head\.(?:(\d+)\.)?convs\.(\d+)\.conv\.", "roi_heads.mask_heads.{}.convs.{}.0."),
        (r"roi_head\.mask_head\.(?:(\d+)\.)?upsample\.", "roi_heads.mask_heads.{}.predictor.conv5_mask."),
        (r"roi_head\.mask_head\.(?:(\d+)\.)?conv_logits\.", "roi_heads.mask_heads.{}.predictor.mask_fcn_logits."),
        (r"bbox_head\.(cls|reg)_convs\.(\d+)\.conv\.", "head.{}_tower.{}.0."),
        (r"bbox_head\.retina_cls\.", "head.cls_logits."),
        (r"bbox_head\.retina_reg\.", "head.bbox_pred."),
    )
)
_HIDDEN = re.compile(r"roi_head\.bbox_head\.(?:(\d+)\.)?shared_fcs\.(\d+)\.")
_CONV = re.compile(r"roi_head\.bbox_head\.(?:\d+\.)?shared_convs\.(\d+)\.conv\.weight")
# mmdet 3.x keeps the normalisation of images there; ours is the transform's.
_EXTRAS = ("data_preprocessor.",)
# The layers that know the classes, of which the offsets may or may not.
_CLASSIFIERS = re.compile(
    r"roi_heads\.(box_heads\.\d+\.(cls_score|bbox_pred)|mask_heads\.\d+\.predictor\.mask_fcn_logits)\.|head\.cls_logits\."
)


def held_options(path: str | Path) -> dict[str, Any]:
    """Return the options of `create_detector` that a checkpoint of `foveate train` was made with; else none."""
    card = card_of(path, open_checkpoint(path)) or {}
    return dict(card["kwargs"]) if card.get("task") == "detect" else {}


def read_detector(path: str | Path) -> dict[str, Tensor]:
    """Read a detector's checkpoint; return its entries under our names, the backbone's as published.

    Raises:
        CheckpointError: If it can't be read, or holds no detector.
    """
    published = state_of(open_checkpoint(path))
    convs = len({match.group(1) for key in published if (match := _CONV.fullmatch(key))})
    state = {
        renamed(key, convs): value for key, value in convert_pyramid(published).items() if not key.startswith(_EXTRAS)
    }
    if not any(key.startswith(_HEADS) for key in state):
        raise CheckpointError(f"{path}: holds no detector, only {', '.join(map(repr, list(state)[:3]))}, ...")
    return state


def renamed(key: str, convs: int) -> str:
    """Return our name of a published entry of a head, whose box heads have ``convs`` convolutions; others stay."""
    if match := _HIDDEN.match(key):
        # In torchvision's tower the convolutions come first, then flattening, then layers with activations between.
        stage, layer = match.group(1) or "0", convs + 1 + 2 * int(match.group(2))
        return f"roi_heads.box_heads.{stage}.tower.{layer}." + key[match.end() :]
    for published, ours in _NAMES:
        if match := published.match(key):
            return ours.format(*(group or "0" for group in match.groups())) + key[match.end() :]
    return key


def head_of(state: dict[str, Tensor], path: str | Path) -> str:
    """Return the name of the detector that a state dict is of."""
    if "head.cls_logits.weight" in state:
        return "retinanet"
    if "roi_heads.box_heads.0.cls_score.weight" not in state:
        raise CheckpointError(f"{path}: holds no head that is known; known: retinanet, mask_rcnn, cascade_mask_rcnn")
    return "cascade_mask_rcnn" if "roi_heads.box_heads.1.cls_score.weight" in state else "mask_rcnn"


def variant_of(head: str, state: dict[str, Tensor], path: str | Path) -> dict:
    """Return the class count and the detector's options that the entries and their shapes tell.

    Raises:
        CheckpointError: If there is no pyramid.
    """
    levels = [key for key in state if re.fullmatch(r"neck\.inner_blocks\.\d+\.0\.weight", key)]
    simple = next((key for key in state if re.fullmatch(r"neck\.simfp_\d\.\d+\.norm\.weight", key)), None)
    if simple is None and (not levels or "neck.layer_blocks.0.0.weight" not in state):
        raise CheckpointError(f"{path}: holds heads without a pyramid (neck.*)")
    channels = state[simple or "neck.layer_blocks.0.0.weight"].shape[0]
    variant = {"channels": channels}
    extra = state.get("neck.extra_blocks.convs.0.weight")
    if extra is None:
        variant["extra_convs"] = None
    elif simple is not None:
        variant["extra_convs"] = "on_output"
    else:
        # Where the backbone's last map has as many channels as the outputs, either fits; on_input is the published one.
        last = max(levels, key=lambda key: int(key.split(".")[2]))
        variant["extra_convs"] = "on_input" if extra.shape[1] == state[last].shape[1] else "on_output"
    if head == "retinanet":
        per_cell = state["head.bbox_pred.weight"].shape[0] // 4
        return variant | {"num_classes": state["head.cls_logits.weight"].shape[0] // per_cell}
    classes, hidden = state["roi_heads.box_heads.0.cls_score.weight"].shape
    variant |= {"num_classes": classes - 1, "hidden": hidden}
    if head == "cascade_mask_rcnn":
        variant["style"] = "swin" if "roi_heads.box_heads.0.tower.0.0.weight" in state else "default"
    return variant


def load_detector(
    model: nn.Module, state: dict[str, Tensor], path: str | Path, backbone_loaded: bool, reset_classifier: bool
) -> LoadReport:
    """Load entries under our names into ``model``: all of them, and no others; report what was done.

    Args:
        model: The detector.
        state: What `read_detector` returned.
        path: Its file, for messages.
        backbone_loaded: Whether the backbone has its weights already.
        reset_classifier: Whether the layers that know the classes keep their initial values.

    Raises:
        CheckpointError: If entries are missing, unexpected or of another shape.
    """
    wanted = model.state_dict()

    def fresh(key: str) -> bool:
        # Offsets for all classes have four rows whatever the classes; those of a single class are one's own.
        shared = ".bbox_pred." in key and len(wanted[key]) == len(state.get(key, ())) == 4
        return reset_classifier and not shared and _CLASSIFIERS.match(key) is not None

    return load_dense(model, state, path, backbone_loaded, fresh)
