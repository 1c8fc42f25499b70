"""The triton path of the routed operator: interpreted on the CPU, compiled for GPUs that are not there, run on one.

Triton decides at import whether it interprets, so the interpreted tests run in a process of their own, which the last
test starts.
"""

import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
from foveate.kernels import routed_attention

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreted_kernels")
gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")

CASES = [
    # batch, grid, region, heads, dim, topk
    (2, (3, 2), (3, 5), 2, 8, 3),
    (1, (2, 2), (4, 5), 3, 12, 4),
    (1, (1, 1), (1, 1), 1, 1, 1),
    (1, (3, 3), (2, 2), 1, 33, 5),
    (1, (1, 2), (7, 11), 1, 32, 2),
]


def compare(case, device, dtype=torch.float32, tolerance=1e-5):
    batch, grid, region, heads, dim, topk = case
    generator = torch.Generator().manual_seed(1)
    shape = (batch, grid[0] * region[0], grid[1] * region[1], 3, heads, dim)
    qkv = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    regions = grid[0] * grid[1]
    routes = torch.randint(0, regions, (batch, regions, topk), generator=generator)
    # A region that every other one chooses, and one that nobody does.
    routes[:, :, 0] = 0
    routes[routes == regions - 1] = 0
    routes = routes.to(device)
    outs, gradients = [], []
    for backend in ("reference", "triton"):
        x = qkv if backend == "triton" else qkv.float()
        out = routed_attention(*x.unbind(3), routes, region, scale=0.3, backend=backend)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(device)
        outs.append(out.float())
        gradients.append(torch.autograd.grad((out.float() * weight).sum(), qkv)[0].float())
    torch.testing.assert_close(outs[1], outs[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(gradients[1], gradients[0], atol=3 * tolerance, rtol=3 * tolerance)


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_triton_equals_the_reference(case, monkeypatch):
    """Every number is written: what torch.empty hands out is poisoned."""

    def poisoned(make):
        def empty(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return empty

    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    compare(case, "cpu")


@interpreted
def test_triton_in_half_precision():
    """In float16: the interpreter multiplies bfloat16 matrices as if they were integers."""
    compare(CASES[0], "cpu", torch.float16, 0.03)


@interpreted
def test_inverse_routes_name_who_chose():
    from foveate.kernels.routing.triton_kernels import inverse_routes

    routes = torch.tensor([[[1, 2], [1, 0], [2, 2]], [[0, 0], [0, 1], [0, 2]]])
    choosers, starts = inverse_routes(routes)
    lists = [choosers[a:b].tolist() for a, b in itertools.pairwise(starts)]
    assert lists == [[1], [0, 1], [0, 2, 2], [0, 0, 1, 2], [1], [2]]


@interpreted
def test_channels_with_gaps_and_an_empty_batch():
    q = torch.randn(1, 4, 6, 2, 16)[..., ::2]
    routes = torch.randint(0, 4, (1, 4, 2))
    out = routed_attention(q, q, q, routes, (2, 3), backend="triton")
    torch.testing.assert_close(out, routed_attention(q, q, q, routes, (2, 3), backend="reference"))
    assert routed_attention(q[:0], q[:0], q[:0], routes[:0], (2, 3), backend="triton").shape == (0, 4, 6, 2, 8)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*CASES, (2, (7, 7), (2, 2), 8, 32, 16), (1, (16, 16), (13, 21), 2, 32, 1)])
def test_triton_on_a_gpu(case, dtype):
    compare(case, "cuda", dtype, 1e-4 if dtype == torch.float32 else 0.03)


@pytest.mark.skipif(INTERPRETED, reason="runs the interpreted tests in a process of their own")
def test_interpreted_kernels():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= len(CASES) + 3


# Tokens of a region, and keys of its queries: a stage of an image of 800x1344 in 16x16 regions, and 224x224 in 7x7,
# where blocks of queries and of keys differ.
LONG, SHORT = (273, 4096), (4, 64)


def compile_for(kernel, dim, dtype, capability, lengths=LONG):
    """Compile a kernel for a GPU that is not here."""
    from foveate.kernels.routing import triton_kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(triton_kernels, kernel)
    lengths = lengths[::-1] if kernel == "backward_key_value_kernel" else lengths
    options = triton_kernels.launch_options(*lengths, dim, dtype)
    compile_options = {name: options.pop(name) for name in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
    pointer = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    types = {"routes": "*i64", "choosers": "*i64", "starts": "*i64", "lse": "*fp32", "delta": "*fp32"}
    types |= {"scale": "fp32", "scale_log2": "fp32", "grid": ("i32",) * 3} | dict.fromkeys(options, "constexpr")
    types |= dict.fromkeys(("heads", "regions", "topk"), "i32")
    signature, attributes = {}, {}
    for i, name in enumerate(function.arg_names):
        strided = name.endswith("_strides")
        signature[name] = ("i32",) * 4 if strided else types.get(name, pointer)
        # Pointers and strides are multiples of 16, as triton finds at a launch.
        paths = [(i, j) for j in range(4)] if strided else [(i,)] if signature[name][0] == "*" else []
        attributes |= {path: [["tt.divisibility", 16]] for path in paths}
    source = ASTSource(fn=function, signature=signature, constexprs=options, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=compile_options)


# Shared memory of a block, per compute capability.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_query_kernel", "backward_key_value_kernel"])
@pytest.mark.parametrize(
    ("dim", "dtype", "capability"),
    [
        (32, torch.bfloat16, 80),
        (32, torch.bfloat16, 90),
        (32, torch.bfloat16, 100),
        *[
            pytest.param(dim, dtype, capability, marks=pytest.mark.heavy)
            for dim in (32, 64, 128)
            for dtype in (torch.bfloat16, torch.float32)
            for capability in SHARED
        ],
    ],
)
def test_compiled_kernels_spill_nothing_and_fit(kernel, dim, dtype, capability, resources_of):
    resources = resources_of(compile_for, kernel, dim, dtype, capability)
    assert resources.spilled <= 16, resources  # two registers, for sm_100 only
    assert resources.registers <= 255, resources
    assert resources.shared <= SHARED[capability], resources


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_query_kernel", "backward_key_value_kernel"])
def test_blocks_of_different_lengths_compile(kernel):
    assert compile_for(kernel, 32, torch.float16, 90, SHORT).asm["ptx"]
