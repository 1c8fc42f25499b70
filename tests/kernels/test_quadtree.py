"""QuadTree's operators: reference against a loop, chunks against the reference, refusals."""

import pytest
import torch
from foveate.kernels import quadtree_scores, quadtree_values
from foveate.kernels.quadtree import chunked

pytestmark = pytest.mark.versions


def inputs(batch=2, heads=3, parents=5, tokens=7, chosen=3, dim=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, parents, 4, dim, generator=generator).to(dtype)
    key = torch.randn(batch, heads, tokens, 4, dim, generator=generator).to(dtype)
    index = torch.rand(batch, heads, parents, tokens, generator=generator).argsort(-1)[..., :chosen]
    weights = torch.rand(batch, heads, parents, 4, 4 * chosen, generator=generator).to(dtype)
    return query, key, weights, index


def test_reference_is_the_published_formula():
    query, key, weights, index = inputs(dtype=torch.float64)
    scores = quadtree_scores(query, key, index, backend="reference")
    values = quadtree_values(weights, key, index, backend="reference")
    for b, h, n, f in ((0, 0, 0, 0), (1, 2, 4, 3), (1, 0, 2, 1)):
        total = torch.zeros(6, dtype=torch.float64)
        for k in range(3):
            for child in range(4):
                token = key[b, h, index[b, h, n, k], child]
                torch.testing.assert_close(scores[b, h, n, f, 4 * k + child], query[b, h, n, f] @ token)
                total += weights[b, h, n, f, 4 * k + child] * token
        torch.testing.assert_close(values[b, h, n, f], total)


@pytest.mark.parametrize("chunk_bytes", [1, 700, 2**21])
def test_chunks_match_reference_with_every_gradient(chunk_bytes, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", chunk_bytes)
    query, key, weights, index = inputs(dtype=torch.float64)

    def run(backend):
        leaves = [x.clone().requires_grad_() for x in (query, key, weights)]
        scores = quadtree_scores(leaves[0], leaves[1], index, backend=backend)
        out = quadtree_values(scores.softmax(-1) * leaves[2], leaves[1], index, backend=backend)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    for actual, expected in zip(run("chunked"), run("reference"), strict=True):
        torch.testing.assert_close(actual, expected)


def test_second_order_gradients():
    query, key, weights, index = inputs(1, 1, 2, 3, 2, 2, torch.float64)
    leaves = [x.requires_grad_() for x in (query, key, weights)]
    assert torch.autograd.gradgradcheck(lambda q, k: quadtree_scores(q, k, index), leaves[:2])
    assert torch.autograd.gradgradcheck(lambda k, w: quadtree_values(w, k, index), leaves[1:])


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_summed_in_float32(backend, dtype):
    query, key, weights, index = inputs(dtype=dtype)
    scores = quadtree_scores(query * 300, key * 300, index, backend=backend)
    exact = quadtree_scores((query * 300).double(), (key * 300).double(), index, backend="reference")
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact, rtol=1e-6, atol=0.1)
    assert quadtree_values(weights, key, index, backend=backend).dtype == dtype


def test_autocast_does_not_lower_the_scores():
    query, key, _, index = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quadtree_scores(query, key, index), quadtree_scores(query, key, index, backend="chunked"))
        lowered = quadtree_scores(query, key, index)
    torch.testing.assert_close(lowered, quadtree_scores(query, key, index, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_lower_the_gradients(dtype):
    query, key, weights, index = inputs()
    operands = [x.requires_grad_() for x in (query, key, weights)]

    def gradients():
        loss = quadtree_scores(query, key, index).square().sum() + quadtree_values(weights, key, index).square().sum()
        return torch.autograd.grad(loss, operands)

    expected = gradients()
    with torch.autocast("cpu", dtype):
        inside = gradients()
    for a, b in zip(inside, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_strided_inputs():
    query, key, weights, index = inputs()
    wide = key.repeat_interleave(2, -1)[..., ::2]
    assert not wide.is_contiguous()
    assert torch.equal(quadtree_scores(query, wide, index), quadtree_scores(query, key, index))
    assert torch.equal(quadtree_values(weights, wide, index), quadtree_values(weights, key, index))


def test_tokens_outside_the_map_raise_on_the_cpu():
    query, key, _, index = inputs()
    index[0, 0, 0, 0] = 7
    with pytest.raises(IndexError, match="from 0 to 6, as key has them; got 0 to 7"):
        quadtree_scores(query, key, index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 3, 5, 3, 6)}, r"takes query as \[B, heads, tokens, 4, \.\.\.\]"),
        ({"query": torch.zeros(2, 3, 5, 4, 9)}, "one dtype and dim"),
        ({"key": torch.zeros(2, 3, 7, 4, 6, dtype=torch.float64)}, "one dtype and dim"),
        ({"key": torch.zeros(2, 2, 7, 4, 6)}, "of one"),
        ({"chosen": torch.zeros(2, 3, 5, 3)}, "int64"),
        ({"chosen": torch.zeros(2, 3, 4, 3, dtype=torch.int64)}, "of one"),
        ({"backend": "cuda"}, "has no backend 'cuda'; it has 'triton', 'chunked', 'reference'"),
    ],
)
def test_bad_calls_say_what_was_wrong(change, message):
    query, key, _, index = inputs()
    call = {"query": query, "key": key, "chosen": index} | change
    with pytest.raises(ValueError, match=message):
        quadtree_scores(call.pop("query"), call.pop("key"), call.pop("chosen"), **call)


def test_weights_must_fit_the_candidates():
    _, key, weights, index = inputs()
    with pytest.raises(ValueError, match="a weight for each of the 4 children of 3 chosen tokens; got 8"):
        quadtree_values(weights[..., :8], key, index)
