"""The files of mmdet, mmseg, detectron2 and Mask2Former on timm's backbones: names, order of channels, and forms.

A *layout* is how a code base names a backbone's entries. What names and shapes can't tell, such as the stage of a
bottleneck that strides, the file's own settings tell, which are text and are read, not run; else its name; else the
caller is asked. In which *form* timm's model of that name then computes: `published_forms`.

Written after mmdet 3.3, mmseg 1.2, mmpretrain 1.2 (Apache-2.0), detectron2 (Apache-2.0) and Mask2Former (MIT).
"""

import ast
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import model_entrypoint
from torch import Tensor, nn

from .backbone import Backbone
from .checkpoint import Checkpoint, CheckpointError, absent_counters, load
from .published_forms import FORM_OPTIONS, STYLES

# Options of a form, and of timm's the ones that a published file may ask for.
TOLD_OPTIONS = (*FORM_OPTIONS, "output_stride", "stem_type", "stem_width", "img_size", "dynamic_img_size")

# 0 to 255, in the order of the channels.
_IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
_CAFFE = ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
_CAFFE_SCALED = ((103.53, 116.28, 123.675), (57.375, 57.12, 58.395))
_LONGEST = 1_000_000
_MM_HEADS = ("rpn_head.", "roi_head.", "bbox_head.", "decode_head.", "panoptic_head.")
_DETECTRON_HEADS = ("proposal_generator.", "roi_heads.", "sem_seg_head.", "head.cls_subnet.")
# Averaged twins of mm's hook, constants, and what is computed anew.
_CONSTANTS = re.compile(
    r"ema_\w+$|pixel_mean$|pixel_std$|criterion\.empty_weight$|data_preprocessor\."
    r"|.*anchor_generator\.cell_anchors\.|.*\.relative_position_index$|.*\.attn_mask$"
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a file comes from, and what it says of itself.

    Attributes:
        path: The file.
        library: ``"mm"`` (mmdet, mmseg) or ``"detectron2"`` (and Mask2Former).
        settings: Its configuration, as far as that is literals; empty if it has none.
        parts: The first two words of the names of its entries.
        classes: Names of its classes, if it has them.
    """

    path: Path
    library: str
    settings: Mapping[str, Any]
    parts: frozenset[str]
    classes: tuple[str, ...] = ()

    @property
    def model(self) -> Mapping[str, Any]:
        """The settings of its model."""
        return _dict(self.settings.get("model"))

    @property
    def backbone(self) -> Mapping[str, Any]:
        """The settings of its model's backbone."""
        return self.part("backbone")

    @property
    def test(self) -> Mapping[str, Any]:
        """The settings of its tests; older files have them beside the model."""
        return _dict(self.model.get("test_cfg")) or _dict(self.settings.get("test_cfg"))

    def part(self, name: str) -> Mapping[str, Any]:
        """Return the settings of a part of its model, such as ``"decode_head"``; empty if it has none."""
        return _dict(self.model.get(name))

    def says(self, *words: str) -> bool:
        """Return whether the file's name has one of some words."""
        parts = re.split(r"[_\-.\s]+", self.path.stem.lower())
        return any(word in parts for word in words)


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def origin_of(checkpoint: Checkpoint) -> Origin | None:
    """Return where a dense model's file comes from; None if it is none of those libraries'."""
    state = checkpoint.state
    if any(key.startswith(_MM_HEADS) for key in state):
        library = "mm"
    elif any(key.startswith(_DETECTRON_HEADS) and not key.startswith("roi_heads.box_heads.") for key in state):
        library = "detectron2"
    else:
        return None
    meta = _dict(checkpoint.content.get("meta"))
    text = next((meta[key] for key in ("config", "cfg") if isinstance(meta.get(key), str)), "")
    names = meta.get("CLASSES") or _dict(meta.get("dataset_meta")).get("classes") or ()
    plain = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    parts = frozenset(".".join(key.split(".")[:2]) for key in state)
    return Origin(checkpoint.path, library, settings_of(text), parts, tuple(names) if plain else ())


def settings_of(text: str) -> dict[str, Any]:
    """Return the literals that a configuration in Python assigns to names; nothing of it is run, all else is None."""
    if len(text) > _LONGEST:
        return {}
    known: dict[str, Any] = {}
    try:
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name):
                known[target.id] = _literal(node.value, known)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    return known


def _literal(node: ast.expr, known: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item, known) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
        return dict(zip(keys, (_literal(value, known) for value in node.values), strict=True))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {word.arg: _literal(word.value, known) for word in node.keywords}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand, known)
        return -value if isinstance(value, int | float) else None
    return None


def statistics_from(origin: Origin, state: Mapping[str, Tensor], style: str | None) -> dict[str, Any]:
    """Return ``mean`` and ``std`` of a file's images, of 0 to 1, and their ``channel_order``, ``"rgb"`` or ``"bgr"``.

    Args:
        origin: Where the file comes from.
        state: Its entries, the backbone's as published.
        style: Of its ResNet; None if it has none.
    """
    stated = _normalization(origin)
    if stated is not None:
        mean, std, order = stated
    elif _groups_of(state) == (256, 8):
        (mean, std), order = _CAFFE_SCALED, "bgr"
    elif style == "caffe":
        (mean, std), order = _CAFFE, "bgr"
    else:
        (mean, std), order = _IMAGENET, "rgb"
    scaled = {"mean": tuple(value / 255 for value in mean), "std": tuple(value / 255 for value in std)}
    return scaled | {"channel_order": order}


def _normalization(origin: Origin) -> tuple[Sequence[float], Sequence[float], str] | None:
    """Return mean, standard deviation and order of the channels of a file's own settings, if it says them."""
    places = (origin.model.get("data_preprocessor"), *(origin.settings.get(name) for name in _NORMALIZATIONS))
    for place in (*places, _normalize_of(origin.settings)):
        entry = _dict(place)
        mean, std = entry.get("mean"), entry.get("std")
        if all(isinstance(values, list) and len(values) == 3 and all(values) for values in (mean, std)):
            # Both libraries read images as BGR.
            return mean, std, "rgb" if entry.get("to_rgb", entry.get("bgr_to_rgb", False)) else "bgr"
    return None


_NORMALIZATIONS = ("data_preprocessor", "img_norm_cfg")


def _normalize_of(value: Any, depth: int = 0) -> Mapping[str, Any] | None:
    """Return the settings of the first step of a pipeline that normalises images."""
    if depth > 12:
        return None
    if isinstance(value, Mapping):
        if value.get("type") == "Normalize":
            return {"to_rgb": True} | value
        value = list(value.values())
    if isinstance(value, list):
        return next(filter(None, (_normalize_of(item, depth + 1) for item in value)), None)
    return None


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a code base names the entries of a backbone.

    Attributes:
        family: What it is, for messages.
        marks: Entries that no other layout has; one of them does.
        rules: Patterns of its names, and timm's; the first that matches the beginning counts. Several names of timm's,
            where an entry is cut into rows.
        kinds: Beginnings of timm's names of the models it is of.
        prefix: What stands before its names.
        change: What becomes of an entry's values, by timm's name.
        out_norms: Whether maps have norms of their own.
    """

    family: str
    marks: tuple[str, ...]
    rules: tuple[tuple[str, str], ...]
    kinds: tuple[str, ...]
    prefix: str = ""
    change: Callable[[str, Tensor], dict[str, Tensor]] | None = None
    out_norms: bool = False


def _unfold_order(name: str, value: Tensor) -> dict[str, Tensor]:
    """Put what merges four neighbors in Microsoft's order, neighbor by neighbor down the columns, from nn.Unfold's.

    There channels are outside, and neighbors, row by row, inside.
    """
    if ".downsample." in name and value.shape[-1] % 4 == 0:
        value = value.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2)
    return {name: value}


def _pvt_values(name: str, value: Tensor) -> dict[str, Tensor]:
    """Cut queries from keys and values, and make matrices of 1x1 convolutions."""
    if ".attn.in_proj." in name:
        dim = len(value) // 3
        return {name.replace("in_proj", "q"): value[:dim], name.replace("in_proj", "kv"): value[dim:]}
    if re.search(r"\.mlp\.fc[12]\.weight$", name):
        value = value.flatten(1)
    return {name: value}


def _pointwise(name: str, value: Tensor) -> dict[str, Tensor]:
    return {name: value.flatten(1) if re.search(r"\.mlp\.fc[12]\.weight$", name) else value}


def _without_token(name: str, value: Tensor) -> dict[str, Tensor]:
    """Give positions of patches the form of their grid, which is square, and leave out that of the class token."""
    if name == "patch_embed.pos_embed" and value.dim() == 3:
        side = math.isqrt(value.shape[1])
        value = value[:, -side * side :].unflatten(1, (side, side))
    return {name: value}


_SWIN_BLOCK = (
    (r"layers\.(\d+)\.downsample\.", "layers.{+1}.downsample."),
    (r"norm(\d)\.(weight|bias)$", "out_norms.{0}.{1}"),
)
LAYOUTS = (
    Layout(
        "detectron2's ResNet",
        ("res2.0.conv1.weight", "res3.0.conv1.weight"),
        (
            (r"stem\.conv1\.norm\.", "bn1."),
            (r"stem\.conv1\.", "conv1."),
            (r"res(\d)\.(\d+)\.conv(\d)\.norm\.", "layer{-1}.{1}.bn{2}."),
            (r"res(\d)\.(\d+)\.shortcut\.norm\.", "layer{-1}.{1}.downsample.1."),
            (r"res(\d)\.(\d+)\.shortcut\.", "layer{-1}.{1}.downsample.0."),
            (r"res(\d)\.(\d+)\.", "layer{-1}.{1}."),
        ),
        ("resnet", "resnext"),
    ),
    Layout(
        "mmdet's or mmseg's ResNet",
        ("layer1.0.conv1.weight", "layer2.0.conv1.weight"),
        ((r"stem\.7\.", "bn1."), (r"stem\.(\d)\.", "conv1.{0}.")),
        ("resnet", "resnext"),
    ),
    Layout(
        "mmdet's or mmseg's Swin Transformer",
        ("stages.0.blocks.0.attn.w_msa.qkv.weight", "stages.0.blocks.1.attn.w_msa.qkv.weight"),
        (
            (r"patch_embed\.projection\.", "patch_embed.proj."),
            (r"stages\.(\d)\.blocks\.(\d+)\.attn\.w_msa\.", "layers.{0}.blocks.{1}.attn."),
            (r"stages\.(\d)\.blocks\.(\d+)\.ffn\.layers\.0\.0\.", "layers.{0}.blocks.{1}.mlp.fc1."),
            (r"stages\.(\d)\.blocks\.(\d+)\.ffn\.layers\.1\.", "layers.{0}.blocks.{1}.mlp.fc2."),
            (r"stages\.(\d)\.downsample\.", "layers.{+1}.downsample."),
            (r"stages\.(\d)\.", "layers.{0}."),
            _SWIN_BLOCK[1],
        ),
        ("swin_",),
        change=_unfold_order,
        out_norms=True,
    ),
    Layout(
        "Microsoft's Swin Transformer",
        ("layers.0.blocks.0.attn.qkv.weight", "layers.0.blocks.1.attn.qkv.weight"),
        _SWIN_BLOCK,
        ("swin_",),
        out_norms=True,
    ),
    Layout(
        "mmpretrain's ConvNeXt",
        ("stages.0.0.depthwise_conv.weight", "stages.0.1.depthwise_conv.weight"),
        (
            (r"downsample_layers\.0\.(\d)\.", "stem.{0}."),
            (r"downsample_layers\.(\d)\.(\d)\.", "stages.{0}.downsample.{1}."),
            (r"stages\.(\d)\.(\d+)\.depthwise_conv\.", "stages.{0}.blocks.{1}.conv_dw."),
            (r"stages\.(\d)\.(\d+)\.pointwise_conv(\d)\.", "stages.{0}.blocks.{1}.mlp.fc{2}."),
            (r"stages\.(\d)\.(\d+)\.", "stages.{0}.blocks.{1}."),
            _SWIN_BLOCK[1],
        ),
        ("convnext_",),
        change=_pointwise,
        out_norms=True,
    ),
    Layout(
        "mmdet's PVTv2",
        ("layers.0.1.0.attn.attn.in_proj_weight", "layers.0.1.1.attn.attn.in_proj_weight"),
        (
            (r"layers\.0\.0\.projection\.", "patch_embed.proj."),
            (r"layers\.0\.0\.norm\.", "patch_embed.norm."),
            (r"layers\.(\d)\.0\.projection\.", "stages.{0}.downsample.proj."),
            (r"layers\.(\d)\.0\.norm\.", "stages.{0}.downsample.norm."),
            (r"layers\.(\d)\.2\.", "stages.{0}.norm."),
            (r"layers\.(\d)\.1\.(\d+)\.attn\.attn\.in_proj_", "stages.{0}.blocks.{1}.attn.in_proj."),
            (r"layers\.(\d)\.1\.(\d+)\.attn\.attn\.out_proj\.", "stages.{0}.blocks.{1}.attn.proj."),
            (r"layers\.(\d)\.1\.(\d+)\.ffn\.layers\.0\.", "stages.{0}.blocks.{1}.mlp.fc1."),
            (r"layers\.(\d)\.1\.(\d+)\.ffn\.layers\.1\.", "stages.{0}.blocks.{1}.mlp.dwconv."),
            (r"layers\.(\d)\.1\.(\d+)\.ffn\.layers\.4\.", "stages.{0}.blocks.{1}.mlp.fc2."),
            (r"layers\.(\d)\.1\.(\d+)\.", "stages.{0}.blocks.{1}."),
        ),
        ("pvt_v2_",),
        change=_pvt_values,
    ),
    Layout(
        "mmseg's ViT",
        ("layers.0.ln1.weight", "layers.1.ln1.weight"),
        (
            (r"patch_embed\.projection\.", "patch_embed.proj."),
            (r"layers\.(\d+)\.ln(\d)\.", "blocks.{0}.norm{1}."),
            (r"layers\.(\d+)\.attn\.attn\.in_proj_", "blocks.{0}.attn.qkv."),
            (r"layers\.(\d+)\.attn\.attn\.out_proj\.", "blocks.{0}.attn.proj."),
            (r"layers\.(\d+)\.ffn\.layers\.0\.0\.", "blocks.{0}.mlp.fc1."),
            (r"layers\.(\d+)\.ffn\.layers\.1\.", "blocks.{0}.mlp.fc2."),
            (r"ln1\.", "out_norms.3."),
        ),
        ("vit_", "deit_"),
    ),
    Layout(
        "detectron2's ViTDet",
        ("net.blocks.0.attn.rel_pos_h", "net.blocks.1.attn.rel_pos_h"),
        ((r"net\.pos_embed", "patch_embed.pos_embed"), (r"net\.", "")),
        ("samvit_",),
        change=_without_token,
    ),
)


def tests_of(layout: Layout, origin: Origin) -> dict[str, Any]:
    """Return how a segmenter's file was tested: ``mode``, ``crop_size`` and ``stride`` of windows, ``short``, ``long``.

    What it doesn't say itself is that of the files of its data and backbone: whole images, and windows for ConvNeXt.
    """
    large = 640 if origin.says("640x640") else 512
    slides = layout.family.endswith("ConvNeXt")
    options = {"mode": "slide", "crop_size": (large, large), "stride": (large * 2 // 3,) * 2} if slides else {}
    test = origin.test
    if test.get("mode") == "whole":
        options = {}
    elif test.get("mode") == "slide":
        sides = [test.get(name) for name in ("crop_size", "stride")]
        if all(isinstance(side, list) and [type(value) for value in side] == [int, int] for side in sides):
            options = {"mode": "slide", "crop_size": tuple(sides[0]), "stride": tuple(sides[1])}
    short = 1024 if origin.says("cityscapes") else large
    return options | {"short": short, "long": 2048 if short == 1024 else 4 * large}


def refuse_unknown_backbone(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise a CheckpointError that names a file's backbone, if timm has none such."""
    for mark, family in _UNKNOWN_BACKBONES:
        if any(mark.match(key) for key in state):
            raise CheckpointError(f"{path}: its backbone is {family}, which timm has not")


_UNKNOWN_BACKBONES = (
    (re.compile(r"backbone\.layers\.0\.1\.\d+\.pos_embed"), "a PVT of the first version"),
    (re.compile(r"backbone\.stages\.\d\.\d\.\d\.conv\d\.conv\."), "an HRNet or another of mm's own"),
    (
        re.compile(r"backbone\.(bottom_up\.)?\S+\.conv2_offset\.|backbone\.\S+\.conv_offset\."),
        "of deformable convolutions",
    ),
)


def layout_of(state: Mapping[str, Tensor]) -> Layout | None:
    """Return the layout of a dense model's backbone, whose entries begin with ``backbone.``; None if it is none here.

    The prefixes of detectron2's pyramids are read too.
    """
    for layout in LAYOUTS:
        for prefix in ("backbone.", "backbone.bottom_up."):
            if any(prefix + mark in state for mark in layout.marks):
                return dataclasses.replace(layout, prefix=prefix)
    return None


def _renamed(layout: Layout, name: str) -> str:
    for pattern, replacement in layout.rules:
        if match := re.match(pattern, name):
            groups = match.groups()
            replacement = replacement.replace("{+1}", str(int(groups[0]) + 1) if groups else "")
            replacement = replacement.replace("{-1}", str(int(groups[0]) - 1) if groups and groups[0].isdigit() else "")
            return replacement.format(*groups) + name[match.end() :]
    return name


def likely_model_of(checkpoint: Checkpoint) -> str | None:
    """Return timm's name of the model that a file's backbone is, by widths and depths; None if it is none here."""
    layout = layout_of(checkpoint.state)
    return None if layout is None else likely_model(layout, checkpoint.state)


def is_foreign(name: str) -> bool:
    """Return whether a registered model is timm's own, and none of this package."""
    return not model_entrypoint(name).__module__.startswith(f"{__package__}.")


def without_constants(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return a file's entries but its constants and averaged twins, and the names of those."""
    left = {key: value for key, value in state.items() if not _CONSTANTS.match(key)}
    return left, sorted(state.keys() - left.keys())


def form_of(
    layout: Layout, origin: Origin, state: Mapping[str, Tensor], name: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options of `create_backbone` that a file's backbone needs to compute what it did.

    Args:
        layout: Its layout.
        origin: Where it comes from.
        state: Its entries, the backbone's as published.
        name: Registered name of timm's model.
        given: Options that the caller gives; they decide what the file leaves open.

    Raises:
        CheckpointError: If the file is of another family or of a form that isn't known here, or leaves something open.
    """
    path = origin.path
    if not name.startswith(layout.kinds):
        raise CheckpointError(
            f"{path}: its backbone is {layout.family}, not {name}; create it on "
            f"{likely_model(layout, state) or f'one of timm{chr(39)}s {layout.kinds[0]}*'}"
        )
    if any(key.startswith(f"{layout.prefix}absolute_pos_embed") for key in state):
        raise CheckpointError(f"{path}: its Swin Transformer has absolute positions (absolute_pos_embed), timm's none")
    form: dict[str, Any] = {"dense": True}
    if layout.out_norms:
        levels = {int(match[1]) for key in state if (match := re.match(rf"{re.escape(layout.prefix)}norm(\d)\.", key))}
        # RetinaNet has no use for the finest map, nor has DINO of four scales.
        spares = origin.parts & {"bbox_head.retina_cls", "query_embedding.weight"}
        if levels not in ({0, 1, 2, 3}, *([{1, 2, 3}] if spares else [])):
            missing = ", ".join(f"{layout.prefix}norm{index}" for index in sorted({0, 1, 2, 3} - levels))
            raise CheckpointError(f"{path}: lacks norms of the backbone's maps: {missing}")
        form["out_norms"] = tuple(sorted(levels))
    if layout.family.endswith("ViT"):
        # Patches of 16 pixels; the class token has a position too.
        side = 16 * math.isqrt(_held(state, f"{layout.prefix}pos_embed", path).shape[1] - 1)
        form |= {"img_size": (side, side), "dynamic_img_size": True}
        form |= {"out_norms": (3,)} if f"{layout.prefix}ln1.weight" in state else {}
    if layout.family.endswith("ViTDet"):
        form["grid"] = math.isqrt(_held(state, f"{layout.prefix}net.pos_embed", path).shape[1])
    if "ResNet" in layout.family:
        form = {"style": _style_of(layout, origin, state, given.get("style"))}
        stride = _output_stride_of(origin, given.get("output_stride"))
        if stride != 32:
            form["output_stride"] = stride
        stem = state.get(f"{layout.prefix}stem.0.weight")
        if stem is not None:
            form |= {"stem_type": "deep", "stem_width": len(stem)}
    return form


def _held(state: Mapping[str, Tensor], key: str, path: Path) -> Tensor:
    if key not in state:
        raise CheckpointError(f"{path}: 1 missing ({key})")
    return state[key]


def _groups_of(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Return the channels of a ResNet's first 3x3 convolution, and those of a group of it."""
    keys = (f"{prefix}{stem}.0.conv2.weight" for prefix in ("backbone.", "backbone.bottom_up.") for stem in _FIRST)
    weight = next((state[key] for key in keys if key in state), None)
    return None if weight is None else tuple(weight.shape[:2])


_FIRST = ("layer1", "res2")


def _style_of(layout: Layout, origin: Origin, state: Mapping[str, Tensor], given: str | None) -> str:
    """Return which convolution of a ResNet's bottlenecks strides: the first (caffe) or the 3x3 one (pytorch)."""
    if given is not None and given not in STYLES:
        raise CheckpointError(f"style is {given!r}; it can be {' or '.join(map(repr, STYLES))}")
    first = [f"{layout.prefix}{stem}.0.conv3.weight" for stem in _FIRST]
    if not any(key in state for key in first):
        return "pytorch"  # blocks of two 3x3 convolutions, of which the first strides always
    stated = origin.backbone.get("style")
    if stated in STYLES:
        if given not in (None, stated):
            raise CheckpointError(f"{origin.path}: says itself that it is of style {stated!r}; leave style out")
        return stated
    if given is not None:
        return given
    groups = _groups_of(state)
    if groups and groups[0] != groups[1]:
        return "pytorch"  # nobody published another ResNeXt
    segments = any(part.startswith(("sem_seg_head.", "decode_head.", "panoptic_head.")) for part in origin.parts)
    # Nobody published a DINO of mm's on another ResNet.
    if segments or "query_embedding.weight" in origin.parts or origin.says("pytorch", "torchvision"):
        return "pytorch"
    if origin.says("caffe"):
        return "caffe"
    if origin.library == "detectron2":
        return "caffe"  # MODEL.RESNETS.STRIDE_IN_1X1 is True unless a configuration says otherwise
    if origin.says("r50", "r101", "r152"):
        return "pytorch"  # mm names the others' files by "caffe"
    raise CheckpointError(
        f"{origin.path}: neither its entries nor its settings nor its name tell which convolution of the bottlenecks "
        'strides: give style="caffe" or style="pytorch"'
    )


def _output_stride_of(origin: Origin, given: int | None) -> int:
    """Return the stride of a ResNet's last map."""
    settings, path = origin.backbone, origin.path
    if settings.get("multi_grid") or origin.says("mg124") or re.search(r"d16-mg", path.name):
        raise CheckpointError(f"{path}: its last stage dilates by a multi-grid, which timm's ResNets have not")
    dilations = settings.get("dilations")
    dilated = isinstance(dilations, list) and any(dilation != 1 for dilation in dilations)
    if dilated and settings.get("contract_dilation") is False:
        raise CheckpointError(f"{path}: its stages begin with their full dilation, which timm's ResNets don't")
    strides = settings.get("strides")
    if isinstance(strides, list) and len(strides) == 4 and all(isinstance(stride, int) for stride in strides):
        product = 4
        for stride in strides:
            product *= stride
        if given not in (None, product):
            raise CheckpointError(f"{path}: says itself that its output stride is {product}; leave output_stride out")
        return product
    if given is not None:
        return given
    if origin.says("d8"):
        return 8
    if origin.says("d16"):
        return 16
    if "decode_head.aspp_modules" in origin.parts:
        raise CheckpointError(
            f"{path}: neither its entries nor its settings nor its name tell how its ResNet is dilated: give "
            "output_stride=8 or output_stride=16"
        )
    return 32


def translated(layout: Layout, state: Mapping[str, Tensor], backbone: nn.Module, path: Path) -> dict[str, Tensor]:
    """Return a dense model's entries with the names that its backbone's have in a built `Backbone`.

    Args:
        layout: Of the backbone.
        state: Entries; those of the backbone begin with ``backbone.`` and are as published.
        backbone: What `create_backbone` built.
        path: The file, for messages.

    Raises:
        CheckpointError: If two entries would have the same name.
    """
    names = {_flat(key.removeprefix("features.").removeprefix("model.")): key for key in backbone.state_dict()}
    result: dict[str, Tensor] = {}
    if layout.family.endswith("ViT"):
        # mmseg 1.2 builds its patches without a bias, which its own files have.
        width = len(_held(state, f"{layout.prefix}patch_embed.projection.weight", path))
        state = {f"{layout.prefix}patch_embed.projection.bias": torch.zeros(width), **state}
    for key, value in state.items():
        if not key.startswith(layout.prefix):
            result[key] = value
            continue
        name = _renamed(layout, key.removeprefix(layout.prefix))
        for part, values in (layout.change(name, value) if layout.change else {name: value}).items():
            # A name that the model hasn't stays as the file has it, so that the error can tell.
            own = names.get(_flat(part))
            target = key if own is None else f"backbone.{own}"
            if target in result:
                raise CheckpointError(f"{path}: {key} and another entry are both {target}")
            result[target] = values
    return result


def _flat(name: str) -> str:
    return name.replace(".", "_")


def likely_model(layout: Layout, state: Mapping[str, Tensor]) -> str | None:
    """Return the name of timm's model that a file's backbone is, as far as depth and width tell."""
    keys = [key.removeprefix(layout.prefix) for key in state if key.startswith(layout.prefix)]

    def depth(pattern: str) -> int:
        return len({match[1] for key in keys if (match := re.match(pattern, key))})

    def width(name: str) -> int:
        return len(state[layout.prefix + name]) if layout.prefix + name in state else 0

    if "ResNet" in layout.family:
        stage = "res{}" if "detectron2" in layout.family else "layer{}"
        first = 2 if "detectron2" in layout.family else 1
        blocks = tuple(depth(stage.format(first + index) + r"\.(\d+)\.") for index in range(4))
        basic = f"{stage.format(first)}.0.conv3.weight" not in keys
        number = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34 if basic else 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}.get(
            blocks
        )
        if number is None:
            return None
        groups = {(128, 4): "32x4d", (256, 4): "64x4d", (256, 8): "32x8d"}.get(_groups_of(state))
        if groups:
            return f"resnext{number}_{groups}"
        return f"resnet{number}{'c' if 'stem.0.weight' in keys else ''}"
    if "Swin" in layout.family:
        patch = "projection" if "mmdet" in layout.family else "proj"
        deep = depth(r"(?:stages|layers)\.2\.blocks\.(\d+)\.") > 6
        size = {96: "small" if deep else "tiny", 128: "base", 192: "large"}.get(width(f"patch_embed.{patch}.weight"))
        table = next((len(state[key]) for key in state if key.endswith("relative_position_bias_table")), 169)
        return size and f"swin_{size}_patch4_window{'12_384' if table == 529 else '7_224'}"
    if "ConvNeXt" in layout.family:
        deep = depth(r"stages\.2\.(\d+)\.") > 9
        size = {96: "small" if deep else "tiny", 128: "base", 192: "large", 256: "xlarge"}
        return (variant := size.get(width("downsample_layers.0.0.weight"))) and f"convnext_{variant}"
    if "ViT" in layout.family:
        plain = {384: "deit_small_patch16_224", 768: "vit_base_patch16_224"}
        sam = {768: "samvit_base_patch16", 1024: "samvit_large_patch16", 1280: "samvit_huge_patch16"}
        return plain.get(width("patch_embed.projection.weight")) or sam.get(width("net.patch_embed.proj.weight"))
    depths = tuple(depth(rf"layers\.{index}\.1\.(\d+)\.") for index in range(4))
    known = {(3, 4, 6, 3): 2, (3, 4, 18, 3): 3, (3, 8, 27, 3): 4, (3, 6, 40, 3): 5}
    known[(2, 2, 2, 2)] = 0 if width("layers.0.0.projection.weight") == 32 else 1
    return f"pvt_v2_b{known[depths]}" if depths in known else None


def build_filled(
    create: Callable[..., Backbone], name: str, checkpoint: Checkpoint, options: Mapping[str, Any]
) -> Backbone | None:
    """Return timm's model with the backbone of a dense model's file; None if the file's layout is none of these.

    Args:
        create: Builds the backbone, without weights, of its options.
        name: Registered name of timm's model.
        checkpoint: The file.
        options: Of the backbone.

    Raises:
        CheckpointError: If the file is of another model or form.
    """
    path, published = checkpoint.path, checkpoint.state
    layout, origin = layout_of(published), origin_of(checkpoint)
    if layout is None or origin is None:
        if origin is not None:
            refuse_unknown_backbone(published, path)
        return None
    backbone = create(**form_of(layout, origin, published, name, options) | dict(options))
    state, constants = without_constants(published)
    state = {key: value for key, value in state.items() if key.startswith("backbone.")}
    state = translated(layout, state, backbone, path)
    state = {key.removeprefix("backbone."): value for key, value in state.items() if not _OF_NECK.match(key)}
    report = load(backbone, state, path, absent_counters(state, backbone), f"its backbone is no {name}")
    backbone.load_report = dataclasses.replace(report, unexpected=tuple(constants))
    return backbone


# detectron2 counts the pyramid as part of the backbone.
_OF_NECK = re.compile(r"backbone\.(fpn_|top_block\.|simfp_)")
