"""Aggregated attention: the published modules, all ways to compute it, gradients, positions, sizes, precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from foveate.blocks import AggregatedAttention2d, UnitGlobalAttention2d, create_attention
from foveate.blocks import aggregated as blocks_aggregated
from foveate.blocks.continuous_bias import (
    ContinuousBias,
    axis_table,
    bias_axes,
    bias_of_rows,
    coordinates,
    pooling_matrix,
)
from foveate.kernels import rows as rows_of_maps
from foveate.kernels.aggregated import aggregated_attention, aggregated_reference

PUBLISHED = {
    "aggregated_10x14": lambda: AggregatedAttention2d(48, 2),
    "aggregated_16x16_pool5": lambda: AggregatedAttention2d(72, 3, fixed_pool_size=5),
    "global_7x9": lambda: UnitGlobalAttention2d(96, 4),
}


def published_state(fixture) -> dict:
    state = {name.replace("cpb_fc", "cpb.fc"): value for name, value in fixture.state().items()}
    return {name: value.flatten(1) if name == "sr.weight" else value for name, value in state.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_modules_are_the_published_ones(name, open_fixture):
    fixture = open_fixture(f"transnext_blocks/{name}")
    attention = PUBLISHED[name]()
    attention.load_state_dict(published_state(fixture))
    notes = fixture.spec["notes"]
    x = fixture.input().unflatten(1, (notes["H"], notes["W"]))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = attention(x).flatten(1, 2)
        fixture.assert_output("out", out, 6e-6 * fixture.spec["outputs"]["out"]["std"])


def problem(size, window=3, pooled=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    height, width = size
    maps = [draw(2, *size, 2, 4) for _ in range(3)]
    table = draw(2, height * width, pooled)
    return [
        *maps,
        draw(2, pooled, 2, 4),
        draw(2, pooled, 2, 4),
        draw(2, window**2),
        table,
        draw(2, height, width, 2, window**2),
    ]


def fast(query, key, value, pooled_key, pooled_value, local_bias, table, added, **options):
    width = query.shape[2]

    def rows(table, first, end):
        return table[:, first * width : end * width]

    return aggregated_attention(query, key, value, pooled_key, pooled_value, local_bias, table, rows, added, **options)


@pytest.mark.parametrize("chunk", [1 << 21, 300], ids=["whole", "rows"])
@pytest.mark.parametrize(("size", "window"), [((5, 7), 3), ((1, 4), 3), ((3, 3), 3), ((5, 6), 5), ((4, 9), 5)])
def test_every_way_equals_the_reference_with_all_gradients(size, window, chunk, monkeypatch):
    monkeypatch.setattr(rows_of_maps, "CHUNK", chunk)
    leaves = [x.requires_grad_() for x in problem(size, window)]
    expected = aggregated_reference(*leaves)
    out = fast(*leaves)
    torch.testing.assert_close(out, expected)
    with torch.no_grad():
        torch.testing.assert_close(fast(*leaves), expected)
        torch.testing.assert_close(fast(*leaves[:-1], None), aggregated_reference(*leaves[:-1]))
    weights = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad((out * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradients_of_gradients():
    leaves = [x.requires_grad_() for x in problem((3, 4), pooled=2)]
    assert torch.autograd.gradcheck(fast, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(fast, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", ["native", "tiled", "reference"])
def test_backends_of_the_window_agree(backend):
    leaves = problem((5, 7), dtype=torch.float32)
    try:
        out = fast(*leaves, backend=backend)
    except ValueError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(out, aggregated_reference(*leaves), atol=1e-5, rtol=1e-5)


def randomized(*args, **options) -> AggregatedAttention2d:
    torch.manual_seed(0)
    attention = AggregatedAttention2d(*args, **options).eval()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attention


def asking_for(backend):
    """Return `attend_projected` by a backend; the module leaves the choice, its last argument, open."""
    call = blocks_aggregated.attend_projected
    return lambda *arguments: call(*arguments[:-1], backend)


def attend(monkeypatch, attention, x, backend):
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(blocks_aggregated, "attend_projected", asking_for(backend))
        return attention(x)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("size", "window", "dim", "options"),
    [
        ((14, 14), 3, 72, {}),
        ((1, 1), 3, 12, {}),
        ((2, 11), 3, 15, {}),
        ((5, 6), 5, 72, {}),
        ((33, 50), 3, 24, dict(sr_ratio=8, pretrain_size=56, trained_size=64)),
        ((40, 16), 7, 24, dict(fixed_pool_size=5)),
        ((90, 67), 3, 24, dict(sr_ratio=3)),
    ],
)
def test_attention_in_c_is_that_in_torch(size, window, dim, options, threads, monkeypatch):
    attention, x = randomized(dim, 3, window, **options), torch.randn(2, *size, dim)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = attend(monkeypatch, attention, x, "native")
    except ValueError as error:
        pytest.skip(str(error))
    finally:
        torch.set_num_threads(torch_threads)
    expected = attend(monkeypatch, attention.double(), x.double(), "torch")
    torch.testing.assert_close(out.double(), expected, atol=2e-5 * float(expected.std()), rtol=0)


def test_what_is_not_finite_reaches_in_c_what_it_reaches_in_torch(monkeypatch):
    attention, x = randomized(24, 2), torch.randn(2, 9, 20, 24)
    x[1, 4, 3] = torch.tensor([float("nan"), float("inf")]).repeat(12)
    try:
        out = attend(monkeypatch, attention, x, "native")
    except ValueError as error:
        pytest.skip(str(error))
    assert out[0].isfinite().all()
    assert torch.equal(out.isfinite(), attend(monkeypatch, attention, x, "torch").isfinite())


@pytest.mark.parametrize("autocast", [False, True])
def test_halves_are_computed_in_c_in_float32(autocast, monkeypatch):
    attention, x = randomized(24, 2), torch.randn(2, 9, 20, 24)
    expected = attend(monkeypatch, attention, x, "torch")
    if not autocast:
        attention, x = attention.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", enabled=autocast):
        try:
            out = attend(monkeypatch, attention, x, "native")
        except ValueError as error:
            pytest.skip(str(error))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.05 * float(expected.std()), rtol=0.05)


def test_attention_in_c_is_refused_where_it_cannot_run(monkeypatch):
    attention, x = randomized(24, 2), torch.randn(1, 4, 4, 24)
    with pytest.raises(ValueError, match="native' cannot run here: it computes in float32"):
        attend(monkeypatch, copy.deepcopy(attention).double(), x.double(), "native")
    monkeypatch.setattr(blocks_aggregated, "attend_projected", asking_for("native"))
    with pytest.raises(ValueError, match="cannot run here: it has no derivatives"):
        attention(x)


def test_a_window_that_is_none_is_one_line():
    with pytest.raises(ValueError, match=r"odd windows from 3x3 on; got 4 entries"):
        fast(*problem((4, 4), window=2))
    with pytest.raises(ValueError, match="odd window_size from 3 on; got 4"):
        AggregatedAttention2d(16, 2, window_size=4)


@pytest.mark.parametrize("size", [(7, 9), (1, 1), (2, 11), (16, 16)])
def test_any_size_and_bins_that_overlap(size):
    attention = create_attention("aggregated", 16, 2, sr_ratio=4).eval()
    x = torch.randn(2, *size, 16)
    with torch.no_grad():
        out = attention(x)
    assert out.shape == x.shape
    torch.testing.assert_close(attention(x), out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("length", "bins"), [(7, 3), (10, 4), (8, 2), (5, 5)])
def test_pooling_is_adaptive_average_pooling(length, bins):
    x = torch.randn(1, 1, length)
    expected = F.adaptive_avg_pool1d(x, bins)
    torch.testing.assert_close(x @ pooling_matrix(length, bins).T, expected)


def all_pairs(bias: ContinuousBias, size, pooled):
    """Return the bias as published: the MLP on every pair of a query and a key."""
    axes = []
    for i in range(2):
        line = torch.arange(size[i], dtype=torch.float32)
        key = F.adaptive_avg_pool1d(line[None, None], pooled[i])[0, 0]
        axes.append(coordinates(line[:, None] - key[None], bias.pretrain_size[i]))
    y, x = axes
    pairs = torch.stack(
        [
            y[:, None, :, None].expand(size[0], size[1], pooled[0], pooled[1]),
            x[None, :, None, :].expand(size[0], size[1], pooled[0], pooled[1]),
        ],
        -1,
    )
    return bias.fc2(bias.act(bias.fc1(pairs))).permute(4, 0, 1, 2, 3)


@pytest.mark.parametrize(("size", "pooled"), [((8, 12), (2, 3)), ((7, 9), (3, 4)), ((4, 5), (4, 5))])
def test_bias_by_axes_is_that_of_all_pairs(size, pooled):
    bias = ContinuousBias(3, (6, 7))
    rows, columns = bias_axes(size, pooled, 2, None)
    table = bias(size, pooled, 2)
    whole = torch.cat([bias_of_rows(table, rows, columns, i, i + 1) for i in range(size[0])], 1)
    torch.testing.assert_close(whole, all_pairs(bias, size, pooled).flatten(3).flatten(1, 2))


@pytest.mark.parametrize("size", [(8, 8), (6, 11), (13, 4)])
def test_bias_of_other_sizes_is_resized_twice(size):
    bias, trained = ContinuousBias(2, (7, 7), (8, 8)), (8, 8)
    pooled = (size[0] // 2, size[1] // 2)
    expected = all_pairs(bias, trained, (4, 4)).flatten(1, 2)
    expected = F.interpolate(expected, size=pooled, mode="bilinear").flatten(2)
    expected = expected.transpose(1, 2).unflatten(2, trained)
    expected = F.interpolate(expected, size=size, mode="bilinear").flatten(2).transpose(1, 2)
    rows, columns = bias_axes(size, pooled, 2, trained)
    torch.testing.assert_close(bias_of_rows(bias(size, pooled, 2), rows, columns, 0, size[0]), expected)


def test_distances_are_few():
    axis = axis_table(200, 25, 200, 25)
    assert len(axis.distances) == 392


@pytest.mark.parametrize("change", ["in place", "behind autograd's back", "load"])
def test_the_kept_bias_is_that_of_the_weights(change):
    attention = AggregatedAttention2d(16, 2).eval()
    other = AggregatedAttention2d(16, 2).eval()
    other.load_state_dict(attention.state_dict())
    x = torch.randn(1, 6, 8, 16)
    with torch.no_grad():
        before = attention(x)
        assert torch.equal(attention(x), before)
        for module in (attention, other):
            if change == "load":
                module.load_state_dict({key: value + 0.1 for key, value in attention.state_dict().items()})
                break
            weight = module.cpb.fc2.weight
            (weight if change == "in place" else weight.data).mul_(3)
        if change == "load":
            other.load_state_dict(attention.state_dict())
        after = attention(x)
        assert not torch.allclose(after, before)
        assert torch.equal(after, other(x))
    assert torch.equal(copy.deepcopy(attention)(x).detach(), attention(x).detach())


def test_linear_mode_refuses_maps_that_are_no_larger():
    attention = AggregatedAttention2d(16, 2, fixed_pool_size=5)
    assert attention(torch.randn(1, 6, 9, 16)).shape == (1, 6, 9, 16)
    with pytest.raises(ValueError, match=r"fixed_pool_size 5 needs maps that are larger; got 5x9"):
        attention(torch.randn(1, 5, 9, 16))


@pytest.mark.parametrize("make", [lambda: AggregatedAttention2d(32, 2), lambda: UnitGlobalAttention2d(32, 2)])
def test_half_precision_is_near(make):
    torch.manual_seed(0)
    attention, x = make(), torch.randn(1, 8, 9, 32)
    expected = attention(x)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = attention(x)
    for out in (lowered, attention.bfloat16()(x.bfloat16())):
        assert (out.float() - expected).abs().max() < 0.05 * expected.std() + 0.01


@pytest.mark.parametrize(
    "make",
    [pytest.param(lambda: AggregatedAttention2d(16, 2), marks=pytest.mark.heavy), lambda: UnitGlobalAttention2d(16, 2)],
)
def test_compilers_see_one_graph_for_any_size(make):
    attention = make()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    for size in ((8, 8), (7, 10)):
        x = torch.randn(1, *size, 16)
        torch.testing.assert_close(compiled(x), attention(x), atol=1e-5, rtol=1e-4)
