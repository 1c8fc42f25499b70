"""NATTEN as a backend, by a stand-in: what it is called with, what is refused before and by it, and its column."""

import importlib
import importlib.machinery
import sys
from types import ModuleType

import foveate
import pytest
import torch
from foveate import kernels
from foveate.kernels import na1d, na2d, na3d, neighborhood_backends, set_neighborhood_backend
from foveate.tools.bench.kernels import bench_kernels


def stand_in(version, rank, with_lse):
    operator = (na1d, na2d, na3d)[rank - 1]

    def recent(
        query,
        key,
        value,
        kernel_size,
        stride=1,
        dilation=1,
        is_causal=False,
        scale=None,
        additional_keys=None,
        additional_values=None,
        return_lse=False,
    ):
        if query.shape[-1] % 8:
            raise NotImplementedError("head dims are multiples of 8")
        natten.calls += 1
        windows = (kernel_size, stride, dilation, is_causal, scale)
        return operator(query, key, value, *windows, additional_keys, additional_values, return_lse=return_lse)

    def before_lse(
        query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values
    ):
        return recent(
            query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values
        )

    def old(query, key, value, kernel_size, dilation=1, is_causal=False, rpb=None, scale=None):
        raise AssertionError

    natten = sys.modules["natten"]
    return old if version == "0.17.5" else recent if with_lse else before_lse


@pytest.fixture
def natten(monkeypatch):
    def put(version, with_lse=True):
        module = ModuleType("natten")
        module.__spec__ = importlib.machinery.ModuleSpec("natten", None, origin="elsewhere")
        module.__version__, module.calls = version, 0
        monkeypatch.setitem(sys.modules, "natten", module)
        for rank in (1, 2, 3):
            setattr(module, f"na{rank}d", stand_in(version, rank, with_lse))
        return module

    return put


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_calls_run_on_natten_on_request(natten, rank):
    module = natten("0.21.7")
    operator = (na1d, na2d, na3d)[rank - 1]
    q, k, v = torch.randn(3, 2, *(7, 6, 5)[:rank], 2, 8, requires_grad=True).unbind()
    more = torch.randn(2, 2, 3, 2, 8).unbind()
    options = dict(stride=2, dilation=1, is_causal=True, scale=0.2, additional_keys=more[0], additional_values=more[1])
    for lse in (False, True):
        actual = operator(q, k, v, 3, **options, backend="natten", return_lse=lse)
        torch.testing.assert_close(actual, operator(q, k, v, 3, **options, return_lse=lse))
    assert module.calls == 2
    operator(q, k, v, 3)
    assert module.calls == 2  # never by itself
    report = neighborhood_backends(q, k, v, 3, backend="natten")
    assert report["natten"] == "chosen"


X = torch.zeros(1, 6, 7, 2, 8)


@pytest.mark.parametrize(
    ("version", "with_lse", "call", "message"),
    [
        (None, True, dict(), "natten is not installed"),
        ("0.17.5", True, dict(), "natten 0.17.5 is older than 0.20"),
        ("0.21.0", False, dict(return_lse=True), "natten 0.21.0 returns no log-sum-exp"),
        ("0.21.7", True, dict(rpb=torch.zeros(2, 5, 5)), "no relative position bias"),
        ("0.21.7", True, dict(x=X.double()), "got torch.float64"),
        ("0.21.7", True, dict(x=X[..., :4]), "0.21.7 says: head dims are multiples of 8"),
        ("foveate", True, dict(), "the natten of this process is foveate.natten"),
    ],
)
def test_refusals_name_the_reason(natten, version, with_lse, call, message):
    options = {name: value for name, value in call.items() if name != "x"}
    x = call.get("x", X)
    if version == "foveate":
        foveate.natten.install("0.21")
    elif version is not None:
        natten(version, with_lse)
    try:
        with pytest.raises(ValueError, match=f"na2d's backend 'natten' cannot run here: .*{message}"):
            na2d(x, x, x, 3, backend="natten", **options)
    finally:
        foveate.natten.uninstall()


def test_a_natten_that_does_not_import_is_an_obstacle(tmp_path, monkeypatch):
    (tmp_path / "natten.py").write_text("raise RuntimeError('built for another torch')\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert neighborhood_backends(X, X, X, 3)["natten"] == (
        "natten does not import: RuntimeError: built for another torch"
    )


def test_the_benchmark_has_its_column(natten):
    natten("0.21.7")
    settings = dict(rounds=1, device="cpu", flex=False, backward=False, dtype=torch.float32)
    rows = bench_kernels([(1, 9, 8, 2, 8, 3)], **settings, bias=False)
    by_path = {row["path"]: row for row in rows}
    assert by_path["natten"]["times natten"] == 1.0
    assert {"tiled", "unfused, tiled", "gather"} <= set(by_path)
    biased = bench_kernels([(1, 9, 8, 2, 8, 3)], **settings)
    assert {row["times natten"] for row in biased} == {"-"}


def test_the_unfused_operators_obey_the_chosen_backend():
    x = torch.randn(1, 6, 7, 2, 8, dtype=torch.float64)
    report = kernels.unfused_neighborhood_backends(x, x, 3)
    assert report["tiled"] == "chosen"
    assert "float64" in report["native"]
    weights = kernels.na2d_qk(x, x, 3)
    try:
        set_neighborhood_backend("reference")
        assert kernels.unfused_neighborhood_backends(weights, x, 3)["reference"] == "chosen"
        torch.testing.assert_close(kernels.na2d_qk(x, x, 3), weights)
        set_neighborhood_backend("flex")
        with pytest.raises(ValueError, match="na2d_qk has no backend 'flex'"):
            kernels.na2d_qk(x, x, 3)
        kernels.na2d_qk(x, x, 3, backend="tiled")
    finally:
        set_neighborhood_backend(None)
    with pytest.raises(ValueError, match="4, 5 or 6 axes"):
        kernels.unfused_neighborhood_backends(x[0, 0], x[0, 0], 3)
