"""The unfused operators' Triton path without a GPU: interpreted, and compiled for the GPUs it is meant for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foveate.kernels import na1d_qk

triton = pytest.importorskip("triton", reason="triton has no wheel for this platform")


def test_interpreted_kernels_match_the_reference():
    # The interpreter is chosen when triton is imported, hence a process of its own.
    checks = Path(__file__).with_name("check_unfused_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=checks.parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.parametrize("capability", [90, *(pytest.param(other, marks=pytest.mark.heavy) for other in (80, 100))])
@pytest.mark.parametrize("kernel", ["scores_kernel", "values_kernel", "scatter_kernel"])
def test_kernels_compile_without_spills(kernel, capability, resources_of):
    from foveate.kernels.neighborhood import triton_product_kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tables = ["*i64", "*i64"] if kernel == "scatter_kernel" else ["*i32"]
    function = getattr(triton_product_kernels, kernel)
    # NAT's windows, and the largest dim that the path takes
    for dim, slots, dtype in ((32, 49, "bf16"), (512, 9, "fp32")):
        constants = triton_product_kernels.launch_options(kernel, dim, slots)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
        types = [f"*{dtype}"] * 3 + tables + ["i32"] * 11
        signature = dict(zip(function.arg_names, types + ["constexpr"] * len(constants), strict=True))
        source = ASTSource(fn=function, signature=signature, constexprs=constants)
        resources = resources_of(triton.compile, source, GPUTarget("cuda", capability, 32), options)
        assert resources.spilled == 0, (dim, resources)
        assert resources.shared <= 48 * 1024, (dim, resources)


def test_triton_is_refused_on_the_cpu_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 5, 1, 4)
    with pytest.raises(ValueError, match=r"'triton' cannot run here: it needs tensors on a GPU .*; they are on cpu"):
        na1d_qk(x, x, 3, backend="triton")
