"""COCO-Stuff's 164k images: 80 kinds of things and 91 of stuff, in the release's label maps or mmseg's."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import TaskError
from .annotations import Faults
from .augment import IGNORE
from .label_maps import class_of_values, images_in

_NAMES = (
    "banner,blanket,branch,bridge,building-other,bush,cabinet,cage,cardboard,carpet,ceiling-other,ceiling-tile,cloth,"
    "clothes,clouds,counter,cupboard,curtain,desk-stuff,dirt,door-stuff,fence,floor-marble,floor-other,floor-stone,"
    "floor-tile,floor-wood,flower,fog,food-other,fruit,furniture-other,grass,gravel,ground-other,hill,house,leaves,"
    "light,mat,metal,mirror-stuff,moss,mountain,mud,napkin,net,paper,pavement,pillow,plant-other,plastic,platform,"
    "playingfield,railing,railroad,river,road,rock,roof,rug,salad,sand,sea,shelf,sky-other,skyscraper,snow,solid-other,"
    "stairs,stone,straw,structural-other,table,tent,textile-other,towel,tree,vegetable,wall-brick,wall-concrete,"
    "wall-other,wall-panel,wall-stone,wall-tile,wall-wood,water-other,waterdrops,window-blind,window-other,wood"
)
_STUFF = _NAMES.split(",")
_FIRST_STUFF = 91


@functools.cache
def class_of_ids() -> dict[int, str]:
    """Return the 171 classes by the value that they have in the release's label maps, in the order of mmseg's labels.

    The values are COCO's ids less one: of things 80 of 0 to 89, of stuff 91 to 181.
    """
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    things = {label - 1: name for label, name in enumerate(names) if name not in ("__background__", "N/A")}
    return things | dict(enumerate(_STUFF, _FIRST_STUFF))


def find_maps(root: Path, data: dict, split: str, faults: Faults) -> tuple[list, Sequence[str], np.ndarray]:
    """Return COCO-Stuff's files: the release's (``stuffthingmaps``) or mmseg's (``*_labelTrainIds.png``)."""
    part = f"{data[split]['split']}2017"
    images = next(
        (folder for folder in (root / "images" / part, root / part) if folder.is_dir()), root / "images" / part
    )
    folders = [root / name / part for name in ("annotations", "stuffthingmaps")]
    maps = next((folder for folder in folders if folder.is_dir()), None)
    if maps is None:
        raise TaskError(
            f"{root}: holds no label maps of COCO-Stuff, neither annotations/{part} nor stuffthingmaps/{part}"
        )
    files, converted = images_in(images), "_labelTrainIds.png"
    suffix = converted if next(maps.glob(f"*{converted}"), None) is not None else ".png"
    values = range(len(class_of_ids())) if suffix == converted else class_of_ids()
    # Ids that the release leaves out are in none of its maps.
    known = class_of_values({255: IGNORE, **{value: label for label, value in enumerate(values)}})
    return [(file, maps / f"{file.stem}{suffix}") for file in files], list(class_of_ids().values()), known


def recognise(root: Path) -> dict | None:
    """Return the settings of ``data`` by which a folder is read, if it looks like COCO-Stuff; else None."""
    there = any((root / name / "train2017").is_dir() for name in ("annotations", "stuffthingmaps"))
    return {"train": {"split": "train"}, "val": {"split": "val"}} if there else None
