"""The Triton kernels on a GPU: outputs and every gradient against the references in float64."""

import pytest
import torch
from foveate.kernels import na1d, na2d, na3d, neighborhood_backends, quadtree_scores, quadtree_values

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OPERATORS = (na1d, na2d, na3d)
# Largest error over the largest value, for outputs and gradients.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = tuple(TOLERANCES)
# batch, map, kernel, heads, heads of keys, dim, dim of values, whether there is a bias, additional keys, options
NEIGHBORHOODS = {
    "nat": (2, (56, 56), 7, 2, 2, 32, 32, True, 0, {}),
    "dinat": (2, (56, 56), 7, 2, 2, 32, 32, True, 0, {"dilation": 8}),
    "last stage": (4, (7, 7), 7, 16, 16, 32, 32, True, 0, {}),
    "isotropic": (2, (14, 14), 7, 6, 6, 64, 64, True, 0, {}),
    "odd map": (1, (37, 61), (11, 5), 3, 3, 20, 20, True, 0, {"dilation": (3, 2)}),
    "shared keys": (2, (23, 19), 5, 6, 2, 24, 40, False, 7, {}),
    "blocked": (1, (32, 24), (8, 6), 2, 2, 64, 64, False, 0, {"stride": (8, 6)}),
    "causal map": (1, (24, 31), 5, 2, 1, 32, 32, False, 0, {"is_causal": (True, False), "stride": (1, 2)}),
    "line": (2, (999,), 63, 2, 2, 128, 128, False, 5, {}),
    "causal line": (1, (777,), 32, 4, 2, 64, 64, False, 0, {"is_causal": True, "dilation": 3}),
    "video": (1, (9, 14, 11), (3, 7, 5), 2, 2, 48, 48, False, 0, {"is_causal": (True, False, False)}),
    "video, strided": (1, (12, 16, 20), (6, 8, 8), 2, 2, 64, 64, False, 0, {"stride": (4, 4, 4)}),
    "volume, biased": (1, (6, 7, 9), (3, 5, 3), 2, 2, 32, 32, True, 0, {}),
    "wide heads": (1, (13, 17), 5, 1, 1, 256, 512, True, 0, {}),
}


def assert_close(actual, expected, dtype, name):
    assert actual.isfinite().all(), name
    error = ((actual.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1e-3)).item()
    assert error <= TOLERANCES[dtype], f"{name}: {error:.1e}"


def gradients(function, tensors):
    """Return the outputs of a function, and the gradients of its floating-point tensors under fixed random weights."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = function(*leaves)
    generator = torch.Generator(tensors[0].device).manual_seed(7)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32).to(x.dtype)).sum()
        for x in outputs
    )
    return (*outputs, *torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NEIGHBORHOODS)
def test_neighborhoods_equal_the_reference(case, dtype):
    batch, spatial, kernel, heads, heads_kv, dim, dim_v, biased, more, options = NEIGHBORHOODS[case]
    generator = torch.Generator("cuda").manual_seed(1)
    shapes = {
        "query": (batch, *spatial, heads, dim),
        "key": (batch, *spatial, heads_kv, dim),
        "value": (batch, *spatial, heads_kv, dim_v),
    }
    if biased:
        kernels = kernel if isinstance(kernel, tuple) else (kernel,) * len(spatial)
        shapes["rpb"] = (heads, *(2 * k - 1 for k in kernels))
    if more:
        shapes |= {"additional_keys": (batch, more, heads_kv, dim), "additional_values": (batch, more, heads_kv, dim_v)}
    tensors = [torch.randn(shape, device="cuda", generator=generator).to(dtype) for shape in shapes.values()]

    def run(backend, *leaves):
        named = dict(zip(shapes, leaves, strict=True))
        return OPERATORS[len(spatial) - 1](**named, kernel_size=kernel, **options, backend=backend, return_lse=True)

    expected = gradients(lambda *leaves: run("reference", *leaves), [x.double() for x in tensors])
    actual = gradients(lambda *leaves: run("triton", *leaves), tensors)
    for name, a, b in zip(("out", "lse", *shapes), actual, expected, strict=True):
        assert_close(a, b, dtype, name)


def test_triton_is_chosen_on_gpus():
    x = torch.randn(1, 9, 9, 2, 16, device="cuda")
    assert neighborhood_backends(x, x, x, 3)["triton"] == "chosen"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 49, 64, 8, 32), (1, 8, 196, 196, 16, 64), (1, 1, 5, 40, 33, 20)], ids=str)
def test_quadtrees_equal_the_reference(shape, dtype):
    batch, heads, parents, tokens, chosen, dim = shape
    generator = torch.Generator("cuda").manual_seed(2)
    query = torch.randn(batch, heads, parents, 4, dim, device="cuda", generator=generator).to(dtype)
    key, value = torch.randn(2, batch, heads, tokens, 4, dim, device="cuda", generator=generator).to(dtype).unbind()
    index = torch.rand(batch, heads, parents, tokens, device="cuda", generator=generator).argsort(-1)[..., :chosen]

    def run(backend, query, key, value):
        scores = quadtree_scores(query, key, index, backend=backend)
        return scores, quadtree_values((scores / dim**0.5).softmax(-1), value, index, backend=backend)

    expected = gradients(lambda *leaves: run("reference", *leaves), [x.double() for x in (query, key, value)])
    actual = gradients(lambda *leaves: run("triton", *leaves), [query, key, value])
    for name, a, b in zip(("scores", "values", "query", "key", "value"), actual, expected, strict=True):
        assert_close(a, b, dtype, name)


def test_compiled_calls_equal_eager_ones():
    x = torch.randn(2, 28, 28, 3, 4, 32, device="cuda", dtype=torch.bfloat16)
    rpb = torch.randn(4, 13, 13, device="cuda")
    call = lambda x, rpb: (na2d(*x.unbind(3), 7, rpb=rpb).flatten(3),)  # noqa: E731
    expected, actual = (gradients(function, (x, rpb)) for function in (call, torch.compile(call, fullgraph=True)))
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b.float(), torch.bfloat16, "compiled")
