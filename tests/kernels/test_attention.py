"""Dense attention and merging: attention to parts, merged, is attention to the whole."""

import pytest
import torch
from foveate.kernels import attention, merge_attentions, na1d

pytestmark = pytest.mark.versions


def tensors(keys=11, heads_kv=2):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 7, 4, 6), (2, keys, heads_kv, 6), (2, keys, heads_kv, 5))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_merged_parts_are_the_whole():
    q, k, v = tensors()
    parts = [attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(4), slice(4, 5), slice(5, None))]
    output, lse = merge_attentions(*zip(*parts, strict=True))
    expected, expected_lse = attention(q, k, v, return_lse=True)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(attention(q, k, v), expected)


def test_merging_has_gradients():
    q, k, v = (x.requires_grad_() for x in tensors(5))

    def merged(q, k, v):
        parts = [attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(2), slice(2, None))]
        return merge_attentions(*zip(*parts, strict=True))

    assert torch.autograd.gradcheck(merged, (q, k, v))


def test_causal_attention_is_a_causal_neighborhood_of_the_whole_line():
    q, k, v = tensors(keys=7, heads_kv=4)
    for return_lse in (False, True):
        expected = na1d(q, k, v, 7, is_causal=True, return_lse=return_lse)
        torch.testing.assert_close(attention(q, k, v, is_causal=True, return_lse=return_lse), expected)


def test_bad_arguments_are_one_line():
    q, k, v = tensors()
    with pytest.raises(ValueError, match=r"query \[B, N, heads, dim\]"):
        attention(q, k[..., :3], v)
    with pytest.raises(ValueError, match="two or more outputs"):
        merge_attentions([q], [q[..., 0]])
    with pytest.raises(ValueError, match="lses without its last axis"):
        merge_attentions([q, q], [q[..., 0], q])
