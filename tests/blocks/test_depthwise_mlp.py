"""PVTv2's MLP: in pieces it is the same."""

import pytest
import torch
from foveate.blocks import depthwise_mlp
from foveate.blocks.depthwise_mlp import DepthwiseMlp


@pytest.mark.parametrize("piece_bytes", [1, 5000, 2**23])
def test_mlp_in_pieces_is_the_mlp(piece_bytes, monkeypatch):
    monkeypatch.setattr(depthwise_mlp, "_PIECE_BYTES", piece_bytes)
    mlp = DepthwiseMlp(6, 40)
    x = torch.randn(3, 5, 7, 6)
    whole = mlp(x)
    assert whole.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), whole, atol=1e-6, rtol=1e-5)


def test_dropout_in_the_mlp_is_applied_without_gradients():
    mlp = DepthwiseMlp(6, 40, drop=0.5).train()
    with torch.no_grad():
        assert (mlp(torch.randn(1, 5, 7, 6)) == 0).any()
