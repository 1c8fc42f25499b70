"""Attention between tokens: the C path against torch's, at ends of vectors and tiles, and what is chosen when."""

import re

import pytest
import torch
import torch.nn.functional as F
from foveate.kernels import token_attention, token_attention_backends, token_attention_native, window_attention
from foveate.kernels.token_attention import reads_in_place

native = pytest.mark.skipif(token_attention_native._library is None, reason="no C compiler was found at installation")

# Batch, heads, queries, keys, dim, dim_v: ends of vectors of queries, of tiles of keys, and of what is taken together.
SHAPES = [
    (2, 3, 1, 1, 4, 8),
    (1, 2, 7, 3, 5, 8),
    (2, 1, 9, 64, 32, 32),
    (1, 2, 49, 49, 32, 16),
    (1, 1, 17, 131, 16, 24),
    (2, 2, 100, 65, 8, 40),
    (1, 1, 33, 6, 1, 8),
]


def operands(batch, heads, queries, keys, dim, dim_v, like_a_map=False):
    torch.manual_seed(0)
    if like_a_map:  # tokens before heads in memory, as projections leave them
        query, key, value = (
            torch.randn(batch, tokens, heads, channels).transpose(1, 2)
            for tokens, channels in ((queries, dim), (keys, dim), (keys, dim_v))
        )
        return query, key, value
    shapes = ((queries, dim), (keys, dim), (keys, dim_v))
    return tuple(torch.randn(batch, heads, tokens, channels) for tokens, channels in shapes)


def biases(batch, heads, queries, keys):
    """Yield a bias of every kind: for all, heads, images, queries or keys; with the queries or nothing side by side."""
    yield torch.randn(1, 1, queries, keys)
    yield torch.randn(1, heads, queries, keys)
    yield torch.randn(batch, heads, keys, queries).transpose(2, 3)
    yield torch.randn(batch, 1, queries, keys, 3)[..., 1]
    yield torch.randn(1, heads, queries, 1).expand(-1, -1, -1, keys)
    yield torch.randn(1, heads, queries, 2)[..., :1]  # one for all keys, beside others
    yield torch.randn(1, heads, 2, keys)[:, :, :1]
    yield torch.randn(batch, heads, 1, 1)


@native
@pytest.mark.parametrize("like_a_map", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_is_torch(shape, like_a_map):
    tensors = operands(*shape, like_a_map)
    expected = F.scaled_dot_product_attention(*tensors)
    actual = token_attention(*tensors, backend="native")
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)
    assert actual.transpose(1, 2).is_contiguous()
    for bias in biases(*shape[:4]):
        exact = (x.double() for x in (*tensors, bias))
        expected = F.scaled_dot_product_attention(*exact, scale=0.7).float()
        torch.testing.assert_close(
            token_attention(*tensors, bias, 0.7, backend="native"), expected, atol=5e-6, rtol=1e-5
        )


@native
@pytest.mark.parametrize("lies", ["map", "windows"])
@pytest.mark.parametrize("window", [(7, 7), (2, 5), (1, 1)])
def test_windows_are_read_in_place(window, lies):
    torch.manual_seed(0)
    heads, dim, (height, width), rows, columns = 2, 16, window, 3, 2
    qkv = torch.randn(2, rows * height, columns * width, 3, heads, dim)
    windows = qkv.unflatten(2, (columns, width)).unflatten(1, (rows, height)).permute(5, 0, 1, 3, 6, 2, 4, 7)
    query, key, value = windows.contiguous() if lies == "windows" else windows
    bias = torch.randn(1, heads, height * width, height * width)
    for given in (None, bias):
        expected = window_attention(query, key, value, given, backend="reference")
        actual = window_attention(query, key, value, given, backend="native")
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)
    assert actual.permute(0, 1, 4, 2, 5, 3, 6).is_contiguous()  # a map


@native
def test_windows_of_other_keys():
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 2, 2, 3, 3, 8), torch.randn(1, 2, 2, 2, 1, 2, 8)
    expected = window_attention(query, key, key, backend="reference")
    torch.testing.assert_close(window_attention(query, key, key, backend="native"), expected, atol=2e-6, rtol=1e-5)


@native
@pytest.mark.parametrize("queries", [5, 70])
def test_masked_keys(queries):
    # A whole tile of keys that nobody sees, and queries that see nothing at all.
    query, key, value = operands(1, 1, queries, 150, 8, 8)
    bias = torch.zeros(1, 1, queries, 150)
    bias[..., :70] = -torch.inf
    bias[:, :, 3] = -torch.inf
    actual = token_attention(query, key, value, bias, backend="native")
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    seen = [i for i in range(queries) if i != 3]
    torch.testing.assert_close(actual[:, :, seen], expected[:, :, seen], atol=2e-6, rtol=1e-5)
    assert not actual[:, :, 3].any()  # as torch's attention on CPUs


@native
def test_what_is_not_finite_stays_in_its_row():
    query, key, value = operands(1, 1, 20, 9, 8, 8)
    query[0, 0, 4] = torch.nan
    actual = token_attention(query, key, value, backend="native")
    assert actual[0, 0, 4].isnan().all()
    assert actual[0, 0, [i for i in range(20) if i != 4]].isfinite().all()
    value[0, 0, 2, 5] = torch.inf
    assert token_attention(query, key, value, backend="native")[0, 0, 0, 5] == torch.inf


@native
def test_threads_share_queries():
    tensors = operands(1, 1, 300, 80, 16, 16)
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        try:
            results.append(token_attention(*tensors, backend="native"))
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@native
def test_in_a_compiled_graph():
    tensors = operands(2, 2, 30, 20, 8, 8, like_a_map=True)

    def layer(query, key, value):
        return token_attention(query, key, value, scale=0.5).transpose(1, 2).flatten(2) * 2

    with torch.inference_mode():
        expected = layer(*tensors)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(*tensors), expected)


@native
def test_what_native_does_not_take():
    query, key, value = operands(1, 2, 5, 4, 8, 8)
    answer = token_attention_backends(query, key, value)
    assert answer == {"native": "chosen", "reference": "can run"}
    assert "derivatives" in token_attention_backends(query.clone().requires_grad_(), key, value)["native"]
    assert "float32" in token_attention_backends(query.half(), key.half(), value.half())["native"]
    assert "multiple of 8" in token_attention_backends(query, key, value[..., :7])["native"]
    assert "empty" in token_attention_backends(query[:0], key[:0], value[:0])["native"]
    with torch.autocast("cpu", torch.bfloat16):
        assert token_attention_backends(query, key, value)["reference"] == "chosen"
        assert token_attention(query, key, value).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="token_attention's backend 'native' cannot run here: it computes in float32"):
        token_attention(query.half(), key.half(), value.half(), backend="native")


def test_derivatives_of_every_kind_are_torchs():
    query, key, value = (x.double().requires_grad_() for x in operands(1, 2, 3, 4, 2, 2))
    bias = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(token_attention, (query, key, value, bias))
    single = operands(1, 2, 3, 4, 8, 8)
    with torch.no_grad():
        expected = F.scaled_dot_product_attention(*single)
        batched = torch.vmap(token_attention)(*(x[None] for x in single))
        torch.testing.assert_close(batched[0], expected, atol=2e-6, rtol=1e-5)
    # The chain rule sees it: no operator hides derivatives that are carried along.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, tangent = torch.func.jvp(token_attention, single, tuple(torch.ones_like(x) for x in single))
    assert tangent.abs().max() > 0.1


def test_maps_are_cut_where_gradients_are_wanted():
    x = torch.randn(1, 4, 4, 16)
    assert not reads_in_place(x, 2)
    with torch.no_grad():
        assert reads_in_place(x, 2) == (token_attention_native._library is not None)
        assert not reads_in_place(x, 4)  # heads of 4 channels
        assert not reads_in_place(x.double(), 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k: token_attention(q[0], k, k), "[B, heads, N, dim]"),
        (lambda q, k: token_attention(q, k[..., :4], k), "as many tokens"),
        (lambda q, k: token_attention(q, k, k[:, :, :3]), "as many tokens"),
        (lambda q, k: token_attention(q, k[:, :1], k[:, :1]), "got [1, 2, 5, 8], [1, 1, 4, 8]"),
        (lambda q, k: token_attention(q, k, k, torch.zeros(2, 5, 4)), "a bias [1, 2, 5, 4], or 1 for an axis"),
        (lambda q, k: token_attention(q, k, k, torch.zeros(1, 2, 5, 3)), "got [1, 2, 5, 3]"),
        (lambda q, k: window_attention(q, k, k), "[B, rows, columns, heads, height, width, dim]"),
        (lambda q, k: token_attention(q, k, k, backend="fast"), "no backend 'fast'"),
    ],
)
def test_what_does_not_fit_is_said(call, message):
    query, key, _ = operands(1, 2, 5, 4, 8, 8)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(query, key)
