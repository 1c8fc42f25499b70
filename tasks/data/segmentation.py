"""Images whose pixels are labelled: ADE20K, Cityscapes, Pascal VOC, plain folders, COCO's two formats, the nuclei."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .. import TaskError, nearest
from ..dense.normalize import normalize
from ..dense.segment.inference import pad_to
from .annotations import Faults, check_names, count_values, in_threads, read_lines
from .augment import IGNORE, Augment, resize_within
from .coco import (
    PanopticRecord,
    Record,
    decode_masks,
    encode_mask,
    mask_box,
    order_by_name,
    read_instances,
    read_panoptic,
    read_picture,
    read_segment_ids,
    to_run_lengths,
)
from .images import (
    FULL_WHITE,
    DamagedImageError,
    check_white,
    choose_white,
    list_images,
    read_image,
    read_size,
    read_values,
    to_bytes,
    white_of_depth,
)
from .samples import load_nuclei_half
from .voc import Names, check_classes, name_classes

DATA_SETS = ("ade20k", "cityscapes", "coco", "coco_panoptic", "folder", "nuclei", "voc")

_ADE20K = (
    "wall,building,sky,floor,tree,ceiling,road,bed,windowpane,grass,cabinet,sidewalk,person,earth,door,table,mountain,"
    "plant,curtain,chair,car,water,painting,sofa,shelf,house,sea,mirror,rug,field,armchair,seat,fence,desk,rock,"
    "wardrobe,lamp,bathtub,railing,cushion,base,box,column,signboard,chest of drawers,counter,sand,sink,skyscraper,"
    "fireplace,refrigerator,grandstand,path,stairs,runway,case,pool table,pillow,screen door,stairway,river,bridge,"
    "bookcase,blind,coffee table,toilet,flower,book,hill,bench,countertop,stove,palm,kitchen island,computer,"
    "swivel chair,boat,bar,arcade machine,hovel,bus,towel,light,truck,tower,chandelier,awning,streetlight,booth,"
    "television receiver,airplane,dirt track,apparel,pole,land,bannister,escalator,ottoman,bottle,buffet,poster,stage,"
    "van,ship,fountain,conveyer belt,canopy,washer,plaything,swimming pool,stool,barrel,basket,waterfall,tent,bag,"
    "minibike,cradle,oven,ball,food,step,tank,trade name,microwave,pot,animal,bicycle,lake,dishwasher,screen,blanket,"
    "sculpture,hood,sconce,vase,traffic light,tray,ashcan,fan,pier,crt screen,plate,monitor,bulletin board,shower,"
    "radiator,glass,clock,flag"
)
ADE20K_CLASSES = _ADE20K.split(",")
# Cityscapes' 19 classes by the id that its label maps have; the other ids of 0 to 33 aren't counted.
CITYSCAPES_IDS = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}


@dataclasses.dataclass(frozen=True)
class InputRule:
    """How an image becomes a segmenter's input; kept in every checkpoint.

    Attributes:
        short: It is resized, at the same ratio, to fit into ``short x long`` pixels, whichever way it lies; None: it
            keeps its size.
        long: See ``short``.
        divisor: Then both sides are stretched, a little, to the next multiple of it.
        mean: Subtracted from pixels of 0 to 1, for each channel.
        std: Divides the difference, for each channel.
    """

    short: int | None
    long: int
    divisor: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != 3:
                raise TaskError(f"data.{name} needs three numbers, for red, green and blue")

    def normalise(self, pixels: np.ndarray) -> Tensor:
        """Return ``[3, H, W]``, float32, of RGB pixels ``[H, W, 3]``, uint8."""
        return normalize(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), self.mean, self.std)

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        """Return an RGB image as the input of evaluation, ``[3, H', W']``."""
        pixels = np.asarray(image)
        if self.short is not None:
            pixels = resize_within(pixels, self.short, self.long, self.divisor)
        return self.normalise(pixels)


class SegmentationSet(Dataset):
    """Labelled images, to train on or to be measured by; the sources of annotations are its subclasses.

    An item to train on is a normalised image ``[3, h, w]`` with labels ``[h, w]``, int64, of which ``IGNORE`` don't
    count, or for Mask2Former with a dict of ``labels`` ``[N]`` and ``masks`` ``[N, h, w]``, bool. One to be measured by
    is a dict of ``image`` and ``size``, with the truth in the image's own size.

    Attributes:
        white: As for `read_image`.

    Args:
        classes: Names of the classes, in the order of the labels.
        things: For each class whether its objects are told apart.
        rule: How images become inputs.
        task: What is predicted: ``"semantic"``, ``"instance"`` or ``"panoptic"``.
        as_masks: Whether to train on masks.
        augment: Augmentation; the set is to be measured by if None.
        pad: Height and width to which smaller images are padded, by zeros after normalisation, to train on them.
        repeat: How often an epoch shows each image.
    """

    overlapping = False  # whether a pixel may be in several masks
    white = FULL_WHITE

    def __init__(
        self,
        classes: Sequence[str],
        things: Sequence[bool],
        rule: InputRule,
        task: str,
        as_masks: bool,
        augment: Augment | None = None,
        pad: tuple[int, int] | None = None,
        repeat: int = 1,
    ):
        self.classes, self.things = list(classes), list(things)
        self.rule, self.task, self.as_masks = rule, task, as_masks
        self.augment, self.pad, self.repeat = augment, pad, repeat

    @property
    def images(self) -> int:
        """Number of different images."""
        raise NotImplementedError

    def image(self, index: int) -> Image.Image:
        """Return an image as it is, RGB."""
        raise NotImplementedError

    def segments(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return masks ``[N, H, W]``, uint8, their labels ``[N]``, and whether each is a crowd ``[N]``."""
        raise NotImplementedError

    def occurring(self) -> Iterator[np.ndarray]:
        """Yield the labels of every image's segments without crowds."""
        for index in range(self.images):
            _, labels, crowd = self.segments(index)
            yield labels[~crowd]

    def labels(self, index: int) -> np.ndarray:
        """Return the class of every pixel, ``[H, W]``, int32; ``IGNORE`` where there is none."""
        masks, labels, crowd = self.segments(index)
        image = self.image(index)
        painted = np.full((image.height, image.width), IGNORE, np.int32)
        for mask, label, is_crowd in zip(masks, labels, crowd, strict=True):
            if not is_crowd:
                painted[mask > 0] = label
        return painted

    def __len__(self) -> int:
        return self.images * self.repeat

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        index %= self.images
        image = self.image(index)
        if self.augment is None:
            return {"image": self.rule(image), "size": (image.height, image.width)}, self._truth(index)
        pixels = np.asarray(image)
        if not self.as_masks:
            pixels, labels = self.augment(pixels, self.labels(index))
            return self._padded(self.rule.normalise(pixels), 0.0), self._padded(
                torch.from_numpy(labels.astype(np.int64)), IGNORE
            )
        masks, labels, crowd = self.segments(index)
        masks, labels = masks[~crowd], labels[~crowd]
        if self.overlapping:
            pixels, _, masks, left = self.augment.instances(pixels, _boxes(masks), masks)
        else:
            # One picture of all masks is augmented in place of each.
            numbers = np.einsum("nhw,n->hw", masks, np.arange(1, len(masks) + 1), dtype=np.uint16, casting="unsafe")
            pixels, numbers = self.augment(pixels, numbers)
            left = np.unique(numbers[numbers > 0]).astype(np.int64) - 1
            masks = numbers == (left + 1)[:, None, None]
        image = self._padded(self.rule.normalise(pixels), 0.0)
        masks = self._padded(torch.from_numpy(np.ascontiguousarray(masks)).bool(), False)
        return image, {"labels": torch.from_numpy(labels[left]), "masks": masks}

    def _padded(self, x: Tensor, value: float) -> Tensor:
        return pad_to(x, [max(sides) for sides in zip(self.pad or (0, 0), x.shape[-2:], strict=True)], value)

    def _truth(self, index: int) -> Any:
        if self.task == "semantic":
            return torch.from_numpy(self.labels(index))
        masks, labels, crowd = self.segments(index)
        if self.task == "instance":
            return {
                "boxes": torch.from_numpy(_boxes(masks)),
                "labels": torch.from_numpy(labels),
                "area": torch.from_numpy(masks.sum((1, 2)).astype(np.float64)),
                "iscrowd": torch.from_numpy(crowd.astype(np.int64)),
                "size": tuple(masks.shape[1:]),
                "masks": [encode_mask(mask) for mask in masks],
            }
        # Class and number of every pixel's segment; void and crowds have the class after the last.
        truth = np.zeros((*masks.shape[1:], 2), np.int32)
        truth[..., 0] = len(self.classes)
        for number, (mask, label, is_crowd) in enumerate(zip(masks, labels, crowd, strict=True), start=1):
            if not is_crowd:
                truth[mask > 0] = label, number
        return torch.from_numpy(truth)

    def collate(self, items: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        """Return a batch: to train, one tensor of images, padded to the largest; to be measured by, lists."""
        inputs, targets = zip(*items, strict=True)
        if self.augment is None:
            return list(inputs), list(targets)
        size = [max(image.shape[side] for image in inputs) for side in (-2, -1)]
        images = torch.stack([pad_to(image, size) for image in inputs])
        if not self.as_masks:
            return images, torch.stack([pad_to(labels, size, IGNORE) for labels in targets])
        return images, [target | {"masks": pad_to(target["masks"], size, False)} for target in targets]


def _boxes(masks: np.ndarray) -> np.ndarray:
    return np.array([mask_box(mask) if mask.any() else (0.0,) * 4 for mask in masks], np.float64).reshape(-1, 4)


class LabelMaps(SegmentationSet):
    """Images with pictures whose values stand for classes.

    Args:
        files: ``(image, label map)`` of each.
        values: Class of each value of 0 to 255, int32 ``[256]``; -1 where there is none.
        skip_damaged: Whether images that can't be read are no fault in `check`.
        **settings: As for `SegmentationSet`.
    """

    def __init__(self, files: Sequence[tuple[Path, Path]], values: np.ndarray, skip_damaged: bool = False, **settings):
        super().__init__(**settings)
        self.files, self.values, self._skip_damaged = list(files), values, skip_damaged
        # How many pixels of each label map have each value, once they were checked.
        self.found: list[dict[int, int]] = []

    @property
    def images(self) -> int:
        """Number of different images."""
        return len(self.files)

    @property
    def image_files(self) -> list[Path]:
        """Files of the images."""
        return [image for image, _ in self.files]

    def image(self, index: int) -> Image.Image:
        """Return an image as it is, RGB."""
        return read_image(self.files[index][0], white=self.white)

    def inventory(self) -> list[tuple[Path, str]]:
        """Return all images and label maps."""
        return [(file, "") for pair in self.files for file in pair]

    def labels(self, index: int) -> np.ndarray:
        """Return the class of every pixel, ``[H, W]``, int32; ``IGNORE`` where there is none."""
        return self.values[read_values(self.files[index][1]).astype(np.uint8)]

    def segments(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a mask for every class that is there."""
        labels = self.labels(index)
        found = np.setdiff1d(np.unique(labels), [IGNORE]).astype(np.int64)
        return (labels == found[:, None, None]).astype(np.uint8), found, np.zeros(len(found), bool)

    def occurring(self) -> Iterator[np.ndarray]:
        """Yield the labels in every label map that was checked."""
        for found in self.found:
            labels = self.values[list(found)]
            yield labels[labels != IGNORE]

    def unlabelled(self) -> dict[int, float]:
        """Return the values that count as unlabelled, and their share of the pixels, of the label maps checked."""
        totals = np.zeros(256)
        for found in self.found:
            totals[list(found)] += list(found.values())
        shares = totals / max(totals.sum(), 1)
        return {int(value): float(shares[value]) for value in np.flatnonzero((self.values == IGNORE) & (totals > 0))}

    def _look_at(self, index: int) -> tuple[tuple[str, str] | None, dict[int, int]]:
        """Return the kind of a label map's fault and what is wrong, or None; and how many pixels have each value."""
        image, path = self.files[index]
        try:
            values = read_values(path)
        except DamagedImageError as error:
            return ("damaged", str(error)), {}
        if values.dtype.kind not in "biu":
            return ("damaged", f"{path}: holds numbers with fractions; a label map has 0 to 255"), {}
        found = count_values(values)
        return self._find_fault(image, path, values.shape, found), found

    def _find_fault(
        self, image: Path, path: Path, shape: tuple[int, ...], found: dict[int, int]
    ) -> tuple[str, str] | None:
        unknown = [value for value in found if not 0 <= value < 256 or self.values[value] < 0]
        if unknown:
            listed = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            return "value", f"{path.name} has values that stand for no class: {listed}"
        try:
            size, turned = read_size(image)
        except DamagedImageError as error:
            return None if self._skip_damaged else ("damaged", str(error))
        if shape == size:
            return None
        if turned and shape == size[::-1]:
            return "rotated", f"{image} is {size[0]}x{size[1]}, {path.name} {size[1]}x{size[0]}"
        return "size", f"{path.name} has {shape[0]}x{shape[1]} pixels, but its image {size[0]}x{size[1]}"

    def check(self, faults: Faults) -> None:
        """Read all label maps, note what is wrong, and leave out the images of which something is."""
        kept, self.found = [], []
        for pair, (fault, found) in zip(self.files, in_threads(self._look_at, range(len(self.files))), strict=True):
            if fault is None:
                kept.append(pair)
                self.found.append(found)
            else:
                faults.add(*fault)
        self.files = kept


class CocoMaps(SegmentationSet):
    """Images with COCO's annotations, a record for each; what these are is for the subclasses."""

    def __init__(self, records: Sequence[PanopticRecord | Record], **settings):
        super().__init__(**settings)
        self.records = list(records)

    @property
    def images(self) -> int:
        """Number of different images."""
        return len(self.records)

    @property
    def image_files(self) -> list[Path]:
        """Files of the images."""
        return [record.file for record in self.records]

    def image(self, index: int) -> Image.Image:
        """Return an image as it is, RGB."""
        return read_picture(self.records[index], self.white)

    def inventory(self) -> list[tuple[Path, list]]:
        """Return every image with its size and the labels of its objects or segments."""
        labels = (getattr(record, "instances", record).labels.tolist() for record in self.records)
        return [(record.file, [*record.size, *found]) for record, found in zip(self.records, labels, strict=True)]


class PanopticMaps(CocoMaps):
    """COCO's panoptic annotations."""

    def occurring(self) -> Iterator[np.ndarray]:
        """Yield the labels of every image's segments without crowds."""
        return (record.labels[~record.crowd] for record in self.records)

    def segments(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the segments' masks, labels and whether they are crowds."""
        record = self.records[index]
        numbers = read_segment_ids(np.asarray(read_image(record.map)))
        return (numbers == record.ids[:, None, None]).astype(np.uint8), record.labels, record.crowd


class InstanceMaps(CocoMaps):
    """COCO's annotations of instances."""

    overlapping = True

    def occurring(self) -> Iterator[np.ndarray]:
        """Yield the labels of every image's objects without crowds."""
        return (record.instances.labels[~record.instances.crowd] for record in self.records)

    def segments(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the objects' masks, labels and whether they are crowds."""
        record = self.records[index]
        instances = record.instances
        masks = [to_run_lengths(mask, *record.size) for mask in instances.masks]
        return decode_masks(masks, *record.size), instances.labels, instances.crowd


class Nuclei(SegmentationSet):
    """A half of the bundled micrograph: background is stuff, nuclei are things.

    For instances the only class is the nucleus; else there are background and nucleus.

    Args:
        split: ``"train"`` for the left half, else the right one.
        task: ``"semantic"``, ``"instance"`` or ``"panoptic"``.
        tile: Side of the tiles that the half is cut into, row by row; None: one image.
        **settings: As for `SegmentationSet`.
    """

    def __init__(self, split: str, task: str, tile: int | None = None, **settings):
        names = ["nucleus"] if task == "instance" else ["background", "nucleus"]
        super().__init__(classes=names, things=[name == "nucleus" for name in names], task=task, **settings)
        pixels, numbers = load_nuclei_half(split)
        self.white = white_of_depth(int(pixels.max()))
        height, width = numbers.shape
        down, across = (height, width) if tile is None else (tile, tile)
        if tile is not None and not 0 < tile <= width:
            raise TaskError(f"data.tile is {tile}, but must be from 1 to {width}")
        corners = [(y, x) for y in range(0, height, down) for x in range(0, width, across)]
        self.tiles = [tuple(half[y : y + down, x : x + across] for half in (pixels, numbers)) for y, x in corners]

    @property
    def images(self) -> int:
        """Number of different images."""
        return len(self.tiles)

    def image(self, index: int) -> Image.Image:
        """Return the half, or a tile of it, as RGB."""
        return Image.fromarray(to_bytes(self.tiles[index][0], self.white)).convert("RGB")

    def segments(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return background, unless instances are asked for, and nuclei; for semantic masks all nuclei as one."""
        numbers = self.tiles[index][1]
        if self.task == "semantic":
            masks, labels = np.stack([numbers == 0, numbers > 0]), np.arange(2)
        else:
            found = np.unique(numbers)
            found = found[found > 0] if self.task == "instance" else found
            masks = numbers == found[:, None, None]
            labels = np.minimum(found, 1) if self.task == "panoptic" else np.zeros_like(found)
        return masks.astype(np.uint8), labels.astype(np.int64), np.zeros(len(labels), bool)


def build_datasets(
    data: dict, rule: InputRule, task: str = "semantic", as_masks: bool = False, skip_damaged: bool = False
) -> tuple[SegmentationSet, SegmentationSet]:
    """Return the training and the validation set that a config's ``data`` describes.

    Args:
        data: As in `Segment.DEFAULTS`.
        rule: How images become inputs.
        task: ``"semantic"``, ``"instance"`` or ``"panoptic"``.
        as_masks: Whether to train on masks.
        skip_damaged: Whether images that can't be read are left to the loader, which skips them.

    Raises:
        TaskError: If the data set is unknown or doesn't hold what the task needs, or its files are missing or broken.
    """
    name = data["name"]
    if name not in DATA_SETS:
        raise TaskError(f"unknown data set {name!r}{nearest(str(name), DATA_SETS)}")
    fits = {
        "coco": ("instance",),
        "coco_panoptic": ("panoptic", "semantic"),
        "nuclei": ("semantic", "instance", "panoptic"),
    }
    if task not in fits.get(name, ("semantic",)):
        raise TaskError(
            f"{name} has no annotations for {task} segmentation, only for {' or '.join(fits.get(name, ('semantic',)))}"
        )
    if data["broken"] not in ("refuse", "drop"):
        raise TaskError(f"data.broken is {data['broken']!r}, but must be refuse or drop")
    if data["repeat"] < 1:
        raise TaskError(f"data.repeat is {data['repeat']}, but must be at least 1")
    for key in ("values", "unlabelled"):
        if data[key] is not None and name != "folder":
            raise TaskError(
                f"data.{key} is for label maps of data.name=folder; those of {name} have values of their own"
            )
    white = check_white(data.get("white"))
    crop = data["augment"].get("crop")
    pad = (crop, crop) if isinstance(crop, int) else None if crop is None else tuple(crop)
    shared = {"rule": rule, "task": task, "as_masks": as_masks}
    to_train = {"augment": Augment(data["augment"]), "pad": pad, "repeat": data["repeat"]}
    if name == "nuclei":
        shared.pop("task")
        sets = Nuclei("train", task, **shared, **to_train), Nuclei("val", task, data["tile"], **shared)
        white = white or sets[0].white
    else:
        if data["root"] is None:
            raise TaskError("data.root is not set; name the folder that holds images and annotations")
        root = Path(data["root"]).expanduser()
        if not root.is_dir():
            raise TaskError(f"{root}: no such folder (data.root)")
        read = {"coco": _read_coco, "coco_panoptic": _read_coco}.get(name, _read_maps)
        sets = tuple(
            read(root, data, split, shared | settings, skip_damaged)
            for split, settings in (("train", to_train), ("val", {}))
        )
        white = white or choose_white(sets[0].image_files)
    sets[0].white = sets[1].white = white
    _order_classes(sets, data)
    if data["num_classes"] not in (None, len(sets[0].classes)):
        raise TaskError(
            f"data.num_classes is {data['num_classes']}, but {data['root'] or name} has {len(sets[0].classes)} "
            f"classes; leave it None to take what is there"
        )
    if len(sets[0].classes) >= IGNORE:
        raise TaskError(f"{name} has {len(sets[0].classes)} classes; at most {IGNORE - 1} can be told from unlabelled")
    return sets


def _order_classes(sets: tuple[SegmentationSet, SegmentationSet], data: dict) -> None:
    """Give both sets the classes in one order: that of ``data.classes``, or else that of the training set.

    Raises:
        TaskError: If they have other classes, or a class whose objects are told apart in one of them only.
    """
    name, (train, val) = data["name"], sets
    # Of these the label maps' classes were named by it.
    given = None if data["classes"] is None or name in ("voc", "folder") else list(data["classes"])
    expected = list(train.classes) if given is None else given
    for part in sets:
        found = part.classes
        # Only files of COCO's formats number classes as they like.
        fits = order_by_name(part.records, found, expected) if isinstance(part, CocoMaps) else found == expected
        if not fits and given is not None:
            raise TaskError(f"data.classes is {given}, but {name} has {found}")
        if not fits:
            differing = sorted(set(expected) ^ set(found)) or "names that repeat, in another order"
            raise TaskError(f"training and validation annotations have different classes: {differing}")
        if found != expected:
            part.things = [part.things[found.index(label)] for label in expected]
            part.classes = list(expected)
    differing = [label for label, *kinds in zip(expected, train.things, val.things, strict=True) if len({*kinds}) > 1]
    if differing:
        raise TaskError(f"training and validation annotations differ in isthing of {', '.join(differing[:5])}")


def _read_coco(root: Path, data: dict, split: str, settings: dict, skip_damaged: bool) -> SegmentationSet:
    part = data[split]
    images = root / part["images"]
    if not images.is_dir():
        raise TaskError(f"{images}: no such folder (data.root and data.{split}.images)")
    path = root / part["annotations"]
    if data["name"] == "coco":
        records, classes, _ = read_instances(path, images, True, data["broken"], skip_damaged)
        return InstanceMaps(records, classes=classes, things=[True] * len(classes), **settings)
    maps = None if part["maps"] is None else root / part["maps"]
    records, classes, things = read_panoptic(path, images, maps, data["broken"], skip_damaged)
    return PanopticMaps(records, classes=classes, things=things, **settings)


def _read_maps(root: Path, data: dict, split: str, settings: dict, skip_damaged: bool) -> LabelMaps:
    faults = Faults(root)
    files, classes, values = {"ade20k": _ade20k, "cityscapes": _cityscapes, "voc": _voc, "folder": _folder}[
        data["name"]
    ](root, data, split, faults)
    pairs = []
    for image, path in files:
        if not image.is_file():
            faults.add("image", image)
        elif not path.is_file():
            faults.add("pair", image)
        else:
            pairs.append((image, path))
    found = LabelMaps(pairs, values, skip_damaged, classes=classes, things=[False] * len(classes), **settings)
    found.check(faults)
    faults.settle(data["broken"], "correct or complete them", len(found.files))
    if not found.files:
        raise TaskError(f"{root}: holds no image to {'train on' if split == 'train' else 'validate by'}")
    return found


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise TaskError(f"{folder}: no such folder")
    return list_images(folder)


def _values(labels: dict[int, int]) -> np.ndarray:
    values = np.full(256, -1, np.int32)
    for value, label in labels.items():
        values[value] = label
    return values


def _ade20k(root: Path, data: dict, split: str, faults: Faults) -> tuple[list, Sequence[str], np.ndarray]:
    """Return ADE20K's files (the release of SceneParse150): 0 is unlabelled, classes count from 1."""
    part = "training" if data[split]["split"] == "train" else "validation"
    files = [(image, root / "annotations" / part / f"{image.stem}.png") for image in _images_in(root / "images" / part)]
    return files, ADE20K_CLASSES, _values({0: IGNORE, 255: IGNORE, **{label + 1: label for label in range(150)}})


def _cityscapes(root: Path, data: dict, split: str, faults: Faults) -> tuple[list, Sequence[str], np.ndarray]:
    """Return Cityscapes' files: of the ids 0 to 33, 19 are classes."""
    files, part = [], data[split]["split"]
    for image in _images_in(root / "leftImg8bit" / part):
        name = image.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png")
        files.append((image, root / "gtFine" / part / image.parent.name / name))
    values = dict.fromkeys((*range(34), 255), IGNORE)
    return files, list(CITYSCAPES_IDS.values()), _values(values | {v: k for k, v in enumerate(CITYSCAPES_IDS)})


def _voc(root: Path, data: dict, split: str, faults: Faults) -> tuple[list, Sequence[str], np.ndarray]:
    """Return Pascal VOC's files: 0 is background, 255 the borders of objects."""
    classes = name_classes(data["classes"])
    names = Names(root)
    listed = names.listed("Segmentation", data[split]["split"])
    check_classes(names, listed, classes, data["classes"] is not None)
    files = []
    for name in listed:
        picture = names.picture(name, faults)
        if picture is not None:
            files.append((picture, root / "SegmentationClass" / f"{name}.png"))
    classes = ["background", *classes]
    return files, classes, _values({255: IGNORE, **{label: label for label in range(len(classes))}})


def _folder(root: Path, data: dict, split: str, faults: Faults) -> tuple[list, Sequence[str], np.ndarray]:
    """Return the files of ``images/train``, ``masks/train``, ``images/val`` and ``masks/val``."""
    if data["classes"] is not None:
        classes = check_names(data["classes"], "data.classes")
    else:
        listing = root / "classes.txt"
        if not listing.is_file():
            raise TaskError(f"{listing}: no such file; list the classes' names there, a line each, or in data.classes")
        lines = read_lines(listing)
        while lines and not lines[-1]:
            lines.pop()
        # An empty line between others may be a class of its own.
        classes = check_names(lines, listing)
    unlabelled = [255] if data["unlabelled"] is None else list(data["unlabelled"])
    left = [value for value in range(256) if data["unlabelled"] is None or value not in unlabelled]
    values = left[: len(classes)] if data["values"] is None else list(data["values"])
    for key, numbers in (("values", values), ("unlabelled", unlabelled)):
        if not all(type(value) is int and 0 <= value < 256 for value in numbers) or len({*numbers}) < len(numbers):
            raise TaskError(f"data.{key} takes different numbers of 0 to 255, not {numbers}")
    if len(values) != len(classes):
        raise TaskError(f"data.values needs a number of 0 to 255 for each of the {len(classes)} classes, not {values}")
    both = sorted({*values} & {*unlabelled})
    if data["unlabelled"] is not None and both:
        raise TaskError(f"data.unlabelled and data.values both hold {both[0]}")
    folder = root / "images" / split
    files = [
        (image, (root / "masks" / split / image.relative_to(folder)).with_suffix(".png"))
        for image in _images_in(folder)
    ]
    labels = {value: label for label, value in enumerate(values)}
    return files, classes, _values(dict.fromkeys(unlabelled, IGNORE) | labels)
