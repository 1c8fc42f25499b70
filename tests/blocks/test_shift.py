"""Shifts of channels: the published ones, both layouts, both ways to compute them, gradients."""

import re

import pytest
import torch
from foveate.blocks import Shift2d


def test_shifts_are_the_published_ones(open_fixture):
    fixture = open_fixture("shift/shift_feat")
    for name, spec in fixture.spec["inputs"].items():
        channels, parts = map(int, re.findall(r"c(\d+)_div(\d+)_", name)[0])
        x = fixture.golden.input_for(tuple(spec["shape"]), spec["seed"])
        shift = Shift2d(channels, parts, channels_first=True)
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                fixture.assert_output(name, shift(x), 0)


@pytest.mark.parametrize("size", [(5, 7), (1, 3), (1, 1), (2, 1)])
def test_layouts_and_ways_agree(size):
    x = torch.randn(2, *size, 26)
    last, first = Shift2d(26, 6), Shift2d(26, 6, channels_first=True)
    expected = last(x)
    assert torch.equal(first(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), expected)
    with torch.no_grad():
        assert torch.equal(last(x), expected)
        assert torch.equal(first(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), expected)
        assert torch.equal(torch.compile(last, backend="eager", fullgraph=True)(x), expected)


def test_gradients_are_shifted_back():
    x = torch.randn(1, 3, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Shift2d(9, 4), x)
    assert torch.autograd.gradcheck(Shift2d(3, channels_first=True, parts=4), x)


def test_too_few_parts_are_one_line():
    with pytest.raises(ValueError, match="at least 4 parts; got 3"):
        Shift2d(8, 3)
