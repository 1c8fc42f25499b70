"""What doesn't learn stays as it is; adapters alone are trained, saved and merged."""

import contextlib
import json
import shutil

import pytest
import timm
import torch
from foveate.tasks import TaskError, engine
from foveate.tasks.adapters import is_target, merge
from foveate.tasks.checkpoints import read_checkpoint
from foveate.tasks.engine.groups import group
from foveate.tasks.frozen import freeze, stage_names
from foveate.tasks.predictors import load_predictor
from foveate.tools.cli import main
from foveate.zoo import CheckpointError, weights
from foveate.zoo.backbone import create_backbone
from PIL import Image
from torch import nn


def train(config_file, output, *overrides, resume=False):
    config = engine.load_config(config_file, overrides)
    return engine.train(config, output, resume=resume, progress=False)


def saved(path):
    return torch.load(path, weights_only=True)


@pytest.fixture
def base(tmp_path):
    """Weights to start from, with statistics and norms that aren't those of a new model."""
    torch.manual_seed(0)
    model = timm.create_model("nat_atto", num_classes=7)
    path = tmp_path / "base.pth"
    torch.save(model.state_dict(), path)
    return path


# Dense runs of two short epochs, with what has to be small in each.
DENSE = {
    "segment/upernet_nat_atto_nuclei": ("data.augment.crop=64", "model.kwargs.channels=16"),
    "segment/mask2former_nat_atto_nuclei": ("data.augment.crop=64", "model.kwargs.dim=32", "data.tile=64"),
    "detect/mask_rcnn_nat_atto_nuclei": ("data.augment.crop=64", "model.kwargs.max_detections=5"),
    "detect/dino_nat_atto_nuclei": ("data.augment.crop=64", "model.kwargs.num_queries=20"),
}


def lora(base):
    return (f"model.checkpoint={base}", "epochs=2", "lora=True", "schedule.warmup_epochs=0", "optimizer.lr=1e-2")


@contextlib.contextmanager
def stopped_after_an_epoch(monkeypatch):
    """Interrupt the run within, once its first epoch is complete."""

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("foveate.tasks.engine.hooks.RunHook._keep", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_adapters_are_trained_saved_merged_and_resumed(config_file, base, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    whole = train(config_file, tmp_path / "run", *lora(base))
    best, last = saved(whole["best"]), saved(whole["last"])
    names = set(best["state_dict"])
    assert {name for name in names if ".lora_" not in name} == {"head.fc.weight", "head.fc.bias"}
    assert sum(".lora_A." in name for name in names) == 40
    assert best["card"]["lora"]["base"] == str(base)
    # Adapters and classifier alone have a state of the optimizer.
    assert len(last["optimizer"]["state"]) == len(names)
    # Merged, it is the model as it was trained, and the base weights are what they were.
    config = engine.load_config(config_file, lora(base))
    metrics, _, _ = engine.evaluate(config, whole["last"], progress=False)
    key = {f"val/{name}": value for name, value in metrics.items()}
    assert key["val/loss"] == pytest.approx(whole["history"][-1]["val/loss"], rel=1e-5)
    merged, start = read_checkpoint(whole["last"])["state_dict"], saved(base)
    changed = {name for name, value in start.items() if not torch.equal(value, merged[name])}
    assert all(
        (name.endswith(".weight") and is_target(name[:-7], ("qkv", "proj", "fc1", "fc2"))) or "head" in name
        for name in changed
    )
    assert len(changed) == 42
    predictor = load_predictor(whole["last"])
    assert set(predictor.model.state_dict()) == set(start)
    # Resumed after the first epoch, it ends with the same bits.
    stopped = tmp_path / "stopped"
    with stopped_after_an_epoch(monkeypatch):
        train(config_file, stopped, *lora(base))
    resumed = train(config_file, stopped, *lora(base), resume=True)
    again = saved(resumed["last"])["state_dict"]
    assert all(torch.equal(value, again[name]) for name, value in last["state_dict"].items())
    # Other base weights are refused.
    torch.save({name: value + 1 if name.endswith("fc1.weight") else value for name, value in start.items()}, base)
    with pytest.raises(CheckpointError, match=r"holds adapters of .*base.pth, which is no longer the same"):
        load_predictor(whole["last"])
    base.unlink()
    with pytest.raises(CheckpointError, match=r"holds adapters of .*base.pth, which can't be had"):
        load_predictor(whole["last"])


def test_a_file_of_adapters_fetches_nothing(config_file, base, tmp_path, monkeypatch):
    """Its config names the weights that they are of; whoever wrote it may have named any address."""
    pytest.importorskip("peft")
    run = train(config_file, tmp_path / "run", *lora(base), "epochs=1")
    fetched = []
    monkeypatch.setattr("foveate.zoo._download._ask", lambda *arguments, **_: fetched.append(arguments))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    content, address = saved(run["best"]), "https://127.0.0.1:9/base.pth"
    content["config"]["model"]["checkpoint"] = address
    torch.save(content, tmp_path / "strange.pth")
    with pytest.raises(
        CheckpointError, match=rf"no address is followed on a file's word; run `foveate weights fetch {address}`"
    ):
        load_predictor(tmp_path / "strange.pth")
    # What it gave before is used.
    entry = weights.entry_of(address)
    folder = weights.cache_folder() / entry.name
    folder.mkdir(parents=True)
    shutil.copy(base, folder / "base.pth")
    load_predictor(tmp_path / "strange.pth")
    content["config"]["model"] |= {"checkpoint": str(base), "kwargs": {"pretrained_cfg_overlay": {"url": address}}}
    torch.save(content, tmp_path / "strange.pth")
    load_predictor(tmp_path / "strange.pth")
    assert fetched == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("lora", 3), ("lora", {"rank": 2}), ("task", "..engine"), ("classes", None), ("input", {})],
)
def test_adapters_that_make_no_sense_are_one_line(key, value, config_file, base, tmp_path):
    card = {"task": "classify", "model": "nat_atto", "classes": list("abc"), "kwargs": {}, "input": {}}
    card["lora"] = {"base": str(base), "sha256": "0", "rank": 2, "alpha": 1.0}
    model = {"name": "nat_atto", "pretrained": False, "checkpoint": str(base), "kwargs": {}}
    content = {"card": card | {key: value}, "config": {"model": model}, "state_dict": {"x": torch.zeros(1)}}
    torch.save(content, tmp_path / "strange.pth")
    with pytest.raises(CheckpointError, match=r"strange.pth: ") as error:
        load_predictor(tmp_path / "strange.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "recipe", [recipe if "upernet" in recipe else pytest.param(recipe, marks=pytest.mark.heavy) for recipe in DENSE]
)
def test_adapters_of_a_dense_model_are_measured_resumed_predicted_with_and_exported(recipe, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    base = tmp_path / "base.pth"
    torch.save(timm.create_model("nat_atto").state_dict(), base)
    overrides = (*DENSE[recipe], f"model.backbone_checkpoint={base}", "lora=True", "epochs=2", "data.repeat=4")
    overrides += ("batch_size=2", "schedule.warmup_iterations=0", "ema=0.5")
    monkeypatch.setattr(f"foveate.tasks.{recipe.partition('/')[0]}.Task.draw", lambda *args: [])
    config = engine.load_config(recipe, overrides)
    whole = engine.train(config, tmp_path / "run", progress=False)
    state = saved(whole["last"])["state_dict"]
    assert sum(".lora_A." in name for name in state) == 40
    assert all(".lora_" in name for name in state if name.startswith("backbone."))
    assert any(value.abs().max() > 0 for name, value in state.items() if ".lora_B." in name)
    metrics, _, _ = engine.evaluate(config, whole["last"], progress=False)
    assert metrics == pytest.approx(
        {key[4:]: x for key, x in whole["history"][-1].items() if key[:4] == "val/"}, abs=1e-3
    )
    # Resumed after the first epoch, it ends with the same bits.
    stopped = tmp_path / "stopped"
    with stopped_after_an_epoch(monkeypatch):
        engine.train(config, stopped, progress=False)
    again = saved(engine.train(config, stopped, resume=True, progress=False)["last"])["state_dict"]
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    # What is exported is whole: the base weights aren't needed any longer.
    exported = tmp_path / "whole.safetensors"
    assert main(["export", str(whole["last"]), str(exported)]) == 0
    merged = load_predictor(whole["last"]).model.state_dict()
    base.unlink()
    predictor = load_predictor(exported)
    assert all(torch.equal(value, merged[name]) for name, value in predictor.model.state_dict().items())
    assert predictor([Image.new("RGB", (64, 64))])
    with pytest.raises(CheckpointError, match=r"holds adapters of .*base.pth, which can't be had"):
        load_predictor(whole["last"])


def test_at_the_default_rank_few_parameters_learn():
    pytest.importorskip("peft")
    from foveate.tasks.adapters import DEFAULT_RANK, add_adapters, is_new, is_saved, without_adapters

    model = timm.create_model("nat_tiny", num_classes=10).eval()
    new = is_new("classify", model)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"rank": DEFAULT_RANK, "alpha": 16.0, "dropout": 0.0, "targets": ("qkv", "proj", "fc1", "fc2")}
    add_adapters(model, model, new, settings)
    learning = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert learning < 0.02 * sum(weight.numel() for weight in model.parameters())
    state = model.state_dict()
    assert 4 * sum(value.numel() for name, value in state.items() if is_saved(name, new)) < 5e6
    assert {name: value.shape for name, value in without_adapters(state).items()} == {
        name: value.shape for name, value in start.items()
    }
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(weight, std=0.02)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        adapted = model(images)
        whole = timm.create_model("nat_tiny", num_classes=10).eval()
        whole.load_state_dict(merge(start, {n: v for n, v in model.state_dict().items() if is_saved(n, new)}, 4.0))
        assert (adapted - whole(images)).abs().max() <= 1e-5 * adapted.std()


@pytest.mark.parametrize(
    "name", ["dat_tiny", "litv2_small", "transnext_micro", "quadtree_a_b0", "van_b0", "vit_tiny_patch16_224"]
)
def test_every_family_has_layers_to_adapt(name):
    pytest.importorskip("peft")
    from foveate.tasks.adapters import add_adapters, is_new

    with torch.device("meta"):
        model = timm.create_model(name)
        settings = {"rank": 2, "alpha": 16.0, "dropout": 0.0, "targets": ("qkv", "proj", "fc1", "fc2")}
        add_adapters(model, model, is_new("classify", model), settings)
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any(".lora_A." in name for name in learning)
    assert all(".lora_" in name or name.startswith("head") for name in learning)
    assert not any("norm" in name for name in learning)


def test_names_of_layers_are_told_by_their_last_word():
    targets = ("qkv", "proj", "fc1", "fc2")
    assert all(is_target(name, targets) for name in ("a.qkv", "a.l_q", "kv", "b.h_proj", "fc1", "x.k"))
    assert not any(is_target(name, targets) for name in ("a.proj1", "head.fc", "mix", "a.qkvx", "a.1"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("lora.rank=2",), "lora adapts weights: set model.pretrained=True or model.checkpoint=FILE"),
        (("lora.rank=0",), "lora.rank is 0, but must be at least 1"),
        (
            ("lora.rank=2", "lora.targets=('nothing',)", "model.checkpoint={base}"),
            "no layer is called nothing; there are",
        ),
        (("lora.rank=2", "freeze=(0,)", "model.checkpoint={base}"), "leave freeze out"),
        (("freeze=(9,)",), r"stage 9, but .* has 4, counted from 0"),
        (("freeze=('stemm',)",), "'stemm', which is no module; did you mean 'stem"),
        (("freeze=('head', 0, 1, 2, 3, 'norm')",), "leaves nothing to learn"),
    ],
)
def test_what_can_t_be_is_said_before_training(config_file, base, tmp_path, overrides, message):
    overrides = [text.format(base=base) for text in overrides]
    with pytest.raises(TaskError, match=message):
        train(config_file, tmp_path / "run", *overrides)


def test_frozen_stages_get_no_gradient_and_no_state(config_file, tmp_path):
    run = train(config_file, tmp_path / "run", "epochs=1", "schedule.warmup_epochs=0", "freeze=(0,1,'norm')")
    torch.manual_seed(0)
    model = timm.create_model("nat_atto", num_classes=2)
    freeze(model, (0, 1, "norm"))
    learning = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert {name.split(".")[0] for name in learning} == {"stages", "head"}
    assert all(f"{stage_names(model)[index]}." not in name for index in (0, 1) for name in learning)
    state = saved(run["last"])
    assert len(state["optimizer"]["state"]) == len(learning)
    assert sum(len(group["params"]) for group in state["optimizer"]["param_groups"]) == len(learning)
    assert json.loads((tmp_path / "run" / "history.json").read_text())


def test_norms_of_frozen_stages_keep_their_statistics():
    model = timm.create_model("resnet18", num_classes=2)
    frozen = freeze(model, (0, 1))
    assert {name.split(".")[0] for name, weight in model.named_parameters() if weight.requires_grad} == {
        "layer3",
        "layer4",
        "fc",
    }
    assert any(module is model.layer1 for module in frozen)
    vit = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=2)
    freeze(vit, (0, "blocks.1"))
    assert not vit.pos_embed.requires_grad
    assert not any(weight.requires_grad for weight in vit.patch_embed.parameters())
    learning = {name for name, weight in vit.named_parameters() if weight.requires_grad}
    assert {name.split(".")[1] for name in learning if name.startswith("blocks.")} == {"2"}


def test_stages_of_a_detectors_backbone_are_frozen_by_number_and_a_recipes_factors_stay():
    settings = {"factors": {"backbone.": 0.5}, "layer_decay": None, "no_decay": None, "weight_decay": 0.1}
    net = nn.Module()
    net.backbone, net.head = create_backbone("nat_atto"), nn.Linear(2, 2)
    stem = [weight for name, weight in net.named_parameters() if ".stem." in name]
    freeze(net, (0,))
    assert stem
    assert not any(weight.requires_grad for weight in stem)
    learning = {name for name, weight in net.named_parameters() if weight.requires_grad}
    assert any(".stages.1." in name for name in learning)
    assert not any(".stages.0." in name for name in learning)
    freeze(net, ("backbone",))
    assert [len(entry["params"]) for entry in group(net, settings)] == [1, 1]
    with pytest.raises(TaskError, match="no parameter's name holds 'neck'"):
        group(net, settings | {"factors": {"neck": 0.5}})
