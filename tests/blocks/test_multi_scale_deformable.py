"""Multi-scale deformable attention as a module."""

import pytest
import torch
from foveate.blocks import MultiScaleDeformableAttention
from foveate.blocks.multi_scale_deformable import pixel_centres
from torch.autograd import gradcheck


def test_published_module_gives_published_output(open_fixture):
    fixture = open_fixture("dense/msdeform_module")
    shapes = fixture.spec["inputs"]["spatial_shapes_hw"]
    attention = MultiScaleDeformableAttention(256)
    attention.load_state_dict({key.removeprefix("self_attn."): value for key, value in fixture.state().items()})
    query, value = (fixture.golden.input_for((1, 1680, 256), seed) for seed in (710, 711))
    fixture.assert_output("out", attention(query, pixel_centres(shapes, query), value, shapes), 1e-5)


@pytest.mark.parametrize("shapes", [[(5, 7)], [(1, 1), (3, 2), (9, 4)]])
def test_every_parameter_learns_at_odd_sizes(shapes):
    attention = MultiScaleDeformableAttention(24, num_heads=3, num_levels=len(shapes), num_points=2)
    torch.nn.init.normal_(attention.attention_weights.weight)
    tokens = torch.randn(2, sum(height * width for height, width in shapes), 24, requires_grad=True)
    attention(tokens, pixel_centres(shapes, tokens), tokens, shapes).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in attention.parameters()
    )
    assert tokens.grad.isfinite().all()


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    shapes = [(3, 4), (2, 2)]
    attention = MultiScaleDeformableAttention(8, num_heads=2, num_levels=2, num_points=2).double()
    for layer in (attention.sampling_offsets, attention.attention_weights):
        torch.nn.init.normal_(layer.weight, std=0.3)
    tokens = torch.randn(1, 16, 8, dtype=torch.float64, requires_grad=True)
    reference = pixel_centres(shapes, tokens)
    assert gradcheck(lambda x: attention(x, reference, x, shapes), tokens)


def test_references_of_each_level_and_image():
    """A reference for all levels is the same as one for each; images don't see each other."""
    shapes = [(4, 5), (2, 3)]
    attention = MultiScaleDeformableAttention(16, num_heads=2, num_levels=2)
    tokens = torch.randn(3, 26, 16)
    reference = pixel_centres(shapes, tokens)
    out = attention(tokens, reference, tokens, shapes)
    each = reference[None, :, None].expand(3, -1, 2, -1)
    torch.testing.assert_close(attention(tokens, each, tokens, shapes), out)
    torch.testing.assert_close(attention(tokens[1:2], reference, tokens[1:2], shapes), out[1:2])


def test_heads_must_divide_channels():
    with pytest.raises(ValueError, match="num_heads to divide dim; got dim 30, heads 8"):
        MultiScaleDeformableAttention(30)
