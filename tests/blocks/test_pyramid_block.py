"""The transformer block that families share."""

import pytest
import torch
from foveate.blocks.pyramid import Block
from torch import nn


@pytest.mark.parametrize("dropped", ["drop_path1", "drop_path2"])
def test_each_branch_has_its_own_drop_path(dropped):
    """With the other branch silenced, dropping this one leaves the input."""
    block = Block(8, nn.Linear(8, 8), 2.0, None, drop=0.0, drop_path=1.0, norm_layer=nn.LayerNorm).train()
    x = torch.randn(3, 2, 2, 8)
    assert torch.equal(block(x), x)
    setattr(block, "drop_path1" if dropped == "drop_path2" else "drop_path2", nn.Identity())
    branch = block.mlp(block.norm2(x)) if dropped == "drop_path1" else block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), x + branch)
    assert not torch.equal(block.eval()(x), x + branch)
