"""Sampling between pixels: the points of torchvision's deformable convolution, by both ways; gradients, bad points."""

import pytest
import torch
from foveate.kernels.bilinear import bilinear_backends, sample_bilinear
from torchvision.ops import deform_conv2d


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 7, 6, generator=generator, dtype=dtype)
    rows = 12 * torch.rand(2, 40, generator=generator, dtype=dtype) - 3
    columns = 14 * torch.rand(2, 40, generator=generator, dtype=dtype) - 3
    # Points on the border, where a wrong rule shows.
    rows[:, :6] = torch.tensor([-1, -0.5, 0, 4, 4.5, 5.0], dtype=dtype)
    columns[:, 6:12] = torch.tensor([-1, -0.5, 0, 6, 6.5, 7.0], dtype=dtype)
    return x, rows, columns


@pytest.mark.parametrize("backend", ["bags", "gather"])
def test_points_are_those_of_deformable_convolution(backend):
    x, rows, columns = problem()
    offset = torch.stack([rows, columns], 1)[:, :, None] - torch.zeros(1)
    for b in range(2):
        # A 1x1 convolution of the identity whose every output pixel reads one of the points.
        for point in range(0, 40, 3):
            here = offset[b : b + 1, :, :, point : point + 1].expand(-1, -1, 5, 7).clone()
            here[:, 0] -= torch.arange(5.0)[:, None]
            here[:, 1] -= torch.arange(7.0)
            expected = deform_conv2d(x[b : b + 1].permute(0, 3, 1, 2), here, torch.eye(6)[:, :, None, None])[0, :, 0, 0]
            actual = sample_bilinear(x, rows, columns, backend)[b, point]
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_bags_are_the_gather_and_chosen_without_gradients():
    x, rows, columns = problem()
    torch.testing.assert_close(sample_bilinear(x, rows, columns, "bags"), sample_bilinear(x, rows, columns, "gather"))
    assert bilinear_backends(x, rows, columns) == {"bags": "can run", "gather": "chosen"}
    with torch.no_grad():
        assert bilinear_backends(x, rows, columns)["bags"] == "chosen"
    with pytest.raises(ValueError, match="has no backend 'xyz'"):
        sample_bilinear(x, rows, columns, "xyz")


def test_gradients_of_both_orders():
    x, rows, columns = (y[:, :12, :4].clone().requires_grad_() if y.ndim == 4 else y for y in problem(torch.float64))
    rows = (rows[:, 12:20] + 0.013).requires_grad_()
    columns = (columns[:, 12:20] + 0.017).requires_grad_()
    assert torch.autograd.gradcheck(sample_bilinear, (x, rows, columns))
    assert torch.autograd.gradgradcheck(sample_bilinear, (x, rows, columns))


@pytest.mark.parametrize("backend", ["bags", "gather"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_bad_points_read_nothing_else(backend, bad):
    x, rows, columns = problem()
    expected = sample_bilinear(x, rows, columns, backend)
    rows[1, 20] = bad
    out = sample_bilinear(x, rows, columns, backend)
    assert not out[1, 20].isfinite().any() or not out[1, 20].any()
    out[1, 20] = expected[1, 20]
    torch.testing.assert_close(out, expected)


def test_half_precision_reads_at_exact_points():
    x, rows, columns = problem()
    out = sample_bilinear(x.bfloat16(), rows, columns)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), sample_bilinear(x, rows, columns), rtol=2e-2, atol=2e-2)


class Reads(torch.nn.Module):
    def forward(self, x, rows, columns):
        return sample_bilinear(x, rows, columns)


def test_an_exported_graph_reads_the_same_in_few_operators():
    x, rows, columns = torch.randn(2, 5, 7, 3), torch.rand(2, 30) * 9 - 2, torch.rand(2, 30) * 11 - 2
    rows[0, :6] = torch.tensor([float("nan"), float("inf"), -1e30, 1e30, 0.0, 4.0])
    columns[0, 6:9] = torch.tensor([float("nan"), -float("inf"), 6.0])
    program = torch.export.export(Reads(), (x, rows, columns))
    expected = sample_bilinear(x, rows, columns, "gather")
    assert expected.isnan().any()
    torch.testing.assert_close(program.module()(x, rows, columns), expected, rtol=0, atol=0, equal_nan=True)
    assert sum(node.op == "call_function" for node in program.graph.nodes) < 70
