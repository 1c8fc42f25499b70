"""Multi-scale deformable attention: the published values, all paths alike, and gradients."""

import pytest
import torch
from foveate.kernels import deformable_backends, deformable_native, multi_scale_deformable_attention
from torch.autograd import gradcheck

pytestmark = pytest.mark.versions

# The native path computes in float32 alone, and only where it was compiled.
EXACT = ("reference", "bags", "gathers")
BACKENDS = (*EXACT, *(["native"] if deformable_native._library else []))
SHAPES = [(3, 5), (1, 4), (6, 2)]
PIXELS = sum(height * width for height, width in SHAPES)


def problem(dtype=torch.float32, batch=2, queries=7, heads=3, dim=4, points=2):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(batch, PIXELS, heads, dim, generator=generator, dtype=torch.float64)
    locations = 0.5 + 0.5 * torch.randn(
        batch, queries, heads, len(SHAPES), points, 2, generator=generator, dtype=torch.float64
    )
    weights = torch.randn(batch, queries, heads, len(SHAPES), points, generator=generator, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (value, locations, weights)]


def attend(value, locations, weights, backend):
    return multi_scale_deformable_attention(value, SHAPES, locations, weights, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_published_values(backend, open_fixture):
    fixture = open_fixture("dense/msdeform_op")
    input_for = fixture.golden.input_for
    shapes = fixture.spec["inputs"]["spatial_shapes_hw"]
    value = input_for((2, 1680, 8, 32), 700)
    locations = 0.5 + 0.35 * input_for((2, 23, 8, 3, 4, 2), 701)
    weights = input_for((2, 23, 8, 12), 702).softmax(-1).unflatten(-1, (3, 4))
    fixture.assert_output("out", multi_scale_deformable_attention(value, shapes, locations, weights, backend), 2e-6)


@pytest.mark.parametrize("backend", EXACT)
def test_gradients_are_those_of_finite_differences(backend):
    inputs = problem(torch.float64, batch=1, queries=3, heads=2, dim=2)
    assert gradcheck(lambda *x: attend(*x, backend), inputs, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_paths_agree_with_their_gradients(dtype):
    inputs = problem(dtype)
    outs = [attend(*inputs, backend) for backend in (BACKENDS if dtype == torch.float32 else EXACT)]
    expected, *others = (torch.autograd.grad(out.square().sum(), inputs) for out in outs)
    for out, actual in zip(outs[1:], others, strict=True):
        torch.testing.assert_close(out, outs[0])
        for wanted, got in zip(expected, actual, strict=True):
            scale = wanted.abs().max().item()
            torch.testing.assert_close(got, wanted, atol=scale * 10 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_points_far_outside_and_on_the_edges(backend):
    value, _, _ = problem()
    weights = torch.ones(2, 1, 3, 3, 2)
    edges = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).expand(2, 1, 3, 3, 2, 2)
    corners = attend(value, edges, weights, backend).unflatten(-1, (3, 4))[:, 0]
    ends = [(0, 14), (15, 18), (19, 30)]
    # A corner of a map lies between its last pixel and three that are zero.
    expected = sum(value[:, first] + value[:, last] for first, last in ends) / 4
    torch.testing.assert_close(corners, expected)
    outside = attend(value, edges + 1e6, weights, backend)
    assert outside.abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_reads_at_exact_positions(backend):
    value, locations, weights = problem()
    out = attend(value.bfloat16(), locations, weights, backend)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attend(value, locations, weights, backend), atol=5e-2, rtol=2e-2)


def test_points_that_are_no_numbers_give_no_numbers_and_no_crash():
    value, locations, weights = (x.detach() for x in problem())
    locations[0, 0, 0, 0, 0, 0] = float("nan")
    for backend in BACKENDS[1:]:
        out = attend(value, locations, weights, backend)
        assert out[0, 0, :4].isnan().all()
        assert out[0, 0, 4:].isfinite().all()


def test_mistakes_are_named():
    value, locations, weights = problem()
    with pytest.raises(ValueError, match=r"maps of .* have 15 pixels; value has 31"):
        multi_scale_deformable_attention(value, SHAPES[:1], locations, weights)
    with pytest.raises(ValueError, match="takes value"):
        multi_scale_deformable_attention(value, SHAPES, locations, weights[..., 0])
    with pytest.raises(ValueError, match="2 images and 3 heads, but locations have 2 and 1"):
        multi_scale_deformable_attention(value, SHAPES, locations[:, :, :1], weights[:, :, :1])
    with pytest.raises(ValueError, match="no backend 'cuda'; it has 'native', 'bags', 'reference', 'gathers'"):
        attend(value, locations, weights, "cuda")


def test_export_is_built_of_operators_that_other_runtimes_know():
    class Attend(torch.nn.Module):
        def forward(self, *inputs):
            return multi_scale_deformable_attention(inputs[0], SHAPES, *inputs[1:])

    inputs = [x.detach() for x in problem()]
    assert (
        deformable_backends(inputs[0], SHAPES, *inputs[1:])[BACKENDS[-1] if "native" in BACKENDS else "bags"]
        == "chosen"
    )
    program = torch.export.export(Attend(), tuple(inputs))
    names = {str(node.target) for node in program.graph.nodes}
    assert names & {"aten.embedding.default", "aten.index_select.default"}  # a Gather of ONNX
    assert not any(other in name for name in names for other in ("embedding_bag", "grid_sampl", "foveate"))
    torch.testing.assert_close(program.module()(*inputs), Attend()(*inputs))


@pytest.mark.skipif("native" not in BACKENDS, reason=str(deformable_native._missing))
@pytest.mark.parametrize("threads", [1, 3])
def test_native_is_the_same_on_several_threads_at_every_width(threads, monkeypatch):
    """Channels that fill no vector, or several; more queries than a thread takes at once."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for dim in (1, 16, 37):
            inputs = problem(queries=300, dim=dim)
            native, reference = (attend(*inputs, backend) for backend in ("native", "reference"))
            torch.testing.assert_close(native, reference)
            grads = [torch.autograd.grad(out.sin().sum(), inputs) for out in (native, reference)]
            for got, wanted in zip(*grads, strict=True):
                torch.testing.assert_close(got, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=0)
            with monkeypatch.context() as patch:
                patch.setattr(deformable_native._library, "parallel", 0)
                assert torch.equal(attend(*inputs, "native"), native)
    finally:
        torch.set_num_threads(before)


def test_transforms_take_torch_s_operators():
    value, locations, weights = (x.detach() for x in problem())
    mapped = torch.func.vmap(lambda *x: attend(*(y[None] for y in x), None)[0])(value, locations, weights)
    torch.testing.assert_close(mapped, attend(value, locations, weights, "reference"))


@pytest.mark.heavy
def test_compiled_is_the_same():
    inputs = problem()
    compiled = torch.compile(lambda *x: attend(*x, None), fullgraph=True)
    expected = attend(*inputs, None)
    actual = compiled(*inputs)
    torch.testing.assert_close(actual, expected)
    for got, wanted in zip(
        torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
