"""Recipes: settings are the papers'; of classification, data, model and optimizer of each can be built."""

import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from foveate.configs import list_recipes, read_recipe, recipes_of_model
from foveate.tasks import TASKS, TaskError, engine
from foveate.tasks.checkpoints import renamed
from foveate.tasks.classify import Classify, create_classifier
from foveate.tasks.engine.config import FREE, leaves, load_config, plain, task_class_of
from foveate.tasks.engine.keys import KEYS
from foveate.tasks.engine.runner import TaskRunner
from foveate.tools.cli import main
from foveate.zoo.backbone import dense_settings_of
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
    needs_root = load_config(name)["data"]["name"] in ("folder", "auto")
    given = [f"data.root={root}", "data.num_classes=2"] if needs_root else []
    return load_config(name, [*given, *overrides])


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
    factors = config["optimizer"]["factors"]
    assert (len(rates) > 1) == (config["optimizer"]["layer_decay"] is not None or bool(factors))
    assert config["optimizer"]["layer_decay"] is not None or rates == {1.0, *factors.values()}


@pytest.mark.parametrize("name", IMAGENET)
def test_images_of_imagenet_have_the_size_that_the_model_was_published_for(name):
    config = load_config(name)
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


# Every recipe with every setting, as they were when each was a file.
SETTINGS = Path(__file__).parents[1] / "golden/recipes/settings.json.gz"


def settings(config):
    """Return a config's settings by dotted key, with the backbone's options that its dense setting stands for."""
    model = config["model"]
    if config["task"] != "classify" and model["setting"] == "auto":
        known = dense_settings_of(model["backbone"])
        tried = (model["head"], {"detect": "detection", "segment": "segmentation"}[config["task"]])
        dense = next((known[name] for name in tried if name in known), {})
        config = config | {"model": model | {"backbone_kwargs": dense | model["backbone_kwargs"]}}
    return dict(leaves(plain(config), ()))


def test_every_recipe_has_the_settings_that_it_had_as_a_file():
    """A key that has come since has its default."""
    before = json.loads(gzip.decompress(SETTINGS.read_bytes()))
    assert len(before) == 152
    assert set(before) <= set(list_recipes())
    changed = {}
    for name, config in before.items():
        old, new = settings(renamed(config)), settings(load_config(name))
        defaults = dict(leaves(plain(engine.DEFAULTS | task_class_of(config["task"]).DEFAULTS), ()))
        for key in old.keys() | new.keys():
            was, now = old.get(key, defaults.get(key)), new.get(key, "nothing")
            if was != now:
                changed.setdefault(name, []).append(f"{key}: was {was!r}, now {now!r}")
    assert not changed, json.dumps(changed, indent=1)


@pytest.mark.parametrize(
    "base", ["detect/mask_rcnn_nat_atto_nuclei", "detect/mask_rcnn_nat_tiny_3x_coco", "_base_/coco_single_scale"]
)
def test_a_config_of_one_s_own_inherits_from_a_recipe_by_its_name(base, tmp_path):
    (tmp_path / "mine.py").write_text(f'_base_ = "{base}"\ntask = "detect"\nbatch_size = 3\n')
    (tmp_path / "again.py").write_text('"""Mine, again."""\n\n_base_ = ["mine.py"]\nseed = 5\n')
    config = load_config(tmp_path / "again.py")
    assert (config["batch_size"], config["seed"]) == (3, 5)
    if not base.startswith("_base_"):
        assert config == load_config(base, ["batch_size=3", "seed=5"])
    else:
        assert config["data"]["augment"]["shorts"] == (800,)


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ("detect/mask_rcnn_nat_ato_nuclei", "did you mean 'detect/mask_rcnn_nat_atto_nuclei'?"),
        ("absent.py", "absent.py: no such config"),
    ],
)
def test_a_base_that_is_not_there_is_named(base, reason, tmp_path):
    (tmp_path / "mine.py").write_text(f'_base_ = ["{base}"]\n')
    with pytest.raises(TaskError, match=re.escape(reason)) as refused:
        load_config(tmp_path / "mine.py")
    assert str(refused.value).startswith(f"{tmp_path / 'mine.py'}: _base_: ")


@pytest.mark.parametrize("task", TASKS)
def test_every_key_of_a_config_is_documented_and_no_other(task):
    free = (*FREE, *task_class_of(task).FREE)
    known = {key for key, _ in leaves(engine.DEFAULTS | task_class_of(task).DEFAULTS, free)}
    assert known == KEYS[None].keys() | KEYS[task].keys()


def test_a_printed_config_says_what_its_keys_mean_and_runs_alone(capsys, tmp_path):
    assert main(["config", "segment/semantic_fpn_quadtree_b0_160k_ade20k", "seed=3"]) == 0
    path = tmp_path / "my.py"
    path.write_text(text := capsys.readouterr().out)
    assert "\n    divisor=32,  # evaluation then stretches the sides" in text
    assert "\nseed = 3  # of everything that is drawn\n" in text
    assert "_base_" not in text
    assert load_config(path) == load_config("segment/semantic_fpn_quadtree_b0_160k_ade20k", ["seed=3"])


def test_recipes_are_listed_with_what_they_were_run_on(capsys):
    assert main(["recipes", "nat_atto"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["recipe", "model", "data", "run", "on", "result"]
    assert len(lines) == 6
    digits = next(line for line in lines if line.startswith("classify/nat_atto_digits "))
    assert "two idle CPU cores" in digits
    assert digits.endswith("97.7 % held-out accuracy after the last epoch")
    assert main(["recipes", "detect/mask_rcnn_nat_*_coco"]) == 0
    published = capsys.readouterr().out.splitlines()
    assert len(published) == 4
    assert re.search(r"mask_rcnn nat_tiny +coco +- +the authors state box AP 47.7; mask AP 42.6$", published[3])
    assert main(["recipes", "zzz"]) == 2
    assert "no recipe matches 'zzz'" in capsys.readouterr().err


def test_a_model_given_as_a_config_is_answered_with_its_recipes():
    assert recipes_of_model("foveate_davit_tiny.msft_in1k")[:2] == [
        "classify/davit_tiny_imagenet",
        "detect/mask_rcnn_foveate_davit_tiny_1x_coco",
    ]
    assert "detect/mask_rcnn_dinat_s_tiny_3x_coco" not in recipes_of_model("dinat_tiny")
    with pytest.raises(TaskError, match="nat_base is a model, and a config a recipe of it: detect/cascade_mask_rcnn_"):
        load_config("nat_base")
    with pytest.raises(TaskError, match=r"such as classify/nat_tiny_finetune model\.name=resnet34"):
        load_config("resnet34")


def test_a_published_recipe_states_the_table_s_numbers():
    text = read_recipe("detect/mask_rcnn_nat_tiny_3x_coco")
    assert "Expect: the authors state box AP 47.7; mask AP 42.6; not run by us." in text
    assert "top-1 83.2" in read_recipe("classify/nat_tiny_imagenet")
    assert "no published result is known here" in read_recipe("detect/mask_rcnn_quadtree_b0_3x_coco")


def test_runs_that_called_settings_recipes_and_outputs_tasks_are_read(tmp_path):
    head = {"head": "mask2former", "backbone": "nat_atto"}
    (tmp_path / "config.py").write_text(f"task = 'segment'\nmodel = {head | {'recipe': None, 'task': 'panoptic'}!r}\n")
    with pytest.raises(TaskError, match=r"unknown key 'model\.\w+'"):
        load_config(tmp_path / "config.py")
    (tmp_path / "environment.json").write_text("{}")  # as a run's folder has it
    model = load_config(tmp_path / "config.py")["model"]
    assert (model["setting"], model["output"]) == (None, "panoptic")
    card = {"task": "segment", "segments": "panoptic", "recipe": "auto", "model": "mask2former on nat_atto"}
    assert renamed(card) == {
        "task": "segment",
        "output": "panoptic",
        "setting": "auto",
        "model": "mask2former on nat_atto",
    }
