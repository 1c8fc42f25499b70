"""What the maps of timm's features are, measured by forward passes without values instead of taken on trust.

timm says the stride and the channels of every map, but not which images a model takes, nor whether its maps follow
them: some models take one size alone, some multiples of a window, some resize what they get, and some return maps
scrambled where a size doesn't suit them. So each is built on torch's meta device, which costs neither memory nor
arithmetic, and sees images of a few sizes.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn

from .library_errors import first_line, needs_values, unknown_option

# What lets timm's models of a fixed input size take any; each model has one of these options, or none.
_FREE_SIZE = ({"strict_img_size": False}, {"dynamic_img_size": True})
# Sides of which a model may need multiples: patches, windows on the coarsest map, and both.
_MULTIPLES = (1, 2, 4, 7, 8, 14, 16, 28, 32, 56, 64, 112, 128, 224, 256, 384, 448, 512)
# Convolutions without padding may cost a map as many pixels at its borders.
_MOST_BORDER = 5
_LEAST_SIDE = 96


class BackboneError(ValueError):
    """A model gives no maps that a dense head could use, or takes no images of a size; the message says why."""


class Maps(NamedTuple):
    """The maps of a model's features.

    Attributes:
        indices: Which of the model's maps these are.
        channels: Channels of each.
        strides: Stride of each on the image.
        channels_last: Whether they are NHWC.
        multiple: Images have sides that are multiples of it.
        size: The one ``(height, width)`` of images that the model takes; None if it takes any.
        borderless: Whether unpadded convolutions leave out the maps' borders.
    """

    indices: tuple[int, ...]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    channels_last: bool
    multiple: int = 1
    size: tuple[int, int] | None = None
    borderless: bool = False

    def take(self, indices: Sequence[int]) -> "Maps":
        """Return those maps, counted among all of the model's, or from the end.

        Raises:
            BackboneError: If there is no such map.
        """
        for index in indices:
            if index not in self.indices and not -len(self.indices) <= index < 0:
                raise BackboneError(f"there is no map {index}; there are {', '.join(map(str, self.indices))}")
        places = [self.indices.index(index) if index >= 0 else len(self.indices) + index for index in indices]
        return self._replace(
            indices=tuple(self.indices[place] for place in places),
            channels=tuple(self.channels[place] for place in places),
            strides=tuple(self.strides[place] for place in places),
        )


def sources_of(strides: Sequence[int], targets: Sequence[int]) -> list[int]:
    """Return for each wanted stride the map to make its own of: the deepest of that stride, or else of the nearest."""
    return [
        min(
            range(len(strides)),
            key=lambda place: (abs(math.log2(strides[place] / stride)), strides[place], -place),
        )
        for stride in targets
    ]


def dense_indices(maps: Maps, targets: Sequence[int] = (4, 8, 16, 32)) -> list[int]:
    """Return the indices of the maps that dense heads take.

    Of stages whose last four begin at stride 4, these four, dilated or not; of blocks on one map, four at even
    distances (mmseg's 2, 5, 8, 11 of 12); of all others those whose strides are nearest to the wanted ones.
    """
    count, strides = len(maps.strides), maps.strides
    if count >= 4 and strides[-4] == targets[0] and strides[-1] <= targets[-1]:
        places = list(range(count - 4, count))
    elif len(set(strides)) == 1:
        places = sorted({(place + 1) * count // 4 - 1 for place in range(4)} - {-1})
    else:
        places = sorted(set(sources_of(strides, targets)))
    return [maps.indices[place] for place in places]


def said_maps(features: nn.Module) -> Maps:
    """Return the maps of features whose word can be taken."""
    info = features.feature_info
    strides = info.reduction()
    return Maps(
        tuple(range(len(strides))),
        tuple(info.channels()),
        tuple(strides),
        # timm's Swin transformers and a few others say so.
        getattr(features, "output_fmt", "NCHW") == "NHWC",
    )


def cfg_of(name: str) -> PretrainedCfg:
    """Return timm's settings of a model; its default ones of a model that was registered without any."""
    return get_pretrained_cfg(name) or PretrainedCfg()


def measure(name: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], Maps]:
    """Return the options that let a timm model take images of any size, as far as there are any, and all of its maps.

    Args:
        name: Registered name.
        options: Options of the model.

    Raises:
        BackboneError: If timm gives no maps of it, or their strides can't be told.
        TypeError: If the model has no such option.
    """
    shaping = {
        key: value
        for key, value in options.items()
        if key not in ("features_only", "out_indices", "pretrained", "pretrained_cfg_overlay")
    }
    return _measured(name.split(".")[0], _Options(shaping))


class _Options(dict):
    """Options by which a cache may be looked up."""

    def __hash__(self) -> int:
        return hash(json.dumps(self, sort_keys=True, default=str))


@functools.lru_cache(maxsize=256)
def _measured(name: str, options: _Options) -> tuple[dict[str, Any], Maps]:
    device = "meta"
    try:
        free, features, indices = _build(name, options, device)
        if any(isinstance(module, nn.RNNBase) for module in features.modules()):
            raise NotImplementedError("recurrent layers are taken apart, step by step, on the meta device")
        maps = _measure(name, options, features, indices, device)
    except (BackboneError, TypeError):
        raise
    except (RuntimeError, NotImplementedError, AssertionError, IndexError, KeyError, AttributeError):
        # What reads values needs them.
        with torch.random.fork_rng(devices=[]):
            free, features, indices = _build(name, options, "cpu")
            maps = _measure(name, options, features, indices, "cpu")
    return free, maps


def _build(name: str, options: Mapping[str, Any], device: str) -> tuple[dict[str, Any], nn.Module, tuple[int, ...]]:
    """Return the options that free the input size, features with all maps, and these maps' indices."""
    freedoms = (*_FREE_SIZE, {})
    if "img_size" in options or not cfg_of(name).fixed_input_size:
        freedoms = ({},)
    for free in freedoms:
        try:
            features = _create(name, {**free, **options}, None, device)
            break
        except TypeError as error:
            if unknown_option(error) not in free:
                raise
    indices = tuple(index for index, info in enumerate(features.feature_info.info) if info["module"])
    return free, _create(name, {**free, **options}, indices, device).eval(), indices


def _create(name: str, options: Mapping[str, Any], indices: tuple[int, ...] | None, device: str) -> nn.Module:
    selection = {} if indices is None else {"out_indices": indices}
    try:
        with torch.device(device):
            return timm.create_model(name, features_only=True, **selection, **options)
    except (IndexError, AssertionError):
        if indices is not None:
            raise
        return _create(name, options, (0,), device)  # it has fewer maps than timm's default takes
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        if device == "meta":
            raise
        raise BackboneError(f"timm gives no maps of {name}: {first_line(error)}") from error


def _measure(name: str, options: Mapping[str, Any], features: nn.Module, indices: tuple[int, ...], device: str) -> Maps:
    channels, said = features.feature_info.channels(), features.feature_info.reduction()
    in_chans = options.get("in_chans", 3)

    def see(size: tuple[int, int]) -> tuple[list[tuple[int, int]], bool] | None:
        """Return the sizes of the maps of an image, and whether they are NHWC; None if it isn't taken."""
        try:
            with torch.no_grad():
                outputs = features(torch.zeros(1, in_chans, *size, device=device))
        except Exception as error:  # any error says that the model doesn't take this size
            if device == "meta" and needs_values(error):
                raise NotImplementedError(str(error)) from error
            return None
        return _layout(outputs, channels)

    before = None
    for multiple in _MULTIPLES:
        odd = _sides(multiple)
        seen = see(odd)
        if seen is not None and seen == before:
            break  # it resizes what it gets, as CrossViT does
        before = seen or before
        if seen is None or not _follow(seen[0], odd, said):
            continue
        unit = math.lcm(multiple, *said)
        least = max(3, -(-_LEAST_SIDE // unit)) if unit < 448 else 1
        small = (least * unit, (least + 2) * unit)
        aligned = see(small)
        if aligned is None:
            continue
        strides, border = _strides(aligned[0], small, said)
        if strides is not None:
            return Maps(indices, tuple(channels), strides, aligned[1], multiple, None, border)
    size = options.get("img_size") or cfg_of(name).input_size[1:]
    size = (size, size) if isinstance(size, int) else tuple(size)
    seen = see(size)
    if seen is None:
        raise BackboneError(f"{name} gives no maps of images of {size[0]}x{size[1]}, nor of any other size tried")
    strides, border = _strides(seen[0], size, said)
    if strides is None:
        ratios = ", ".join(f"{size[0] / height:.4g}" for height, _ in dict.fromkeys(seen[0]))
        raise BackboneError(
            f"{name} takes images of {size[0]}x{size[1]} alone, of which its maps are 1/{ratios}; "
            "dense heads need strides of whole pixels"
        )
    return Maps(indices, tuple(channels), strides, seen[1], 1, size, border)


def _sides(multiple: int) -> tuple[int, int]:
    """Return two odd multiples, a small and a larger one."""
    least = -(-_LEAST_SIDE // multiple) | 1
    step = 46 // multiple if multiple < 23 else 2
    return least * multiple, (least + step + step % 2) * multiple


def _layout(maps: Sequence[Tensor], channels: Sequence[int]) -> tuple[list[tuple[int, int]], bool] | None:
    """Return height and width of each map, and whether they are NHWC; None if they are no maps of these channels."""
    if len(maps) != len(channels) or any(level.dim() != 4 for level in maps):
        return None
    for channels_last in (False, True):
        place = 3 if channels_last else 1
        if all(level.shape[place] == count for level, count in zip(maps, channels, strict=True)):
            sides = slice(1, 3) if channels_last else slice(2, 4)
            return [tuple(level.shape[sides]) for level in maps], channels_last
    return None


def _follow(grids: Sequence[tuple[int, int]], size: tuple[int, int], strides: Sequence[int]) -> bool:
    """Return whether maps have the size that their strides give, less a border at most."""
    return all(
        -_MOST_BORDER <= cells - side / stride < 1
        for grid, stride in zip(grids, strides, strict=True)
        for cells, side in zip(grid, size, strict=True)
    )


def _strides(
    grids: Sequence[tuple[int, int]], size: tuple[int, int], said: Sequence[int]
) -> tuple[tuple[int, ...] | None, bool]:
    """Return the maps' strides, None if they are no whole numbers, and whether borders are missing."""
    strides, border = [], False
    for (rows, columns), stride in zip(grids, said, strict=True):
        if (rows, columns) == (-(-size[0] // stride), -(-size[1] // stride)):
            strides.append(stride)
            continue
        if size[0] / rows == size[1] / columns and size[0] % rows == 0:
            strides.append(size[0] // rows)
            continue
        lost = [side / stride - cells for side, cells in zip(size, (rows, columns), strict=True)]
        if lost[0] != lost[1] or not 0 < lost[0] <= _MOST_BORDER or lost[0] % 1:
            return None, False
        strides.append(stride)
        border = True
    return tuple(strides), border
