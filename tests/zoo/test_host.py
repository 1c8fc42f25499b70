"""The neutral host, and every attention by name."""

import pytest
import timm
import torch
from foveate.blocks import create_attention, list_attentions


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (17, 4)])
@pytest.mark.parametrize("name", list_attentions())
def test_every_attention_takes_any_map(name, size):
    attention = create_attention(name, 32, 2)
    x = torch.randn(2, *size, 32, requires_grad=True)
    out = attention(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", list_attentions())
def test_every_attention_compiles_and_exports(name):
    attention = create_attention(name, 32, 2).eval()
    x = torch.randn(1, 9, 13, 32)
    with torch.inference_mode():
        expected = attention(x)
    with torch.no_grad():
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-4)
        exported = torch.export.export(attention, (x,)).module()(x)
        torch.testing.assert_close(exported, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", list_attentions())
def test_every_attention_trains_in_the_host(name):
    net = timm.create_model("foveate_host_atto", attention=name, num_classes=3)
    net(torch.randn(2, 3, 75, 101)).square().sum().backward()
    assert not [key for key, parameter in net.named_parameters() if parameter.grad is None]


def test_an_attention_for_each_stage():
    names = ("window", "neighborhood", "quadtree", "global")
    options = ({"window_size": 5}, {"kernel_size": 3}, {"levels": 2}, {})
    net = timm.create_model("foveate_host_atto", attention=names, attention_options=options)
    kinds = [type(stage.blocks[0].attn).__name__ for stage in net.stages]
    assert kinds == ["WindowAttention2d", "NeighborhoodAttention2d", "QuadTreeAttention2d", "GlobalAttention2d"]
    assert net.stages[1].blocks[0].attn.rpb.shape[1:] == (5, 5)
    with torch.inference_mode():
        assert net.eval()(torch.randn(1, 3, 67, 93)).shape == (1, 1000)


def test_wrong_names_and_options_are_one_line():
    with pytest.raises(ValueError, match="unknown attention 'neighbourhood'; did you mean 'neighborhood'"):
        create_attention("neighbourhood", 32, 2)
    with pytest.raises(ValueError, match="unknown attention 'xyz'; there are 'agent'"):
        create_attention("xyz", 32, 2)
    with pytest.raises(TypeError, match="radius"):
        create_attention("window", 32, 2, radius=3)
    with pytest.raises(ValueError, match="one for each of 4 stages; got 2 names and 4 options"):
        timm.create_model("foveate_host_atto", attention=("window", "global"))
