"""timm's own models by every door of the zoo: filled completely from a file, or refused by name."""

import foveate
import pytest
import timm
import torch
from foveate.tasks.classify import create_classifier
from foveate.zoo import CheckpointError
from foveate.zoo.loading import create_model

# A model of each kind of features that timm has: a list, flattened or not, a class of its own, a getter, hooks.
SMALL_SWIN = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)}
MODELS = {
    "test_resnet": {},
    "swin_tiny_patch4_window7_224": SMALL_SWIN,
    "test_convnext": {},
    "test_efficientnet": {},
    "test_vit": {},
    "test_nfnet": {},
}
MAPS = {"test_vit": (1, 3)}


def drawn(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state dict with other values, each its own."""
    generator = torch.Generator().manual_seed(1)
    return {
        key: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }


def save(state: dict, folder, name: str = "file.pth"):
    torch.save(state, folder / name)
    return folder / name


def values(model) -> list[float]:
    return sorted(float(value.double().sum()) for value in model.state_dict().values() if value.is_floating_point())


@pytest.mark.parametrize("name", MODELS)
def test_a_backbone_gets_every_entry_of_a_classifiers_or_a_dense_models_file(name, tmp_path):
    options, maps = MODELS[name], MAPS.get(name, (1, 2, 3))
    whole = drawn(timm.create_model(name, num_classes=7, **options))
    body = foveate.create_backbone(name, out_indices=maps, checkpoint=save(whole, tmp_path), **options)
    given = {round(float(value.double().sum()), 6) for value in whole.values() if value.is_floating_point()}
    assert {round(value, 6) for value in values(body)} <= given
    floats = [key for key, value in body.state_dict().items() if value.is_floating_point()]
    assert body.load_report.matched >= len(floats)
    # The same inside a dense model's file, under timm's names and under those of our own files.
    nested = {f"backbone.{key}": value for key, value in whole.items()} | {"neck.weight": torch.ones(1)}
    ours = {f"backbone.{key}": value for key, value in body.state_dict().items()} | {"neck.weight": torch.ones(1)}
    for number, state in enumerate((nested, {"state_dict": ours}, body.state_dict())):
        path = save(state, tmp_path, f"{number}.pth")
        again = foveate.create_backbone(name, out_indices=maps, checkpoint=path, **options)
        assert all(torch.equal(value, body.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_other_names_are_refused_with_what_is_missing(name, tmp_path):
    options = MODELS[name]
    state = {f"trunk.{key}": value for key, value in timm.create_model(name, **options).state_dict().items()}
    for path in (save(state, tmp_path), save({f"backbone.{key}": value for key, value in state.items()}, tmp_path)):
        with pytest.raises(CheckpointError, match=r"0 of \d+ entries match, \d+ missing \(.+\).*not translated"):
            foveate.create_backbone(name, out_indices=MAPS.get(name, (1, 2, 3)), checkpoint=path, **options)
        for classes in (None, 10):
            with pytest.raises(CheckpointError, match=r"\d+ missing|no classifier"):
                create_classifier(name, classes, checkpoint=path, **options)


@pytest.mark.parametrize("name", MODELS)
def test_a_missing_or_a_strange_entry_is_refused_and_named(name, tmp_path):
    options, maps = MODELS[name], MAPS.get(name, (1, 2, 3))
    whole = drawn(timm.create_model(name, **options))
    body = foveate.create_backbone(name, out_indices=maps, checkpoint=save(whole, tmp_path), **options)
    victim = next(key for key in whole if key.endswith(".weight") and whole[key].ndim > 1)
    less = {key: value for key, value in whole.items() if key != victim}
    more = whole | {"blocks.99.weight": torch.ones(3)}
    for state, reason in ((less, "1 missing"), (more, r"1 unexpected \(blocks.99.weight\)")):
        path = save(state, tmp_path)
        with pytest.raises(CheckpointError, match=reason):
            foveate.create_backbone(name, out_indices=maps, checkpoint=path, **options)
        with pytest.raises(CheckpointError, match=reason):
            create_classifier(name, 10, checkpoint=path, **options)
    assert body.load_report.matched


@pytest.mark.parametrize("name", MODELS)
def test_a_classifier_is_kept_or_started_anew_by_the_count_of_the_file(name, tmp_path):
    options = MODELS[name]
    whole = drawn(timm.create_model(name, num_classes=7, **options))
    layer = timm.create_model(name, **options).pretrained_cfg["classifier"]
    path = save(whole, tmp_path)
    kept = create_classifier(name, 7, checkpoint=path, **options)
    assert all(torch.equal(value, whole[key]) for key, value in kept.state_dict().items())
    assert kept.load_report.missing == ()
    with pytest.raises(CheckpointError, match=r"has 7 classes, .* has 1000: give num_classes=7 to keep"):
        create_classifier(name, checkpoint=path, **options)
    fresh = create_classifier(name, 3, checkpoint=path, **options)
    assert set(fresh.load_report.missing) == {f"{layer}.weight", f"{layer}.bias"}
    headless = save({key: value for key, value in whole.items() if not key.startswith(f"{layer}.")}, tmp_path)
    for classes in (7, 10, 1000):
        model = create_classifier(name, classes, checkpoint=headless, **options)
        assert model.num_classes == classes
        assert set(model.load_report.missing) == {f"{layer}.weight", f"{layer}.bias"}
        state = model.state_dict()
        assert all(torch.equal(value, whole[key]) for key, value in state.items() if not key.startswith(f"{layer}."))
    with pytest.raises(CheckpointError, match="no classifier: give num_classes=1000"):
        create_classifier(name, checkpoint=headless, **options)


def test_timm_still_adapts_channels_sizes_and_its_old_names(tmp_path):
    whole = drawn(timm.create_model("test_resnet"))
    model = foveate.create_backbone("test_resnet", checkpoint=save(whole, tmp_path), in_chans=1)
    assert torch.allclose(model.features.conv1[0].weight, whole["conv1.0.weight"].sum(1, keepdim=True))
    assert model.load_report.reshaped
    vit = drawn(timm.create_model("test_vit"))
    model = foveate.create_backbone("test_vit", checkpoint=save(vit, tmp_path), out_indices=(1,), img_size=96)
    assert model.features.model.pos_embed.shape[1] == 37
    assert [change[0] for change in model.load_report.reshaped] == ["model.pos_embed"]
    # Swin's files of before timm 0.8 count its downsampling from the stage before.
    swin = drawn(timm.create_model("swin_tiny_patch4_window7_224", **SMALL_SWIN))
    old = {key.replace("head.fc.", "head."): value for key, value in swin.items()}
    for stage in (1, 2, 3):
        for key in [key for key in old if key.startswith(f"layers.{stage}.downsample")]:
            old[key.replace(f"layers.{stage}.", f"layers.{stage - 1}.")] = old.pop(key)
    model = create_classifier("swin_tiny_patch4_window7_224", checkpoint=save({"model": old}, tmp_path), **SMALL_SWIN)
    assert all(torch.equal(value, swin[key]) for key, value in model.state_dict().items())


def test_a_larger_models_file_does_not_fill_a_smaller_one(tmp_path):
    path = save(timm.create_model("resnet26").state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match="the checkpoint is not one of resnet50"):
        foveate.create_backbone("resnet50", checkpoint=path)
    path = save(timm.create_model("resnet34").state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match=r"\d+ unexpected \(layer1\.2"):
        foveate.create_backbone("resnet18", checkpoint=path)


def test_weights_named_twice_are_refused_and_timms_own_options_are_understood(tmp_path):
    whole = drawn(timm.create_model("test_resnet"))
    path = save(whole, tmp_path)
    for options in ({"checkpoint_path": str(path)}, {"pretrained_cfg_overlay": {"file": str(path)}}):
        model = create_model("test_resnet", **options)
        assert torch.equal(model.fc.weight, whole["fc.weight"])
        assert "state_dict" not in model.pretrained_cfg or not model.pretrained_cfg["state_dict"]
        with pytest.raises(CheckpointError, match="named twice"):
            create_model("test_resnet", path, **options)


def test_what_timm_leaves_out_of_its_own_published_file_is_noticed(tmp_path, monkeypatch):
    """A file of the cache that lacks a layer: cut to features, timm would go on with a random one."""
    whole = drawn(timm.create_model("test_resnet"))
    del whole["layer1.0.conv1.weight"]
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **options: whole)
    monkeypatch.setattr("foveate.zoo.loading.check_host", lambda url: None)
    with pytest.raises(CheckpointError, match=r"1 missing \(layer1\.0\.conv1\.weight\)"):
        foveate.create_backbone("test_resnet", pretrained=True)


def test_nothing_is_left_on_a_model_that_was_watched(tmp_path):
    import copy
    import pickle

    path = save(drawn(timm.create_model("test_resnet", in_chans=3)), tmp_path)
    model = foveate.create_backbone("test_resnet", checkpoint=path, in_chans=1)
    assert not any(module._load_state_dict_post_hooks for module in model.modules())
    assert pickle.loads(pickle.dumps(copy.deepcopy(model))).channels == model.channels
