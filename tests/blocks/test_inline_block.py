"""InLine attention as a module: the paper's formula token by token, kernels made from the image, the class token."""

import pytest
import torch
import torch.nn.functional as F
from foveate.blocks import InLineAttention2d, InLineTokenAttention, create_attention


def reference(block, x, height, width, source=None):
    """The paper's attention with all its weights, and the convolution image by image; tokens before the map allowed."""
    batch, tokens, dim = x.shape
    heads, d = block.num_heads, dim // block.num_heads
    q, k, v = (part.unflatten(2, (heads, d)).transpose(1, 2) for part in block.qkv(x).chunk(3, dim=-1))
    scores = d**-0.5 * q @ k.transpose(2, 3)
    weights = (scores - scores.mean(-1, keepdim=True) + 1) / tokens
    torch.testing.assert_close(weights.sum(-1), torch.ones(batch, heads, tokens))
    out = (weights @ v).transpose(1, 2).flatten(2)
    mean = (x if source is None else source).mean(1)
    first, act, second = block.residual
    kernels = second(act(first(mean[:, :, None])))
    before = tokens - height * width
    values = v.transpose(1, 2).flatten(2)[:, before:].transpose(1, 2).unflatten(2, (height, width))
    local = [
        F.conv2d(image[None], kernel.reshape(dim, 1, 3, 3), padding=1, groups=dim)
        for image, kernel in zip(values, kernels, strict=True)
    ]
    out[:, before:] += torch.cat(local).flatten(2).transpose(1, 2)
    if block.lepe is not None:
        out[:, before:] += block.lepe(values).flatten(2).transpose(1, 2)
    return block.proj(out)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("size", [(7, 7), (3, 10), (1, 1)])
def test_inline_attention_is_the_papers_formula(size, gradients):
    torch.manual_seed(0)
    block = InLineAttention2d(24, num_heads=3)
    x = torch.randn(3, *size, 24)
    with torch.set_grad_enabled(gradients):
        expected = reference(block, x.flatten(1, 2), *size).unflatten(1, size)
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_kernels_are_made_from_a_second_map():
    torch.manual_seed(0)
    block = InLineAttention2d(24, num_heads=3, lepe=True, takes_input=True)
    x, source = torch.randn(2, 2, 5, 6, 24)
    with torch.no_grad():
        out = block(x, source)
        expected = reference(block, x.flatten(1, 2), 5, 6, source.flatten(1, 2)).unflatten(1, (5, 6))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert (out - block(x)).abs().max() > 1e-3


def test_class_token_attends_but_is_not_convolved():
    torch.manual_seed(0)
    block = InLineTokenAttention(24, num_heads=3)
    x = torch.randn(2, 1 + 4 * 5, 24)
    with torch.no_grad():
        torch.testing.assert_close(block(x, 4, 5), reference(block, x, 4, 5), rtol=1e-4, atol=1e-5)


def test_one_by_one_is_all_at_once():
    """Without a compiler images of a batch are computed one by one, whose gradients must be those of the batch."""
    torch.manual_seed(0)
    block = InLineAttention2d(16, num_heads=2)
    x = torch.randn(3, 5, 6, 16, requires_grad=True)
    results = []
    for function in (block, torch.compile(block, backend="eager")):
        out = function(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])))
    for one, all_ in zip(*results, strict=True):
        torch.testing.assert_close(all_, one, rtol=1e-3, atol=1e-4)


def test_large_maps_stay_finite_in_float16():
    """A sum over 66,000 positions passes the largest number of float16."""
    torch.manual_seed(0)
    block = InLineAttention2d(16, num_heads=2)
    x = 4 + torch.randn(1, 300, 220, 16)
    with torch.no_grad():
        block.qkv.weight.fill_(0.1)
        expected = block(x)
        out = block.half()(x.half())
    assert out.isfinite().all()
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


def test_heads_must_divide_channels():
    with pytest.raises(ValueError, match="num_heads to divide dim; got dim 10, heads 3"):
        InLineAttention2d(10, num_heads=3)
    assert isinstance(create_attention("inline", 16, 2), InLineAttention2d)
