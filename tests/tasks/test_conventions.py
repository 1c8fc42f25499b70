"""Detectors and segmenters take the same images, and say in one line what is wrong with images and targets."""

import foveate
import pytest
import torch
from foveate.tasks import TaskError
from foveate.tasks.dense.detect import sample_evenly
from foveate.tasks.dense.segment.set_loss import semantic_targets
from torch import nn

MEAN, STD = (0.3, 0.4, 0.5), (0.1, 0.2, 0.3)
SMALL = {
    "retinanet": {"channels": 16, "min_size": None, "score_threshold": 0.0},
    "mask_rcnn": {"channels": 16, "hidden": 16, "min_size": None, "score_threshold": 0.0},
    "semantic_fpn": {"channels": 16, "neck_channels": 16},
    "upernet": {"channels": 16},
    "deeplabv3": {},
    "mask2former": {"dim": 32, "num_queries": 5, "encoder_layers": 1, "decoder_layers": 3, "num_points": 64},
    "oneformer": {"dim": 32, "num_queries": 5, "encoder_layers": 1, "decoder_layers": 3, "num_points": 64},
}
DETECTORS, SETS = ("retinanet", "mask_rcnn"), ("mask2former", "oneformer")


def build(head, **kwargs):
    create = foveate.create_detector if head in DETECTORS else foveate.create_segmenter
    return create(head, "nat_atto", 3, **SMALL[head] | {"mean": MEAN, "std": STD} | kwargs).eval()


def pictures():
    torch.manual_seed(0)
    return torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)


def targets_of(head, images):
    maps = [(torch.arange(image.shape[-1]) // 20 % 3).expand(image.shape[-2:]) for image in images]
    if head not in DETECTORS:
        return semantic_targets(torch.stack(maps)) if head in SETS else torch.stack(maps)
    box = {"boxes": torch.tensor([[2.0, 3.0, 40.0, 50.0]]), "labels": torch.tensor([2])}
    return [box | {"masks": torch.ones(1, *image.shape[-2:], dtype=torch.bool)} for image in images]


def same(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for pair in zip(one, other, strict=True):
            same(*pair)
    else:
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def losses_of(model, images, targets, **kwargs):
    torch.manual_seed(1)
    return model.loss(images, targets, **kwargs)


@pytest.mark.parametrize("head", SMALL)
def test_bytes_fractions_and_normalised_images_are_the_same(head):
    model = build(head)
    pixels = pictures()
    fractions = pixels / 255
    normalised = (fractions - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    seen = []
    hook = model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    targets = targets_of(head, pixels)
    for images, flag in ((pixels, {}), (fractions, {}), (normalised, {"normalized": True})):
        model.predict(images, **flag)
        losses_of(model, images, targets, **flag)
        losses_of(model, list(images), targets if head in (*DETECTORS, *SETS) else list(targets), **flag)
    hook.remove()
    for images in seen:
        assert images.shape == normalised.shape
        torch.testing.assert_close(images, normalised, atol=1e-5, rtol=1e-5)
    losses = losses_of(model, pixels, targets)
    assert losses
    same(losses, losses_of(model, list(fractions), targets if head in (*DETECTORS, *SETS) else list(targets)))
    # The state dict is as before, so that older checkpoints load.
    assert not [key for key in model.state_dict() if key.split(".")[-1] in ("mean", "std")]


@pytest.mark.parametrize("head", SMALL)
def test_wrong_images_are_one_line(head):
    model = build(head)
    pixels = pictures()
    normalised = (pixels / 255 - 0.45) / 0.22
    with pytest.raises(TaskError, match=r"values of 0 to 255; floating point is of 0 to 1"):
        model.predict(pixels.float())
    with pytest.raises(TaskError, match=r"what is normalised already goes with normalized=True"):
        model.predict(normalised)
    with pytest.raises(TaskError, match=r"floating point is of 0 to 1"):
        model.loss(normalised, targets_of(head, pixels))
    with pytest.raises(TaskError, match=r"values of nan to nan"):
        model.predict(torch.full((1, 3, 64, 64), float("nan")))
    with pytest.raises(TaskError, match=r"has dtype torch\.int64"):
        model.predict(pixels.long())
    with pytest.raises(TaskError, match=r"can't be normalised already; leave normalized=True out"):
        model.predict(pixels, normalized=True)
    with pytest.raises(TaskError, match=r"shape \(1, 64, 96\); the model takes \[3, height, width\]"):
        model.predict(pixels[:, :1])
    with pytest.raises(TaskError, match=r"shape \(3, 64, 96\); they"):
        model.predict(pixels[0])
    with pytest.raises(TaskError, match=r"list of images is empty"):
        model.loss([], [])
    with pytest.raises(TaskError, match=r"in training mode; .*model\.eval\(\)"):
        model.train().predict(pixels)


@pytest.mark.parametrize("head", ["upernet", "deeplabv3", "semantic_fpn"])
def test_wrong_label_maps_are_one_line(head):
    model, pixels = build(head), pictures()
    labels = targets_of(head, pixels)
    for wrong, message in (
        (labels + 1, r"have labels 1 to 3; they must be 0 to 2, or 255 for pixels that don't count"),
        (labels - 1, r"have labels -1 to 1; they must be 0 to 2"),
        (labels[:, None], r"label map of image 0 has shape \(1, 64, 96\); it must have that of the image, \(64, 96\)"),
        (labels[:, :32], r"label map of image 0 has shape \(32, 96\)"),
        (labels[:1], r"there are 2 images and 1 label maps"),
        (labels.float(), r"has dtype torch\.float32; labels are integers"),
    ):
        with pytest.raises(TaskError, match=message) as caught:
            model.loss(pixels, wrong)
        assert "\n" not in str(caught.value)
    ignored = labels.clone()
    ignored[:, :9] = 255
    assert all(loss.isfinite() for loss in model.loss(pixels, ignored.to(torch.uint8)).values())


@pytest.mark.parametrize("head", SETS)
def test_wrong_sets_of_masks_are_one_line(head):
    model, pixels = build(head), pictures()
    first, second = targets_of(head, pixels)
    masks, labels = first["masks"], first["labels"]
    for wrong, message in (
        ([first | {"labels": labels + 1}, second], r"objects of image 0 have labels 1 to 3; they must be 0 to 2"),
        (
            [first, second | {"masks": masks[:, :32]}],
            r"masks of image 1 have 32 x 96 pixels, but the image has 64 x 96",
        ),
        (
            [first | {"masks": masks[:, None]}, second],
            r"labels \(3,\) and masks \(3, 1, 64, 96\); they must be",
        ),
        ([first | {"labels": labels[:1]}, second], r"labels \(1,\) and masks \(3, 64, 96\)"),
        ([first | {"labels": labels.float()}, second], r"labels of torch\.float32; they are integers"),
        ([{"labels": labels}, second], r"target 0 has no 'masks'"),
        ([first], r"2 images and 1 targets"),
        (torch.zeros(2, 64, 96, dtype=torch.long), r"semantic_targets makes them of label maps"),
    ):
        with pytest.raises(TaskError, match=message) as caught:
            model.loss(pixels, wrong)
        assert "\n" not in str(caught.value)


def test_wrong_objects_are_one_line():
    model, pixels = build("mask_rcnn"), pictures()
    first, second = targets_of("mask_rcnn", pixels)
    for change, message in (
        ({"labels": torch.tensor([3])}, r"labels 3 to 3; they must be 0 to 2, without a background"),
        ({"labels": torch.tensor([1.0])}, r"labels of torch\.float32; they are integers"),
        ({"masks": first["masks"].float() / 2}, r"masks of torch\.float32; they are bool or uint8"),
        ({"masks": first["masks"][:, :9]}, r"masks \(1, 9, 96\); for 1 boxes they must be \(1, 64, 96\)"),
        ({"boxes": first["boxes"][0]}, r"boxes \(4,\) and labels \(1,\); they must be \[N, 4\] and \[N\]"),
    ):
        with pytest.raises(TaskError, match=message) as caught:
            model.loss(pixels, [first | change, second])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("head", DETECTORS)
def test_detectors_are_called_as_torchvisions_and_answer_so_if_asked(head):
    torch.manual_seed(0)
    model, pixels = build(head), pictures()
    with torch.inference_mode():
        ours = model(list(pixels))
    same(ours, model.predict(pixels))
    theirs = model.predict(pixels, torchvision_outputs=True)
    assert sum(len(found["labels"]) for found in ours)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(other["labels"], mine["labels"] + 1)
        assert torch.equal(other["boxes"], mine["boxes"])
        if head == "mask_rcnn":
            assert mine["masks"].shape == (len(mine["labels"]), 64, 96)
            assert mine["masks"].dtype == torch.bool
            assert other["masks"].shape == (len(mine["labels"]), 1, 64, 96)
            assert other["masks"].dtype == torch.float32
            assert 0 <= other["masks"].min() < other["masks"].max() <= 1
            assert torch.equal(other["masks"][:, 0] >= 0.5, mine["masks"])
    told = build(head, torchvision_outputs=True)
    told.load_state_dict(model.state_dict())
    with torch.inference_mode():
        same(told(list(pixels)), theirs)
    same(told.predict(pixels, torchvision_outputs=False), ours)
    targets = targets_of(head, pixels)
    model.sample = sample_evenly
    same(model.train()(list(pixels), targets), model.loss(list(pixels), targets))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head", SMALL)
def test_half_models_in_channels_last_take_images_of_several_sizes(head, dtype):
    model = build(head).to(dtype).to(memory_format=torch.channels_last)
    images = [pictures()[0], pictures()[1, :, :48, :80] / 255]
    if head in SETS:
        with pytest.raises(TaskError, match=r"computes in float32, .*model\.head\.float\(\)"):
            model.predict(images)
        model.head.float()
    found = model.predict(images)
    assert len(found) == 2
    if head not in DETECTORS:
        assert [tuple(labels.shape) for labels in found] == [(64, 96), (48, 80)]
    targets = [targets_of(head, [image])[0] for image in images]
    assert all(loss.isfinite() for loss in model.loss(images, targets).values())


def test_mean_and_std_are_the_backbones_the_files_or_those_given(tmp_path):
    small = SMALL["semantic_fpn"]

    def of(*args, **kwargs):
        model = foveate.create_segmenter("semantic_fpn", *args, **small | kwargs)
        return model, (model.mean, model.std)

    usual = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    own = ((0.69,) * 3, (0.38,) * 3)
    model, found = of("nat_atto", 3)
    assert found == own
    assert of("tf_efficientnet_lite0", 3)[1] == ((0.5,) * 3, (0.5,) * 3)
    assert of("tf_efficientnet_lite0", 3, mean=MEAN, std=STD)[1] == (MEAN, STD)
    body = nn.Conv2d(3, 8, 1)
    body.channels = [8] * 4
    assert of(body, 3)[1] == usual
    run = {"card": {"task": "segment", "input": {"mean": MEAN, "std": STD}}, "state_dict": model.state_dict()}
    torch.save(run, tmp_path / "run.pth")
    assert of("nat_atto", checkpoint=tmp_path / "run.pth")[1] == (MEAN, STD)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "plain.pth")
    assert of("nat_atto", checkpoint=tmp_path / "plain.pth")[1] == usual
    with pytest.raises(TaskError, match="mean has 1 channels and std 3"):
        of("nat_atto", 3, mean=(0.5,))


def test_a_detectors_run_keeps_its_transform(tmp_path):
    model = build("retinanet")
    card = {"task": "detect", "kwargs": {"mean": MEAN, "std": STD, "min_size": 77, "channels": 16}}
    torch.save({"card": card, "state_dict": model.state_dict()}, tmp_path / "run.pth")
    again = foveate.create_detector("retinanet", "nat_atto", checkpoint=tmp_path / "run.pth", max_size=99)
    assert (again.transform.mean, again.transform.std) == (MEAN, STD)
    assert (again.transform.min_size, again.transform.max_size) == ((77,), 99)
