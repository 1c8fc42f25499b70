"""The triton path without a GPU: interpreted, and compiled for the GPUs it is meant for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foveate.kernels import na2d
from foveate.kernels.neighborhood import triton_ops
from foveate.kernels.neighborhood.window import unflatten_axes

triton = pytest.importorskip("triton", reason="triton has no wheel for this platform")

SHARED_KIB = {80: 163, 90: 227, 100: 227}
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
# map, kernel, heads, dim, batch, options: the stages of NAT and DiNAT, then shapes beyond them
PUBLISHED = {
    "nat, half": ((56, 56), 7, 2, 32, torch.float16, {}),
    "dinat, half": ((56, 56), 7, 2, 32, torch.bfloat16, {"dilation": 8}),
    "nat, last stage": ((7, 7), 7, 16, 32, torch.bfloat16, {}),
    "isotropic": ((14, 14), 7, 6, 64, torch.bfloat16, {}),
    "k 11": ((200, 336), 11, 4, 32, torch.float16, {}),
    "k 11, bf16": ((200, 336), 11, 4, 32, torch.bfloat16, {}),
    "k 13": ((64, 64), 13, 4, 64, torch.float16, {}),
    "no bias": ((56, 56), 7, 2, 32, torch.bfloat16, {"rpb": False}),
    "float32": ((56, 56), 7, 2, 32, torch.float32, {}),
    "float32, isotropic": ((14, 14), 7, 6, 64, torch.float32, {}),
    "line": ((32768,), 511, 2, 128, torch.bfloat16, {"rpb": False}),
    "large window": ((256, 256), 80, 24, 128, torch.bfloat16, {"rpb": False}),
    "video": ((30, 48, 80), (18, 24, 24), 24, 128, torch.bfloat16, {"rpb": False, "stride": (16, 8, 8)}),
    "video, causal": ((16, 28, 28), (3, 7, 7), 4, 48, torch.float16, {"rpb": False, "causal": (True, False, False)}),
}


def launches(spatial, kernel_size, heads, dim, dtype, dilation=1, stride=1, causal=False, rpb=True):
    """Return the launches of forward and backward for tensors cut from one qkv, as the blocks make them."""
    settings = [x if isinstance(x, tuple) else (x,) * len(spatial) for x in (kernel_size, stride, dilation, causal)]
    axes = unflatten_axes([int(field) for axis in zip(spatial, *settings, strict=True) for field in axis], 3)
    query, key, value = torch.empty(2, *spatial, 3, heads, dim, dtype=dtype, device="meta").unbind(-3)
    out = torch.empty(2, *spatial, heads, dim, dtype=dtype, device="meta")
    lse = torch.empty(2, *spatial, heads, device="meta")
    bias = torch.empty(heads, *(2 * k - 1 for k in settings[0]), device="meta") if rpb else None
    tensors, grads = (query, key, value, bias), (out, out, out)
    yield triton_ops.forward_launch(*tensors, out, lse, axes, 0.1)
    yield from triton_ops.backward_launches(out, None, tensors, out, lse, grads, rpb, axes, 0.1)[:2]


def compile_for(launch, capability):
    """Compile a launch for a GPU that is not here, with the types and divisibilities that a real call has."""
    from foveate.kernels.neighborhood import triton_kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(triton_kernels, launch.kernel)
    constants, attributes = {}, {}

    def type_of(x, path):
        if isinstance(x, tuple):
            return tuple(type_of(item, (*path, i)) for i, item in enumerate(x))
        if isinstance(x, float):
            return "fp32"
        if isinstance(x, int) and x == 1:
            constants[path] = 1
            return "constexpr"
        if isinstance(x, torch.Tensor) or x % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return TYPES[x.dtype] if isinstance(x, torch.Tensor) else "i32" if x < 2**31 else "i64"

    signature = {}
    for i, name in enumerate(kernel.arg_names):
        if name in launch.arguments:
            signature[name] = type_of(launch.arguments[name], (i,))
        else:
            signature[name], constants[(i,)] = "constexpr", launch.options[name]
    options = {name: launch.options[name] for name in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def check_resources(case, capability, resources_of, monkeypatch):
    monkeypatch.setattr(triton_ops, "_major", lambda device: capability // 10)
    for launch in launches(*PUBLISHED[case][:-1], **PUBLISHED[case][-1]):
        resources = resources_of(compile_for, launch, capability)
        # The fastest of the tiles tried on an H200 spill a few registers.
        assert resources.spilled <= 64, f"{launch.kernel} {launch.options}: {resources}"
        assert resources.shared <= SHARED_KIB[capability] * 1024, f"{launch.kernel} {launch.options}: {resources}"


def test_interpreted_kernels_equal_the_reference():
    # The interpreter is chosen when triton is imported, hence a process of its own.
    checks = Path(__file__).with_name("check_neighborhood_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=checks.parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def test_kernels_compile_without_spills(resources_of, monkeypatch):
    check_resources("nat, half", 90, resources_of, monkeypatch)


@pytest.mark.parametrize("case", ["float32", "float32, isotropic"])
def test_the_compiler_adds_no_product_of_matrices(case):
    """Triton turns some sums of products into products in tf32, which are wrong where they add up fewer than 8."""
    for launch in launches(*PUBLISHED[case][:-1], **PUBLISHED[case][-1]):
        code = compile_for(launch, 90).asm["ttir"]
        inner = [int(size) for size in re.findall(r"tt\.dot .*: tensor<\d+x(\d+)xf32> \* ", code)]
        assert inner, code
        assert min(inner) >= 16, f"{launch.kernel} {launch.options}"
        assert "tf32" not in code, f"{launch.kernel} {launch.options}"


@pytest.mark.heavy
@pytest.mark.parametrize("capability", SHARED_KIB)
@pytest.mark.parametrize("case", PUBLISHED)
def test_kernels_of_all_shapes_compile_without_spills(case, capability, resources_of, monkeypatch):
    check_resources(case, capability, resources_of, monkeypatch)


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(1, 5, 5, 1, 4), "tensors on a GPU .*; they are on cpu"),
        (torch.zeros(1, 5, 5, 1, 4, dtype=torch.float64, device="meta"), "got torch.float64"),
        (torch.zeros(1, 5, 5, 1, 513, device="meta"), "dim per head of at most 512; got 513"),
    ],
)
def test_refusal_names_the_reason(x, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=rf"na2d's backend 'triton' cannot run here: .*{reason}"):
        na2d(x, x, x, 3, backend="triton")


def test_meta_tensors_give_shapes():
    x = torch.empty(2, 9, 7, 4, 16, device="meta", requires_grad=True)
    rpb = torch.empty(4, 5, 5, device="meta", requires_grad=True)
    out, lse = na2d(x, x, x[..., :8], 3, rpb=rpb, backend="triton", return_lse=True)
    assert (out.shape, lse.shape) == ((2, 9, 7, 4, 8), (2, 9, 7, 4))
    assert [grad.shape for grad in torch.autograd.grad(out.sum(), (x, rpb))] == [x.shape, rpb.shape]


def test_package_does_not_import_triton():
    code = "import foveate.kernels, sys; sys.exit('foveate.kernels.neighborhood.triton_kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tiles_waste_little_on_the_published_shapes():
    for spatial, kernel_size, heads, dim, dtype, options in PUBLISHED.values():
        for launch in launches(spatial, kernel_size, heads, dim, dtype, **options):
            tile, box = launch.options["TILE"], launch.options["BOX"]
            assert all(x & (x - 1) == 0 for x in (*tile, *box))
            kernel = launch.options["KERNEL"]
            keys = 1
            for t, b, k, n in zip(tile, box, kernel, launch.arguments["length"], strict=True):
                keys *= -(-min(t + k - 1, n) // b) * b
            assert launch.options["STRIDE"] != (1, 1, 1) or keys <= 8 * torch.Size(kernel).numel()
