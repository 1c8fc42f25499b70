"""The Triton path, interpreted on the CPU; `test_quadtree_triton.py` runs this file with ``TRITON_INTERPRET=1``."""

import pytest
import torch
from foveate.kernels import quadtree_scores, quadtree_values
from foveate.kernels.quadtree import triton_ops

# batch, heads, parents, tokens, chosen, dim: odd, and dims that are no powers of two
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 3, 5, 7, 3, 5), (1, 2, 3, 9, 8, 32), (1, 1, 3, 40, 33, 20)]


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Fill fresh outputs with NaN, so that what a kernel leaves unwritten shows."""

    def poison(make):
        return lambda *arguments: make(*arguments).fill_(float("nan"))

    monkeypatch.setattr(triton_ops, "_empty_scores", poison(triton_ops._empty_scores))
    monkeypatch.setattr(triton_ops, "_empty_values", poison(triton_ops._empty_values))


def inputs(shape, dtype=torch.float32):
    batch, heads, parents, tokens, chosen, dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    query = torch.randn(batch, heads, parents, 4, dim, generator=generator).to(dtype)
    key = torch.randn(batch, heads, tokens, 4, dim, generator=generator).to(dtype)
    index = torch.rand(batch, heads, parents, tokens, generator=generator).argsort(-1)[..., :chosen]
    weights = torch.rand(batch, heads, parents, 4, 4 * chosen, generator=generator)
    return query, key, weights, index


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape):
    query, key, weights, index = inputs(shape)
    scores = quadtree_scores(query, key, index, backend="triton")
    torch.testing.assert_close(scores, quadtree_scores(query, key, index, backend="reference"), atol=1e-5, rtol=1e-5)
    values = quadtree_values(weights, key, index, backend="triton")
    torch.testing.assert_close(values, quadtree_values(weights, key, index, backend="reference"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_gradients_match_reference(shape):
    query, key, weights, index = inputs(shape)

    def gradients(backend):
        leaves = [x.clone().requires_grad_() for x in (query, key, weights)]
        scores = quadtree_scores(leaves[0], leaves[1], index, backend=backend)
        out = quadtree_values(scores.softmax(-1) * leaves[2], leaves[1], index, backend=backend)
        return torch.autograd.grad(out.square().sum(), leaves)

    for actual, expected in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_second_order_gradient_matches_reference():
    query, key, _, index = inputs((1, 2, 3, 4, 2, 3))

    def second(backend):
        leaves = [x.clone().requires_grad_() for x in (query, key)]
        scores = quadtree_scores(*leaves, index, backend=backend)
        first = torch.autograd.grad(scores.pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for actual, expected in zip(second("triton"), second("reference"), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-4)


def test_half_precision_sums_in_float32():
    query, key, weights, index = inputs((1, 2, 3, 9, 8, 32), torch.float16)
    scores = quadtree_scores(query, 1000 * key, index, backend="triton")
    expected = quadtree_scores(query, 1000 * key, index, backend="reference")
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=1e-2, rtol=1e-5)
    values = quadtree_values(weights, key, index, backend="triton")
    assert values.dtype == torch.float16
    torch.testing.assert_close(values, quadtree_values(weights, key, index, backend="reference"), atol=1e-2, rtol=1e-3)


def test_tokens_outside_the_map_are_skipped():
    query, key, weights, index = inputs((1, 1, 2, 5, 3, 4))
    index[0, 0, 1, 2], index[0, 0, 0, 0] = 5, -1
    scores = triton_ops.scores_triton(query, key, index)
    assert (scores[0, 0, 1, :, 8:] == 0).all()
    assert (scores[0, 0, 0, :, :4] == 0).all()
    assert triton_ops.values_triton(weights, key, index).isfinite().all()


def test_no_parents():
    query, key, _, index = inputs((1, 2, 3, 4, 2, 3))
    assert quadtree_scores(query[:, :, :0], key, index[:, :, :0], backend="triton").shape == (1, 2, 0, 4, 8)


def test_operators_keep_torchs_contract():
    query, key, weights, index = inputs((1, 2, 3, 4, 2, 3))
    for operator, arguments in (
        (triton_ops.scores_triton, (query.requires_grad_(), key.requires_grad_(), index)),
        (triton_ops.values_triton, (weights.requires_grad_(), key, index)),
        (triton_ops.scatter_triton, (weights, query, index, 4)),
    ):
        torch.library.opcheck(
            operator, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
        )


def test_compiles_as_one_graph():
    query, key, _, index = inputs((1, 2, 3, 4, 2, 3))
    compiled = torch.compile(quadtree_scores, fullgraph=True, backend="aot_eager")
    expected = quadtree_scores(query, key, index, backend="reference")
    torch.testing.assert_close(compiled(query, key, index, backend="triton"), expected, atol=1e-5, rtol=1e-5)
