"""One way to choose: every operator's table obeys or refuses, and says why."""

import pytest
import torch
from foveate.kernels import (
    deformable_backends,
    deformable_native,
    depthwise_backends,
    gelu_linear_backends,
    pointwise_backends,
    quadtree_backends,
    routing_backends,
)
from foveate.kernels.backends import Backend, choose, contiguous_rows, exporting, report
from foveate.kernels.pointwise import pointwise
from foveate.kernels.triton_launch import TileSize, power_of_two, size_for

TABLE = {
    "fast": Backend(None, lambda x: "x is odd" if x % 2 else None),
    "slow": Backend(None, drawback=lambda x: "it is slow" if x < 10 else None),
    "reference": Backend(None),
}
MAP = torch.zeros(1, 4, 6, 2, 8)
CHILDREN = torch.zeros(1, 1, 3, 4, 5)


@pytest.mark.parametrize(("x", "name"), [(2, "fast"), (3, "reference"), (11, "slow")])
def test_the_first_without_obstacle_and_drawback_is_chosen(x, name):
    assert choose("op", TABLE, x, None) == name
    assert report("op", TABLE, x, None)[name] == "chosen"


def test_requests_are_obeyed_or_refused():
    assert choose("op", TABLE, 3, "slow") == "slow"
    with pytest.raises(ValueError, match="op's backend 'fast' cannot run here: x is odd"):
        choose("op", TABLE, 3, "fast")
    with pytest.raises(ValueError, match="op has no backend 'faster'; it has 'fast', 'slow', 'reference'"):
        choose("op", TABLE, 3, "faster")


class _SaysSo(torch.nn.Module):
    """Adds 1 where a graph is made for other runtimes."""

    def forward(self, x):
        return x + 1 if exporting() else x + 0


@pytest.mark.versions
def test_compiling_is_not_exporting():
    x, module = torch.zeros(2), _SaysSo()
    assert not module(x).any()
    assert not torch.compile(module, backend="eager", fullgraph=True)(x).any()
    for strict in (False, True):
        assert torch.export.export(module, (x,), strict=strict).module()(x).all()
    assert not module(x).any()


def deformable_report(backend=None, device="cpu"):
    value, locations = torch.zeros(1, 12, 2, 4, device=device), torch.zeros(1, 3, 2, 1, 2, 2, device=device)
    return deformable_backends(value, [(3, 4)], locations, locations[..., 0], backend)


@pytest.mark.parametrize(
    ("call", "chosen"),
    [
        (lambda **o: routing_backends(MAP, MAP, MAP, torch.zeros(1, 4, 1, dtype=torch.int64), (2, 3), **o), "chunked"),
        (lambda **o: quadtree_backends(CHILDREN, **o), "chunked"),
        (deformable_report, "bags" if deformable_native._library is None else "native"),
        (lambda **o: depthwise_backends(CHILDREN[0], torch.zeros(3, 1, 3, 3), **o), "convolution"),
        (lambda **o: gelu_linear_backends(torch.zeros(3, 4), torch.zeros(2, 4), **o), "reference"),
        (lambda **o: pointwise_backends(torch.zeros(3, 4).double(), torch.zeros(2, 4).double(), **o), "linear"),
    ],
)
def test_every_operator_reports_its_backends(call, chosen, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    answers = call()
    assert answers.pop(chosen) == "chosen"
    assert "chosen" not in answers.values()
    for name, answer in answers.items():
        if answer == "can run":
            assert call(backend=name)[name] == "chosen"
        else:
            with pytest.raises(ValueError, match="cannot run here"):
                call(backend=name)


def test_reasons():
    assert deformable_report(device="meta")["bags"] == "it is for CPU tensors; value is on meta"
    assert pointwise_backends(torch.zeros(4), torch.zeros(2, 4))["convolution"].startswith("it takes [B, H, W, in]")
    with pytest.raises(ValueError, match="pointwise's backend 'convolution' cannot run here"):
        pointwise(torch.zeros(4), torch.zeros(2, 4), backend="convolution")


def test_sizes_are_the_first_that_fit():
    table = [TileSize(64, 2, 2, 4, 1, registers_free=True), TileSize(64, 1, 1, 4, 1), TileSize(128, 3, 3, 4, 1)]
    assert [size_for(table, n, free).own for n, free in ((32, True), (64, False), (65, True))] == [2, 1, 3]
    assert [power_of_two(x) for x in (1, 16, 17, 64)] == [16, 16, 32, 64]


def test_rows_are_copied_only_if_they_have_gaps():
    x = torch.zeros(4, 6)
    assert contiguous_rows(x[:, ::2]).stride() == (3, 1)
    assert contiguous_rows(x[::2]).data_ptr() == x.data_ptr()
