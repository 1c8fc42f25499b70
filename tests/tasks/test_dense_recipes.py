"""The published recipes of detection and segmentation: data, model and optimizer of each can be built."""

import json

import numpy as np
import pytest
import torch
from foveate.configs import list_recipes
from foveate.configs.published import read_published
from foveate.tasks import engine
from foveate.tasks.data.coco import encode_mask
from foveate.tasks.engine.config import task_class_of
from foveate.tasks.engine.groups import group
from foveate.tools.cli import main
from PIL import Image

RECIPES = [name for name in list_recipes() if name.startswith(("detect/", "segment/")) and "nuclei" not in name]
# One of each kind of data set and head.
FEW = [
    "detect/mask_rcnn_nat_mini_3x_coco",
    "detect/retinanet_biformer_small_1x_coco",
    "detect/cascade_mask_rcnn_dat_pp_tiny_1x_coco",
    "detect/dino_resnet50_1x_coco",
    "segment/semantic_fpn_quadtree_b0_160k_ade20k",
    "segment/upernet_agent_swin_tiny_160k_ade20k",
    "segment/light_ham_mscan_t_160k_ade20k",
    "segment/light_ham_van_b0_512_160k_ade20k",
]
DATA = [
    *FEW,
    "segment/mask2former_dinat_large_100ep_coco_instance",
    "segment/mask2former_dinat_large_100ep_coco_panoptic",
    "segment/mask2former_dinat_large_160k_ade20k_panoptic",
    "segment/mask2former_dinat_large_160k_ade20k_instance",
    "segment/mask2former_dinat_large_90k_cityscapes_instance",
    "segment/mask2former_dinat_large_90k_cityscapes_semantic",
    "segment/light_ham_mscan_t_160k_cityscapes",
    "segment/light_ham_mscan_l_80k_coco_stuff",
]


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with an image or two of COCO, ADE20K and Cityscapes, as these are laid out."""
    root = tmp_path_factory.mktemp("data")
    image = np.random.default_rng(0).integers(0, 256, (120, 171, 3))
    ids = np.zeros((120, 171), np.int64)
    ids[20:60, 30:90], ids[60:, :] = 1, 2
    picture = np.stack([ids, 0 * ids, 0 * ids], -1)
    for split, part in (("train", "training"), ("val", "validation")):
        save(root / f"{split}2017" / "a.jpg", image)
        save(root / "annotations" / f"panoptic_{split}2017" / "a.png", picture)
        save(root / "images" / part / "a.jpg", image)
        save(root / "annotations" / part / "a.png", ids)
        save(root / "stuffthingmaps" / f"{split}2017" / "a.png", ids)
        save(root / f"ade20k_panoptic_{split}" / "a.png", picture)
        save(root / "leftImg8bit" / split / "ulm" / "ulm_0_1_leftImg8bit.png", image)
        save(root / "gtFine" / split / "ulm" / "ulm_0_1_gtFine_labelIds.png", 7 + ids)
        images = [{"id": 1, "file_name": "a.jpg", "height": 120, "width": 171}]
        runs = encode_mask(ids == 1)
        thing = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [30, 20, 60, 40], "area": 2400, "iscrowd": 0}
        thing["segmentation"] = runs | {"counts": runs["counts"].decode()}

        def categories(count):
            return [
                {"id": number, "name": f"c{number}", "isthing": int(number <= 80)} for number in range(1, count + 1)
            ]

        instances = root / "gtFine" / split / "ulm" / "ulm_0_1_gtFine_instanceIds.png"
        Image.fromarray(np.where(ids == 1, 26001, 7).astype(np.uint16)).save(instances)
        content = {"images": images, "annotations": [thing], "categories": categories(100)}
        (root / f"ade20k_instance_{split}.json").write_text(json.dumps(content))
        content["categories"] = categories(80)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        segments = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 90}]
        content["annotations"] = [{"image_id": 1, "file_name": "a.png", "segments_info": segments}]
        for path, count in ((f"annotations/panoptic_{split}2017.json", 133), (f"ade20k_panoptic_{split}.json", 150)):
            (root / path).write_text(json.dumps(content | {"categories": categories(count)}))
    return root


@pytest.mark.parametrize("name", DATA)
def test_a_recipe_s_data_can_be_read_and_augmented(name, root):
    config = engine.load_config(name, [f"data.root={root}"])
    task = task_class_of(config["task"])(config)
    assert len(task.classes) == config["data"]["num_classes"] or "cityscapes" in name
    torch.manual_seed(0)
    items = [task.train_set[0], task.train_set[0]]
    images, targets = task.train_set.collate(items)
    assert len(images) == len(targets) == 2
    if config["task"] == "detect":
        assert images[0].dtype == torch.uint8
        assert {"boxes", "labels"} <= set(targets[0])
    else:
        crop = config["data"]["augment"]["crop"]
        height, width = (crop, crop) if isinstance(crop, int) else crop
        assert images.shape == (2, 3, height, width)
    inputs, truths = task.val_set.collate([task.val_set[0]])
    assert len(inputs) == len(truths) == 1


def build(name):
    config = engine.load_config(name, ["data.root=nowhere"])
    start = {"pretrained": False, "checkpoint": None, "backbone_checkpoint": None}
    model, classes, data = config["model"] | start, config["data"]["num_classes"], config["data"]
    with torch.device("meta"):
        if config["task"] == "detect":
            from foveate.tasks.detect.task import build_detector

            return config, build_detector(model, classes)
        from foveate.tasks.data.segmentation import InputRule
        from foveate.tasks.segment.task import build_segmenter

        rule = InputRule(**{key: data[key] for key in ("short", "long", "divisor", "mean", "std")})
        return config, build_segmenter(model, [False] * classes, rule)


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.heavy) for name in RECIPES]
)
def test_a_recipe_s_model_and_parameter_groups_can_be_built(name):
    config, model = build(name)
    settings = config["optimizer"]
    groups = group(model, settings)
    assert sum(len(part["params"]) for part in groups) == len([*model.parameters()])
    listed = {parameter for part in groups if part["weight_decay"] == 0 for parameter in part["params"]}
    names = dict(model.named_parameters())
    assert bool(listed) == bool(settings["no_decay"])
    if settings["no_decay"]:
        # Batch norms of heads are called bn, and decay.
        assert all(names[key] not in listed for key in names if ".bn." in key and "norm" not in key)
        assert any(names[key] in listed for key in names if key.startswith("backbone.") and "norm" in key)
    assert {part["lr_scale"] for part in groups} == {1.0, *settings["factors"].values()}


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_the_table_of_published_models_is_complete(task):
    rows = read_published(task)
    assert len({row["name"] for row in rows}) == len(rows) == {"detect": 181, "segment": 223}[task]
    for row in rows:
        assert row["name"].startswith(f"{row['backbone']}.")
        assert row["metrics"]
        assert row["license"]
        assert row["source"].startswith("https://")
        assert not row["config"] or row["config"] in list_recipes()
    assert sum(row["state"] == "none" for row in rows) == {"detect": 4, "segment": 7}[task]


def test_published_models_are_listed(capsys):
    assert main(["list", "--detectors", "nat_tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "authors' metrics" in lines[0]
    assert any("mask_rcnn" in line and "box AP 47.7; mask AP 42.6" in line and " mit " in line for line in lines)
    assert all("not opened" in line for line in lines if ".shi_" in line)
    assert main(["list", "--segmenters", "*oneformer*"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8
    assert main(["list", "--detectors", "zzz"]) == 2
    assert "no published model matches '*zzz*'" in capsys.readouterr().err
