"""Names of a data set's classes, for models whose file doesn't name them, and of their folders."""

from collections.abc import Sequence
from pathlib import Path


def class_names(data: str, count: int) -> list[str]:
    """Return the names of a data set's classes, in the order of the labels; numbers where they aren't known here.

    Args:
        data: ``"imagenet-1k"``, ``"coco"``, ``"ade20k"``, ``"cityscapes"``, ``"coco_stuff"``; of others nothing
            is known.
        count: Classes that the model has.
    """
    known = _known(data)
    # COCO's panoptic classes begin with its things; fewer of another data set are in an order of their own.
    if data != "coco" and len(known) != count:
        known = []
    return [*known[:count], *(f"class {label}" for label in range(len(known), count))]


def folder_names(classes: Sequence[str], root: Path) -> list[str]:
    """Return how the folders of a classifier's classes are called under ``root``: as these, or by ImageNet's synsets.

    Published ImageNet is in folders such as n01443537, whose class models call "goldfish, Carassius auratus".
    """
    if len(classes) == 1000:
        from timm.data import ImageNetInfo

        synsets = ImageNetInfo("imagenet-1k").label_names()
        if any((root / name).is_dir() for name in synsets):
            return synsets
    return list(classes)


def _known(data: str) -> list[str]:
    if data == "imagenet-1k":
        from timm.data import ImageNetInfo

        info = ImageNetInfo("imagenet-1k")
        return [info.index_to_description(index) for index in range(info.num_classes())]
    if data == "coco":
        from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

        names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
        return [name for name in names if name not in ("__background__", "N/A")]
    from . import ade20k, cityscapes, coco_stuff

    if data == "coco_stuff":
        return list(coco_stuff.class_of_ids().values())
    return {"ade20k": list(ade20k.CLASSES), "cityscapes": list(cityscapes.CLASS_OF_ID.values())}.get(data, [])
