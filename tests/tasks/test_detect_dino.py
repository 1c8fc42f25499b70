"""DINO: mmdet's outputs, rules and losses, and what data really holds."""

import itertools
import math

import foveate
import pytest
import torch
from foveate.blocks import MultiScaleDeformableAttention
from foveate.tasks.dense.detect.checkpoint import renamed
from foveate.tasks.dense.detect.denoising import Denoising, NoisyQueries, inverse_sigmoid
from foveate.tasks.dense.detect.dino import Predictions, Proposals, Scene
from foveate.tasks.dense.detect.dino_loss import DinoCriterion
from foveate.zoo import CheckpointError
from torch import nn
from torchvision.ops import box_convert, generalized_box_iou

from .published_names import as_mm, mm_file


class StubBackbone(nn.Module):
    channels = (8, 12, 16, 24)


def of_fixture(fixture):
    """The detector whose transformer and heads a fixture has; its neck passes on."""
    notes = fixture.spec["notes"]
    state = {renamed(key, 0).removeprefix("head."): value for key, value in fixture.state().items()}
    options = {name: notes["positional_encoding"][name] for name in ("temperature", "offset")}
    model = foveate.create_detector(
        "dino",
        StubBackbone(),
        num_queries=notes["num_queries"],
        num_levels=notes["num_levels"],
        max_detections=notes["max_per_img"],
        **options,
    )
    model.head.load_state_dict(state)
    model.neck = nn.Identity()
    return model


@pytest.mark.parametrize("name", ["dino_maps", "dino_maps_padded"])
@torch.no_grad()
def test_published_outputs_from_maps(name, open_fixture):
    fixture = open_fixture(f"dino/{name}")
    model = of_fixture(fixture).eval()
    head, maps, metas = model.head, fixture.levels(), fixture.spec["inputs"]["metas"]
    image_sizes = [tuple(meta["img_shape"]) for meta in metas]
    originals = [tuple(meta["ori_shape"]) for meta in metas]
    stages = {}
    for part in ("encode", "propose", "decode", "forward"):
        stages[part] = record(head, part)
    detections = model.predict_from_features(maps, image_sizes, originals)
    (memory,), (proposals,) = stages["encode"], stages["propose"]
    fixture.assert_output("memory", memory, 2e-5)
    fixture.assert_output("topk_index", proposals.index, 0)
    fixture.assert_output("topk_score", proposals.logits.amax(-1), 2e-5)
    fixture.assert_output("topk_box", proposals.boxes.sigmoid(), 5e-6)
    ((hidden, references),) = stages["decode"]
    (found,) = stages["forward"]
    for layer in range(6):
        fixture.assert_output(f"hidden{layer}", hidden[layer], 1e-4)
        fixture.assert_output(f"cls{layer}", found.logits[layer], 1e-4)
        fixture.assert_output(f"box{layer}", found.boxes[layer], 2e-5)
    for layer in range(7):
        fixture.assert_output(f"reference{layer}", references[layer], 2e-5)
    for image, detection in enumerate(detections):
        fixture.assert_output(f"det_labels{image}", detection["labels"], 0)
        fixture.assert_output(f"det_scores{image}", detection["scores"], 1e-5)
        fixture.assert_output(f"det_boxes{image}", detection["boxes"], 1e-2)


def record(module: nn.Module, method: str) -> list:
    """Let a method note what it returns."""
    results, run = [], getattr(module, method)

    def recorded(*args):
        results.append(run(*args))
        return results[-1]

    setattr(module, method, recorded)
    return results


# --- Denoising and losses ---------------------------------------------------------------------------------------------


OBJECTS = (
    (torch.tensor([2, 0, 1]), torch.tensor([[0.1, 0.2, 0.5, 0.9], [0.3, 0.3, 0.4, 0.4], [0.0, 0.0, 1.0, 1.0]])),
    (torch.tensor([], dtype=torch.int64), torch.zeros(0, 4)),
    (torch.tensor([1]), torch.tensor([[0.7, 0.1, 0.9, 0.3]])),
)


def slow_noise(objects, count: int, classes: int):
    """Section 7 of the rules, object by object: labels (-1: unused) and boxes, cx cy w h, of each image's places."""
    most = max(len(labels) for labels, _ in objects)
    groups = max(1, count // most)
    labels = [int(label) for image, _ in objects for label in image]
    boxes = [box.tolist() for _, image in objects for box in image]
    owner = [(image, k) for image, (found, _) in enumerate(objects) for k in range(len(found))]
    rows = 2 * groups * len(labels)
    chosen = [row for row, value in enumerate(torch.rand(rows).tolist()) if value < 0.25]
    noisy = labels * (2 * groups)
    for row, label in zip(chosen, torch.randint(0, classes, (len(chosen),)).tolist(), strict=True):
        noisy[row] = label
    signs, parts = torch.randint(0, 2, (rows, 4)).tolist(), torch.rand(rows, 4).tolist()
    found = [[(-1, [0.5] * 4)] * (2 * groups * most) for _ in objects]
    for row, (sign, part) in enumerate(zip(signs, parts, strict=True)):
        block, target = divmod(row, len(labels))
        x1, y1, x2, y2 = boxes[target]
        sides = [x2 - x1, y2 - y1] * 2
        edges = [
            min(max(edge + (2 * s - 1) * (p + block % 2) * side / 2, 0.0), 1.0)
            for edge, s, p, side in zip(boxes[target], sign, part, sides, strict=True)
        ]
        image, k = owner[target]
        box = [(edges[0] + edges[2]) / 2, (edges[1] + edges[3]) / 2, edges[2] - edges[0], edges[3] - edges[1]]
        # Before the sigmoid no side of the ratio is below 0.001.
        logits = [math.log(max(min(max(c, 0), 1), 1e-3) / max(1 - min(max(c, 0), 1), 1e-3)) for c in box]
        found[image][block * most + k] = (noisy[row], [1 / (1 + math.exp(-c)) for c in logits])
    return found, groups, most


def test_noise_is_drawn_in_the_published_order():
    denoising = Denoising(3, 8, count=10)
    torch.manual_seed(2024)
    expected, groups, most = slow_noise(OBJECTS, 10, 3)
    torch.manual_seed(2024)
    noisy = denoising([labels for labels, _ in OBJECTS], [boxes for _, boxes in OBJECTS])
    assert (noisy.groups, noisy.most) == (groups, most) == (3, 3)
    for image, places in enumerate(expected):
        for place, (label, box) in enumerate(places):
            content = torch.zeros(8) if label < 0 else denoising.label_embedding.weight[label]
            torch.testing.assert_close(noisy.content[image, place], content)
            torch.testing.assert_close(noisy.boxes[image, place].sigmoid(), torch.tensor(box), atol=1e-6, rtol=0)


def test_groups_of_the_denoising_dont_see_each_other():
    noisy = Denoising(3, 8, count=6)([labels for labels, _ in OBJECTS], [boxes for _, boxes in OBJECTS])
    blocked = noisy.blocked(4)
    for query in range(16):
        for key in range(16):
            apart = key < 12 and (query >= 12 or query // 6 != key // 6)
            assert blocked[query, key] == apart, (query, key)


def test_both_eps_of_the_inverse_sigmoid():
    """Boxes are refined with 0.001, and the head adds to references with 0.00001; beyond 0.001 they differ."""
    torch.manual_seed(0)
    model = tiny()
    head, memory = model.head.eval(), torch.randn(1, 30, 64)
    scene = Scene([(4, 6), (2, 2), (1, 1), (1, 1)], None, None)
    references = torch.tensor([[[1e-4, 0.5, 0.99995, 2e-6]]])
    _, boxes = head.decode(torch.randn(1, 1, 64), references, memory, scene)
    # The last layer of new branches is zero, so that they change nothing but by the eps.
    torch.testing.assert_close(
        boxes[1], torch.tensor([[[1e-3 / (1 - 1e-4 + 1e-3), 0.5, 1 / 1.001, 1 / 1001]]]), atol=1e-5, rtol=0
    )
    model.head.propose = lambda memory, scene: Proposals(
        torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, 3), inverse_sigmoid(references, 1e-7)
    )
    maps = [torch.randn(1, 64, *shape) for shape in scene.shapes]
    found = head(maps, [(32, 48)], (32, 48))
    logits = torch.logit(found.boxes[0][0, 0].double())
    wanted = torch.logit(references[0, 0].double(), eps=1e-5)
    torch.testing.assert_close(logits, wanted, atol=2e-2, rtol=0)


def slow_losses(logits, boxes, pairs, objects, size) -> list[float]:
    """Section 8 of the rules, pair by pair, in float64."""
    logits, boxes, count = logits.double(), boxes.double(), max(sum(map(len, pairs)), 1)
    total = [0.0, 0.0, 0.0]
    for image, matched in enumerate(pairs):
        height, width = size[image]
        sides = torch.tensor([width, height, width, height], dtype=torch.float64)
        classes = {query: int(objects[image][0][target]) for query, target in matched}
        for query in range(logits.shape[1]):
            for k, p in enumerate(logits[image, query].sigmoid().tolist()):
                hit = classes.get(query) == k
                total[0] -= 0.25 * (1 - p) ** 2 * math.log(p) if hit else 0.75 * p**2 * math.log(1 - p)
        for query, target in matched:
            found, goal = boxes[image, query], box_convert(objects[image][1][target].double(), "xyxy", "cxcywh")
            total[1] += 5 * float((found - goal).abs().sum())
            pair = [box_convert(box * sides, "cxcywh", "xyxy")[None] for box in (found, goal)]
            total[2] += 2 * (1 - float(generalized_box_iou(*pair)))
    return [value / count for value in total]


def slow_matching(logits, boxes, objects, size) -> list[list[tuple[int, int]]]:
    """The cheapest of all matchings."""
    pairs = []
    for image, (labels, goals) in enumerate(objects):
        height, width = size[image]
        sides = torch.tensor([width, height, width, height])
        cost = {}
        for query in range(logits.shape[1]):
            for target, label in enumerate(labels.tolist()):
                p = float(logits[image, query, label].sigmoid())
                goal = box_convert(goals[target], "xyxy", "cxcywh")
                pair = [box_convert(box * sides, "cxcywh", "xyxy")[None] for box in (boxes[image, query], goal)]
                cost[query, target] = (
                    2 * (-math.log(p + 1e-12) * 0.25 * (1 - p) ** 2 + math.log(1 - p + 1e-12) * 0.75 * p**2)
                    + 5 * float((boxes[image, query] - goal).abs().sum())
                    - 2 * float(generalized_box_iou(*pair))
                )
        orders = itertools.permutations(range(logits.shape[1]), len(labels))
        best = min(orders, key=lambda order: sum(cost[query, target] for target, query in enumerate(order)))
        pairs.append([(query, target) for target, query in enumerate(best)])
    return pairs


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_losses_are_those_of_the_rules(weight):
    draw = torch.Generator().manual_seed(0)
    size = [(40, 64), (64, 64), (33, 64)]

    def random(*shape):
        return torch.randn(*shape, generator=draw)

    noisy = NoisyQueries(None, torch.zeros(3, 12, 4), 2, 3)
    proposals = Proposals(None, random(3, 5, 3), random(3, 5, 4))
    layers = [(random(3, 17, 3), random(3, 17, 4).sigmoid()) for _ in range(2)]
    predictions = Predictions([x for x, _ in layers], [x for _, x in layers], proposals, noisy)
    labels, goals = zip(*OBJECTS, strict=True)
    losses = DinoCriterion(weight)(predictions, labels, goals, size)
    known = [[(2 * g * 3 + k, k) for g in range(2) for k in range(len(label))] for label in labels]
    expected = {}

    def put(prefix, logits, boxes, pairs=None):
        pairs = slow_matching(logits, boxes, OBJECTS, size) if pairs is None else pairs
        values = slow_losses(logits, boxes, pairs, OBJECTS, size)
        names = (f"{prefix}loss_{name}" for name in ("cls", "bbox", "iou"))
        expected.update(zip(names, (weight * values[0], *values[1:]), strict=True))

    put("enc_", proposals.logits, proposals.boxes.sigmoid())
    for prefix, (logits, boxes) in zip(("d0.", ""), layers, strict=True):
        put(prefix, logits[:, 12:], boxes[:, 12:])
        put(f"{prefix}dn_", logits[:, :12], boxes[:, :12], known)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-5), name


def tiny(backbone=None, **options):
    """A small DINO."""
    sizes = {"channels": 64, "hidden": 48, "num_queries": 20, "encoder_layers": 1, "decoder_layers": 2, "num_heads": 4}
    options = {"num_classes": 3, "min_size": 64, "max_size": 96, "denoising_queries": 6} | sizes | options
    return foveate.create_detector("dino", backbone or StubBackbone(), **options)


def a_target(boxes, labels) -> dict[str, torch.Tensor]:
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": torch.tensor(labels).long()}


def features_of(sizes, channels=StubBackbone.channels) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    return [
        torch.randn(len(sizes), count, -(-height // stride), -(-width // stride), generator=draw)
        for count, stride in zip(channels, (4, 8, 16, 32), strict=True)
    ]


def test_every_parameter_learns_and_the_seed_reproduces_losses():
    torch.manual_seed(0)
    model, sizes = tiny(), [(64, 96), (50, 64)]
    maps, targets = features_of(sizes), [a_target([[3, 4, 50, 44], [0, 0, 64, 96]], [0, 2]), a_target([], [])]
    for branch in model.head.reg_branches:
        nn.init.normal_(branch.layers[-1].weight, std=0.1)
    for layer in (*model.head.encoder.layers, *model.head.decoder.layers):
        for attention in (x for x in layer.modules() if isinstance(x, MultiScaleDeformableAttention)):
            nn.init.normal_(attention.attention_weights.weight)
    torch.manual_seed(2024)
    losses = model.losses_from_features(maps, targets, sizes)
    assert len(losses) == 3 + 2 * 6
    sum(losses.values()).backward()
    still = {name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()}
    assert not still
    torch.manual_seed(2024)
    again = model.losses_from_features(maps, targets, sizes)
    assert {name: value.item() for name, value in losses.items()} == {k: v.item() for k, v in again.items()}


def test_look_forward_twice():
    """The loss of a layer's boxes reaches the layer before, but no further."""
    torch.manual_seed(0)
    model = tiny(decoder_layers=3)
    sizes = [(64, 96)]
    found = model.head(model.neck(features_of(sizes)), sizes, sizes[0])
    found.boxes[2].sum().backward()
    # Through the tokens all branches' layers hang together; the boxes alone decide which branches do.
    reached = [branch.layers[-1].bias.grad is not None for branch in model.head.reg_branches]
    assert reached == [False, True, True, False]


# --- Files of mmdet ---------------------------------------------------------------------------------------------------


SMALL = {"channels": 64, "hidden": 48, "num_queries": 20, "encoder_layers": 1, "decoder_layers": 2}


@pytest.fixture(scope="module")
def on_resnet():
    torch.manual_seed(0)
    return foveate.create_detector("dino", "resnet26", num_classes=3, style="pytorch", **SMALL).eval()


IMPROVED = """
model = dict(
    type='DINO',
    positional_encoding=dict(num_feats=128, normalize=True, offset=-0.5, temperature=10000),
    bbox_head=dict(type='DINOHead', loss_cls=dict(type='FocalLoss', loss_weight=2.0)),
    dn_cfg=dict(group_cfg=dict(dynamic=True, num_dn_queries=300)),
    test_cfg=dict(max_per_img=50))
"""


@pytest.mark.parametrize(
    ("name", "config", "options", "form"),
    [
        ("dino-4scale_r50_8xb2-12e_coco_20221202_182705-55b2bba2.pth", None, {}, (20, 0, 1, 100, 300)),
        ("dino-4scale_r50_improved_8xb2-12e_coco.pth", None, {}, (10000, -0.5, 2, 300, 300)),
        ("mine.pth", IMPROVED, {}, (10000, -0.5, 2, 300, 50)),
        ("mine.pth", IMPROVED.replace("offset=-0.5, temperature=10000", "temperature=20"), {}, (20, 0, 2, 300, 50)),
        ("dino.pth", None, {"offset": -0.5, "temperature": 100}, (100, -0.5, 1, 100, 300)),
    ],
)
def test_the_form_is_told_by_settings_or_name(name, config, options, form, on_resnet, tmp_path):
    model = foveate.create_detector(
        "dino", "resnet26", checkpoint=mm_file(as_mm(on_resnet), tmp_path / name, config), **options
    ).eval()
    head = model.head
    found = (head.temperature, head.offset, model.criterion.cls_weight, head.denoising.count, head.max_detections)
    assert found == form
    assert model.num_classes == 3
    assert all(
        key.endswith("num_batches_tracked") for key in (*model.load_report.missing, *model.load_report.unexpected)
    )
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in on_resnet.state_dict().items())
    assert model.told["kwargs"]["temperature"] == form[0]


def test_a_file_that_doesnt_tell_its_form_is_asked_for(on_resnet, tmp_path):
    path = mm_file(as_mm(on_resnet), tmp_path / "mine.pth")
    with pytest.raises(
        CheckpointError, match=r"temperature=20, offset=0, or in mmdet's improved form temperature=10000"
    ):
        foveate.create_detector("dino", "resnet26", checkpoint=path)


def test_files_of_others_are_refused(on_resnet, tmp_path):
    path = mm_file(as_mm(on_resnet), tmp_path / "dino.pth")
    with pytest.raises(
        CheckpointError, match=r"holds a dino, not a retinanet; create_detector\('dino', ...\) reads it"
    ):
        foveate.create_detector("retinanet", "resnet26", checkpoint=path)
    with pytest.raises(CheckpointError, match=r"has 3 classes, not 2; .*reset_classifier=True"):
        foveate.create_detector("dino", "resnet26", checkpoint=path, num_classes=2)
    fresh = foveate.create_detector("dino", "resnet26", checkpoint=path, num_classes=2, reset_classifier=True)
    assert fresh.head.denoising.label_embedding.weight.shape == (2, 64)
    assert {key.split(".")[1] for key in fresh.load_report.missing if key.startswith("head.")} == {
        "cls_branches",
        "denoising",
    }
    file = torch.load(path, weights_only=True)
    del file["state_dict"]["encoder.layers.0.norms.1.bias"]
    torch.save(file, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(head.encoder.layers.0.norm2.bias\)"):
        foveate.create_detector("dino", "resnet26", checkpoint=path)


@pytest.mark.heavy
def test_swin_of_five_scales(tmp_path):
    torch.manual_seed(0)
    name = "swin_tiny_patch4_window7_224"
    ours = foveate.create_detector(
        "dino", name, num_levels=5, num_classes=3, dense=True, out_norms=(0, 1, 2, 3), **SMALL
    )
    for norm in ours.backbone.out_norms.values():
        nn.init.normal_(norm.bias)
    path = mm_file(as_mm(ours), tmp_path / "dino-5scale_swin-t.pth")
    model = foveate.create_detector("dino", name, checkpoint=path, min_size=64, max_size=96).eval()
    assert model.neck.reductions == [4, 8, 16, 32, 64]
    assert model.backbone.out_norms["0"].bias.equal(ours.backbone.out_norms["0"].bias)
    found = model([torch.rand(3, 61, 83)])[0]
    assert found["boxes"].shape == (60, 4)


def test_files_of_ours_are_read_again(tmp_path):
    torch.manual_seed(0)
    ours = tiny("nat_atto", temperature=10000.0).eval()
    card = {"task": "detect", "kwargs": {"num_heads": 4, "temperature": 10000.0, "min_size": 64, "max_size": 96}}
    torch.save({"state_dict": ours.state_dict(), "foveate": card}, tmp_path / "best.pth")
    model = foveate.create_detector("dino", "nat_atto", checkpoint=tmp_path / "best.pth", num_heads=4).eval()
    image = torch.rand(3, 50, 70)
    model.transform, model.head.temperature = ours.transform, 10000.0
    torch.testing.assert_close(model([image])[0], ours([image])[0])


BACKBONES = ("resnet18", "convnext_atto", "vit_tiny_patch16_224")


@pytest.mark.parametrize("backbone", ["nat_atto", *(pytest.param(x, marks=pytest.mark.heavy) for x in BACKBONES)])
@pytest.mark.parametrize("num_levels", [4, 5])
def test_any_backbone_trains_and_detects(backbone, num_levels):
    torch.manual_seed(0)
    options = {"dynamic_img_size": True} if backbone.startswith("vit") else {}
    model = tiny(backbone, num_levels=num_levels, **options)
    images = [torch.rand(3, 61, 83), torch.randint(0, 256, (3, 97, 64), dtype=torch.uint8)]
    targets = [a_target([[3, 4, 50, 44], [10, 10, 11, 11]], [0, 2]), a_target([], [])]
    losses = model(images, targets)
    assert all(value.dim() == 0 and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    learning = [x for x in model.parameters() if x.grad is not None]
    assert len(learning) > 0.9 * len(list(model.parameters()))
    assert all(x.grad.isfinite().all() for x in learning)
    with torch.no_grad():
        alone = model.eval()(images[:1])[0]
        for found, image in zip(model(images), images, strict=True):
            height, width = image.shape[-2:]
            assert found["boxes"].shape == (60, 4)
            assert (found["boxes"] >= 0).all()
            assert (found["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all()
            assert (found["scores"].diff() <= 0).all()
        torch.testing.assert_close(model(images)[0], alone)


def test_images_are_padded_to_the_batch_alone():
    model = tiny()
    assert model.transform.divisor == 1
    batch, _, sizes = model.transform.eval()([torch.rand(3, 61, 83), torch.rand(3, 64, 64)])
    assert (batch.shape[-2:], sizes) == ((64, 87), [(64, 87), (64, 64)])


def test_padding_counts_for_nothing():
    """What stands in the padding changes no detection of a padded image."""
    torch.manual_seed(0)
    model, sizes = tiny(encoder_layers=2).eval(), [(64, 96), (40, 57)]
    model.neck = nn.Identity()
    maps = [torch.randn(2, 64, *shape) for shape in ((8, 12), (4, 6), (2, 3), (1, 2))]
    found = model.predict_from_features(maps, sizes)
    for x, padding in zip(maps, Scene.of(maps, sizes, sizes[0]).paddings, strict=True):
        x.masked_fill_(padding[:, None], 7.0)
    for before, after in zip(found, model.predict_from_features(maps, sizes), strict=True):
        torch.testing.assert_close(before, after)


@pytest.mark.parametrize("objects", [0, 25])
def test_no_objects_and_more_than_queries(objects):
    torch.manual_seed(0)
    model, sizes = tiny(num_classes=1), [(64, 96)]
    corner = torch.rand(objects, 2) * 40
    target = a_target(torch.cat([corner, corner + 5], dim=1).tolist(), [0] * objects)
    losses = model.losses_from_features(features_of(sizes), [target], sizes)
    assert all(value.isfinite() for value in losses.values())
    if objects == 0:
        assert all(value == 0 for name, value in losses.items() if not name.endswith("cls") or "dn_" in name)
    sum(losses.values()).backward()


def test_fewer_tokens_than_queries():
    model, sizes = tiny().eval(), [(16, 24)]
    assert len(model.predict_from_features(features_of(sizes), sizes)[0]["scores"]) == 3 * (2 * 3 + 1 * 2 + 1 + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_finite(dtype):
    torch.manual_seed(0)
    model, sizes = tiny(), [(64, 96), (50, 64)]
    targets = [a_target([[3, 4, 50, 44], [10, 10, 11, 11]], [0, 2]), a_target([[1, 1, 9, 9]], [1])]
    with torch.autocast("cpu", dtype):
        losses = model.losses_from_features(features_of(sizes), targets, sizes)
        assert all(value.isfinite() and value.dtype == torch.float32 for value in losses.values())
        sum(losses.values()).backward()
        assert all(x.grad.isfinite().all() for x in model.parameters() if x.grad is not None)
        found = model.eval().predict_from_features(features_of(sizes), sizes)[0]
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    lowered = tiny("nat_atto").to(torch.bfloat16).eval()([torch.rand(3, 64, 64)])[0]
    assert lowered["boxes"].isfinite().all()


def test_gradient_checkpointing_of_the_backbone_changes_nothing():
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        model = tiny("nat_atto")
        model.backbone.set_grad_checkpointing(on)
        torch.manual_seed(1)
        losses = model([torch.full((3, 64, 96), 0.5)], [a_target([[3, 4, 50, 44]], [1])])
        sum(losses.values()).backward()
        gradients.append([x.grad for x in model.parameters() if x.grad is not None])
    torch.testing.assert_close(*gradients)
