"""Neighborhood attention as a module: the published module's outputs, small maps, introspection."""

import json

import numpy as np
import pytest
import torch
from foveate.blocks import (
    GlobalAttention2d,
    NeighborhoodAttention1d,
    NeighborhoodAttention2d,
    NeighborhoodAttention3d,
)
from foveate.blocks.relative_bias import resize_bias_table
from foveate.kernels.neighborhood.window import axis_windows


def test_published_module_outputs(golden_folder):
    """The padding rule included: maps smaller than the kernel are padded before the projection."""
    cases = {case["name"]: case for case in json.loads((golden_folder / "na_op" / "index_modules.json").read_text())}
    paths = sorted((golden_folder / "na_op").glob("module_*.npz"))
    assert len(paths) >= 2
    for path in paths:
        case, meta = np.load(path), cases[path.stem]
        block = NeighborhoodAttention2d(16, meta["num_heads"], meta["kernel_size"], meta["dilation"])
        block.load_state_dict({name: torch.from_numpy(case[name]) for name in meta["params"]})
        with torch.inference_mode():
            error = (block(torch.from_numpy(case["x"])) - torch.from_numpy(case["out"])).abs().max().item()
        assert error <= 2e-6, f"{path.stem}: {error:.1e}"


@pytest.mark.parametrize("size", [(1, 1), (3, 20), (14, 13), (15, 28)])
def test_any_map_size_gives_finite_gradients(size):
    block = NeighborhoodAttention2d(24, num_heads=3, kernel_size=7, dilation=2)
    x = torch.randn(2, *size, 24, requires_grad=True)
    out = block(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    for gradient in [x.grad, *(parameter.grad for parameter in block.parameters())]:
        assert gradient.isfinite().all()


def test_attention_map_explains_the_output():
    block = NeighborhoodAttention2d(16, num_heads=2, kernel_size=5, dilation=2)
    x = torch.randn(1, 12, 11, 16)
    weights = block.attention_map(x)
    assert weights.shape == (1, 12, 11, 2, 25)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 12, 11, 2))
    value = block.qkv(x).unflatten(-1, (3, 2, 8))[..., 2, :, :]
    rows, columns = axis_windows(12, 5, 2), axis_windows(11, 5, 2)
    y, x_ = 4, 9
    keys = value[0, rows[y]][:, columns[x_]].flatten(0, 1)
    out = torch.einsum("hk,khd->hd", weights[0, y, x_], keys).flatten()
    torch.testing.assert_close(block.proj(out), block(x)[0, y, x_])


def test_no_bias_and_even_kernel():
    block = NeighborhoodAttention2d(8, num_heads=2, kernel_size=4, rel_pos_bias=False, qkv_bias=False)
    assert not [name for name, _ in block.named_parameters() if "rpb" in name]
    assert block(torch.randn(1, 9, 5, 8)).shape == (1, 9, 5, 8)


def test_wrong_settings_are_one_line():
    with pytest.raises(ValueError, match="num_heads to divide dim"):
        NeighborhoodAttention2d(10, num_heads=3)
    with pytest.raises(ValueError, match="odd kernel sizes only"):
        NeighborhoodAttention2d(8, num_heads=2, kernel_size=4)
    with pytest.raises(ValueError, match="maps of 4x5; got 5x4"):
        GlobalAttention2d(8, 2, (4, 5))(torch.zeros(1, 5, 4, 8))


def test_global_attention_is_neighborhood_attention_over_the_whole_map():
    """With an odd map and a kernel of its size both modules are the same function of the same parameters."""
    everywhere = GlobalAttention2d(16, num_heads=2, map_size=(7, 7))
    window = NeighborhoodAttention2d(16, num_heads=2, kernel_size=7)
    window.load_state_dict(everywhere.state_dict())
    x = torch.randn(2, 7, 7, 16)
    torch.testing.assert_close(window(x), everywhere(x))


def test_bias_table_keeps_its_middle_when_resampled():
    table = torch.zeros(1, 13, 13)
    table[0, 6, 6] = 1
    resampled = resize_bias_table(table, (21, 21))[0]
    assert resampled.argmax() == 21 * 21 // 2


def test_lines_and_volumes_are_maps_of_one_row():
    """Each rank is the same function: a line is a map whose other axis a window of two cannot tell apart."""
    volume = NeighborhoodAttention3d(8, 2, (3, 3, 5), dilation=(1, 1, 2))
    assert volume(torch.randn(2, 2, 7, 4, 8)).shape == (2, 2, 7, 4, 8)
    line = NeighborhoodAttention1d(8, 2, 4, rel_pos_bias=False, stride=2, is_causal=True)
    x = torch.randn(1, 9, 8)
    changed = x.clone()
    changed[:, 5:] += 1
    torch.testing.assert_close(line(x)[:, :5], line(changed)[:, :5])
    assert (line(x)[:, 5:] - line(changed)[:, 5:]).abs().max() > 1e-3
