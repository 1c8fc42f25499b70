"""`foveate bench`: tables that agree with what was run, on shapes small enough for a test."""

import copy
import csv

import pytest
import timm
import torch
from foveate.kernels import depthwise_native, na2d
from foveate.kernels.neighborhood.window import Axis
from foveate.tasks import TaskError
from foveate.tasks.cost import count_macs
from foveate.tools import timing
from foveate.tools.bench import exports, gpu, parts
from foveate.tools.bench.deformable import bench_deformable
from foveate.tools.bench.depthwise import KERNELS, bench_depthwise
from foveate.tools.bench.floor import Floor
from foveate.tools.bench.kernels import SIDES, bench_kernels, masked_attention_of, plot
from foveate.tools.bench.models import stated_accuracy
from foveate.tools.bench.parts import kind_of, least_times
from foveate.tools.cli import main
from timm.layers import ScaledStdConv2d
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode


def test_models_are_timed_against_their_peer(tmp_path, capsys):
    argv = ["bench", "models", "nat_atto", "--peer", "resnet10t", "--batch", "1", "--size", "64", "--rounds", "2"]
    assert main([*argv, "--output", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "models.csv").open()))
    assert [row["model"] for row in rows] == ["nat_atto", "resnet10t"]
    assert float(rows[1]["times resnet10t"]) == float(rows[1]["MACs/s times resnet10t"]) == 1.0
    ratios = [float(rows[0][f"{what}times resnet10t"]) for what in ("", "MACs/s ")]
    macs = [float(row["GMACs"]) for row in rows]
    # Each is rounded to 0.001, of which a small model and a slow moment leave few.
    low, high = (
        (ratios[0] + sign * 0.0005) * (macs[0] + sign * 0.0005) / (macs[1] - sign * 0.0005) for sign in (-1, 1)
    )
    assert low - 0.0005 <= ratios[1] <= high + 0.0005
    assert (tmp_path / "models.md").read_text().splitlines()[-1] in capsys.readouterr().out


def test_models_are_measured_in_all_ways_and_sizes(tmp_path):
    argv = ["bench", "models", "nat_atto", "--peers", "resnet10t", "test_vit", "--sizes", "160", "160x192"]
    argv += ["--batches", "1", "2", "--rounds", "1", "--also", "floor", "train", "bfloat16", "latency", "parts"]
    assert main([*argv, "--output", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "models.csv").open()))
    assert [(row["size"], row["batch"]) for row in rows[::3]] == [(s, b) for s in ("160", "160x192") for b in "12"]
    assert [row["model"] for row in rows[:3]] == ["nat_atto", "resnet10t", "test_vit"]
    for row in rows:
        numbers = ("over floor", "training step over forward", "bfloat16 times forward", "ms for one image")
        numbers += ("training step over floor", "all, least ms", "products, least ms")
        numbers += ("all, training, least ms", "products, training, least ms")
        assert all(float(row[column]) > 0 for column in numbers)
        for of in ("least ms", "training, least ms"):  # "between" is negative where a busy machine held up the parts
            least = [float(row[f"{part}, {of}"]) for part in (*parts.KINDS, parts.PASSES, "between")]
            assert sum(least) == pytest.approx(float(row[f"all, {of}"]), abs=0.5)
        assert row["machine moved"].endswith("%")
        assert row["model"] != "resnet10t" or float(row["training steps times resnet10t"]) == 1
    assert (tmp_path / "models.png").stat().st_size > 5_000


def test_a_moving_machine_is_said(monkeypatch, capsys, tmp_path):
    def moving(calls, rounds, device, deadline=None):
        return {key: [0.5, 0.5] for key in calls}, 0.07

    monkeypatch.setattr("foveate.tools.bench.models.sample_calmly", moving)
    argv = ["bench", "models", "nat_atto", "--peers", "resnet10t", "--size", "64", "--quick", "--output", str(tmp_path)]
    assert main(argv) == 0
    assert "the machine was not quiet: beside what was measured the same matrix product took up to 7%" in (
        capsys.readouterr().err
    )
    assert "over floor" not in (tmp_path / "models.md").read_text()


def measure_calmly(monkeypatch, busy, rounds):
    """Sample a call that takes 10 seconds beside products of 1, but more than that in the calls that ``busy`` holds."""
    now, count = [0.0], [0]

    def multiply(x, other):
        now[0] += 1.3 if count[0] in busy else 1.0

    def call():
        count[0] += 1
        now[0] += 20.0 if count[0] in busy else 10.0

    monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
    return timing.sample_calmly({"x": call}, rounds, "cpu", clock=lambda: now[0])


def test_disturbed_samples_are_measured_again(monkeypatch):
    """Two calls warm up and a sample takes two, so that the sixth is the second sample."""
    samples, moved = measure_calmly(monkeypatch, busy={5, 6}, rounds=4)
    assert samples == {"x": [10.0] * 4}
    assert moved == 0


def test_a_machine_that_is_never_calm_is_measured_and_said(monkeypatch):
    samples, moved = measure_calmly(monkeypatch, busy=range(6, 100), rounds=4)
    assert len(samples["x"]) == 4
    assert moved == pytest.approx(0.3)


@pytest.mark.parametrize("name", ["nat_atto", "biformer_tiny", "dat_tiny", "quadtree_b0", "resnet10t"])
def test_the_floor_holds_every_layers_product(name):
    """Multiply-adds of the layers, as their shapes say, are those of what is replayed."""
    model = timm.create_model(name).eval()
    floor = Floor(model, torch.randn(1, 3, 224, 224))
    expected = sum(isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) for layer in model.modules())
    assert len({id(layer) for layer, _ in floor.operators}) == expected
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        floor()
    macs = count_macs(copy.deepcopy(model).to("meta"), (3, 224, 224))
    assert 0.75 < counter.get_total_flops() / 2 / macs <= 1


@pytest.mark.parametrize("name", ["nat_atto", "resnet10t"])
def test_the_floor_of_training_holds_every_gradient(name):
    """As many multiply-adds again for the gradients of weights, and of inputs, where these are not the images."""
    model, images = timm.create_model(name).train(), torch.randn(2, 3, 64, 64)
    counts = {}
    for train in (False, True):
        floor = Floor(model, images, train)
        with torch.set_grad_enabled(train), FlopCounterMode(display=False) as counter:
            floor()
        counts[train] = counter.get_total_flops()
    first, x = floor.operators[0]
    with FlopCounterMode(display=False) as counter:
        first._conv_forward(x.detach(), first.weight, None)
    assert counts[True] == 3 * counts[False] - counter.get_total_flops()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_floor_of_training_leaves_out_what_is_frozen_or_not_of_the_product():
    frozen, scaled = torch.nn.Linear(4, 4).requires_grad_(False), ScaledStdConv2d(4, 6, 1)
    model = torch.nn.Sequential(frozen, torch.nn.Unflatten(1, (4, 1, 1)), scaled)
    floor = Floor(model, torch.randn(2, 4), train=True)
    with FlopCounterMode(display=False) as counter:
        floor()
    # A product of the frozen layer, and of the other the gradient of its weight alone; each counts twice.
    assert counter.get_total_flops() == 2 * (2 * 4 * 4 + 2 * (2 * 4 * 6))


@pytest.mark.parametrize(
    ("operators", "kind"),
    [
        (["aten::linear", "aten::conv2d", "mkldnn::_linear_pointwise", "foveate::depthwise"], "products"),
        (["foveate::neighborhood_native", "aten::scaled_dot_product_attention", "aten::bmm"], "attention"),
        (["aten::mm", "aten::convolution_backward"], "products"),
        (["aten::layer_norm", "aten::native_group_norm", "aten::native_layer_norm_backward"], "norms"),
        (["aten::add.Tensor", "aten::gelu_", "aten::clone", "aten::topk"], "passes"),
    ],
)
def test_operators_are_told_apart(operators, kind):
    assert {kind_of(operator) for operator in operators} == {kind}


@pytest.mark.parametrize("train", [False, True])
def test_a_pass_is_the_sum_of_its_parts(train):
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.Sigmoid())
    seconds = least_times(layers, torch.randn(512, 64), runs=3, train=train)
    assert all(parameter.grad is None for parameter in layers.parameters())
    assert list(seconds) == ["all", "products", "attention", "norms", "passes", "between"]
    assert sum(seconds.values()) == pytest.approx(2 * seconds["all"])
    assert seconds["attention"] == 0
    assert min(seconds["products"], seconds["norms"], seconds["passes"]) > 0


def test_accuracy_is_the_authors():
    assert stated_accuracy("nat_tiny") == 83.2
    assert stated_accuracy("resnet10t") is None


@pytest.mark.heavy
def test_models_are_timed_with_a_compiler(tmp_path):
    argv = ["bench", "models", "nat_atto", "--peers", "resnet10t", "--size", "64", "--rounds", "1"]
    assert main([*argv, "--also", "compile", "freeze", "--output", str(tmp_path)]) == 0
    for row in csv.DictReader((tmp_path / "models.csv").open()):
        assert min(float(row["compile times forward"]), float(row["freeze times forward"])) > 0


@pytest.mark.heavy
def test_detectors_are_timed_against_torchvision(tmp_path):
    argv = ["bench", "detectors", "resnet10t", "--image", "64", "96", "--rounds", "1", "--output", str(tmp_path)]
    assert main(argv) == 0
    ours, theirs = csv.DictReader((tmp_path / "detectors.csv").open())
    assert ours["detections"] == theirs["detections"] == "100"
    assert float(theirs["times torchvision's time"]) == 1.0


@pytest.mark.heavy
def test_dino_is_timed_by_parts(tmp_path):
    argv = ["bench", "detectors", "resnet10t", "--head", "dino", "--image", "96", "128", "--rounds", "1"]
    assert main([*argv, "--output", str(tmp_path)]) == 0
    rows = {row["part"]: row for row in csv.DictReader((tmp_path / "detectors.csv").open())}
    assert {"backbone", "encoder", "decoder"} < rows.keys()
    assert float(rows["encoder, forward and backward"]["times grid_sample's memory"]) < 0.7
    assert float(rows["encoder, forward and backward, by grid_sample"]["times grid_sample's time"]) == 1.0


def test_deformable_attention_is_timed_against_grid_sample():
    rows = bench_deformable([64], 1, "cpu")
    assert {row["path"].removesuffix(" (chosen)") for row in rows} >= {"bags", "gathers", "grid_sample"}
    assert any(row["path"].endswith(" (chosen)") for row in rows)
    assert {row["pass"] for row in rows} == {"forward", "forward+backward"}
    assert all(row["ms"] > 0 for row in rows)


def test_transnext_agrees_with_its_formulas_before_it_is_timed(tmp_path):
    argv = ["bench", "aggregated", "transnext_micro", "--sizes", "64x96", "--batch", "1", "--rounds", "1"]
    assert main([*argv, "--output", str(tmp_path)]) == 0
    ours, theirs = csv.DictReader((tmp_path / "aggregated.csv").open())
    assert (ours["path"], theirs["path"], theirs["times as fast"], theirs["of the memory"]) == (
        "ours",
        "unfolded",
        "1.0",
        "1.0",
    )


def test_depthwise_convolutions_are_timed_against_torchs():
    rows = bench_depthwise([(8, 9)], 1, 1, "cpu")
    assert {row["kernel"] for row in rows} == set(KERNELS)
    trained = {"trained"} if depthwise_native.obstacle() is None else set()
    assert {row["path"] for row in rows} == {"interleaved", "channels_last", "convolution"} | trained
    assert all(row["ms"] > 0 and row["torch ms"] > 0 for row in rows)


@pytest.mark.parametrize("backward", [False, True])
def test_kernels_agree_before_they_are_timed(backward):
    rows = bench_kernels([(1, 9, 8, 2, 8, 3)], 1, "cpu", flex=False, backward=backward, dtype=torch.float32)
    assert {row["path"] for row in rows} >= {"tiled", "gather"}
    assert all(row["ms"] > 0 for row in rows)
    assert all(("over floor" in row) != backward for row in rows)
    assert backward or all(row["over floor"] > 0 for row in rows)


def test_dense_attention_under_a_mask_is_that_of_the_windows():
    query, key, value = torch.randn(3, 2, 9, 8, 2, 8).unbind()
    dense = masked_attention_of((Axis(9, 3), Axis(8, 3)), query, [SDPBackend.MATH])
    torch.testing.assert_close(dense(query, key, value), na2d(query, key, value, 3, backend="reference"))


@pytest.fixture
def small_parts(monkeypatch):
    """`foveate bench gpu` of small things, which CPUs can do too."""
    monkeypatch.setattr(gpu, "GPU_SHAPES", [(1, 9, 8, 2, 8, 3)])
    monkeypatch.setattr(gpu, "MODELS", ["nat_atto"])
    monkeypatch.setattr(gpu, "BATCH", 1)
    monkeypatch.setattr(gpu, "SIDE", 64)
    monkeypatch.setattr(gpu, "EXTRAS", ["latency"])
    return ["bench", "gpu", "--device", "cpu", "--no-flex", "--rounds", "1", "--peers", "resnet10t"]


def test_models_are_timed_in_half_precision(tmp_path):
    argv = ["bench", "models", "nat_atto", "--peers", "test_vit", "--dtype", "bfloat16", "--size", "160"]
    assert main([*argv, "--rounds", "1", "--also", "memory", "--output", str(tmp_path)]) == 0
    for row in csv.DictReader((tmp_path / "models.csv").open()):
        assert min(float(row["GMACs"]), float(row["images/s"]), float(row["peak MB"])) > 0


def test_a_short_visit_to_a_gpu_leaves_a_table_of_each_part(small_parts, monkeypatch, tmp_path, capsys):
    def fail(names, *args):
        raise RuntimeError("out of registers\nand more")

    assert main([*small_parts, "--output", str(tmp_path / "whole")]) == 0
    tables = {path.stem: list(csv.DictReader(path.open())) for path in (tmp_path / "whole").glob("*.csv")}
    assert tables.keys() == {"gpu", "gpu_kernels", "gpu_models"}
    assert {row["state"] for row in tables["gpu"]} == {"measured"}
    assert {row["pass"] for row in tables["gpu_kernels"]} == {"forward", "forward+backward"}
    assert [row["model"] for row in tables["gpu_models"]] == ["nat_atto", "resnet10t"]

    monkeypatch.setattr(gpu, "bench_models", fail)
    assert main([*small_parts, "--output", str(tmp_path / "failing")]) == 0
    states = {row["part"]: row["state"] for row in csv.DictReader((tmp_path / "failing" / "gpu.csv").open())}
    assert states.pop("nat_atto") == "failed: RuntimeError: out of registers"
    assert set(states.values()) == {"measured"}
    assert (tmp_path / "failing" / "gpu_kernels.md").exists()


def test_no_part_begins_when_the_time_is_up(small_parts, tmp_path):
    assert main([*small_parts, "--minutes", "0", "--output", str(tmp_path)]) == 0
    assert {row["state"] for row in csv.DictReader((tmp_path / "gpu.csv").open())} == {"left out: the time is up"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_at_once(capsys):
    assert main(["bench", "gpu"]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err


def test_plot_of_the_sweep_is_written(tmp_path):
    rows = [{"path": "tiled", "shape": f"1x{side}x{side}x2x32 k7", "ms": side / 10} for side in SIDES]
    plot(rows, tmp_path / "kernels.png", "title")
    assert (tmp_path / "kernels.png").stat().st_size > 5_000


def test_unknown_models_are_answered_with_the_nearest(capsys):
    assert main(["bench", "models", "nat_tinny"]) == 2
    assert "did you mean 'nat_tiny'" in capsys.readouterr().err


def test_the_table_of_exports_is_written_after_each_model(tmp_path, capsys, monkeypatch):
    def measured(name, batch, size, rounds):
        if name == "dinat_mini":
            raise TaskError("a later one fails")
        return [{"model": name, "runtime": "torch eager", "times eager": 1.0}]

    monkeypatch.setattr(exports, "bench_exports", measured)
    assert main(["bench", "exports", "nat_atto", "dinat_mini", "--output", str(tmp_path)]) == 2
    assert "| nat_atto | torch eager | 1.0 |" in capsys.readouterr().out
    assert [row["model"] for row in csv.DictReader((tmp_path / "exports.csv").open())] == ["nat_atto"]


@pytest.mark.heavy
def test_exports_are_timed_against_eager(tmp_path):
    argv = ["bench", "exports", "nat_atto", "--batch", "1", "--size", "64", "--rounds", "1", "--output", str(tmp_path)]
    assert main(argv) == 0
    rows = list(csv.DictReader((tmp_path / "exports.csv").open()))
    assert [row["runtime"] for row in rows][:4] == ["torch eager", "torch.compile", "onnxruntime", "onnxruntime int8"]
    assert float(rows[0]["times eager"]) == 1.0
