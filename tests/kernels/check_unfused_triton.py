"""The unfused operators' Triton path, interpreted; `test_unfused_triton.py` runs this file with TRITON_INTERPRET=1."""

import pytest
import torch
from foveate import kernels
from foveate.kernels.neighborhood import triton_products


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Fill what a kernel writes with NaN before, so that what it leaves unwritten shows."""
    make = triton_products.empty_like
    monkeypatch.setattr(triton_products, "empty_like", lambda *arguments: make(*arguments).fill_(float("nan")))


# spatial, kernel, dilation, causal, heads first, dim, dim of values: odd, causal, and dims that are no powers of two
CASES = [
    ((13,), (3,), (2,), (True,), False, 5, 3),
    ((5, 7), (3, 4), (1, 1), (True, False), True, 20, 20),
    ((3, 3, 4), (2, 3, 3), (1, 1, 1), (False,) * 3, False, 1, 17),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference_forward_and_backward(case):
    spatial, kernel_size, dilation, is_causal, heads_first, dim, dim_v = case
    qk, av = (getattr(kernels, f"na{len(spatial)}d_{half}") for half in ("qk", "av"))
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, *spatial, 2, size, generator=generator) for size in (dim, dim, dim_v)]
    if heads_first:
        maps = [x.movedim(-2, 1).contiguous().movedim(1, -2) for x in maps]
    results = []
    for backend in ("triton", "reference"):
        q, k, v = (x.detach().requires_grad_() for x in maps)
        options = (kernel_size, dilation, is_causal)
        scores = qk(q, k, *options, backend=backend)
        out = av(scores.softmax(-1), v, *options, backend=backend)
        results.append((scores, out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    q = torch.randn(1, 9, 2, 8).to(dtype)
    scores = kernels.na1d_qk(q, q, 3, backend="triton")
    assert scores.dtype == dtype
    torch.testing.assert_close(scores, kernels.na1d_qk(q.double(), q.double(), 3).to(dtype), atol=0.03, rtol=0.03)
    out = kernels.na1d_av(scores, q, 3, backend="triton")
    torch.testing.assert_close(out, kernels.na1d_av(scores.double(), q.double(), 3).to(dtype), atol=0.1, rtol=0.03)


def test_interpreter_runs_on_request_only():
    q = torch.randn(1, 9, 2, 8)
    report = kernels.unfused_neighborhood_backends(q, q, 3)
    assert report["triton"] == "can run"
    with pytest.raises(ValueError, match="dim per head of at most 512; got 513"):
        kernels.na1d_qk(*(torch.zeros(1, 9, 2, 513),) * 2, 3, backend="triton")
