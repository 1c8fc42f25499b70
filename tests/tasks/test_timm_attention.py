"""MaxViT, HaloNet, ConvMixer and Twins, which timm has: each under our trainer and our recorder."""

import math

import foveate
import pytest
import timm
import torch
from foveate.tasks import TaskError, engine
from timm.layers.halo_attn import HaloAttn

# With the size of its images and what is told of its attention; ConvMixer has no attention.
MODELS = {
    "maxvit_tiny_tf_224": (dict(img_size=64, embed_dim=(32, 32), depths=(1, 1), stem_width=16), 64, {"gate", "window"}),
    "twins_svt_small": (
        dict(embed_dims=(16, 16, 32, 32), depths=(2, 1, 1, 1), num_heads=(2, 2, 2, 2)),
        64,
        {"window", "global"},
    ),
    "halonet26t": ({}, 256, {"window"}),
    "convmixer_768_32": ({}, 32, None),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.heavy if name == "halonet26t" else ()) for name in MODELS]
)
def test_is_trained_and_recorded(name, config_file, tmp_path):
    options, size, kinds = MODELS[name]
    overrides = (f"model.name={name}", f"model.kwargs={options}", f"data.size={size}", "epochs=1", "batch_size=2")
    config = engine.load_config(config_file, (*overrides, "schedule.warmup_epochs=0"))
    result = engine.train(config, tmp_path / "run", progress=False)
    assert math.isfinite(result["history"][0]["train/loss"])
    state = torch.load(result["last"], weights_only=True)["state_dict"]
    model = timm.create_model(name, num_classes=2, **options).eval()
    model.load_state_dict(state)
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        expected = model(x)
    if kinds is None:
        with pytest.raises(TaskError, match=r"^nothing to record in .*(no reader for|no attention)"):
            record_of(model, x)
        return
    record, out = record_of(model, x)
    assert torch.equal(out, expected)
    assert {record[layer].kind for layer in record.layers} == kinds
    assert not record.skipped
    for layer in record.layers:
        record[layer].check()


def record_of(model, x):
    with foveate.record_attention(model) as record, torch.no_grad():
        out = model(x)
    return record, out


@pytest.mark.parametrize(
    "options", [{}, dict(stride=2), dict(stride=2, avg_down=True), dict(scale_pos_embed=True, dim_head=16)], ids=str
)
def test_halos_are_recorded_at_every_stride(options):
    torch.manual_seed(0)
    attention = HaloAttn(16, 32, num_heads=2, block_size=4, halo_size=1, **options).eval()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    record, _ = record_of(attention, torch.randn(2, 16, 8, 12))
    call = record[record.layers[0]]
    assert call.check() < 1e-5
    use = call.use([0])
    # The first block sees itself, one cell more to the right and below, and zeros elsewhere.
    seen = 9 if options == dict(stride=2) else 25
    assert int((use.weights[0, 0] > 0).sum()) == seen
    assert (use.rest > 0).all()
    torch.testing.assert_close(use.weights.sum((2, 3)) + use.rest, torch.ones(2, 2))
