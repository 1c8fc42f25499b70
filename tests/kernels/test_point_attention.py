"""Attention to points: every backend against the formula in loops, gradients, and what is chosen when."""

import math

import pytest
import torch
from foveate.kernels import point_attention, point_attention_backends, point_attention_native, rows
from foveate.kernels.point_attention import displacement_bias

# Batch, height, width, points, heads, groups, dim, dim_v, table: tables finer and coarser than the map, rows of several
# vectors and of less than one, a map of one position.
PROBLEMS = [
    (2, 5, 7, 6, 4, 2, 8, 8, (9, 13)),
    (1, 3, 37, 70, 2, 1, 16, 5, (5, 11)),
    (1, 4, 10, 9, 1, 1, 3, 12, (31, 61)),
    (1, 2, 20, 5, 1, 1, 40, 33, (5, 7)),
    (1, 1, 1, 1, 2, 2, 4, 4, (1, 1)),
]
BACKENDS = ["rows", "whole"]
if point_attention_native._library is not None:
    BACKENDS.insert(0, "native")


def problem(batch, height, width, points, heads, groups, dim, dim_v, table, dtype=torch.float32):
    """Return a call whose points lie inside of the map and beyond it."""
    torch.manual_seed(0)
    places = torch.rand(batch, groups, points, 2, dtype=dtype) * 2.6 - 1.3
    axes = (torch.linspace(-1, 1, n, dtype=dtype) if n > 1 else torch.zeros(1, dtype=dtype) for n in (height, width))
    return [
        torch.randn(batch, height, width, heads, dim, dtype=dtype),
        torch.randn(batch, points, heads, dim, dtype=dtype),
        torch.randn(batch, points, heads, dim_v, dtype=dtype),
        torch.randn(heads, *table, dtype=dtype),
        places,
        *axes,
    ]


def read(table, y, x):
    """Return the table's number at a normalised place, bilinear, zero outside."""
    height, width = table.shape
    y, x = (y + 1) / 2 * (height - 1), (x + 1) / 2 * (width - 1)
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * table[row, column].item()
    return total


def by_loops(query, key, value, table, points, row_places, column_places):
    """Return what `point_attention` does, one query after the other."""
    batch, height, width, heads, dim = query.shape
    out = query.new_zeros(batch, height, width, heads, value.shape[-1])
    for b in range(batch):
        for h in range(heads):
            places = points[b, h // (heads // points.shape[1])].tolist()
            for i in range(height):
                for j in range(width):
                    y, x = row_places[i].item(), column_places[j].item()
                    bias = [read(table[h], (y - py) / 2, (x - px) / 2) for py, px in places]
                    scores = key[b, :, h] @ query[b, i, j, h] * dim**-0.5 + query.new_tensor(bias)
                    out[b, i, j, h] = scores.softmax(0) @ value[b, :, h]
    return out


@pytest.mark.parametrize("shape", PROBLEMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_formula(backend, shape, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK", 50)
    call = problem(*shape)
    expected = by_loops(*(x.double() for x in call))
    torch.testing.assert_close(point_attention(*call, backend=backend).double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.skipif("native" not in BACKENDS, reason="the C library was not compiled")
def test_the_way_into_the_library_is_free_of_the_tensors_layout():
    call = problem(*PROBLEMS[0])
    expected = point_attention(*call, backend="native")
    query, key, value = call[0].permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2), call[1], call[2]
    key, value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (key, value))
    torch.testing.assert_close(
        point_attention(query, key, value, *call[3:], backend="native"), expected, rtol=0, atol=0
    )


@pytest.mark.parametrize("shape", PROBLEMS)
@pytest.mark.parametrize("backend", BACKENDS[:-1])
def test_gradients_are_those_of_the_whole(backend, shape, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK", 50)
    call = problem(*shape)
    leaves = [x.requires_grad_() for x in call[:5]]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    weights = torch.randn(*call[0].shape[:-1], call[2].shape[-1])
    grads = torch.autograd.grad(point_attention(*call, backend=backend), leaves, weights)
    whole = point_attention(*exact, *(x.double() for x in call[5:]), backend="whole")
    for grad, expected in zip(grads, torch.autograd.grad(whole, exact, weights.double()), strict=True):
        torch.testing.assert_close(grad.double(), expected, atol=2e-5 * max(1, expected.std()), rtol=1e-4)


@pytest.mark.skipif("native" not in BACKENDS, reason="the C library was not compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(dtype):
    call = [x.to(dtype) for x in problem(*PROBLEMS[0])]
    call[4:] = [x.float() for x in call[4:]]
    leaves = [x.requires_grad_() for x in call[:5]]
    exact = [x.detach().float().requires_grad_() for x in leaves]
    outs = [point_attention(*xs, *call[5:], backend="native") for xs in (leaves, exact)]
    assert outs[0].dtype == dtype
    torch.testing.assert_close(outs[0], outs[1].to(dtype), rtol=0, atol=0)
    weights = torch.randn(outs[0].shape).to(dtype)
    grads = [torch.autograd.grad(out, xs, weights.to(out.dtype)) for out, xs in zip(outs, (leaves, exact), strict=True)]
    for grad, leaf, expected in zip(grads[0], leaves, grads[1], strict=True):
        assert grad.dtype == leaf.dtype
        torch.testing.assert_close(grad, expected.to(leaf.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS[:-1])
def test_second_derivatives(backend, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK", 50)
    seconds = []
    for name, dtype in ((backend, torch.float32), ("whole", torch.float64)):
        call = [x.to(dtype) for x in problem(*PROBLEMS[0])]
        leaves = [x.requires_grad_() for x in call[:5]]
        # One operand is computed from another, and the way between them counts once.
        tied = [leaves[0], *(x + leaves[0].mean() for x in leaves[1:])]
        out = point_attention(*tied, *call[5:], backend=name)
        firsts = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(first.square().sum() for first in firsts), leaves))
    for grad, expected in zip(*seconds, strict=True):
        torch.testing.assert_close(grad.double(), expected, atol=1e-4 * expected.std(), rtol=1e-3)


@pytest.mark.parametrize("threads", [1, 3])
def test_on_the_tables_own_pixels_the_slope_is_the_one_to_the_right(threads):
    call = problem(2, 5, 9, 6, 4, 2, 8, 8, (9, 17))
    call[4] = torch.zeros(2, 2, 6, 2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for x in call[3:5]:
            x.requires_grad_()
        grads = [
            torch.autograd.grad(point_attention(*call, backend=name).square().sum(), call[3:5]) for name in BACKENDS
        ]
    finally:
        torch.set_num_threads(before)
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_what_is_chosen(monkeypatch):
    large, short = problem(*PROBLEMS[1]), problem(*PROBLEMS[0])
    assert point_attention_backends(*short)["whole"] == "chosen"
    if "native" in BACKENDS:
        assert point_attention_backends(*large)["native"] == "chosen"
    large = [x.double() for x in large]
    assert point_attention_backends(*large)["whole"] == "chosen"
    monkeypatch.setattr(rows, "CHUNK", 50)
    assert point_attention_backends(*large)["rows"] == "chosen"
    with pytest.raises(ValueError, match="'native' cannot run here"):
        point_attention(*large, backend="native")


def test_what_is_not_a_number_stays_so_and_alone():
    call = problem(*PROBLEMS[1])
    call[0][0, 1, 2] = float("nan")
    for backend in BACKENDS:
        out = point_attention(*call, backend=backend)
        assert out[0, 1, 2].isnan().all(), backend
        assert out.isnan().sum() == out[0, 1, 2].numel(), backend


def test_nothing_to_attend_to():
    call = problem(*PROBLEMS[0])
    call = [call[0][:0], call[1][:0], call[2][:0], call[3], call[4][:0], *call[5:]]
    leaves = [x.requires_grad_() for x in call[:5]]
    out = point_attention(*call)
    assert out.shape == (0, 5, 7, 4, 8)
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (1, (2, 6, 2, 8), r"key of shape \[2, 6, 4, 8\].*got \[2, 6, 2, 8\]"),
        (1, (2, 6, 4, 4), r"key of shape \[2, 6, 4, 8\]"),
        (1, (1, 6, 4, 8), r"key of shape \[2, 6, 4, 8\]"),
        (2, (2, 9, 4, 8), r"value of shape \[2, 6, 4, 8\]"),
        (3, (2, 9, 13), r"table of shape \[4, 9, 13\]"),
        (3, (4, 0, 13), "an entry or more for each head"),
        (4, (2, 2, 3, 2), r"points of shape \[2, 2, 6, 2\]"),
        (4, (2, 3, 6, 2), "3 don't divide 4 heads"),
        (4, (2, 0, 6, 2), "0 don't divide 4 heads"),
        (5, (4,), r"rows of shape \[5\]"),
        (6, (9,), r"columns of shape \[7\]"),
        (0, (2, 5, 4, 8), "query with 5 axes"),
    ],
)
def test_what_does_not_fit_is_one_line_and_never_reaches_the_library(place, shape, message, backend):
    call = problem(*PROBLEMS[0])
    call[place] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message) as error:
        point_attention(*call, backend=backend)
    assert "\n" not in str(error.value)


def test_an_exported_graph_holds_no_pairs_of_displacements():
    """Onnxruntime is slow at operators along two numbers."""

    class Bias(torch.nn.Module):
        def forward(self, *tensors):
            return displacement_bias(*tensors)

    tensors = torch.randn(6, 9, 11), torch.rand(2, 2, 6, 2) - 0.5, torch.linspace(-1, 1, 5), torch.linspace(-1, 1, 7)
    program = torch.export.export(Bias(), tensors)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "call_function"]
    pairs = [value.numel() for value in values if isinstance(value, torch.Tensor) and value.shape[-1:] == (2,)]
    assert pairs
    assert max(pairs) <= tensors[1].numel()
    torch.testing.assert_close(program.module()(*tensors), displacement_bias(*tensors))
