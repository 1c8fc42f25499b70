"""The MLP at each position: in pieces or at once, the result is the same."""

import pytest
import torch
from foveate.blocks.pointwise import PointwiseMlp, positions_at_once


@pytest.mark.parametrize("shape", [(2, 75, 61, 16), (3, 4999, 16), (1, 1, 9001, 16), (2, 3, 5, 16)])
def test_pieces_give_what_the_whole_gives(shape):
    mlp, x = PointwiseMlp(16, 1024).eval(), torch.randn(shape)
    expected = mlp(x).detach()
    with torch.inference_mode():
        pieces = positions_at_once(x, 1024)
        assert (pieces > 0) == (x.numel() // 16 > 4096)
        torch.testing.assert_close(mlp(x), expected)


def test_gradients_and_graphs_take_everything_at_once():
    x = torch.randn(1, 80, 80, 16)
    assert positions_at_once(x, 1024) == 0
    with torch.no_grad():
        assert positions_at_once(x, 1024) > 0
        traced = torch.jit.trace(PointwiseMlp(16, 1024).eval(), x, check_trace=False)
        assert "aten::split" not in str(traced.inlined_graph)
