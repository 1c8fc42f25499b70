"""transformers' DiNAT on foveate.natten, against its own published values and the zoo's DiNAT of the same weights.

transformers is no requirement; `.ci/wide transformers` installs it, in the versions that are claimed to work.
"""

import subprocess
import sys

import foveate
import pytest
import torch
from foveate.zoo.nat import NAT, convert_checkpoint

pytest.importorskip("transformers", exc_type=ImportError)

FIXTURE = "natten_compat/hf_dinat_atto_256x320"


@pytest.fixture(autouse=True)
def _natten():
    foveate.natten.install()
    yield
    foveate.natten.uninstall()


def state(fixture, names):
    tensors = {name: fixture.golden.tensor_for(name, tuple(shape)) for name, shape in names.items()}
    for name in filter(lambda name: name.endswith(".rpb"), tensors):
        tensors[name] *= 0.5 * (tensors[name].numel() / tensors[name].shape[0]) ** 0.5
    return tensors


def test_published_outputs(open_fixture):
    from transformers import DinatBackbone, DinatConfig, DinatForImageClassification

    fixture = open_fixture(FIXTURE)
    settings = fixture.spec["notes"]["config"]
    classifier = DinatForImageClassification(DinatConfig(**settings)).eval()
    classifier.load_state_dict(state(fixture, fixture.spec["state"]))
    stages = fixture.spec["notes"]["backbone_out_features"]
    backbone = DinatBackbone(DinatConfig(**settings, out_features=stages)).eval()
    backbone.load_state_dict(state(fixture, fixture.spec["notes"]["backbone_state"]))
    with torch.no_grad():
        fixture.assert_output("logits", classifier(fixture.input()).logits, 5e-6)
        seen = classifier(fixture.input(), output_attentions=True)
        for name, feature_map in zip(stages, backbone(fixture.input()).feature_maps, strict=True):
            fixture.assert_output(name, feature_map, 2e-5)
    fixture.assert_output("logits", seen.logits, 5e-6)
    assert list(seen.attentions[0].shape) == [1, 2, 64, 80, 49]


def configure(**options):
    from transformers import DinatConfig

    return DinatConfig(
        embed_dim=16,
        depths=[2, 1, 2],
        num_heads=[2, 4, 8],
        kernel_size=3,
        dilations=[[1, 4], [2], [1, 3]],
        mlp_ratio=2.0,
        layer_scale_init_value=0.5,
        drop_path_rate=0.0,
        **options,
    )


def scatter_biases(model):
    """Give the biases, which start at zero, values that show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("rpb"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def ours_of(state, config, **options):
    model = NAT(
        embed_dim=config.embed_dim,
        depths=config.depths,
        num_heads=config.num_heads,
        kernel_size=config.kernel_size,
        dilations=config.dilations,
        mlp_ratio=config.mlp_ratio,
        layer_scale=config.layer_scale_init_value,
        **options,
    )
    model.load_state_dict(convert_checkpoint(state, model))
    return model


@pytest.mark.parametrize("size", [(64, 52), (32, 128)])  # the second: maps as wide as there are heads, and short ones
def test_classifiers_agree_with_the_zoo_forward_and_backward(size):
    from transformers import DinatForImageClassification

    config = configure(num_labels=7)
    theirs = scatter_biases(DinatForImageClassification(config)).train()
    ours = ours_of(theirs.state_dict(), config, num_classes=7).train()
    x = torch.randn(2, 3, *size)
    grads = []
    for model in (theirs, ours):
        leaf = x.clone().requires_grad_()
        logits = model(leaf) if model is ours else model(leaf).logits
        biases = [p for name, p in model.named_parameters() if name.endswith("rpb")]
        grads.append((logits, *torch.autograd.grad(logits.square().sum(), [leaf, *biases])))
    assert len(grads[0]) == 7
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-5 * max(1, expected.abs().max().item()), rtol=1e-4)


def test_weights_are_dropped_in_training():
    from transformers import DinatForImageClassification

    config = configure(num_labels=3, attention_probs_dropout_prob=0.5)
    model = DinatForImageClassification(config).train()
    x = torch.randn(1, 3, 48, 48)
    assert not torch.equal(model(x).logits, model(x).logits)
    assert torch.equal(model.eval()(x).logits, model(x).logits)


def test_base_models_run_and_learn():
    from transformers import DinatModel

    model = DinatModel(configure())
    out = model(torch.randn(2, 3, 64, 48))
    assert out.last_hidden_state.shape == (2, 4, 3, 64)
    out.pooler_output.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith("rpb"))


def test_oneformer_on_a_dinat_backbone():
    from transformers import DinatConfig, OneFormerConfig, OneFormerForUniversalSegmentation

    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = DinatConfig(
        embed_dim=8, depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 8], kernel_size=3, dilations=[[2], [1, 2], [1], [1]],
        layer_scale_init_value=0.5, drop_path_rate=0.0, out_features=stages,
    )  # fmt: skip
    config = OneFormerConfig(
        backbone_config=backbone,
        num_labels=5,
        num_queries=6,
        hidden_dim=32,
        conv_dim=32,
        mask_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        query_dec_layers=1,
        text_encoder_width=32,
        text_encoder_num_layers=1,
        text_encoder_context_length=9,
        text_encoder_vocab_size=50,
        task_seq_len=9,
        is_training=False,
        use_auxiliary_loss=False,
        norm="LN",
    )
    model = scatter_biases(OneFormerForUniversalSegmentation(config)).eval()
    x = torch.randn(1, 3, 96, 128)
    out = model(pixel_values=x, task_inputs=torch.ones(1, 9, dtype=torch.long))
    assert out.masks_queries_logits.shape[:2] == (1, 6)
    assert out.masks_queries_logits.isfinite().all()
    (out.masks_queries_logits.square().mean() + out.class_queries_logits.square().mean()).backward()
    learned = [p for name, p in model.named_parameters() if name.endswith("rpb")]
    assert len(learned) == 5
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learned)
    theirs = model.model.pixel_level_module.encoder
    ours = ours_of(theirs.state_dict(), backbone, num_classes=0, out_norms=True).eval()
    with torch.no_grad():
        maps = ours.forward_intermediates(x, indices=4, norm=True, intermediates_only=True)
        for actual, expected in zip(theirs(x).feature_maps, maps, strict=True):
            torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


BUILD = """
from transformers import DinatConfig, DinatModel
config = DinatConfig(embed_dim=8, depths=[1], num_heads=[2], kernel_size=3, dilations=[[1]])
"""


@pytest.mark.parametrize("imported", ["before", "after"])
def test_transformers_may_be_imported_before_and_after(imported):
    early = f"""{BUILD}
import transformers.models.dinat.modeling_dinat as modeling
from transformers.utils import is_natten_available
assert not is_natten_available()
try:
    DinatModel(config)
except ImportError:
    pass
else:
    raise AssertionError
"""
    code = f"""import foveate, torch
{early if imported == "before" else ""}
foveate.natten.install()
{BUILD}
from transformers.utils import is_natten_available
assert is_natten_available()
assert DinatModel(config)(torch.randn(1, 3, 32, 48)).last_hidden_state.shape == (1, 8, 12, 8)
foveate.natten.uninstall()
assert not is_natten_available()
try:
    DinatModel(config)
except ImportError:
    print("gone")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "gone", done.stderr
