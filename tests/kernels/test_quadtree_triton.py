"""The Triton path without a GPU: interpreted, and compiled for the GPUs it is meant for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foveate.kernels import quadtree_scores

triton = pytest.importorskip("triton", reason="triton has no wheel for this platform")


def test_interpreted_kernels_match_the_reference():
    # The interpreter is chosen when triton is imported, hence a process of its own.
    checks = Path(__file__).with_name("check_quadtree_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=checks.parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel", ["scores_kernel", "values_kernel", "scatter_kernel"])
def test_kernels_compile_without_spills(kernel, capability, resources_of):
    from foveate.kernels.quadtree import triton_kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # dim and chosen tokens of the published models, and the largest dim that the path takes
    for dim, chosen, dtype in ((64, 8, "fp32"), (32, 32, "bf16"), (256, 8, "fp16")):
        first, out = {
            "scores_kernel": (dtype, "fp32"),
            "values_kernel": ("fp32", dtype),
            "scatter_kernel": ("fp32", "fp32"),
        }[kernel]
        function = getattr(triton_kernels, kernel)
        constants = triton_kernels.launch_options(dim, chosen)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
        types = [f"*{first}", f"*{dtype}", "*i64", f"*{out}", "i32", "i32"]
        signature = dict(zip(function.arg_names, types + ["constexpr"] * len(constants), strict=True))
        source = ASTSource(fn=function, signature=signature, constexprs=constants)
        resources = resources_of(triton.compile, source, GPUTarget("cuda", capability, 32), options)
        assert resources.spilled == 0, resources
        assert resources.shared <= 48 * 1024, resources


def test_triton_is_refused_on_the_cpu_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 1, 3, 4, 5)
    with pytest.raises(ValueError, match=r"'triton' cannot run here: it needs tensors on a GPU .*; they are on cpu"):
        quadtree_scores(x, x, torch.zeros(1, 1, 3, 2, dtype=torch.int64), backend="triton")


def test_package_does_not_import_triton():
    code = "import foveate.kernels.quadtree, sys; sys.exit('foveate.kernels.quadtree.triton_kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
