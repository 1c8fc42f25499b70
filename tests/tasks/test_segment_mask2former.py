"""Mask2Former and OneFormer: training, the three tasks, published settings and files."""

import logging

import foveate
import pytest
import torch
from foveate.tasks import TaskError
from foveate.tasks.dense.segment.mask2former import SETTINGS, THINGS
from foveate.tasks.dense.segment.postprocess import (
    boxes_around,
    fused_panoptic,
    instance_masks,
    panoptic_segments,
)
from foveate.tasks.dense.segment.set_loss import semantic_targets
from foveate.zoo import CheckpointError
from foveate.zoo.backbone import dense_settings_of
from torch import nn

SMALL = {"dim": 32, "num_queries": 6, "encoder_layers": 2, "decoder_layers": 4, "num_heads": 4, "num_points": 48}


class Maps(nn.Module):
    """Average-pooled images, projected: a backbone of any channels."""

    def __init__(self, channels=(8, 12, 16, 20)):
        super().__init__()
        self.channels = list(channels)
        self.proj = nn.ModuleList(nn.Conv2d(3, width, 1) for width in channels)

    def forward(self, x):
        return [conv(nn.functional.avg_pool2d(x, 4 * 2**i, ceil_mode=True)) for i, conv in enumerate(self.proj)]


def small(head="mask2former", num_classes=3, **kwargs):
    return foveate.create_segmenter(head, Maps(), num_classes, **SMALL | kwargs)


@pytest.mark.parametrize("head", ["mask2former", "oneformer"])
def test_every_parameter_learns_on_odd_images(head):
    torch.manual_seed(0)
    model = small(head)
    images, labels = torch.randn(2, 3, 65, 97), torch.randint(3, (2, 65, 97))
    labels[:, :5] = 255
    losses = model.loss(images, semantic_targets(labels), normalized=True)
    names = {"loss_ce", "loss_mask", "loss_dice"}
    assert set(losses) == names | {f"{name}_{index}" for name in names for index in range(4)}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_few_steps_fit_one_image():
    torch.manual_seed(0)
    model = small()
    images = torch.zeros(1, 3, 64, 64)
    images[:, 0, :, :32], images[:, 1, 20:40, 40:60] = 2, 2
    masks = torch.stack([images[0, 0] > 1, images[0, 1] > 1])
    targets = [{"labels": torch.tensor([0, 2]), "masks": masks}]
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(60):
        loss = sum(model.loss(images, targets, normalized=True).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    predicted = model.predict(images, normalized=True)[0]
    assert (predicted[masks[0]] == 0).float().mean() > 0.9
    assert (predicted[masks[1]] == 2).float().mean() > 0.8


def test_images_without_objects_and_masks_of_several_sizes():
    model = small()
    images = torch.randn(3, 3, 40, 56)
    targets = [
        {"labels": torch.zeros(0, dtype=torch.long), "masks": torch.zeros(0, 40, 56)},
        {"labels": torch.tensor([1]), "masks": torch.ones(1, 33, 47, dtype=torch.bool)},
        {"labels": torch.tensor([0, 0]), "masks": torch.zeros(2, 40, 56)},
    ]
    images = [images[0], images[1, :, :33, :47], images[2]]
    for batch in (slice(None), slice(1)):
        losses = model.loss(images[batch], targets[batch], normalized=True)
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())


def test_more_objects_than_queries():
    model = small()
    masks = torch.randint(2, (9, 64, 64))
    losses = model.loss(torch.randn(1, 3, 64, 64), [{"labels": torch.arange(9) % 3, "masks": masks}], normalized=True)
    assert all(loss.isfinite() for loss in losses.values())


def test_diverged_predictions_are_named():
    model = small()
    predictions = [(torch.full((1, 6, 4), float("nan")), torch.zeros(1, 6, 8, 8))]
    with pytest.raises(TaskError, match=r"training has diverged; try a lower optimizer\.lr"):
        model.criterion(predictions, [{"labels": torch.tensor([0]), "masks": torch.ones(1, 8, 8)}])


@pytest.mark.parametrize("head", ["mask2former", "oneformer"])
def test_the_three_tasks_at_the_images_size(head):
    torch.manual_seed(0)
    model = small(head, things=[2]).eval()
    images = torch.randn(2, 3, 45, 70)
    with torch.inference_mode():
        scores = model(images)
    assert scores.shape == (2, 3, 45, 70)
    assert torch.equal(model.predict(images, normalized=True), scores.argmax(1))
    assert model.predict(images, output_size=(30, 90), scales=(0.5, 1), flip=True, normalized=True).shape == (2, 30, 90)
    for result in model.predict(images, "instance", output_size=(30, 90), normalized=True):
        assert set(result["labels"].tolist()) <= {2}
        assert result["masks"].shape == (len(result["labels"]), 30, 90)
        assert (result["scores"].diff() <= 0).all()
    model.object_threshold = 0.0
    for result in model.predict([images[0], images[1, :, :33]], "panoptic", normalized=True):
        ids = [info["id"] for info in result["segments_info"]]
        assert set(result["segments"].unique().tolist()) <= {0, *ids}
        for info in result["segments_info"]:
            assert info["area"] == (result["segments"] == info["id"]).sum()
    assert result["segments"].shape == (33, 70)
    with pytest.raises(TaskError, match="no output 'panoptics'; did you mean 'panoptic'"):
        model.predict(images, "panoptics", normalized=True)
    with pytest.raises(TaskError, match="don't go with the instance output"):
        model.predict(images, "instance", flip=True, normalized=True)
    with pytest.raises(TaskError, match="scales are positive"):
        model.predict(images, scales=(-1,), normalized=True)


def test_padding_is_cut_off():
    """An image that is padded by hand, by less than to a multiple of 32, has the same result."""
    model = small().eval()
    image = torch.randn(1, 3, 45, 70)
    padded = nn.functional.pad(image, (0, 26, 0, 19))
    torch.testing.assert_close(model(image), model(padded)[:, :, :45, :70])


def test_panoptic_rules():
    """Segments that lost most of their mask are dropped, stuff is one segment, things are counted."""
    big, small_one, left = torch.full((3, 8, 8), -9.0)
    big[:, :6], small_one[:2, :2], left[:, 6:] = 9, 3, 9
    hidden = big.clone() - 5  # the same place, less sure
    masks = torch.stack([big, hidden, small_one, left, left.flip(1)])
    classes = torch.full((5, 4), -9.0)
    classes[torch.arange(5), torch.tensor([0, 1, 1, 2, 3])] = 9
    segments, info = panoptic_segments(classes, masks, things={0, 1})
    assert [(x["id"], x["category_id"], x["isthing"], x["area"]) for x in info] == [(1, 0, True, 48), (2, 2, False, 16)]
    assert segments.unique(return_counts=True)[1].tolist() == [48, 16]
    classes[4], masks[3, :, 7], masks[4] = classes[3], -9, -9
    masks[4, :, 7] = 9
    segments, info = panoptic_segments(classes, masks, things={0, 1})
    assert [(x["id"], x["category_id"], x["area"]) for x in info] == [(1, 0, 48), (2, 2, 16)]
    _, info = panoptic_segments(classes, masks, things={0, 1, 2})
    assert [(x["id"], x["category_id"], x["area"]) for x in info] == [(1, 0, 48), (2, 2, 8), (3, 2, 8)]
    nothing, info = panoptic_segments(-classes, masks, things={0})
    assert not info
    assert nothing.max() == 0


def test_fusion_of_mmdet_numbers_classes_and_keeps_uncertain_winners():
    masks = torch.full((2, 4, 4), -1.0)
    masks[0] -= 2
    masks[0, :, :2], masks[1, 3, 3] = 4, 0.5
    classes = torch.full((2, 3), -9.0)
    classes[0, 0], classes[1, 1] = 9, 9
    fused = fused_panoptic(classes, masks, things={1})
    assert fused.unique().tolist() == [0, 1001]
    assert (fused == 1001).sum() == 8
    sure = fused_panoptic(classes, masks, things={1}, filter_low_score=True)
    assert (sure == 1001).sum() == 1
    assert (sure == 2).sum() == 7
    assert fused_panoptic(-classes, masks, things={1}).unique().tolist() == [2]


def test_fusion_is_an_option_of_the_model():
    torch.manual_seed(0)
    model = small(things=[2], fusion="mmdet", object_threshold=0.0, overlap_threshold=0.3).eval()
    result = model.predict(torch.randn(1, 3, 45, 70), "panoptic", normalized=True)[0]
    ids = [info["id"] for info in result["segments_info"]]
    assert ids
    assert set(result["segments"].unique().tolist()) <= {0, *ids}
    assert all(info["isthing"] == (info["category_id"] == 2) for info in result["segments_info"])
    assert sum(info["area"] for info in result["segments_info"]) == (result["segments"] > 0).sum()
    model.fusion = "mmdt"
    with pytest.raises(TaskError, match="no fusion 'mmdt'; did you mean 'mmdet'"):
        model.predict(torch.randn(1, 3, 45, 70), "panoptic", normalized=True)


def test_semantic_models_resize_scores_and_others_logits():
    torch.manual_seed(0)
    model = small().eval()
    classes, masks = torch.randn(6, 4), 4 * torch.randn(6, 32, 64)
    both = []
    for model.resize_first in (True, False):
        scores = model.postprocess(classes, masks, "semantic", (30, 50), (45, 75))
        assert scores.shape == (3, 45, 75)
        both.append(scores)
    inside = torch.einsum("qc,qhw->chw", classes.softmax(-1)[:, :-1], masks[:, :30, :50].sigmoid())
    expected = nn.functional.interpolate(inside[None], (45, 75), mode="bilinear")[0]
    torch.testing.assert_close(both[1], expected)
    assert (both[0] - both[1]).abs().max() > 0.01


def test_instances_numbered_among_things():
    torch.manual_seed(0)
    model = small(things=[0, 2], number_things=True).eval()
    classes, masks = torch.randn(6, 4), torch.randn(6, 32, 32)
    numbered = model.postprocess(classes, masks, "instance")["labels"]
    model.number_things = False
    labels = model.postprocess(classes, masks, "instance")["labels"]
    assert set(labels.tolist()) == {0, 2}
    assert torch.equal(numbered, labels // 2)


def test_boxes_of_masks():
    masks = torch.zeros(3, 5, 7, dtype=torch.bool)
    masks[0, 1:3, 2:6], masks[2] = True, True
    assert boxes_around(masks).tolist() == [[2, 1, 6, 3], [0, 0, 0, 0], [0, 0, 7, 5]]
    found = instance_masks(torch.randn(3, 5), masks.float() * 2 - 1, topk=100)
    assert len(found["labels"]) == 12


def test_published_settings():
    assert len(THINGS["ade20k"]) == 100
    assert len(THINGS["mapillary"]) == 37
    for head, recipes in SETTINGS.items():
        for name, settings in recipes.items():
            assert settings["backbone"] in dense_settings_of("dinat_large"), (head, name)
    model = small("oneformer", num_classes=None, setting="ade20k", num_queries=5)
    assert model.criterion.num_classes == 150
    assert (model.object_threshold, model.topk, model.number_things) == (0.5, 250, True)
    assert model.things == THINGS["ade20k"]
    semantic = small(num_classes=None, setting="cityscapes_semantic")
    assert (semantic.criterion.num_classes, semantic.resize_first) == (19, False)
    with pytest.raises(TaskError, match="things are classes from 0 to 2"):
        small(things=[3])


@pytest.mark.heavy
def test_dinat_large_as_published():
    with torch.device("meta"):
        model = foveate.create_segmenter("mask2former", "dinat_large", setting="coco_panoptic")
        dilations = [[block.attn.dilation for block in stage.blocks] for stage in model.backbone.features.model.stages]
    assert [len(stage) for stage in dilations] == [3, 4, 18, 5]
    assert model.head.predictor.query_feat.num_embeddings == 200
    assert model.head.predictor.class_embed.out_features == 134
    assert 215e6 < sum(parameter.numel() for parameter in model.parameters()) < 225e6


def detectron2(model, old: bool = False) -> dict:
    """Return a file as detectron2 writes it; ``old``: with the names of its first version."""
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith("head.task_mlp."):
            key = key.removeprefix("head.")
        elif key.startswith("head."):
            key = "sem_seg_head." + key.removeprefix("head.")
        if old:
            key = key.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace("query_feat", "static_query")
        state[key] = value
    return {"model": state | {"criterion.empty_weight": torch.ones(4)}, "trainer": {}, "iteration": 7}


@pytest.mark.parametrize("old", [False, True])
def test_files_of_detectron2(old, tmp_path):
    model = small().eval()
    torch.save(detectron2(model, old), tmp_path / "model.pth")
    loaded = foveate.create_segmenter("mask2former", Maps(), checkpoint=tmp_path / "model.pth", num_heads=4).eval()
    image = torch.randn(1, 3, 33, 40)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(image), model(image), atol=0, rtol=0)
    with pytest.raises(CheckpointError, match="holds a mask2former, not a oneformer"):
        foveate.create_segmenter("oneformer", Maps(), checkpoint=tmp_path / "model.pth")


@pytest.mark.parametrize("head", ["mask2former", "oneformer"])
def test_files_of_oneformer_leave_out_the_text_encoder_and_say_so(head, tmp_path, caplog):
    model = small("oneformer").eval()
    file = detectron2(model)
    extras = ("text_encoder.token_embedding.weight", "text_projector.layers.0.weight", "prompt_ctx.weight")
    file["model"] |= {name: torch.zeros(2, 2) for name in extras}
    torch.save(file, tmp_path / "model.pth")
    with caplog.at_level(logging.WARNING):
        loaded = foveate.create_segmenter(head, Maps(), checkpoint=tmp_path / "model.pth", num_heads=4).eval()
    assert "left out 3 entries that only training needs: prompt_ctx, text_encoder, text_projector" in caplog.text
    assert loaded.topk == 6
    features = model.backbone(torch.randn(2, 3, 40, 56))
    seen = []
    with torch.inference_mode():
        for task in ("semantic", "instance", "panoptic"):
            outputs = loaded.head(features, task)
            for key, output in model.head(features, task).items():
                assert torch.equal(outputs[key], output)
            seen.append(outputs["pred_logits"])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    with pytest.raises(TaskError, match="no prompt 'depth'"):
        loaded.head(features, "depth")


def test_the_pixel_decoder_stays_in_float_under_autocast():
    model = small()
    features = model.backbone(torch.randn(1, 3, 64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        mask_features, maps = model.head.pixel_decoder(features)
        losses = model.loss(torch.randn(1, 3, 64, 64), semantic_targets(torch.randint(3, (1, 64, 64))), normalized=True)
    assert mask_features.dtype == maps[0].dtype == torch.float32
    assert all(loss.isfinite() for loss in losses.values())
