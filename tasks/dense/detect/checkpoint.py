"""Published detectors' files: which detector they hold, in which variant, and their entries under our names.

Read are the containers of mmdet 2.x and 3.x, whose heads have the same names, those of detectron2, and our own.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ....zoo.checkpoint import Checkpoint, CheckpointError, LoadReport
from ..build import DenseFile, load_dense
from ..neck import convert_pyramid

_HEADS = ("rpn.", "roi_heads.", "head.")
# detectron2's prefixes and mmdet's. Levels of the pyramid are numbered by their strides there.
_DETECTRON = tuple(
    (re.compile(theirs), published)
    for theirs, published in (
        (r"proposal_generator\.rpn_head\.conv\.(?!conv)", "rpn_head.rpn_conv."),
        (r"proposal_generator\.rpn_head\.objectness_logits\.", "rpn_head.rpn_cls."),
        (r"proposal_generator\.rpn_head\.anchor_deltas\.", "rpn_head.rpn_reg."),
        (r"roi_heads\.box_head\.(\d+\.)?fc(\d)\.", "roi_head.bbox_head.{0}shared_fcs.{1}."),
        (r"roi_heads\.box_predictor\.(\d+\.)?cls_score\.", "roi_head.bbox_head.{0}fc_cls."),
        (r"roi_heads\.box_predictor\.(\d+\.)?bbox_pred\.", "roi_head.bbox_head.{0}fc_reg."),
        (r"roi_heads\.box_head\.(\d+\.)?conv(\d)\.norm\.", "roi_head.bbox_head.{0}shared_convs.{1}.bn."),
        (r"roi_heads\.box_head\.(\d+\.)?conv(\d)\.", "roi_head.bbox_head.{0}shared_convs.{1}.conv."),
        (r"roi_heads\.mask_head\.mask_fcn()(\d)\.norm\.", "roi_head.mask_head.convs.{1}.bn."),
        (r"roi_heads\.mask_head\.mask_fcn()(\d)\.", "roi_head.mask_head.convs.{1}.conv."),
        (r"backbone\.simfp_", "neck.simfp_"),
        (r"roi_heads\.mask_head\.deconv\.", "roi_head.mask_head.upsample."),
        (r"roi_heads\.mask_head\.predictor\.", "roi_head.mask_head.conv_logits."),
        (r"head\.cls_score\.", "bbox_head.retina_cls."),
        (r"head\.bbox_pred\.", "bbox_head.retina_reg."),
    )
)
_SUBNET = re.compile(r"head\.(cls|bbox)_subnet\.(\d)\.")
_LEVEL = re.compile(r"backbone\.(?:fpn_(lateral|output)(\d)|top_block\.p(\d))\.")
# Published prefixes and ours; the stage of a cascade is a group.
_NAMES = tuple(
    (re.compile(published), own)
    for published, own in (
        (r"rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
        # Of two convolutions, in ViTDet.
        (r"proposal_generator\.rpn_head\.conv\.conv(\d)\.", "rpn.head.conv.{}.0."),
        (r"rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
        (r"rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
        (r"roi_head\.bbox_head\.(?:(\d+)\.)?shared_convs\.(\d+)\.conv\.", "roi_heads.box_heads.{}.tower.{}.0."),
        (r"roi_head\.bbox_head\.(?:(\d+)\.)?shared_convs\.(\d+)\.bn\.", "roi_heads.box_heads.{}.tower.{}.1."),
        (r"roi_head\.bbox_head\.(?:(\d+)\.)?fc_cls\.", "roi_heads.box_heads.{}.cls_score."),
        (r"roi_head\.bbox_head\.(?:(\d+)\.)?fc_reg\.", "roi_heads.box_heads.{}.bbox_pred."),
        (r"roi_head\.mask_head\.(?:(\d+)\.)?convs\.(\d+)\.conv\.", "roi_heads.mask_heads.{}.convs.{}.0."),
        (r"roi_head\.mask_head\.(?:(\d+)\.)?convs\.(\d+)\.bn\.", "roi_heads.mask_heads.{}.convs.{}.1."),
        (r"roi_head\.mask_head\.(?:(\d+)\.)?upsample\.", "roi_heads.mask_heads.{}.predictor.conv5_mask."),
        (r"roi_head\.mask_head\.(?:(\d+)\.)?conv_logits\.", "roi_heads.mask_heads.{}.predictor.mask_fcn_logits."),
        (r"bbox_head\.(cls|reg)_convs\.(\d+)\.conv\.", "head.{}_tower.{}.0."),
        (r"bbox_head\.retina_cls\.", "head.cls_logits."),
        (r"bbox_head\.retina_reg\.", "head.bbox_pred."),
        # DINO.
        (r"(level_embed|query_embedding|memory_trans_fc|memory_trans_norm)(\.|$)", "head.{}{}"),
        (r"dn_query_generator\.", "head.denoising."),
        (r"encoder\.layers\.(\d+)\.ffn\.layers\.0\.0\.", "head.encoder.layers.{}.linear1."),
        (r"encoder\.layers\.(\d+)\.ffn\.layers\.1\.", "head.encoder.layers.{}.linear2."),
        (r"encoder\.layers\.(\d+)\.norms\.0\.", "head.encoder.layers.{}.norm1."),
        (r"encoder\.layers\.(\d+)\.norms\.1\.", "head.encoder.layers.{}.norm2."),
        (r"decoder\.layers\.(\d+)\.self_attn\.attn\.", "head.decoder.layers.{}.self_attention.self_attn."),
        (r"decoder\.layers\.(\d+)\.norms\.0\.", "head.decoder.layers.{}.self_attention.norm."),
        (r"decoder\.layers\.(\d+)\.norms\.1\.", "head.decoder.layers.{}.norm."),
        (r"decoder\.layers\.(\d+)\.ffn\.layers\.0\.0\.", "head.decoder.layers.{}.feed_forward.linear1."),
        (r"decoder\.layers\.(\d+)\.ffn\.layers\.1\.", "head.decoder.layers.{}.feed_forward.linear2."),
        (r"decoder\.layers\.(\d+)\.norms\.2\.", "head.decoder.layers.{}.feed_forward.norm."),
        (r"(encoder|decoder)\.", "head.{}."),
        (r"bbox_head\.cls_branches\.", "head.cls_branches."),
        (r"bbox_head\.reg_branches\.(\d+)\.0\.", "head.reg_branches.{}.layers.0."),
        (r"bbox_head\.reg_branches\.(\d+)\.2\.", "head.reg_branches.{}.layers.1."),
        (r"bbox_head\.reg_branches\.(\d+)\.4\.", "head.reg_branches.{}.layers.2."),
    )
)
_HIDDEN = re.compile(r"roi_head\.bbox_head\.(?:(\d+)\.)?shared_fcs\.(\d+)\.")
_CONV = re.compile(r"roi_head\.bbox_head\.(?:\d+\.)?shared_convs\.(\d+)\.conv\.weight")
# The layers that know the classes, of which the offsets may or may not.
_CLASSIFIERS = re.compile(
    r"roi_heads\.(box_heads\.\d+\.(cls_score|bbox_pred)|mask_heads\.\d+\.predictor\.mask_fcn_logits)\.|head\.cls_logits\."
    r"|head\.(cls_branches\.\d+|denoising\.label_embedding)\."
)


def read_detector(checkpoint: Checkpoint) -> DenseFile:
    """Return a detector's entries under our names, the backbone's as published, and what the file says of itself.

    Raises:
        CheckpointError: If it holds no detector.
    """
    file = DenseFile.of(checkpoint)
    cells = _cells_of(file)
    if cells != 9:
        raise CheckpointError(f"{file.path}: its RetinaNet has {cells} anchors in a cell; known are 9, of three sizes")
    file.state = _renamed(file)
    if not any(key.startswith(_HEADS) for key in file.state):
        raise CheckpointError(f"{file.path}: holds no detector, only {', '.join(map(repr, list(file.state)[:3]))}, ...")
    return file


def held_detector(checkpoint: Checkpoint) -> str | None:
    """Return the name of the detector that a file holds; None if it holds none that is known here."""
    file = DenseFile.of(checkpoint)
    if _cells_of(file) != 9:
        return None
    state = _renamed(file)
    head = _marked(state)
    return None if head == "cascade_mask_rcnn" and not _has_masks(state) else head


def _cells_of(file: DenseFile) -> int:
    """Return how many anchors a cell of detectron2's RetinaNet has; 9 of all others."""
    outputs = file.state.get("head.bbox_pred.weight") if _is_detectron(file) else None
    return 9 if outputs is None else len(outputs) // 4


def _is_detectron(file: DenseFile) -> bool:
    return file.origin is not None and file.origin.library == "detectron2"


def _renamed(file: DenseFile) -> dict[str, Tensor]:
    """Return a file's entries under our names, as far as they are a detector's."""
    published = from_detectron(file.state) if _is_detectron(file) else file.state
    convs = len({match.group(1) for key in published if (match := _CONV.fullmatch(key))})
    return {renamed(key, convs): value for key, value in convert_pyramid(published).items()}


def from_detectron(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return detectron2's entries under mmdet's names, and RetinaNet's outputs in its order of anchors."""
    levels = [match for key in state if (match := _LEVEL.match(key))]
    # RetinaNet's pyramid begins at the second map.
    first = min((int(match[2]) for match in levels if match[2]), default=2)
    count = len({match[2] for match in levels if match[1] == "lateral"})
    extras = sorted({int(match[3]) for match in levels if match[3]})

    def mm(key: str) -> str:
        if match := _LEVEL.match(key):
            kind, level, extra = match.groups()
            part = "lateral" if kind == "lateral" else "fpn"
            number = int(level) - first if level else count + extras.index(int(extra))
            return f"neck.{part}_convs.{number}.conv." + key[match.end() :]
        if match := _SUBNET.match(key):
            part = "cls" if match[1] == "cls" else "reg"
            return f"bbox_head.{part}_convs.{int(match[2]) // 2}.conv." + key[match.end() :]
        for theirs, published in _DETECTRON:
            if match := theirs.match(key):
                stage, number = (*match.groups(), None, None)[:2]
                number = int(number) - 1 if number else ""
                return published.format(stage or "", number) + key[match.end() :]
        return key

    def ordered(key: str, value: Tensor) -> Tensor:
        # Sizes are outside there and ratios inside; here it is the other way round.
        if key.startswith(("head.cls_score.", "head.bbox_pred.")) and len(value) % 9 == 0:
            return value.unflatten(0, (3, 3, -1)).transpose(0, 1).flatten(0, 2)
        return value

    return {mm(key): ordered(key, value) for key, value in state.items()}


def renamed(key: str, convs: int) -> str:
    """Return our name of a published entry of a head, whose box heads have ``convs`` convolutions; others stay."""
    if match := _HIDDEN.match(key):
        # In torchvision's tower the convolutions come first, then flattening, then layers with activations between.
        stage, layer = match.group(1) or "0", convs + 1 + 2 * int(match.group(2))
        return f"roi_heads.box_heads.{stage}.tower.{layer}." + key[match.end() :]
    for published, own in _NAMES:
        if match := published.match(key):
            return own.format(*("0" if group is None else group for group in match.groups())) + key[match.end() :]
    return key


def head_of(state: dict[str, Tensor], path: str | Path) -> str:
    """Return the name of the detector that a state dict is of."""
    head = _marked(state)
    if head is None:
        raise CheckpointError(
            f"{path}: holds no head that is known; known: retinanet, faster_rcnn, mask_rcnn, cascade_mask_rcnn, dino"
        )
    if head == "cascade_mask_rcnn" and not _has_masks(state):
        raise CheckpointError(f"{path}: holds a cascade without masks, which there is none of here")
    return head


def _marked(state: dict[str, Tensor]) -> str | None:
    """Return the name of the detector that entries under our names are of; None if of none."""
    if "head.cls_logits.weight" in state:
        return "retinanet"
    if "head.query_embedding.weight" in state and "head.memory_trans_fc.weight" in state:
        return "dino"
    if "roi_heads.box_heads.0.cls_score.weight" not in state:
        return None
    if "roi_heads.box_heads.1.cls_score.weight" in state:
        return "cascade_mask_rcnn"
    return "mask_rcnn" if _has_masks(state) else "faster_rcnn"


def _has_masks(state: dict[str, Tensor]) -> bool:
    return any(key.startswith("roi_heads.mask_heads.") for key in state)


def variant_of(head: str, state: dict[str, Tensor], path: str | Path) -> dict:
    """Return the class count and the detector's options that the entries and their shapes tell.

    Raises:
        CheckpointError: If there is no pyramid.
    """
    if head == "dino":
        return _dino_variant(state)
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
    if head == "mask_rcnn" and "rpn.head.conv.1.0.weight" in state:
        variant["design"] = "vitdet"
    if head == "cascade_mask_rcnn":
        variant["style"] = "swin" if "roi_heads.box_heads.0.tower.0.0.weight" in state else "default"
        if "rpn.head.conv.1.0.weight" in state:
            variant["style"] = "vitdet"
        variant["mask_heads"] = len({key.split(".")[2] for key in state if key.startswith("roi_heads.mask_heads.")})
    return variant


def _dino_variant(state: dict[str, Tensor]) -> dict[str, Any]:
    levels, channels = state["head.level_embed"].shape

    def layers(part: str) -> int:
        matches = (re.match(rf"head\.{part}\.layers\.(\d+)\.", key) for key in state)
        return len({match[1] for match in matches if match})

    return {
        "num_classes": state["head.denoising.label_embedding.weight"].shape[0],
        "num_levels": levels,
        "channels": channels,
        "num_queries": state["head.query_embedding.weight"].shape[0],
        "hidden": state["head.encoder.layers.0.linear1.weight"].shape[0],
        "encoder_layers": layers("encoder"),
        "decoder_layers": layers("decoder"),
    }


def _dino_rules(file: DenseFile, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return DINO's options that its file's settings or name tell: the position embedding, and how it was trained."""
    model = file.origin.model
    options: dict[str, Any] = {"max_detections": file.origin.test.get("max_per_img")}
    if position := file.origin.part("positional_encoding"):
        options |= {"temperature": position.get("temperature", 10000), "offset": position.get("offset", 0.0)}
        loss, group = (_part(model, *names) for names in (("bbox_head", "loss_cls"), ("dn_cfg", "group_cfg")))
        options |= {"cls_weight": loss.get("loss_weight"), "denoising_queries": group.get("num_dn_queries")}
    elif file.origin.says("improved"):
        options |= {"temperature": 10000.0, "offset": -0.5, "cls_weight": 2.0, "denoising_queries": 300}
    elif file.origin.says("dino"):
        options |= {"temperature": 20.0, "offset": 0.0}
    elif not {"temperature", "offset"} & given.keys():
        raise CheckpointError(
            f"{file.path}: neither settings nor a name tell its position embedding; it is temperature=20, offset=0, or "
            "in mmdet's improved form temperature=10000, offset=-0.5"
        )
    return options


def _part(settings: Any, *names: str) -> Mapping[str, Any]:
    for name in names:
        settings = settings.get(name) if isinstance(settings, Mapping) else None
    return settings if isinstance(settings, Mapping) else {}


def rules_of(file: DenseFile, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a detector that neither names nor shapes tell: whose rules they are, and their limits.

    Args:
        file: The detector's.
        given: Options that the caller gives, which are not asked for.

    Raises:
        CheckpointError: If it is a DINO that doesn't tell its position embedding, and the caller doesn't.
    """
    if file.origin is None:
        return {}
    if "head.query_embedding.weight" in file.state:
        options = _dino_rules(file, given)
        return {name: value for name, value in options.items() if type(value) in (int, float)}
    if file.origin.library == "detectron2":
        retina = "head.cls_logits.weight" in file.state
        return {"rules": "detectron2"} | ({"extra_relu": True} if retina else {})
    test = file.origin.test
    test = test.get("rcnn") or test
    nms = test.get("nms")
    options = {
        "score_threshold": test.get("score_thr"),
        "nms_threshold": nms.get("iou_threshold", nms.get("iou_thr")) if isinstance(nms, dict) else None,
        "max_detections": test.get("max_per_img"),
    }
    return {name: value for name, value in options.items() if type(value) in (int, float)}


def load_detector(model: nn.Module, file: DenseFile, backbone_loaded: bool, reset_classifier: bool) -> LoadReport:
    """Load entries under our names into ``model``: all of them, and no others; report what was done.

    Args:
        model: The detector.
        file: What `read_detector` returned; the backbone's entries may have been renamed since.
        backbone_loaded: Whether the backbone has its weights already.
        reset_classifier: Whether the layers that know the classes keep their initial values.

    Raises:
        CheckpointError: If entries are missing, unexpected or of another shape.
    """
    model_state, state = model.state_dict(), file.state

    def fresh(key: str) -> bool:
        # Offsets for all classes have four rows whatever the classes; those of a single class are one's own.
        shared = ".bbox_pred." in key and len(model_state[key]) == len(state.get(key, ())) == 4
        return reset_classifier and not shared and _CLASSIFIERS.match(key) is not None

    return load_dense(model, file, backbone_loaded, fresh)
