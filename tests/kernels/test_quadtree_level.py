"""A level of QuadTree attention in C beside its reference: sums, choices, and gradients of both orders."""

from itertools import product

import pytest
import torch
from foveate.blocks import QuadTreeAttention2d
from foveate.kernels import quadtree_level, quadtree_level_backends
from foveate.kernels.quadtree.level import level_obstacle

pytestmark = pytest.mark.versions

native = level_obstacle(*[torch.zeros(1, 2, 2, 1, 16)] * 3)
needs_native = pytest.mark.skipif(native is not None, reason=f"no native path: {native}")


def problem(batch=2, size=(8, 12), heads=2, dims=(32, 64), keys=None, tokens=3, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    keys, half = keys or size, (size[0] // 2, size[1] // 2)
    count = keys[0] * keys[1] // 4
    query, key = (torch.randn(batch, *of, heads, dims[0], dtype=dtype) for of in (size, keys))
    value, base = (torch.randn(batch, *of, heads, dims[1], dtype=dtype) for of in (keys, size))
    parent = torch.randn(batch, *half, heads, dims[1], dtype=dtype)
    index = torch.rand(batch, heads, *half, count).argsort(-1)[..., :tokens].contiguous()
    return {
        "query": query,
        "key": key,
        "value": value,
        "share": torch.tensor(0.3, dtype=dtype),
        "parent": parent,
        "base": base,
        "token_index": index,
    }


def run(tensors, topk, backend):
    names = [name for name, x in tensors.items() if x.is_floating_point()]
    leaves = {name: tensors[name].detach().requires_grad_() for name in names}
    out, tokens = quadtree_level(**(tensors | leaves), topk=topk, backend=backend)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return out, tokens, torch.autograd.grad(out, leaves.values(), upstream, create_graph=True), list(leaves.values())


@needs_native
@pytest.mark.parametrize(
    ("options", "topk"),
    [({}, 5), ({"keys": (6, 10)}, 0), ({"tokens": 8, "dims": (16, 16)}, 8), ({"tokens": 1}, 4), ({"size": (2, 2)}, 1)],
)
@pytest.mark.parametrize("threads", [1, 7])
def test_the_native_path_is_the_reference(options, topk, threads):
    tensors = problem(**{"tokens": 1 if options.get("size") else 3, **options})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, tokens, firsts, leaves = run(tensors, topk, "native")
        seconds = torch.autograd.grad(sum(x.square().sum() for x in firsts), leaves, materialize_grads=True)
    finally:
        torch.set_num_threads(before)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    expected, best, gradients, leaves = run(wide, topk, "reference")
    again = torch.autograd.grad(sum(x.square().sum() for x in gradients), leaves, materialize_grads=True)
    assert tokens.sort(-1).values.equal(best.sort(-1).values)
    for ours, theirs in zip((out, *firsts, *seconds), (expected, *gradients, *again), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5 * (1 + theirs.abs().max().item()), rtol=1e-5)


@needs_native
def test_maps_are_read_where_they_lie():
    tensors = problem()
    together = torch.stack([tensors["query"], tensors["key"]], 3)
    strided = tensors | dict(zip(("query", "key"), together.unbind(3), strict=True))
    strided["value"] = tensors["value"].transpose(2, 3).contiguous().transpose(2, 3)
    strided["base"] = tensors["base"].permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    for ours, theirs in zip(run(strided, 4, "native")[:3], run(tensors, 4, "native")[:3], strict=True):
        for x, y in zip(*((part,) if isinstance(part, torch.Tensor) else part for part in (ours, theirs)), strict=True):
            torch.testing.assert_close(x, y)


@needs_native
def test_equal_scores_and_nan_hand_down_as_many_tokens():
    tensors = problem(tokens=6)
    for value in (0.0, float("nan"), float("inf")):
        flat = tensors | {"key": torch.full_like(tensors["key"], value), "query": tensors["query"].abs()}
        _, tokens = quadtree_level(**flat, topk=7, backend="native")
        assert 0 <= tokens.min() <= tokens.max() < 8 * 12
        assert all(len(set(row.tolist())) == 7 for row in tokens.flatten(0, 3))


@needs_native
def test_a_token_that_nobody_chose_is_not_read():
    tensors = problem()
    tensors["token_index"] = tensors["token_index"] % 23
    value = tensors["value"].clone()
    value[:, 6:, 10:] = float("nan")  # the children of token 23
    out, _ = quadtree_level(**tensors | {"value": value}, topk=0, backend="native")
    assert out.isfinite().all()


@needs_native
def test_graphs_and_transforms():
    tensors = problem(tokens=4)
    floats = {name: x for name, x in tensors.items() if x.is_floating_point()}

    def level(floats):
        return quadtree_level(**floats, token_index=tensors["token_index"], topk=4)[0]

    torch.testing.assert_close(torch.compile(level, backend="aot_eager", fullgraph=True)(floats), level(floats))
    leaves = {name: x.clone().requires_grad_() for name, x in floats.items()}
    names = list(leaves)
    eager = torch.autograd.grad(level(leaves).square().sum(), leaves.values())
    graph = torch.compile(lambda f: level(f).square().sum(), backend="aot_eager", fullgraph=True)
    compiled = torch.autograd.grad(graph(leaves), leaves.values())
    mapped = torch.func.grad(lambda f: level(f).square().sum())(floats)
    for name, one, other in zip(names, eager, compiled, strict=True):
        torch.testing.assert_close(other, one)
        torch.testing.assert_close(mapped[name], one, atol=1e-3, rtol=1e-4)


@needs_native
@pytest.mark.parametrize(("levels", "topk"), [(2, 3), (3, (16, 8))])
def test_a_block_by_levels_is_the_block_by_trees(levels, topk):
    torch.manual_seed(0)
    block = QuadTreeAttention2d(64, 2, levels, topk)
    for size in ((16, 24), (9, 14)):
        x = torch.randn(2, *size, 64)
        results = []
        for backend in ("native", "chunked"):
            block.backend = backend
            leaf = x.clone().requires_grad_()
            out = block(leaf)
            results.append((out, *torch.autograd.grad(out.square().sum(), (leaf, *block.parameters()))))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4 * (1 + theirs.abs().max().item()), rtol=1e-4)


def test_refusals():
    tensors = problem()
    for change, reason in [
        ({"query": tensors["query"][:, :7]}, "takes query as .* of even H and W"),
        ({"value": tensors["value"].double()}, "in one floating-point dtype"),
        ({"parent": tensors["base"]}, "parent of half its size"),
        ({"token_index": tensors["token_index"].int()}, "takes token_index as"),
        ({"share": tensors["share"].expand(3)}, "share must be a number"),
    ]:
        with pytest.raises(ValueError, match=reason):
            quadtree_level(**tensors | change, topk=2)
    with pytest.raises(ValueError, match="topk must be from 0 to 4 x 3 candidates; got 13"):
        quadtree_level(**tensors, topk=13)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    with pytest.raises(ValueError, match=r"'native' cannot run here: it computes in float32; got torch\.float64"):
        quadtree_level(**wide, topk=2, backend="native")
    narrow = problem(dims=(8, 16))
    with pytest.raises(ValueError, match="dims of multiples of 16; got 8 and 16"):
        quadtree_level(**narrow, topk=2, backend="native")
    assert "computes in float32" in quadtree_level_backends(**wide, topk=2)["native"]
    assert quadtree_level_backends(**wide, topk=2)["reference"] == "chosen"
    if native is None:
        assert quadtree_level_backends(**tensors, topk=2)["native"] == "chosen"
        with pytest.raises(IndexError, match="chosen tokens from 0 to 23; got 0 to 24"):
            quadtree_level(**tensors | {"token_index": tensors["token_index"] * 0 + torch.tensor([0, 1, 24])}, topk=2)
    for kind, levels in product("AB", (1, 2)):
        if (kind, levels) != ("B", 2):
            block = QuadTreeAttention2d(32, 2, levels, 2, kind, backend="native")
            with pytest.raises(ValueError, match="'native' cannot run here: it is for type B, and for two levels"):
                block(torch.randn(1, 4, 4, 32))


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_in_half_precision_take_the_levels_too(dtype):
    torch.manual_seed(0)
    block = QuadTreeAttention2d(32, 2, 3, 4, "B", backend="native").to(dtype)
    x = torch.randn(2, 16, 24, 32, dtype=dtype, requires_grad=True)
    out = block(x)
    assert out.dtype == dtype
    out.float().square().mean().backward()
    gradient = x.grad
    x.grad, block.backend = None, "chunked"
    expected = block(x)
    expected.float().square().mean().backward()
    torch.testing.assert_close(out.float(), expected.float(), atol=0.02, rtol=0.05)
    torch.testing.assert_close(gradient.float(), x.grad.float(), atol=1e-3, rtol=0.1)
