"""NAT and its relatives: any size, finite gradients, consistent batches, compile and export."""

import pytest
import timm
import torch

SIZES = [(96, 96), (224, 224), (250, 310)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["nat_atto", "dinat_mini", "dinat_s_tiny"])
def test_gradients_are_finite_at_any_size(name, size):
    model = timm.create_model(name, num_classes=5, drop_path_rate=0.0)
    model(torch.randn(1, 3, *size)).logsumexp(-1).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


def test_isotropic_takes_any_size_but_global_attention_its_own():
    model = timm.create_model("dinat_isotropic_small", num_classes=3).eval()
    assert model(torch.randn(1, 3, 250, 310)).shape == (1, 3)
    model = timm.create_model("vitrpb_small", num_classes=3).eval()
    with pytest.raises(ValueError, match=r"maps of 14x14; got 16x14.*set_input_size"):
        model(torch.randn(1, 3, 250, 224))
    model.set_input_size((250, 224))
    assert model(torch.randn(1, 3, 250, 224)).shape == (1, 3)


def test_batched_equals_one_by_one():
    model = timm.create_model("nat_atto").eval()
    images = torch.randn(3, 3, 70, 90)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), torch.cat([model(image[None]) for image in images]))


def test_features_at_odd_sizes():
    model = timm.create_model("nat_atto", features_only=True).eval()
    maps = model(torch.randn(1, 3, 101, 67))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 26, 17), (32, 13, 9), (64, 7, 5), (128, 4, 3)]


def test_bfloat16_is_finite_and_near():
    model = timm.create_model("nat_atto").eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(x).float()
        cast = model.to(torch.bfloat16)(x.bfloat16()).float()
    assert (rounded - exact).abs().max() < 0.05
    assert (cast - exact).abs().max() < 0.05


def test_dilations_must_fit_the_depths():
    with pytest.raises(ValueError, match=r"each block of depths \[3, 4, 6, 5\]; got \[1, 4, 6, 5\]"):
        timm.create_model("dinat_mini", dilations=[[1], [1] * 4, [1] * 6, [1] * 5])


def test_init_weights_can_be_run_again():
    with torch.device("meta"):
        model = timm.create_model("nat_atto")
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert 0.01 < model.stages[0].blocks[0].attn.rpb.std() < 0.03


@pytest.mark.parametrize("name", ["nat_mini", "dinat_mini"])
def test_compiled_equals_eager(name):
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, 224, 224)
    torch.compiler.reset()
    with torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["nat_mini", "dinat_mini"])
def test_inductor_equals_eager(name):
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, 224, 224)
    torch.compiler.reset()
    with torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["nat_mini", "dinat_mini"])
def test_exported_equals_eager(name):
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        expected = model(x)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.heavy  # tests/contract exports a relative of each
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nat_mini", {"depths": (1, 1, 1, 1)}),
        ("dinat_mini", {"depths": (2, 1, 1, 1), "dilations": ((1, 8), (2,), (1,), (1,))}),
        pytest.param("nat_mini", {}, marks=pytest.mark.heavy),
        pytest.param("dinat_mini", {}, marks=pytest.mark.heavy),
    ],
)
def test_onnx_equals_eager(name, options, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = timm.create_model(name, **options).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        expected = model(x)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), expected, atol=1e-4, rtol=1e-3)
