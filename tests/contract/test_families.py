"""Every family trains, compiles and is exported: what .ci/wide runs on every torch, timm and Python that we claim."""

import numpy as np
import pytest
import torch
from foveate.tasks import TaskError
from foveate.tasks.export import Options, export_model


def test_gradients_reach_every_parameter(model, images):
    model.train()
    logits = model(images)
    assert logits.shape == (2, 5)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 3])).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_compiled_models_compute_the_same(model, images):
    model.train()
    compiled = torch.compile(model, backend="aot_eager")
    results = []
    for function in (model, compiled):
        # The statistics of batch norms are not compared, but what they are made of is.
        model.zero_grad()
        logits = function(images)
        logits.square().sum().backward()
        results.append((logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
    (expected, gradients), (actual, compiled_gradients) = results
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    # A convolution's bias before a batch norm has a gradient of rounding alone, of the size of the others' rounding.
    floor = max(1e-2, 1e-4 * max(gradient.abs().max().item() for gradient in gradients))
    for gradient, compiled_gradient in zip(gradients, compiled_gradients, strict=True):
        scale = gradient.abs().max().clamp(min=floor)
        torch.testing.assert_close(compiled_gradient / scale, gradient / scale, atol=1e-3, rtol=0)


def test_onnxruntime_computes_the_same(exported, images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "model.onnx"
    # A family that is right to the last bits of float32 may differ by more in units of so small a model's logits.
    facts = export_model(exported.eval(), images, path, {}, Options(tolerance=1e-4))
    assert facts["operators"] == []
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    others = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    (logits,) = session.run(["output"], {"images": others.numpy()})
    with torch.no_grad():
        expected = exported(others).numpy()
    assert np.abs(expected).max() > 1e-4  # of random weights, but of more than rounding
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.heavy
def test_onnx_files_of_opset_17_hold_no_float64_and_no_large_tables(model, images, tmp_path):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "model.onnx"
    export_model(model.eval(), images, path, {}, Options(opset=17, tolerance=1e-4))
    written = onnx.load(path)
    assert [opset.version for opset in written.opset_import if opset.domain == ""] == [17]
    graph = written.graph
    constants = [attribute.t for node in graph.node for attribute in node.attribute if attribute.HasField("t")]
    assert not [
        tensor.name for tensor in (*graph.initializer, *constants) if tensor.data_type == onnx.TensorProto.DOUBLE
    ]
    casts = [attribute.i for node in graph.node if node.op_type == "Cast" for attribute in node.attribute]
    assert onnx.TensorProto.DOUBLE not in casts
    state = sum(value.nbytes for value in {**model.state_dict(), **dict(model.named_buffers())}.values())
    assert path.stat().st_size < state + 300_000


# Those whose maths takes any size, and whose code can be followed so; the others are refused.
OPEN = {"nat_atto", "dinat_mini", "biformer_tiny", "mscan_t", "van_b0"}


@pytest.mark.heavy
def test_files_take_any_size_or_are_refused_in_one_line(family, model, images, tmp_path):
    """The exporter itself runs a file at three sizes, two of them odd, and two batch sizes, and compares."""
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    options, refusal = Options(dynamic_size=True, dynamic_batch=True), None
    try:
        assert export_model(model.eval(), images, path, {}, options)["difference"] <= 1e-5
    except TaskError as error:
        refusal = str(error)
    if refusal is not None:
        assert family not in OPEN
        assert "export it for one" in refusal
        assert "without --dynamic-size" in refusal
        assert "\n" not in refusal
