"""Segmenters as users meet them: any backbone and size, options, inference, files, export."""

import logging

import foveate
import numpy as np
import pytest
import torch
from foveate.tasks import TaskError
from foveate.tasks.dense.segment.fcn import FCNHead
from foveate.tasks.dense.segment.inference import resize_to, slide
from foveate.tasks.dense.segment.losses import pixel_accuracy, pixel_cross_entropy
from foveate.tasks.dense.segment.mask2former import SETTINGS
from foveate.tasks.dense.segment.segmenter import HEADS
from foveate.tasks.dense.segment.upernet import UPerHead
from foveate.tasks.export import Options, export_model
from foveate.zoo import CheckpointError, UnknownModelError
from foveate.zoo.backbone import dense_settings_of
from torch import nn

SMALL = {"upernet": {"channels": 16}, "semantic_fpn": {"channels": 16, "neck_channels": 24}}


class Maps(nn.Module):
    """Average-pooled images, projected: a backbone of any channels."""

    def __init__(self, channels=(8, 12, 16, 20)):
        super().__init__()
        self.channels = list(channels)
        self.proj = nn.ModuleList(nn.Conv2d(3, width, 1) for width in channels)

    def forward(self, x):
        return [conv(nn.functional.avg_pool2d(x, 4 * 2**i, ceil_mode=True)) for i, conv in enumerate(self.proj)]


def small(head="upernet", backbone="nat_atto", num_classes=3, **kwargs):
    return foveate.create_segmenter(head, backbone, num_classes, **SMALL.get(head, {}) | kwargs)


@pytest.mark.parametrize(
    ("head", "parameters"), [("semantic_fpn", 4_266_646), ("upernet", 30_487_852), ("mask2former", 19_812_439)]
)
def test_published_parameter_counts(head, parameters):
    with torch.device("meta"):
        stub = nn.Module()
        stub.channels = [64, 128, 320, 512]
        model = foveate.create_segmenter(head, stub)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
@pytest.mark.parametrize("size", [(65, 97), (33, 40)])
def test_odd_images_train_and_give_maps_of_their_size(head, size):
    torch.manual_seed(0)
    model = small(head)
    images, labels = torch.randn(2, 3, *size), torch.randint(3, (2, *size))
    losses = model.loss(images, labels, normalized=True)
    assert set(losses) == {"decode.loss_ce"} | ({"aux.loss_ce"} if head == "upernet" else set())
    sum(losses.values()).backward()
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not silent
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    with torch.inference_mode():
        logits = model(images)
        assert logits.shape == (2, 3, *size)
        assert model.head(model.backbone(images)).shape == (2, 3, -(-size[0] // 4), -(-size[1] // 4))
        torch.testing.assert_close(model(images[1:]), logits[1:], atol=1e-4, rtol=1e-4)
    assert torch.equal(model.predict(images, normalized=True), logits.argmax(1))


@pytest.mark.heavy
@pytest.mark.parametrize("backbone", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "davit_tiny"])
@pytest.mark.parametrize("head", ["upernet", "semantic_fpn", "mask2former"])
def test_timm_backbones(head, backbone):
    small_transformer = {"dim": 32, "num_queries": 5, "encoder_layers": 1, "decoder_layers": 3, "num_points": 32}
    model = small(head, backbone, **small_transformer if head == "mask2former" else {})
    assert model.backbone.reductions == [4, 8, 16, 32]
    images, labels = torch.randn(2, 3, 96, 64), torch.randint(3, (2, 96, 64))
    if head == "mask2former":
        masks = [(label == torch.arange(3)[:, None, None]) for label in labels]
        labels = [{"labels": torch.arange(3), "masks": mask} for mask in masks]
    sum(model.loss(images, labels, normalized=True).values()).backward()
    assert model.eval()(images).shape == (2, 3, 96, 64)


def test_deeplab_on_the_stride_it_was_published_with():
    model = foveate.create_segmenter("deeplabv3", "ela_s_resnet18", 21).eval()
    assert model.backbone.reductions == [4, 8, 16, 16]
    rates = [conv[0].dilation[0] for conv in list(model.head.classifier[0].convs)[1:4]]
    assert rates == [6, 12, 18]
    images = torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        assert model(images).shape == (1, 21, 65, 97)
        assert model.head(model.backbone(images)).shape == (1, 21, 5, 7)
    with pytest.raises(TaskError, match="neither deeplabv3 nor nat_atto has an option 'output_stride'"):
        foveate.create_segmenter("deeplabv3", "nat_atto", output_stride=16)
    transformer = foveate.create_segmenter("deeplabv3", "nat_atto", 3).eval()
    assert transformer(torch.randn(1, 3, 64, 96)).shape == (1, 3, 64, 96)


def test_a_batch_of_one_is_too_small_to_train_upernet():
    images, labels = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.long)
    with pytest.raises(TaskError, match="needs at least 2 images in a batch"):
        small(backbone=Maps()).loss(images, labels, normalized=True)
    assert small("semantic_fpn", Maps()).loss(images, labels, normalized=True)["decode.loss_ce"].isfinite()


def test_the_two_means_of_the_cross_entropy():
    """mmseg divides by all pixels, others by those that count."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 6, 7), torch.randint(5, (2, 6, 7))
    labels[0, :4] = 255
    valid = (labels != 255).float().mean()
    expected = nn.functional.cross_entropy(logits, labels, ignore_index=255)
    torch.testing.assert_close(pixel_cross_entropy(logits, labels, mean="valid"), expected)
    torch.testing.assert_close(pixel_cross_entropy(logits, labels), expected * valid)
    nothing = torch.full_like(labels, 255)
    for mean in ("all", "valid"):
        assert pixel_cross_entropy(logits, nothing, mean=mean) == 0
    assert pixel_accuracy(logits, nothing) == 0
    right = nn.functional.one_hot(labels.clamp(max=4), 5).permute(0, 3, 1, 2).float()
    assert pixel_accuracy(right, labels) == 1
    with pytest.raises(ValueError, match="'all' or 'valid'"):
        pixel_cross_entropy(logits, labels, mean="some")


def test_sliding_windows_cover_the_image_and_average():
    """A model that tells each pixel's value gives the image back, whatever the windows."""
    seen = []

    def model(window):
        seen.append(tuple(window.shape[-2:]))
        return window[:, :2]

    image = torch.randn(1, 3, 23, 31)
    for crop, stride in (((10, 12), (7, 5)), ((23, 40), (23, 40)), ((50, 8), (1, 8))):
        seen.clear()
        torch.testing.assert_close(slide(model, image, crop, stride), image[:, :2])
        assert set(seen) == {(min(crop[0], 23), min(crop[1], 31))}
    seen.clear()
    slide(model, image, (10, 12), (7, 5))
    assert len(seen) == 3 * 5


def test_scales_and_flips_average_probabilities():
    model = small(backbone=Maps()).eval()
    with torch.no_grad():
        model.head.conv_seg.weight.mul_(30)
    images = torch.randn(2, 3, 40, 56)
    with torch.inference_mode():
        views = []
        for size in ((20, 28), (60, 84)):
            view = nn.functional.interpolate(images, size, mode="bilinear")
            for logits in (model(view), model(view.flip(-1)).flip(-1)):
                views.append(nn.functional.interpolate(logits, (33, 47), mode="bilinear").softmax(1))
        expected = (sum(views) / 4).argmax(1)
    predicted = model.predict(images, scales=(0.5, 1.5), flip=True, output_size=(33, 47), normalized=True)
    assert torch.equal(predicted, expected)
    assert not torch.equal(predicted, model.predict(images, output_size=(33, 47), normalized=True))
    mirrored = model.predict(images.flip(-1), flip=True, normalized=True).flip(-1)
    assert (mirrored == model.predict(images, flip=True, normalized=True)).float().mean() > 0.999


def test_a_list_of_images_of_any_sizes():
    model = small(backbone=Maps()).eval()
    images = [torch.randn(3, 33, 47), torch.randn(3, 20, 64)]
    maps = model.predict(images, mode="slide", crop_size=16, stride=11, normalized=True)
    assert [tuple(x.shape) for x in maps] == [(33, 47), (20, 64)]
    assert torch.equal(
        maps[1], model.predict(images[1][None], mode="slide", crop_size=16, stride=11, normalized=True)[0]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "tiles"}, "mode is 'tiles', but must be 'whole' or 'slide'"),
        ({"mode": "slide", "crop_size": 8, "stride": 9}, "leave gaps"),
        ({"mode": "slide", "crop_size": 8, "stride": 0}, "leave gaps"),
        ({"scales": (1.0, 0.0)}, "scales are positive"),
        ({"scales": ()}, "scales are positive"),
    ],
)
def test_impossible_inference_is_refused(options, message):
    with pytest.raises(TaskError, match=message):
        small(backbone=Maps()).eval().predict(torch.randn(1, 3, 32, 32), **options, normalized=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("upernett", "nat_atto"), TaskError, "there is no segmenter 'upernett'; did you mean 'upernet'"),
        (("upernet", "nat_ato"), UnknownModelError, "did you mean 'nat_atto'"),
        (("upernet", nn.Identity()), TaskError, "Identity has no `channels`"),
    ],
)
def test_wrong_names_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        foveate.create_segmenter(*arguments)


def test_the_table_of_published_segmenters_names_recipes_that_exist():
    """Every row's head, backbone and recipe can be created; the recipe's classes are the data's."""
    from foveate.configs.published import read_published

    sizes = {"ade20k": {150, 100}, "coco": {133, 80}, "cityscapes": {19, 8}, "mapillary": {65}}
    for row in read_published("segment"):
        assert row["head"] in HEADS, row
        own = SETTINGS.get(row["head"], {})
        if own:
            assert row["setting"] in own, row
            assert own[row["setting"]]["num_classes"] in sizes[row["data"]], row
        if row["backbone"] not in foveate.list_models():
            continue  # timm's own have no settings
        setting = own[row["setting"]]["backbone"] if own else row["setting"]
        assert not row["setting"] or setting in dense_settings_of(row["backbone"]), row


def test_wrong_options_are_named():
    with pytest.raises(TaskError, match="upernet has no option 'chanels'; did you mean 'channels'"):
        foveate.create_segmenter("upernet", Maps(), chanels=3)
    with pytest.raises(
        TaskError, match="neither upernet nor nat_atto has an option 'chanels'; did you mean 'channels'"
    ):
        foveate.create_segmenter("upernet", "nat_atto", chanels=3)
    with pytest.raises(UnknownModelError, match="nat_tiny has no setting 'coco_panoptic'"):
        foveate.create_segmenter("mask2former", "nat_tiny", setting="coco_panoptic")


# From our names to mmseg's.
def published(model) -> dict:
    def rename(key):
        for ours, theirs in (
            ("head.neck.inner_blocks.", "neck.lateral_convs."),
            ("head.neck.layer_blocks.", "neck.fpn_convs."),
            ("aux_head.", "auxiliary_head."),
            ("head.", "decode_head."),
        ):
            if key.startswith(ours):
                key = theirs + key.removeprefix(ours)
                break
        if key.startswith("neck."):
            key = key.replace(".0.weight", ".conv.weight").replace(".0.bias", ".conv.bias")
        return key

    return {rename(key): value for key, value in model.state_dict().items()}


@pytest.mark.parametrize("container", ["mmcv", "mmengine", "bare"])
@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_published_containers(head, container, tmp_path):
    """The class count and the width come from the file; batch counts may be missing."""
    torch.manual_seed(0)
    model = small(head, Maps(), 5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    state = {key: value for key, value in published(model).items() if not key.endswith("num_batches_tracked")}
    file = {
        "mmcv": {"meta": {"epoch": 3, "CLASSES": ("a", "b")}, "state_dict": state, "optimizer": {}},
        "mmengine": {"meta": {"mmengine_version": "0.10.7"}, "state_dict": state, "message_hub": {}},
        "bare": {f"module.{key}": value for key, value in state.items()},
    }[container]
    torch.save(file, tmp_path / "published.pth")
    loaded = foveate.create_segmenter(head, Maps(), checkpoint=tmp_path / "published.pth")
    images = torch.randn(1, 3, 40, 50)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.eval()(images), model.eval()(images), atol=0, rtol=0)


def test_a_run_of_mmengine_with_its_history(tmp_path):
    """Checkpoints of unpublished runs hold mmengine's history buffers, which are objects, and still load."""
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer([1.0, 2.0], [1, 1])
    state = published(small(backbone=Maps()))
    torch.save(
        {"state_dict": state, "message_hub": {"log_scalars": {"train/loss": history}}, "x": np.float64(3)},
        tmp_path / "run.pth",
    )
    assert small(backbone=Maps(), checkpoint=tmp_path / "run.pth").head.conv_seg.out_channels == 3


def test_own_checkpoints_and_named_backbones(tmp_path):
    """A named backbone reads a published file's backbone, and our own files whole."""
    model = small().eval()
    images = torch.randn(1, 3, 40, 56)
    ours = {"state_dict": model.state_dict(), "card": {"task": "segment"}}
    torch.save(ours, tmp_path / "ours.pth")
    state = {key.replace("backbone.features.model.", "backbone."): value for key, value in published(model).items()}
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    for name in ("ours.pth", "published.pth"):
        loaded = foveate.create_segmenter("upernet", "nat_atto", checkpoint=tmp_path / name).eval()
        with torch.inference_mode():
            torch.testing.assert_close(loaded(images), model(images), atol=0, rtol=0)


def test_published_backbones_are_read_by_name(tmp_path, caplog):
    path = tmp_path / "file.pth"
    torch.save(published(small(backbone=Maps())), path)
    with pytest.raises(CheckpointError, match="read if it is given by name"):
        foveate.create_segmenter("upernet", foveate.create_backbone("nat_atto"), checkpoint=path)
    stub = nn.Identity()
    stub.channels = Maps().channels
    with caplog.at_level(logging.INFO):
        model = foveate.create_segmenter("upernet", stub, checkpoint=path)
    assert "left out its backbone, since Identity has no weights" in caplog.text
    assert not model.load_report.missing or all("num_batches" in key for key in model.load_report.missing)
    with pytest.raises(TaskError, match="setting 'segmentation' is for a backbone given by name"):
        foveate.create_segmenter("upernet", stub, setting="segmentation")
    with pytest.raises(TaskError, match="but there is none"):
        foveate.create_segmenter("upernet", stub, reset_classifier=True)


def test_what_does_not_fit_is_refused(tmp_path, caplog):
    path = tmp_path / "file.pth"
    state = published(small(backbone=Maps()))
    torch.save({"state_dict": state}, path)
    with pytest.raises(CheckpointError, match="holds a upernet, not a semantic_fpn"):
        foveate.create_segmenter("semantic_fpn", Maps(), checkpoint=path)
    with pytest.raises(CheckpointError, match="has 3 classes, not 7; leave num_classes out"):
        foveate.create_segmenter("upernet", Maps(), 7, checkpoint=path)
    with pytest.raises(CheckpointError, match="of another shape"):
        foveate.create_segmenter("upernet", Maps((8, 12, 16, 24)), checkpoint=path)
    renewed = foveate.create_segmenter("upernet", Maps(), 7, checkpoint=path, reset_classifier=True)
    assert renewed.head.conv_seg.out_channels == renewed.aux_head.conv_seg.out_channels == 7
    assert torch.equal(renewed.head.bottleneck.conv.weight, state["decode_head.bottleneck.conv.weight"])

    with caplog.at_level(logging.INFO):
        assert foveate.create_segmenter("upernet", Maps(), checkpoint=path, aux_head=False).aux_head is None
    assert "left out the auxiliary head" in caplog.text
    without_aux = {key: value for key, value in state.items() if "auxiliary" not in key}
    torch.save(without_aux, path)
    assert foveate.create_segmenter("upernet", Maps(), checkpoint=path).aux_head is None
    head_alone = {key: value for key, value in state.items() if not key.startswith("backbone.")}
    torch.save(head_alone, path)
    with caplog.at_level(logging.WARNING):
        foveate.create_segmenter("upernet", Maps(), checkpoint=path)
    assert "holds the heads alone" in caplog.text

    state["decode_head.surplus.weight"] = state.pop("decode_head.bottleneck.conv.weight")
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(head.bottleneck.* 1 unexpected \(head.surplus"):
        foveate.create_segmenter("upernet", Maps(), checkpoint=path)
    torch.save({"stem.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="holds no segmenter"):
        foveate.create_segmenter("upernet", Maps(), checkpoint=path)


def test_autocast_is_finite_and_returns_to_float():
    model = small(backbone=Maps())
    images, labels = torch.randn(2, 3, 32, 48), torch.randint(3, (2, 32, 48))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(images, labels, normalized=True)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


def test_the_auxiliary_head_reads_the_third_map():
    maps = [torch.randn(1, 4, 8 // 2**i, 8) for i in range(4)]
    head = FCNHead([4] * 4, 2, channels=8).eval()
    expected = head(maps)
    maps[0], maps[1], maps[3] = (torch.randn_like(x) for x in (maps[0], maps[1], maps[3]))
    assert torch.equal(head(maps), expected)
    assert expected.shape == (1, 2, 2, 8)


@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_export_keeps_the_logits(head):
    torch.manual_seed(0)
    model = small(head, "resnet18").eval()
    images = torch.randn(1, 3, 96, 160)
    program = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(program(images), model(images), atol=1e-5, rtol=1e-4)


@pytest.mark.heavy
@pytest.mark.parametrize("backbone", ["nat_atto", "resnet18"])
@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_onnx_gives_the_logits(head, backbone, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = small(head, backbone).eval()
    images = torch.randn(1, 3, 96, 160)
    torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), atol=1e-4, rtol=1e-3)


def test_graphs_of_any_size_resize_what_is_equal_in_their_example_alone():
    class Sum(nn.Module):
        def forward(self, x, y):
            return resize_to(x, y.shape[-2:]) + y

    free = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    example = torch.randn(1, 2, 8, 12), torch.randn(1, 2, 8, 12)
    program = torch.export.export(Sum(), example, dynamic_shapes=(free, free), strict=False).module()
    for size in ((8, 12), (5, 7)):
        others = torch.randn(1, 2, *size), torch.randn(1, 2, 9, 14)
        torch.testing.assert_close(program(*others), Sum()(*others))


def test_an_onnx_file_of_any_size_pools_by_its_own_bins(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.head = UPerHead([3, 3], 5, channels=8)

        def forward(self, x):
            return self.head([x, x[..., ::2, ::2]])

    # The exporter compares at three sizes.
    facts = export_model(
        Pooled().eval(), torch.randn(1, 3, 13, 18), tmp_path / "x.onnx", {}, Options(dynamic_size=True)
    )
    assert facts["difference"] <= 1e-5
