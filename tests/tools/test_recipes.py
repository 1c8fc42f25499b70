"""Recipes of classification: data, model and optimizer of each can be built, and settings are the papers'."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from foveate.configs import find_recipe, list_recipes
from foveate.tasks.classify import Classify, create_classifier
from foveate.tasks.engine.config import load_config
from foveate.tasks.engine.runner import TaskRunner
from PIL import Image

RECIPES = [name for name in list_recipes() if name.startswith("classify/")]
IMAGENET = [name for name in RECIPES if name.endswith("_imagenet")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of two classes with an odd image in each."""
    root = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (101, 143, 3), np.uint8)
    for part in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (root / part).mkdir(parents=True)
        Image.fromarray(pixels).save(root / part / "0.png")
    return root


def read(name, root=None, *overrides):
    needs_root = load_config(find_recipe(name))["data"]["name"] == "folder"
    given = [f"data.root={root}", "data.num_classes=2"] if needs_root else []
    return load_config(find_recipe(name), [*given, *overrides])


@pytest.mark.parametrize(
    "name", [name if "_384_" not in name else pytest.param(name, marks=pytest.mark.heavy) for name in RECIPES]
)
def test_a_recipe_s_data_model_and_optimizer_can_be_built(name, root):
    config = read(name, root)
    data = config["data"]
    # Mixing needs an even batch.
    task = Classify(config | {"batch_size": 2})
    torch.manual_seed(0)
    items = [task.train_set[0], task.train_set[1], task.val_set[0]]
    assert {image.shape for image, _ in items} == {(data["channels"], data["size"], data["size"])}
    model = config["model"]
    with torch.device("meta"):
        net = create_classifier(model["name"], len(task.classes), task.rule, **model["kwargs"])
    run = SimpleNamespace(net=net, _config=config, _device=torch.device("cpu"))
    groups = TaskRunner.build_optim_wrapper(run, None).optimizer.param_groups
    assert {parameter for group in groups for parameter in group["params"]} == set(net.parameters())
    rates = {round(group["lr"] / config["optimizer"]["lr"], 6) for group in groups}
    assert max(rates) == 1.0
    assert (len(rates) > 1) == (config["optimizer"]["layer_decay"] is not None)


@pytest.mark.parametrize("name", IMAGENET)
def test_images_of_imagenet_have_the_size_that_the_model_was_published_for(name):
    config = load_config(find_recipe(name))
    cfg = timm.get_pretrained_cfg(config["model"]["name"])
    data = config["data"]
    assert cfg.input_size == (data["channels"], data["size"], data["size"])
    assert data["crop_pct"] == cfg.crop_pct
    assert data["crop_mode"] == (cfg.crop_mode or "center")
    assert data["num_classes"] == 1000


def test_sizes_of_a_family_differ_in_drop_path_alone(root):
    rates = {}
    for model in ("nat_mini", "nat_small", "nat_base"):
        config = read("classify/nat_tiny_imagenet", root, f"model.name={model}")
        with torch.device("meta"):
            net = create_classifier(config["model"]["name"], 2, **config["model"]["kwargs"])
        rates[model] = max(module.drop_prob for module in net.modules() if isinstance(module, timm.layers.DropPath))
    assert rates == pytest.approx({"nat_mini": 0.2, "nat_small": 0.3, "nat_base": 0.5})
