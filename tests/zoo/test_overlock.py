"""OverLoCK's two forms, its auxiliary head, dense forms and sizes."""

import json
from pathlib import Path

import foveate
import pytest
import timm
import torch
import torch.nn.functional as F
from foveate.blocks.losses import collect_losses
from foveate.tasks import engine
from foveate.tasks.classify.task import Classify
from foveate.tasks.data import classification
from foveate.tasks.data.samples import load_digits
from foveate.zoo import CheckpointError
from timm.utils import reparameterize_model
from torch import nn

SMALL = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), focus_depths=(2, 1), groups=(2, 2), head_dim=16)


def build(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model("overlock_xt", **{"num_classes": 5, **SMALL, **kwargs})
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if "running_var" in name:
            value.uniform_(0.5, 2)
        elif value.ndim > 1 or "running_mean" in name:
            nn.init.normal_(value, std=0.2)
    return model.eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_auxiliary_logits_are_the_published_ones(open_fixture, tmp_path):
    fixture = open_fixture("overlock_parts/overlock_xt_aux_128x160")
    overlay = dict(file=str(fixture.checkpoint(tmp_path)))
    model = timm.create_model(
        "overlock_xt", pretrained=True, aux_head=True, drop_path_rate=0.0, pretrained_cfg_overlay=overlay
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == fixture.spec["notes"]["params"]
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with collect_losses(lambda logits: logits) as own:
        main = model(fixture.input())
    fixture.assert_output("main", main, 1e-5 * fixture.spec["outputs"]["main"]["std"])
    fixture.assert_output("aux", own["aux"] / 0.4, 1e-5 * fixture.spec["outputs"]["aux"]["std"])


@pytest.mark.parametrize("way", [lambda model: model.fuse(), reparameterize_model], ids=["fuse", "timm"])
@torch.no_grad()
def test_both_forms_compute_the_same(images, way):
    model = build().double()
    expected = model(images.double())
    fused = way(model)
    assert not [name for name, _ in fused.named_parameters() if "dil_" in name or "origin_bn" in name]
    torch.testing.assert_close(fused(images.double()), expected, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_files_of_either_form_load_into_either(images, tmp_path):
    model = build()
    files = {"training": tmp_path / "training.pth", "merged": tmp_path / "merged.pth"}
    torch.save(model.state_dict(), files["training"])
    expected = model(images)
    torch.save(model.fuse().state_dict(), files["merged"])
    for form, path in files.items():
        for inference_mode in (False, True):
            overlay = dict(file=str(path))
            loaded = timm.create_model(
                "overlock_xt",
                pretrained=True,
                pretrained_cfg_overlay=overlay,
                num_classes=5,
                inference_mode=inference_mode,
                **SMALL,
            )
            merged = form == "merged" or inference_mode
            assert ("stages.0.blocks.0.large.lk_origin.bias" in loaded.state_dict()) == merged
            torch.testing.assert_close(loaded.eval()(images), expected, atol=1e-4, rtol=1e-4)


def test_a_file_that_lacks_a_branch_or_the_auxiliary_head_is_refused(tmp_path):
    model = build()
    path = tmp_path / "file.pth"
    torch.save(model.state_dict(), path)
    options = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), num_classes=5, **SMALL)
    with pytest.raises(CheckpointError, match=r"missing \(aux_head"):
        timm.create_model("overlock_xt", aux_head=True, **options)
    state = model.state_dict()
    del state["stages.0.blocks.0.large.dil_convs.2.weight"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(stages.0.blocks.0.large.dil_convs.2.weight"):
        timm.create_model("overlock_xt", **options)
    with pytest.raises(CheckpointError, match="lk_origin"):
        timm.create_model("overlock_xt", inference_mode=True, **options)


@torch.no_grad()
def test_a_classifiers_file_starts_a_dense_model(tmp_path, images):
    model = build()
    path = tmp_path / "file.pth"
    torch.save(model.state_dict(), path)
    for setting, norms in (("detection", 5), ("segmentation", 4)):
        backbone = foveate.create_backbone("overlock_xt", setting=setting, checkpoint=path, num_classes=5, **SMALL)
        assert len(backbone.features.model.out_norms) == norms
        assert all("out_norms." in key for key in backbone.load_report.missing), backbone.load_report
        shapes = [tuple(level.shape[1:]) for level in backbone.eval()(images)]
        assert shapes == [(8, 16, 24), (8, 8, 12), (20, 4, 6), (20, 2, 3)]
        assert backbone.channels == [8, 8, 20, 20]


@torch.no_grad()
def test_the_second_norm_is_on_the_way_to_the_later_maps(images):
    model = build(out_norms=True)
    before = model.forward_intermediates(images, intermediates_only=True)
    model.out_norms[0].weight.mul_(2)
    model.out_norms[1].bias.add_(1)
    after = model.forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close(after[1], before[1] + 1)
    for level in (2, 3):
        assert (after[level] - before[level]).abs().max() > 1e-3
    torch.testing.assert_close(model.forward_features(images), after[3])


@pytest.mark.parametrize("size", [(1, 1), (7, 40), (33, 31), (224, 32)])
@torch.no_grad()
def test_images_of_any_size(size):
    model = build()
    images = torch.randn(1, 3, *size)
    assert model(images).isfinite().all()
    final, maps = model.forward_intermediates(images)
    assert [tuple(level.shape[2:]) for level in maps] == [
        tuple(-(-side // stride) for side in size) for stride in (4, 8, 16, 32)
    ]
    torch.testing.assert_close(final, model.forward_features(images))


@torch.no_grad()
def test_an_image_that_holds_no_numbers_spoils_no_other(images):
    model = build()
    expected = model(images)
    spoilt = images.clone()
    spoilt[0, 0, 5, 5] = float("nan")
    logits = model(spoilt)
    assert logits[0].isnan().all()
    torch.testing.assert_close(logits[1], expected[1])


def test_training_without_a_collection_ties_the_auxiliary_head_to_nothing(images):
    model = build(aux_head=True).train()
    logits = model(images)
    assert logits.shape == (2, 5)
    F.cross_entropy(logits, torch.tensor([0, 3])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(not parameter.grad.any() for parameter in model.aux_head.parameters())


@torch.no_grad()
def test_classes_bring_their_pooling_back(images):
    model = build(num_classes=0, global_pool="")
    assert model(images).shape == (2, 20, 2, 3)
    with pytest.raises(ValueError, match="needs pooling"):
        model.reset_classifier(3, "")
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    model.reset_classifier(0)
    assert model(images).shape == (2, 16)


@pytest.mark.parametrize("indices", [[0], [1], [2], [1, 3]])
@torch.no_grad()
def test_pruned_models_give_the_same_maps(images, indices):
    for options in ({}, dict(out_norms=True, overview_out=True)):
        model = build(**options)
        expected = model.forward_intermediates(images, indices=indices, intermediates_only=True)
        model.prune_intermediate_layers(indices)
        final, actual = model.forward_intermediates(images, indices=indices)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(model.forward_features(images), final)


def test_the_auxiliary_loss_is_trained_on_and_logged(tmp_path, monkeypatch):
    images, labels = load_digits()
    few = (images[:48], labels[:48])
    monkeypatch.setattr(classification, "load_digits", lambda: few)
    monkeypatch.setattr(classification, "DIGITS_TRAIN", 32)
    monkeypatch.setattr(Classify, "draw", lambda *args: [])  # most of the time
    options = ["model.name=overlock_xt", "model.kwargs={}", "model.kwargs.aux_head=True", "grad_checkpointing=True"]
    options += [f"model.kwargs.{key}={value}" for key, value in SMALL.items()]
    options += ["epochs=1", "schedule.warmup_epochs=0", "batch_size=16", "device=cpu", "ema=0.1", "loss.mixup=0.8"]
    config = engine.load_config(Path(foveate.__file__).parent / "configs/classify/host_atto_digits.py", options)
    result = engine.train(config, tmp_path / "run", progress=False)
    (entry,) = json.loads((tmp_path / "run" / "history.json").read_text())
    assert 0.3 * entry["train/loss"] < entry["train/loss_aux"] < 0.5 * entry["train/loss"]
    state = torch.load(result["last"], weights_only=True)["state_dict"]
    # Without a loss of its own its bias would still be what it began as.
    assert state["aux_head.2.bias"].abs().max() > 1e-4
