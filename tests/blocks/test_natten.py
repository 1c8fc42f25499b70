"""NATTEN's names: every release's calls and modules give its values; a namespace takes natten's place and leaves it."""

import copy
import importlib.metadata
import importlib.util
import inspect
import json
import pickle
import subprocess
import sys
from functools import partial

import foveate
import numpy as np
import pytest
import torch
from foveate.kernels import na1d, na2d, na3d

LINES = ("0.14", "0.15", "0.17", "0.20", "0.21")
# The lines and releases that must answer the calls which a fixture names for a release.
SERVING = {
    "0.14.4": ("0.14.4", "0.14"),
    "0.14.6": ("0.14.6", "0.14"),
    "0.15.1": ("0.15.1", "0.15"),
    "0.17.5": ("0.17.5", "0.17"),
}


@pytest.fixture
def uninstalled():
    yield
    foveate.natten.uninstall()
    assert not [name for name in sys.modules if name.partition(".")[0] == "natten"]


def golden_cases(folder, index):
    return json.loads((folder / "natten_compat" / index).read_text())["cases"]


def leaves_of(arrays, dtype):
    names = ("query", "key", "value", "rpb", "probs", "additional_keys", "additional_values")
    return {name: torch.from_numpy(arrays[name]).to(dtype).requires_grad_() for name in names if name in arrays.files}


@pytest.mark.parametrize("written_for", SERVING)
def test_calls_as_written_for_a_release(written_for, golden_folder):
    run = 0
    for case in golden_cases(golden_folder, "index.json"):
        arrays = np.load(golden_folder / "natten_compat" / f"{case['name']}.npz")
        for name in SERVING[written_for]:
            functional = vars(foveate.natten.release(name).functional)
            for call in case["calls"].get(written_for, ()):
                leaves = leaves_of(arrays, torch.float64)
                out = eval(call, functional | leaves)
                values = "av(" in call
                expected = torch.from_numpy(arrays["out" if values else "attn"]).double()
                check = partial(torch.testing.assert_close, atol=1e-6, rtol=1e-6, msg=f"{case['name']}: {call}")
                assert out.is_contiguous()
                check(out, expected)
                used = ("probs", "value", "additional_values") if values else ("query", "key", "rpb", "additional_keys")
                used = [each for each in used if each in leaves]
                cotangent = torch.from_numpy(arrays["grad_out" if values else "grad_attn"]).double()
                grads = torch.autograd.grad(out, [leaves[each] for each in used], cotangent)
                for each, grad in zip(used, grads, strict=True):
                    check(grad, torch.from_numpy(arrays[f"d_{each}"]).double())
                run += 1
    assert run >= 20


def releases_of(kwargs_of):
    return ("0.14", "0.14.5", "0.15") if kwargs_of.startswith("0.14") else ("0.17", "0.17.0")


def test_modules_give_their_values_and_gradients(golden_folder):
    cases = golden_cases(golden_folder, "index_modules.json")
    assert len(cases) >= 5
    for case in cases:
        arrays = np.load(golden_folder / "natten_compat" / f"{case['name']}.npz")
        state = {name[6:]: torch.from_numpy(arrays[name]) for name in arrays.files if name.startswith("state.")}
        for release in releases_of(case["kwargs_of"]):
            kwargs = {name: tuple(v) if isinstance(v, list) else v for name, v in case["kwargs"].items()}
            module = getattr(foveate.natten.release(release), case["cls"])(**kwargs).double().eval()
            module.load_state_dict(state, strict=True)
            for fused in (True, False):
                if not fused:  # who looks at the weights gets them
                    module.attn_drop.register_forward_hook(lambda *args: None)
                x = torch.from_numpy(arrays["x"]).double().requires_grad_()
                out = module(x)
                check = partial(torch.testing.assert_close, atol=1e-6, rtol=1e-6, msg=f"{case['name']} {release}")
                check(out, torch.from_numpy(arrays["out"]).double())
                grads = torch.autograd.grad(
                    out, [x, *module.parameters()], torch.from_numpy(arrays["grad_out"]).double()
                )
                for name, grad in zip(("x", *(name for name, _ in module.named_parameters())), grads, strict=True):
                    check(grad, torch.from_numpy(arrays[f"d_{name}"]).double())


@pytest.mark.parametrize("line", LINES)
def test_every_function_of_a_line_runs(line):
    """Also those that no fixture calls: fused operators, classes of functions, the fifth argument's two meanings."""
    functional = foveate.natten.release(line).functional
    for rank, operator in enumerate((na1d, na2d, na3d), 1):
        size = (9, 8, 7)[:rank]
        q, k, v = torch.randn(3, 2, *size, 2, 4, dtype=torch.float64).unbind()
        first = [x.movedim(-2, 1).contiguous() for x in (q, k, v)]
        rpb = torch.randn(2, *(5,) * rank, dtype=torch.float64)
        biased = operator(q, k, v, 3, 1, 2, scale=1.0, rpb=rpb).movedim(-2, 1)
        if fused := getattr(functional, f"na{rank}d", None):
            fifth = {"dilation": 2} if line == "0.17" else {"stride": 2}
            torch.testing.assert_close(fused(q, k, v, 3, 2), operator(q, k, v, 3, **fifth))
            more = torch.randn(2, 2, 3, 2, 4, dtype=torch.float64).unbind()
            options = dict(is_causal=True, scale=0.3, additional_keys=more[0], additional_values=more[1])
            torch.testing.assert_close(fused(q, k, v, 3, **options), operator(q, k, v, 3, **options))
        classes = {name: each for name, each in vars(functional).items() if name.endswith("Function")}
        for name in [name for name in classes if f"{rank}DQK" in name]:
            windows = (3, 2) if line == "0.17" or rank < 3 else (3, 3, 2, 2)
            extra = () if name.startswith("NATTEN") else (None,)
            scores = classes[name].apply(*first[:2], rpb, *extra, *windows)
            av = classes[name.replace("QKRPB", "AV").replace("QK", "AV")].apply
            torch.testing.assert_close(av(scores.softmax(-1), first[2], *extra, *windows), biased)
    if line == "0.17":
        apply = functional.FusedNeighborhoodAttention2D.apply
        q, k, v = torch.randn(3, 1, 5, 6, 2, 8).unbind()
        out, lse = apply(q, k, v, torch.zeros(2, 5, 5), (3, 3), (1, 1), (False, False), 0.5, None, None)
        expected = na2d(q, k, v, 3, scale=0.5, return_lse=True)
        torch.testing.assert_close((out, lse), expected)
        early = foveate.natten.release("0.17.3").functional.FusedNeighborhoodAttention2D.apply
        torch.testing.assert_close(early(q, k, v, None, 3, 1, False, 0.5), expected[0])


def test_argument_orders_of_modules():
    of = foveate.natten.release
    first = of("0.14.4").NeighborhoodAttention2D(16, 3, 2)  # kernel size before heads
    later = of("0.14.6").NeighborhoodAttention2D(16, 2, 3)
    assert [(m.num_heads, m.kernel_size, m.window_size) for m in (first, later)] == [(2, 3, 3)] * 2
    with pytest.raises(ValueError, match=r"odd kernel_size .* got 2. It comes after num_heads from NATTEN 0.14.5"):
        of("0.14.6").NeighborhoodAttention2D(16, 1, 2)
    with pytest.warns(DeprecationWarning, match="NeighborhoodAttention2D"):
        assert of("0.14").NeighborhoodAttention(16, kernel_size=13, num_heads=2).kernel_size == 13
    assert of("0.15").NeighborhoodAttention2D(16, 2, 3).rpb is not None
    assert of("0.17").NeighborhoodAttention2D(16, 2, 3).rpb is None
    assert of("0.17").NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True).dilation == (1, 1)
    deep = of("0.15").NeighborhoodAttention3D(16, 2, 3, kernel_size_d=5, dilation=2)
    assert deep.rpb.shape == (2, 9, 5, 5)
    assert (deep.kernel_size_d, deep.kernel_size, deep.dilation_d, deep.window_size_d) == (5, 3, 2, 10)
    strided = of("0.21").NeighborhoodAttention2D(embed_dim=16, num_heads=2, kernel_size=4, stride=2)
    assert strided(torch.randn(1, 6, 7, 16)).shape == (1, 6, 7, 16)
    assert "dim" in inspect.signature(of("0.20.0").NeighborhoodAttention2D).parameters
    with pytest.raises(ValueError, match="num_heads to divide dim"):
        of("0.15").NeighborhoodAttention2D(16, 3, 3)
    with pytest.raises(ValueError, match="odd kernel sizes only, and on no causal axis"):
        of("0.17").NeighborhoodAttention2D(16, 2, 3, is_causal=(True, False), rel_pos_bias=True)


def test_maps_shorter_than_a_window_are_padded_until_0_15_and_refused_later():
    x = torch.randn(1, 3, 9, 16)
    assert foveate.natten.release("0.15").NeighborhoodAttention2D(16, 2, 5)(x).shape == x.shape
    deep = foveate.natten.release("0.15").NeighborhoodAttention3D(16, 2, 3, dilation=2)
    assert deep(torch.randn(1, 2, 5, 7, 16)).shape == (1, 2, 5, 7, 16)
    with pytest.raises(ValueError, match="does not fit the height"):
        foveate.natten.release("0.17").NeighborhoodAttention2D(16, 2, 5)(x)


def test_a_dilation_that_is_text_is_the_greatest_that_fits():
    of = foveate.natten.release("0.14.4").NeighborhoodAttention2D
    module, fixed = of(16, 3, 2, dilation="max"), of(16, 3, 2, dilation=4)
    fixed.load_state_dict(module.state_dict())
    x = torch.randn(1, 12, 14, 16)
    torch.testing.assert_close(module(x), fixed(x))
    assert module.window_size is None


def test_dropout_of_weights_does_not_normalise_again():
    module = foveate.natten.release("0.15").NeighborhoodAttention2D(8, 2, 3, attn_drop=0.5)
    seen = []
    module.attn_drop.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    module(torch.randn(1, 5, 6, 8))
    (weights,) = seen
    assert weights.shape == (1, 2, 5, 6, 9)  # heads first
    assert (weights == 0).float().mean() == pytest.approx(0.5, abs=0.15)
    assert not torch.allclose(weights.sum(-1), torch.ones(()))


def test_modules_are_copied_pickled_and_compiled():
    module = foveate.natten.release("0.17").NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True).eval()
    x = torch.randn(1, 6, 7, 16)
    expected = module(x)
    torch.testing.assert_close(copy.deepcopy(module)(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(module))(x), expected)
    torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), expected)
    operator = foveate.natten.release("0.17").functional.na2d_qk
    assert pickle.loads(pickle.dumps(operator)) is operator


Q, W = torch.zeros(1, 2, 6, 7, 4), torch.zeros(1, 2, 6, 7, 9)


@pytest.mark.parametrize(
    ("release", "call", "message"),
    [
        ("0.17", lambda f: f.na2d_qk(Q[0], Q[0], 3), r"heads first, \[B, heads, H, W, ...\]; got 4 axes"),
        ("0.17", lambda f: f.na2d_qk(Q, Q[:, :1], 3), "query and key of one"),
        ("0.17", lambda f: f.na2d_qk(Q, Q, 7), "does not fit the height: kernel_size 7 x dilation 1 = 7 > 6"),
        ("0.17", lambda f: f.na2d_qk(Q, Q, 3, is_causal=True, rpb=torch.zeros(2, 5, 5)), "nor on a causal axis"),
        ("0.17", lambda f: f.na2d_qk(Q, Q, 3, additional_keys=torch.zeros(1, 3, 2, 4)), r"\[1, 2, N, 4\]; got"),
        ("0.17", lambda f: f.na2d_av(W, Q, 5), "window's 25 keys and 0 additional ones; got 9"),
        ("0.14.6", lambda f: f.natten2dav(W, Q, 5, 1), "window's 25 keys and 0 additional ones; got 9"),
        ("0.14", lambda f: f.natten2dqkrpb(Q, Q, None, 1), "without a bias needs a kernel_size"),
        ("0.17", lambda f: f.na2d_qk(*(torch.nested.nested_tensor([Q[0]]) for _ in "qk"), 3), "no nested tensors"),
        ("0.21", lambda f: f.na2d(Q, Q, Q, 2, backend="cutlass-fna"), "'cutlass-fna' is one of NATTEN's own"),
        ("0.21", lambda f: f.attention(Q[0], Q[0], Q[0], seqlens_Q=torch.ones(1)), "no packed sequences"),
    ],
)
def test_mistakes_are_named(release, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(foveate.natten.release(release).functional)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("release", ["0.16", "0.1", "1.0", "0.14.0", 0.17, ""])
def test_releases_that_are_not_served_are_refused(release):
    with pytest.raises(ValueError, match="release"):
        foveate.natten.release(release)


def test_switches_answer_and_change_nothing():
    natten = foveate.natten.release("0.17.4")
    assert natten.has_fused_na()
    assert natten.has_half(0)
    assert natten.has_cuda() == torch.cuda.is_available()
    assert not natten.is_fused_na_enabled()
    natten.use_fused_na(True, kv_parallel=False)
    natten.use_autotuner(True, thorough_mode_backward=True)
    assert natten.is_fna_enabled()
    assert natten.context.is_autotuner_enabled()
    assert natten.is_autotuner_thorough_for_backward()
    natten.disable_autotuner()
    assert not natten.is_autotuner_enabled()
    natten.set_memory_usage_preference("strict")
    assert natten.get_memory_usage_preference() is natten.context.MemoryUsagePreference.Strict
    with pytest.raises(ValueError, match="'loose'"):
        natten.set_memory_usage_preference("loose")
    assert not foveate.natten.release("0.17.3").is_fused_na_enabled()
    assert foveate.natten.release("0.15").enable_tf32() is True
    assert foveate.natten.release("0.15").functional.has_bfloat()


def test_what_callers_take_beside_operators():
    natten = foveate.natten.release("0.17")
    assert natten.utils.check_all_args(2, 3, None, (True, False)) == ((3, 3), (1, 1), (True, False))
    assert natten.utils.get_num_na_weights((3, 5)) == 15
    with pytest.raises(ValueError, match="2 of them"):
        natten.utils.check_kernel_size_arg(2, (3, 3, 3))
    assert foveate.natten.release("0.21").utils.check_all_args(1, 5, 2, 1, False) == ((5,), (2,), (1,), (False,))
    assert natten.types.create_dim_from_int(3, 2) == (2, 2, 2)
    assert natten.flops.na_qk_flop_count((1, 2, 6, 7, 4), (1, 2, 6, 7, 4), (3, 3)) == 2 * 2 * 42 * 4 * 9
    counter = object()
    assert natten.flops.add_natten_handle(counter) is counter
    q, k, v = torch.randn(3, 1, 6, 7, 2, 4).unbind()
    more = torch.randn(2, 1, 3, 2, 4).unbind()
    out, lse = na2d(q, k, v, 3, return_lse=True)
    other, other_lse = foveate.kernels.attention(q.flatten(1, 2), *more, return_lse=True)
    merged = natten.ops.merge_attentions(out, other, lse, other_lse.transpose(1, 2))
    expected = na2d(q, k, v, 3, additional_keys=more[0], additional_values=more[1])
    torch.testing.assert_close(merged, expected)
    both = [[out.flatten(1, 2), other], [lse.flatten(1, 2), other_lse]]
    late = foveate.natten.release("0.21").functional.merge_attentions(*both)[0]
    torch.testing.assert_close(late.view_as(expected), expected)


# How repositories ask which natten they have.
PROBES = {
    "0.14": "assert not hasattr(natten, 'context') and hasattr(natten, 'NeighborhoodAttention2D')",
    "0.15": "from natten.functional import na2d_av, na2d_qk_with_bias; assert not hasattr(natten, 'context')",
    "0.17": """
from natten import NeighborhoodAttention2D, use_fused_na, use_gemm_na, use_autotuner
from natten.functional import na2d, na2d_av, na2d_qk, natten2dav, natten2dqkrpb, natten1dqkrpb
from natten.flops import qk_2d_rpb_flop, av_2d_flop, add_natten_handle
from natten.natten2d import NeighborhoodAttention2D as again
import natten.types, natten.utils.log
assert hasattr(natten, 'context') and natten.has_fused_na() and again is NeighborhoodAttention2D
""",
    "0.20": "from natten import na2d; from natten.functional import na2d as same; assert na2d is same",
    "0.21": "assert natten.HAS_LIBNATTEN is False; natten.na1d; natten.merge_attentions",
}


@pytest.mark.parametrize("line", LINES)
@pytest.mark.usefixtures("uninstalled")
def test_a_namespace_takes_the_place_of_an_absent_natten(line):
    assert importlib.util.find_spec("natten") is None
    root = foveate.natten.install(line)
    assert foveate.natten.install(line) is root
    exec(f"import natten\n{PROBES[line]}", {})
    spec = importlib.util.find_spec("natten")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    assert importlib.metadata.version("natten") == root.__version__
    assert root.__version__.startswith(line)
    assert importlib.reload(sys.modules["natten"]) is root
    foveate.natten.uninstall()
    assert importlib.util.find_spec("natten") is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("natten")
    assert not [each for each in sys.meta_path if type(each).__module__.startswith("foveate.blocks.natten")]
    foveate.natten.uninstall()  # nothing is there


@pytest.mark.usefixtures("uninstalled")
def test_absent_names_say_why():
    foveate.natten.install("0.17.5")
    import natten

    for statement, message in (
        ("from natten.functional import natten2dav", "which NATTEN had from 0.14.1 to 0.17.4"),
        ("from natten.functional import na2d_qk_with_bias", "which NATTEN had from 0.15.0 to 0.15.1"),
        ("from natten import libnatten", "compiled entry points are not served"),
        ("import natten.autotuner", "no kernels of NATTEN's to tune"),
        ("import natten.nonsense", "has no natten.nonsense"),
    ):
        with pytest.raises(ImportError, match=message):
            exec(statement, {})
    assert not hasattr(natten.functional, "natten2dav")
    foveate.natten.install("0.15")  # another release takes its place
    from natten.functional import na2d_qk_with_bias, natten2dav

    assert natten2dav is not na2d_qk_with_bias


@pytest.fixture
def installed_natten(tmp_path, monkeypatch):
    """A stand-in for an installed NATTEN 0.21.7, of its functions one."""
    (tmp_path / "natten").mkdir()
    (tmp_path / "natten" / "__init__.py").write_text("from . import functional\n__version__ = '0.21.7'\n")
    (tmp_path / "natten" / "functional.py").write_text("def na2d(): return 'theirs'\n")
    (tmp_path / "natten-0.21.7.dist-info").mkdir()
    (tmp_path / "natten-0.21.7.dist-info" / "METADATA").write_text("Name: natten\nVersion: 0.21.7\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    foveate.natten.uninstall()
    for name in [name for name in sys.modules if name.partition(".")[0] == "natten"]:
        del sys.modules[name]


@pytest.mark.usefixtures("installed_natten")
def test_an_installed_natten_is_replaced_on_request_only():
    with pytest.raises(ImportError, match=r"natten 0.21.7 is installed, and it lacks .*natten2dqkrpb.*replace=True"):
        foveate.natten.install()
    import natten

    assert natten.functional.na2d() == "theirs"
    foveate.natten.install(replace=True)
    import natten as ours

    assert ours.__version__ == importlib.metadata.version("natten") == "0.17.5"
    assert hasattr(ours.functional, "natten2dqkrpb")
    foveate.natten.install("0.15")  # what was replaced stays replaced
    assert importlib.metadata.version("natten") == "0.15.1"
    foveate.natten.uninstall()
    import natten as again

    assert again is natten
    assert importlib.metadata.version("natten") == "0.21.7"


def test_nothing_is_installed_unless_asked_for():
    code = (
        "import foveate, timm, sys; from foveate.blocks import natten; foveate.natten.release('0.17')\n"
        "assert 'natten' not in sys.modules\nimport natten"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "No module named 'natten'" in done.stderr
