"""Dynamic kernels from context, and large kernels in both their forms, against the published ones."""

import pytest
import torch
from foveate.blocks.contmix import (
    ContextMixing,
    ContextMixing2d,
    ContMixBlock,
    convert_contmix,
    rename_published,
    stretched_size,
)
from foveate.blocks.dilated_reparam import BRANCHES, DilatedReparamConv, merge_state, rename_branches
from foveate.kernels import na2d_av, na2d_bias, na2d_qk
from foveate.zoo.overlock import FocusBlock


def load(module, state):
    """Load a state dict that may lack the counters of batch norms alone."""
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return module.eval()


def scaled(fixture, name, atol):
    return atol * fixture.spec["outputs"][name]["std"]


@torch.no_grad()
def test_block_is_the_published_one_at_any_size(open_fixture):
    fixture = open_fixture("overlock_parts/contmix_block_k7")
    block = ContMixBlock(**fixture.spec["notes"]["kwargs"])
    load(block, convert_contmix(fixture.state()))
    for name, spec in fixture.spec["inputs"].items():
        out = block(fixture.golden.input_for(tuple(spec["shape"]), spec["seed"]))
        fixture.assert_output(name, out, scaled(fixture, name, 1e-5))


@pytest.mark.parametrize("name", ["dynamic_conv_block_k7", "dynamic_conv_block_k7_first"])
@torch.no_grad()
def test_focus_block_is_the_published_one(open_fixture, name):
    fixture = open_fixture(f"overlock_parts/{name}")
    x, context, overview = (
        fixture.golden.input_for(tuple(spec["shape"]), spec["seed"]) for spec in fixture.spec["inputs"].values()
    )
    first = name.endswith("first")
    block = FocusBlock(48, 16, groups=6, kernel_size=7, reminded=not first, drop_path=0.0, inference_mode=False)
    load(block, rename_branches({rename_published(key, "mixer"): value for key, value in fixture.state().items()}))
    out = block(torch.cat([x, context], 1), overview)
    for part, channels in (("x", out[:, :48]), ("h", out[:, 48:])):
        fixture.assert_output(part, channels, scaled(fixture, part, 1e-5))


@torch.no_grad()
def test_large_kernels_and_their_merged_forms_are_the_published_ones(open_fixture):
    fixture = open_fixture("overlock_parts/dilated_reparam_block")
    published = rename_branches(fixture.state())
    for size in fixture.spec["notes"]["kwargs"]["kernel_sizes"]:
        prefix = f"k{size}."
        conv = DilatedReparamConv(8, size)
        state = {key.removeprefix(prefix): value for key, value in published.items() if key.startswith(prefix)}
        load(conv, state)
        x = fixture.input()
        fixture.assert_output(f"{prefix}y", conv(x), scaled(fixture, f"{prefix}y", 5e-6))
        conv.reparameterize()
        conv.reparameterize()  # changes nothing
        assert set(conv.state_dict()) == {"lk_origin.weight", "lk_origin.bias"}
        merged = DilatedReparamConv(8, size, inference_mode=True)
        merged.load_state_dict(merge_state(state))
        for form in (conv, merged):
            for name, value in (
                ("merged_weight", form.lk_origin.weight),
                ("merged_bias", form.lk_origin.bias),
                ("merged_y", form(x)),
            ):
                fixture.assert_output(prefix + name, value, scaled(fixture, prefix + name, 5e-6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_kernel_size_merges_in_every_dtype(dtype):
    for size in BRANCHES:
        torch.manual_seed(size)
        conv = DilatedReparamConv(3, size, dtype=dtype).eval()
        for name, buffer in conv.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 2)
        x = torch.randn(1, 3, 9, 4, dtype=dtype)
        before = conv(x)
        conv.reparameterize()
        assert conv.lk_origin.weight.dtype == dtype
        tolerance = 1e-12 if dtype == torch.float64 else 0.1
        torch.testing.assert_close(conv(x), before, atol=tolerance, rtol=tolerance)
    with pytest.raises(ValueError, match="there are branches for kernels of 5, 7"):
        DilatedReparamConv(3, 8)


@torch.no_grad()
def test_windows_are_the_published_ones(open_fixture):
    fixture = open_fixture("overlock_parts/na2d_av")
    for name in fixture.spec["outputs"]:
        logits, value = (
            fixture.golden.input_for(tuple(spec["shape"]), spec["seed"]).permute(0, 2, 3, 1, 4)
            for key, spec in fixture.spec["inputs"].items()
            if key.startswith(f"{name}.")
        )
        out = na2d_av(logits.softmax(-1), value, int(name[1 : name.index("_")])).permute(0, 3, 1, 2, 4)
        fixture.assert_output(name, out, scaled(fixture, name, 5e-6))


def test_bias_is_what_scores_are_given():
    torch.manual_seed(0)
    query = torch.randn(1, 6, 8, 2, 3)
    rpb = torch.randn(2, 9, 9)
    expected = na2d_qk(query, query, 5, rpb=rpb) - na2d_qk(query, query, 5)
    torch.testing.assert_close(na2d_bias(rpb, (6, 8), 5), expected[0], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"a table of \[heads, 13, 13\]; got \[2, 9, 9\]"):
        na2d_bias(rpb, (8, 8), 7)
    with pytest.raises(ValueError, match="na2d_bias"):
        na2d_bias(rpb, (4, 8), 5)


def test_small_maps_are_stretched_as_published():
    assert stretched_size(20, 13, 13) == (20, 13)
    assert stretched_size(7, 5, 7) == (9, 7)
    assert stretched_size(5, 45, 7) == (7, 62)  # 63 in exact arithmetic
    assert stretched_size(3, 27, 13) == (13, 116)
    assert stretched_size(11, 11, 15) == (15, 15)  # where the published block fails
    assert stretched_size(1, 1, 13) == (13, 13)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (6, 2), (7, 7)])
def test_every_parameter_gets_a_gradient_at_any_size(size):
    torch.manual_seed(0)
    mixing = ContextMixing(8, 6, groups=2)
    query, context, value = (torch.randn(2, channels, *size, requires_grad=True) for channels in (8, 6, 8))
    out = mixing(query, context, value)
    assert out.shape == value.shape
    out.square().sum().backward()
    for tensor in (*mixing.parameters(), query, context, value):
        assert tensor.grad.isfinite().all()


def test_a_hooked_layer_is_called_and_changes_nothing():
    torch.manual_seed(0)
    mixing = ContextMixing2d(16, 2).eval()
    torch.nn.init.normal_(mixing.gated.mix.weights.weight)
    x = torch.randn(1, 9, 8, 16)
    expected = mixing(x)
    seen = []
    mixing.gated.mix.weights.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(mixing(x), expected)
    assert seen


def test_what_is_no_number_spreads_over_what_sees_it_and_no_further():
    torch.manual_seed(0)
    mixing = ContextMixing(8, 6, groups=2).eval()
    query, context, value = (torch.randn(1, channels, 12, 12) for channels in (8, 6, 8))
    value[0, 0, 0, 0] = float("nan")
    out = mixing(query, context, value)
    # A value: in its channel, in the windows that hold it.
    assert out[0, 0, :3, :3].isnan().all()
    assert out.isnan().sum() == 9
    context[0, 0, 0, 0] = float("nan")
    assert mixing(query, context, value).isnan().all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="divided into groups; got 12 channels, 4 groups"):
        ContextMixing(12, 6, groups=4)
    with pytest.raises(ValueError, match="kernels are odd, at least 3"):
        ContextMixing(16, 6, groups=4, kernel_size=3)
