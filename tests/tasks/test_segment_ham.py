"""SegNeXt's heads: parity with the published code, files, the rank, bases; and the two heads without weights."""

import foveate
import pytest
import torch
from foveate.blocks import CrossAxisAttention2d, Hamburger2d
from foveate.blocks.hamburger import factorize, initial_bases
from foveate.tasks import TaskError
from foveate.tasks.dense.segment.attention_unet import AttentionGate
from foveate.tasks.predictors import load_published
from foveate.zoo import CheckpointError, weights
from torch import nn

MAPS = [(16, 20), (8, 10), (4, 5), (2, 3)]


class StubBackbone(nn.Module):
    """Stands for the backbone of features that are given; has no parameters."""

    def __init__(self, features):
        super().__init__()
        self.maps = features
        self.channels = [x.shape[1] for x in features]
        self.reductions = [4, 8, 16, 32]

    def forward(self, x):
        return self.maps


def features(batch=2, sizes=MAPS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 8 * (i + 1), *size, generator=generator) for i, size in enumerate(sizes)]


def assert_published(fixture, name, output, relative):
    fixture.assert_output(name, output, relative * fixture.spec["outputs"][name]["std"])


@pytest.mark.parametrize("name", ["lightham_nmf", "lightham_nmf_small"])
def test_factorisation_is_the_published_one(name, open_fixture):
    fixture = open_fixture(f"segnext/{name}")
    x = fixture.input().relu()
    if name.endswith("small"):
        x = 1e-3 * x
        x[..., :6] = 0
    x.requires_grad_()
    bases = initial_bases(64, 16, 2, torch.Generator().manual_seed(0))
    assert_published(fixture, "bases", bases, 0)
    with torch.no_grad():
        assert_published(fixture, "eval", factorize(x.flatten(2), bases, 7).view_as(x), 5e-5)
    out = factorize(x.flatten(2), bases, 6).view_as(x)
    assert_published(fixture, "train", out, 5e-5)
    (out * fixture.golden.input_for(tuple(out.shape), 7)).mean().backward()
    assert_published(fixture, "train.grad_x", x.grad, 5e-5)


def test_gradient_through_the_last_step_alone():
    x, bases = torch.rand(1, 8, 12, requires_grad=True), initial_bases(8, 3)
    full, cut = factorize(x, bases, 4), factorize(x, bases, 4, one_step_gradient=True)
    assert torch.equal(full, cut)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (full, cut)]
    assert not torch.allclose(*gradients)
    assert gradients[1].isfinite().all()


def test_light_ham_head_is_the_published_one(open_fixture, tmp_path):
    fixture = open_fixture("segnext/lightham_t")
    levels = fixture.levels()
    model = foveate.create_segmenter(
        "light_ham", StubBackbone(levels), checkpoint=fixture.checkpoint(tmp_path), rank=16
    )
    model.eval()
    assert sum(p.numel() for p in model.head.parameters()) == fixture.spec["notes"]["params"]
    assert_published(fixture, "bases", model.head.hamburger.bases, 0)
    with torch.inference_mode():
        alone = model.head(levels)
        assert_published(fixture, "logits", alone, 2e-5)
        torch.manual_seed(7)  # what others draw changes nothing, nor does the company of another image
        pair = model.head([torch.cat([torch.randn_like(x), x]) for x in levels])
    torch.testing.assert_close(pair[1:], alone, atol=2e-5, rtol=0)


def test_a_file_tells_that_fewer_channels_are_factorised(tmp_path):
    """The wide head on VAN-B0 factorises 480 of its 512 channels; the names are the published ones."""
    maps = [torch.randn(1, 8, size, size) for size in (16, 8, 4, 2)]
    model = foveate.create_segmenter("light_ham", StubBackbone(maps), 3, channels=96, ham_channels=40, rank=4).eval()
    published = {"ham_in.": "ham_in.conv.", "ham_out.": "ham_out.conv.", "norm.": "ham_out.gn."}
    state = {}
    for key, value in model.head.state_dict().items():
        name = key.replace(".bn.", ".gn.")
        for ours, theirs in published.items():
            name = name.replace(f"hamburger.{ours}", f"hamburger.{theirs}")
        if key != "hamburger.bases":
            state[f"decode_head.{name}"] = value
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    again = foveate.create_segmenter("light_ham", StubBackbone(maps), checkpoint=tmp_path / "published.pth", rank=4)
    assert again.head.hamburger.ham_in.weight.shape == (40, 96, 1, 1)
    with torch.inference_mode():
        assert torch.equal(again.eval().head(maps), model.head(maps))


def test_segnext_is_the_published_one(open_fixture, tmp_path):
    fixture = open_fixture("segnext/segnext_t_256x320")
    path = fixture.checkpoint(tmp_path)
    model = foveate.create_segmenter("light_ham", "mscan_t", checkpoint=path, rank=16).eval()
    assert sum(p.numel() for p in model.parameters()) == fixture.spec["notes"]["params"]
    with torch.inference_mode():
        assert_published(fixture, "logits", model.head(model.backbone(fixture.input())), 5e-5)
        resized = model(fixture.input())
    assert_published(fixture, "resized", resized, 5e-5)
    index = torch.from_numpy(fixture.samples["argmax.index"])
    wrong = resized.argmax(1).flatten()[index] != torch.from_numpy(fixture.samples["argmax.value"])
    assert wrong.float().mean() <= fixture.spec["notes"]["argmax_fraction_with_margin_below_1e_4"]


def test_the_rank_is_told_by_mmsegs_names_by_our_files_or_asked_for(open_fixture, tmp_path):
    fixture = open_fixture("segnext/segnext_t_256x320")
    path = fixture.checkpoint(tmp_path)
    with pytest.raises(TaskError, match=r"doesn't tell the rank of its factorisation: give rank=16, .* or rank=64"):
        foveate.create_segmenter("light_ham", "mscan_t", checkpoint=path)
    state = {key.replace("dwconv.dwconv", "dwconv"): value for key, value in fixture.state().items()}
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "mmseg.pth")
    model = foveate.create_segmenter("light_ham", "mscan_t", checkpoint=tmp_path / "mmseg.pth").eval()
    assert model.head.hamburger.rank == 16
    # A checkpoint of the published code with RAND_INIT False, and one of ours, have the bases.
    own = initial_bases(256, 20, generator=torch.Generator().manual_seed(5))
    torch.save(fixture.state() | {"decode_head.hamburger.ham.bases": own}, tmp_path / "kept.pth")
    kept = foveate.create_segmenter("light_ham", "mscan_t", checkpoint=tmp_path / "kept.pth").eval()
    assert torch.equal(kept.head.hamburger.bases, own)
    torch.save(kept.state_dict(), tmp_path / "ours.pth")
    again = foveate.create_segmenter("light_ham", "mscan_t", checkpoint=tmp_path / "ours.pth").eval()
    assert again.state_dict().keys() == kept.state_dict().keys()
    assert all(torch.equal(value, kept.state_dict()[key]) for key, value in again.state_dict().items())


def test_the_rank_is_told_by_the_rows_of_published_weights(open_fixture, tmp_path, monkeypatch):
    rows = {name: row for name, row in weights.table().items() if row.head == "light_ham"}
    assert {name: row.options.get("rank") for name, row in rows.items() if ".mcg_" in name and "mscan" in name} == {
        "mscan_t.mcg_light_ham_ade20k_160k": 16,
        "mscan_s.mcg_light_ham_ade20k_160k": 16,
        "mscan_b.mcg_light_ham_ade20k_160k": 64,
        "mscan_l.mcg_light_ham_ade20k_160k": 64,
        "mscan_t.mcg_light_ham_cityscapes_160k": 16,
        "mscan_s.mcg_light_ham_cityscapes_160k": 16,
        "mscan_b.mcg_light_ham_cityscapes_160k": 64,
        "mscan_l.mcg_light_ham_cityscapes_160k": 64,
        "mscan_l.mcg_light_ham_coco_stuff_80k": 64,
    }
    name = "mscan_t.mcg_light_ham_ade20k_160k"
    folder = tmp_path / "mirror" / name
    folder.mkdir(parents=True)
    fixture = open_fixture("segnext/segnext_t_256x320")
    torch.save(fixture.state(), folder / rows[name].sources[0].name)
    monkeypatch.setenv("FOVEATE_WEIGHTS_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    model = foveate.create_segmenter("light_ham", "mscan_t", checkpoint=name)
    assert model.head.hamburger.rank == 16
    # The same file under any name.
    (folder / rows[name].sources[0].name).rename(tmp_path / "file.pth")
    predictor = load_published(name, weights=tmp_path / "file.pth")
    assert predictor.card["kwargs"] == {"rank": 16}
    assert predictor.card["input"]["divisor"] == 32


def published_ham_net(model):
    """Return the state dict of a HamNet under the published names."""
    names = (
        ("head.hamburger.ham_in.", "decode_head.ham_in.conv."),
        ("head.hamburger.ham_out.", "decode_head.ham_out.conv."),
        ("head.hamburger.norm.", "decode_head.ham_out.gn."),
        ("head.join.", "decode_head.conv_cat."),
        ("aux_head.", "auxiliary_head."),
        ("head.", "decode_head."),
    )
    state = {}
    for key, value in model.state_dict().items():
        if not key.endswith(".bases") and not key.startswith("backbone."):
            ours, theirs = next(pair for pair in names if key.startswith(pair[0]))
            state[theirs + key.removeprefix(ours).replace("bn.", "gn.")] = value
    return state


def test_ham_net_reads_files_without_the_level_of_the_hamburger(tmp_path):
    maps = features()
    model = foveate.create_segmenter("ham_net", StubBackbone(maps), 5, channels=64).eval()
    assert model.head.hamburger.rank == 64
    state = published_ham_net(model)
    assert {"decode_head.ham_out.gn.weight", "decode_head.conv_cat.conv.weight", "auxiliary_head.convs.0.gn.bias"} <= (
        state.keys()
    )
    torch.save(state, tmp_path / "old.pth")
    again = foveate.create_segmenter("ham_net", StubBackbone(maps), checkpoint=tmp_path / "old.pth").eval()
    assert again.num_classes == 5
    with torch.no_grad():
        assert torch.equal(again.head(maps), model.head(maps))
        assert torch.equal(again.aux_head(maps), model.aux_head(maps))
    with pytest.raises(CheckpointError, match="holds a ham_net, not a light_ham"):
        foveate.create_segmenter("light_ham", StubBackbone(maps), checkpoint=tmp_path / "old.pth", rank=64)


def test_ham_net_stands_on_van_at_an_output_stride_of_8():
    model = foveate.create_segmenter("ham_net", "van_b0", 5, channels=64, rank=4).eval()
    assert model.backbone.reductions == [4, 8, 8, 8]
    assert model.backbone.features.model.stages[0].norm.eps == 1e-6
    with torch.inference_mode():
        maps = model.backbone(torch.randn(1, 3, 40, 56))
        assert [tuple(x.shape[2:]) for x in maps] == [(10, 14), (5, 7), (5, 7), (5, 7)]
        assert model.head(maps).shape == (1, 5, 5, 7)


HEADS = {
    "light_ham": dict(channels=64, rank=4),
    "ham_net": dict(channels=64, rank=4),
    "mca": dict(channels=16),
    "attention_unet": dict(channels=8),
}


@pytest.mark.parametrize("head", HEADS)
def test_heads_train_and_come_back(head, tmp_path):
    maps = features()
    model = foveate.create_segmenter(head, StubBackbone(maps), 5, **HEADS[head]).train()
    labels = torch.randint(0, 5, (2, 64, 80), generator=torch.Generator().manual_seed(0))
    sum(model.loss(torch.zeros(2, 3, 64, 80), labels, normalized=True).values()).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    again = foveate.create_segmenter(head, StubBackbone(maps), checkpoint=tmp_path / "ours.pth").eval()
    with torch.no_grad():
        assert torch.equal(again.head(maps), model.eval().head(maps))
        assert again.predict(torch.zeros(2, 3, 64, 80), normalized=True).shape == (2, 64, 80)


@pytest.mark.parametrize("head", HEADS)
def test_maps_of_a_pixel_odd_maps_and_what_is_not_finite(head):
    for sizes in ([(1, 1)] * 4, [(5, 3), (3, 2), (2, 1), (1, 1)]):
        maps = features(1, sizes)
        model = foveate.create_segmenter(head, StubBackbone(maps), 5, **HEADS[head]).eval()
        with torch.no_grad():
            assert model(torch.zeros(1, 3, 17, 9)).isfinite().all()
            # Zeros alone divide by nothing but the small number.
            assert model.head([torch.zeros_like(x) for x in maps]).isfinite().all()
    # A pixel that is not a number shows in its own image alone.
    maps = features(2)
    maps[-1][1, 0, 0, 0] = float("nan")
    with torch.no_grad():
        logits = model.head(maps)
    assert logits[0].isfinite().all()
    assert logits[1].isnan().any()


def test_random_bases_while_training():
    torch.manual_seed(0)
    hamburger, x = Hamburger2d(64, rank=4, random_bases=True), torch.randn(2, 64, 5, 7)
    hamburger.train()
    assert not torch.equal(hamburger(x), hamburger(x))
    hamburger.eval()
    assert torch.equal(hamburger(x), hamburger(x))
    assert not torch.equal(Hamburger2d(64, 4, seed=1).bases, hamburger.bases)


def test_factorisation_stays_in_float32_under_autocast():
    torch.manual_seed(0)
    hamburger, x = Hamburger2d(64, rank=16).eval(), torch.randn(1, 64, 9, 13)
    seen = []
    hamburger.ham_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        hamburger(x)
        z = hamburger.ham_in(x).relu()
    exact = factorize(z.float().flatten(2), hamburger.bases, 7).view_as(z)
    assert torch.equal(seen[0], exact.to(torch.bfloat16))


def test_cross_axis_attention_is_its_definition():
    torch.manual_seed(0)
    module = CrossAxisAttention2d(8, num_heads=2, lengths=(3, 5)).double()
    x = torch.randn(1, 8, 3, 4, dtype=torch.float64)
    normed = module.norm(x)
    rows, columns = (module.proj(sum(conv(normed) for conv in convs)) for convs in (module.rows, module.columns))
    total = x.clone()
    for axis, (query, key) in ((2, (columns, rows)), (3, (rows, columns))):
        out = torch.zeros_like(x)
        for head in (slice(0, 4), slice(4, 8)):
            # Whole rows, or columns, are the tokens.
            q, v = (y[0, head].movedim(axis - 1, 0).flatten(1) for y in (query, key))
            q, k = (y / y.norm(dim=1, keepdim=True) for y in (q, v))
            attended = (q @ k.T).softmax(1) @ v + q
            shape = (attended.shape[0], 4, x.shape[5 - axis])
            out[0, head] = attended.view(shape).movedim(0, axis - 1)
        total = total + module.proj(out)
    torch.testing.assert_close(module(x), total)


def test_attention_gate_is_its_definition():
    torch.manual_seed(0)
    gate = AttentionGate(6, 10, 3).eval()
    x, g = torch.randn(1, 6, 8, 12), torch.randn(1, 10, 4, 6)
    # Where g has the size of theta's output, nothing is resized but the coefficients.
    coefficients = gate.psi((gate.theta(x) + gate.phi(g)).relu()).sigmoid()
    a = nn.functional.interpolate(coefficients, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(gate(x, g), gate.out.bn(gate.out.conv(x * a)))


def test_bad_options_are_one_line():
    backbone = StubBackbone(features())
    for head in ("light_ham", "ham_net"):
        with pytest.raises(TaskError, match=r"channels=64, 96, 128, \.\.\.; got 40"):
            foveate.create_segmenter(head, backbone, channels=40)
    with pytest.raises(TaskError, match="num_heads must divide channels; got 3 heads and 16 channels"):
        foveate.create_segmenter("mca", backbone, channels=16, num_heads=3)
    for head in ("light_ham", "mca", "attention_unet"):
        with pytest.raises(TaskError, match="1 alone"):
            foveate.create_segmenter(head, StubBackbone(features()[:1]))
    with pytest.raises(ValueError, match="rank of at least 1; got 0"):
        Hamburger2d(64, rank=0)
    with pytest.raises(ValueError, match="num_heads must divide the channels"):
        CrossAxisAttention2d(9, num_heads=2)


def test_semantic_fpn_on_van_is_the_published_one(open_fixture, tmp_path):
    fixture = open_fixture("segnext/semfpn_van_b0_256x320")
    model = foveate.create_segmenter("semantic_fpn", "van_b0", checkpoint=fixture.checkpoint(tmp_path)).eval()
    with torch.inference_mode():
        assert_published(fixture, "logits", model.head(model.backbone(fixture.input())), 5e-5)


def test_segnext_is_exported_and_keeps_its_answers():
    torch.manual_seed(0)
    small = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1))
    model = foveate.create_segmenter("light_ham", "mscan_t", 5, backbone_kwargs=small, **HEADS["light_ham"]).eval()
    images = torch.randn(1, 3, 40, 56)
    graph = torch.export.export(model, (torch.randn(1, 3, 40, 56),)).module()
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(graph(images), expected, atol=1e-6, rtol=1e-4)
        lowered = model.to(torch.bfloat16)(images.bfloat16()).float()
    assert (lowered - expected).std() < 0.05 * expected.std()
