"""Deformable attention: both published geometries against loops over every point, and any map."""

import math

import pytest
import torch
import torch.nn.functional as F
from foveate.blocks import DeformableAttention2d
from foveate.blocks.deformable import key_points, reference_points
from foveate.tasks.export import Options, export_model
from foveate.tasks.export.onnx_file import run_onnx
from torch import nn


def block(geometry, dim=16, heads=4, groups=2, seed=0, **options):
    torch.manual_seed(seed)
    module = DeformableAttention2d(dim, heads, groups, geometry=geometry, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def run(module, x):
    """Attend over maps whose channels come first, as the published formulas have them."""
    return module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def read(image, y, x):
    """Bilinear value of ``image`` ``[C, H, W]`` at the normalised point, corners at -1 and 1, zero outside."""
    height, width = image.shape[1:]
    y, x = (y + 1) / 2 * (height - 1), (x + 1) / 2 * (width - 1)
    top, left = math.floor(y), math.floor(x)
    value = torch.zeros(image.shape[0], dtype=image.dtype)
    for row, weight_y in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, weight_x in ((left, 1 - (x - left)), (left + 1, x - left)):
            if 0 <= row < height and 0 <= column < width:
                value += weight_y * weight_x * image[:, row, column]
    return value


def by_loops(module, x, geometry, offset_range):
    """Deformable attention of one image ``[C, H, W]`` with the published formulas, point by point."""
    channels, height, width = x.shape
    groups, heads = module.groups, module.num_heads
    per_group, per_head = channels // groups, heads // groups
    plus = geometry == "dat_pp"

    def project(layer, columns):
        return layer.weight[:, :, 0, 0] @ columns + layer.bias[:, None]

    q = project(module.q, x.flatten(1))
    out = torch.zeros_like(q)
    table = module.rpe_table
    if not plus and table.shape[1:] != (2 * height - 1, 2 * width - 1):
        size = (2 * height - 1, 2 * width - 1)
        table = F.interpolate(table[None], size=size, mode="bicubic", align_corners=False)[0]
    points, samples = [], []
    for g in range(groups):
        part = slice(g * per_group, (g + 1) * per_group)
        conv = module.offset_conv
        offset = F.conv2d(q[part].unflatten(1, (height, width))[None], conv.weight, conv.bias, module.stride,
                          module.padding, groups=per_group)  # fmt: skip
        offset = F.layer_norm(offset.permute(0, 2, 3, 1), (per_group,), module.offset_norm.weight,
                              module.offset_norm.bias, 1e-5)  # fmt: skip
        offset = F.gelu(offset) @ module.offset_proj.weight[:, :, 0, 0].t()
        rows, columns = offset.shape[1:3]
        less = 1 if plus else 0
        own = []
        for i in range(rows):
            for j in range(columns):
                dy, dx = offset[0, i, j].tolist()
                y = (i + 0.5) / (rows - less) * 2 - 1
                x_ = (j + 0.5) / (columns - less) * 2 - 1
                if offset_range is not None:
                    y += math.tanh(dy) / (rows - less) * offset_range
                    x_ += math.tanh(dx) / (columns - less) * offset_range
                elif plus:
                    y, x_ = min(max(y + dy, -1), 1), min(max(x_ + dx, -1), 1)
                else:
                    y, x_ = math.tanh(y + dy), math.tanh(x_ + dx)
                own.append((y, x_))
        points.append(own)
        samples.append(torch.stack([read(x[part], *point) for point in own], 1))
    samples = torch.cat(samples)
    k, v = project(module.k, samples), project(module.v, samples)
    dim = channels // heads
    for head in range(heads):
        part, g = slice(head * dim, (head + 1) * dim), head // per_head
        for i in range(height):
            for j in range(width):
                if plus:
                    qy, qx = i / (height - 1) * 2 - 1, j / (width - 1) * 2 - 1
                else:
                    qy, qx = (i + 0.5) / height * 2 - 1, (j + 0.5) / width * 2 - 1
                bias = [read(table[head : head + 1], (qy - y) / 2, (qx - x_) / 2) for y, x_ in points[g]]
                scores = q[part, i * width + j] @ k[part] * dim**-0.5 + torch.cat(bias)
                out[part, i * width + j] = v[part] @ scores.softmax(0)
    return project(module.proj, out).unflatten(1, (height, width))


@pytest.mark.parametrize("offset_range", [2.0, None])
@pytest.mark.parametrize("geometry", ["dat", "dat_pp"])
@pytest.mark.parametrize("map_size", [(5, 7), (4, 4)])
@torch.no_grad()
def test_geometry_is_the_published_one(geometry, offset_range, map_size):
    """On a map that the table is made for, and on another one; the table is far from symmetric."""
    module = block(geometry, kernel_size=3, stride=2, map_size=map_size, offset_range=offset_range)
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    expected = torch.stack([by_loops(module, image, geometry, offset_range) for image in x])
    # Positions are float64 here because the features are.
    torch.testing.assert_close(run(module, x), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", [dict(kernel_size=9, stride=8), dict(kernel_size=3, stride=1)])
@pytest.mark.parametrize("geometry", ["dat", "dat_pp"])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (9, 1), (2, 3), (17, 30)])
def test_maps_and_key_grids_of_size_one_do_not_divide_by_zero(geometry, options, size):
    module = block(geometry, map_size=(7, 7), **options).float()
    x = torch.randn(2, 16, *size, requires_grad=True)
    out = run(module, x)
    assert out.shape == x.shape
    out.square().sum().backward()
    for gradient in [x.grad, *(parameter.grad for parameter in module.parameters())]:
        assert gradient.isfinite().all()


def test_a_grid_of_one_key_starts_at_the_middle():
    for plus in (False, True):
        assert reference_points(1, 1, plus, torch.zeros(1)).flatten().tolist() == [0, 0]


def test_references_of_dat_pp_leave_the_map_and_are_clamped():
    like = torch.zeros(1)
    torch.testing.assert_close(reference_points(3, 3, True, like)[:, 0, 0], torch.tensor([-0.5, 0.5, 1.5]))
    torch.testing.assert_close(reference_points(3, 3, False, like)[:, 0, 0], torch.tensor([-2 / 3, 0, 2 / 3]))
    still = torch.zeros(1, 2, 3, 3)
    assert key_points(still, None, True).max() == 1
    assert key_points(still, 2.0, True).max() == 1.5


@pytest.mark.parametrize("geometry", ["dat", "dat_pp"])
def test_without_offsets_keys_are_averages_over_the_cells(geometry):
    """The published code crashes here in its first version; in its second, where the stride doesn't divide the map."""
    module = block(geometry, kernel_size=5, stride=2, map_size=None, offsets=False)
    x = torch.randn(1, 16, 6, 8, dtype=torch.float64)
    features = F.avg_pool2d(x, 2)
    q, k, v = (layer(y).flatten(2).unflatten(1, (4, 4)) for layer, y in
               ((module.q, x), (module.k, features), (module.v, features)))  # fmt: skip
    weights = (q.transpose(2, 3) @ k * 0.5).softmax(-1)
    expected = module.proj((v @ weights.transpose(2, 3)).flatten(1, 2).unflatten(2, (6, 8)))
    torch.testing.assert_close(run(module, x), expected)
    assert run(module, torch.randn(1, 16, 7, 5, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("geometry", ["dat", "dat_pp"])
def test_points_stay_float32_in_low_precision(geometry):
    """Half precision could not tell neighboring pixels apart on a large map."""
    module = block(geometry, map_size=(7, 9)).float()
    x = torch.randn(1, 16, 14, 18)
    exact = run(module, x)
    with torch.autocast("cpu", torch.bfloat16):
        points, _ = module.sampled_points(x.permute(0, 2, 3, 1))
        assert points.dtype == torch.float32
        assert not torch.equal(points, points.bfloat16().float())
        assert (run(module, x).float() - exact).abs().mean() < 0.1 * exact.abs().mean()
    low = module.bfloat16()
    assert run(low, x.bfloat16()).dtype == torch.bfloat16
    assert low.sampled_points(x.permute(0, 2, 3, 1).bfloat16())[0].dtype == torch.float32


@pytest.mark.parametrize("geometry", ["dat", "dat_pp"])
@torch.no_grad()
def test_pictures_explain_the_output(geometry):
    """Features read at the returned pixels, weighted by the returned map, are the output."""
    module = block(geometry, kernel_size=3, stride=2, map_size=(6, 9))
    x = torch.randn(1, 16, 6, 9, dtype=torch.float64)
    points, references = module.sampled_points(x.permute(0, 2, 3, 1))
    assert points.shape == (1, 2, 3, 5, 2)
    assert references.shape == (3, 5, 2)
    weights = module.attention_map(x.permute(0, 2, 3, 1))
    assert weights.shape == (1, 4, 6, 9, 3, 5)
    torch.testing.assert_close(weights.sum((4, 5)), torch.ones(1, 4, 6, 9, dtype=torch.float64))
    samples = torch.cat([
        torch.stack([read(x[0, g * 8 : g * 8 + 8], py / 5 * 2 - 1, px / 8 * 2 - 1)
                     for px, py in points[0, g].flatten(0, 1).tolist()], 1)
        for g in range(2)
    ])  # fmt: skip
    v = module.v(samples[None, :, None])[0, :, 0].unflatten(0, (4, 4))
    out = torch.einsum("hyxn,hdn->hdyx", weights[0].flatten(3), v).flatten(0, 1)[None]
    torch.testing.assert_close(module.proj(out), run(module, x))


def test_references_lie_at_the_centres_of_their_cells():
    module = block("dat", kernel_size=3, stride=1, map_size=(4, 4))
    _, references = module.sampled_points(torch.randn(1, 4, 4, 16, dtype=torch.float64))
    torch.testing.assert_close(references[0, :, 0], torch.tensor([0.375, 1.125, 1.875, 2.625], dtype=torch.float64))
    assert (references[..., 1] == references[..., 0].t()).all()


@torch.no_grad()
def test_resampling_the_table_beforehand_or_on_the_way_is_the_same():
    """So that a first-version model at another size is that model made for the size, its weights resampled."""
    x = torch.randn(1, 16, 5, 8)
    module = block("dat", map_size=(7, 7)).float()
    expected = run(module, x)
    module.rpe_table.requires_grad_(False)
    module.set_map_size((5, 8))
    assert module.rpe_table.shape == (4, 9, 15)
    assert not module.rpe_table.requires_grad
    torch.testing.assert_close(run(module, x), expected)


def test_dtypes_and_layouts_agree():
    module = block("dat_pp", map_size=(6, 7)).float()
    x = torch.randn(3, 16, 6, 7)
    out = run(module, x)
    close = dict(atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(run(module, x.contiguous(memory_format=torch.channels_last)), out, **close)
    torch.testing.assert_close(torch.cat([run(module, image[None]) for image in x]), out, **close)
    torch.testing.assert_close(run(module.double(), x.double()).float(), out, **close)


def test_wrong_settings_are_one_line():
    with pytest.raises(ValueError, match="groups to divide num_heads; got dim 12, heads 4, groups 3"):
        DeformableAttention2d(12, 4, groups=3)
    with pytest.raises(ValueError, match="num_heads to divide dim"):
        DeformableAttention2d(10, 4, groups=2)
    with pytest.raises(ValueError, match="no geometry 'v1'; it has 'dat', 'dat_pp'"):
        DeformableAttention2d(16, 4, geometry="v1")


class Strided(nn.Module):
    """An attention on every fourth pixel, which leaves one of a side of four."""

    def __init__(self, options):
        super().__init__()
        torch.manual_seed(0)
        self.attention = DeformableAttention2d(8, 2, 1, 3, 1, (7, 7), **options)

        self.size_axes = 1, 2

    def forward(self, x):
        return self.attention(x[:, ::4, ::4])

    def check_inputs(self):
        return torch.randn(1, 40, 33, 8), torch.randn(1, 21, 18, 8)


def test_files_of_any_size_take_maps_of_one_row_or_column(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = Strided({"offset_range": 2.0}).eval()
    export_model(model, torch.randn(1, 40, 33, 8), tmp_path / "x.onnx", {}, Options(dynamic_size=True))
    run = run_onnx(tmp_path / "x.onnx")
    for size in ((17, 4), (3, 14), (2, 2)):
        x = torch.randn(1, *size, 8)
        with torch.no_grad():
            torch.testing.assert_close(run(x)[0], model(x))


@pytest.mark.parametrize("geometry", ["dat", "dat_pp"])
def test_vmap_is_one_image_after_the_other(geometry):
    attention = DeformableAttention2d(32, 2, groups=2, map_size=(6, 6), geometry=geometry).eval()
    x = torch.randn(3, 6, 6, 32)
    torch.testing.assert_close(torch.vmap(lambda image: attention(image[None])[0])(x), attention(x))


def test_onnx_can_be_written_with_gradients_on(tmp_path):
    pytest.importorskip("onnxscript")
    module, x = DeformableAttention2d(32, 2, map_size=(9, 7)).eval(), torch.randn(2, 9, 7, 32)
    torch.onnx.export(module, (x,), tmp_path / "file.onnx", dynamo=True, verbose=False)
    (out,) = run_onnx(tmp_path / "file.onnx")(x)
    torch.testing.assert_close(out, module(x), atol=1e-5, rtol=1e-5)
