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
        assert (pieces > 0) == (x.numel() // 16 >= 2048)
        torch.testing.assert_close(mlp(x), expected)


def test_gradients_graphs_and_hooks_take_everything_at_once(monkeypatch):
    seen = []
    monkeypatch.setattr(PointwiseMlp, "_feed_forward", lambda mlp, x: seen.append(x.shape) or x)
    x, mlp = torch.randn(1, 80, 80, 16), PointwiseMlp(16, 1024).eval()
    mlp(x)
    with torch.no_grad():
        mlp(x)
        assert seen[0] == x.shape
        assert len(seen) == 8
        torch.jit.trace(mlp, x, check_trace=False)
        mlp.act.register_forward_hook(lambda *_: None)
        mlp(x)
    assert seen[8:] == [x.shape] * 2
