"""ADE20K, in the release of SceneParse150."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .annotations import Faults
from .augment import IGNORE
from .label_maps import check_pairs, class_of_values, images_in

_NAMES = (
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
CLASSES = _NAMES.split(",")


def find_maps(root: Path, data: dict, split: str, faults: Faults) -> tuple[list, Sequence[str], np.ndarray]:
    """Return ADE20K's files (the release of SceneParse150): 0 is unlabelled, classes count from 1."""
    part = "training" if data[split]["split"] == "train" else "validation"
    maps = root / "annotations" / part
    files = [(image, maps / f"{image.stem}.png") for image in images_in(root / "images" / part)]
    files = check_pairs(maps, files, faults)
    return files, CLASSES, class_of_values({0: IGNORE, 255: IGNORE, **{label + 1: label for label in range(150)}})


def recognise(root: Path) -> dict | None:
    """Return the settings of ``data`` by which a folder is read, if it looks like the release; else None."""
    there = (root / "annotations" / "training").is_dir() and (root / "images" / "training").is_dir()
    return {"train": {"split": "train"}, "val": {"split": "val"}} if there else None
