"""`foveate bench`: tables that agree with what was run, on shapes small enough for a test."""

import csv

import pytest
import torch
from foveate.tools.bench.deformable import bench_deformable
from foveate.tools.bench.depthwise import LARGE_KERNELS, bench_depthwise
from foveate.tools.bench.kernels import SIDES, bench_kernels, plot
from foveate.tools.cli import main


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


def test_depthwise_convolutions_are_timed_against_torchs():
    rows = bench_depthwise([(8, 9)], 1, 1, "cpu")
    assert {row["kernel"] for row in rows} == set(LARGE_KERNELS)
    assert {row["path"] for row in rows} == {"interleaved", "channels_last", "convolution"}
    assert all(row["ms"] > 0 and row["torch ms"] > 0 for row in rows)


@pytest.mark.parametrize("backward", [False, True])
def test_kernels_agree_before_they_are_timed(backward):
    rows = bench_kernels([(1, 9, 8, 2, 8, 3)], 1, "cpu", flex=False, backward=backward, dtype=torch.float32)
    assert {row["path"] for row in rows} >= {"tiled", "gather"}
    assert all(row["ms"] > 0 for row in rows)


def test_plot_of_the_sweep_is_written(tmp_path):
    rows = [{"path": "tiled", "shape": f"1x{side}x{side}x2x32 k7", "ms": side / 10} for side in SIDES]
    plot(rows, tmp_path / "kernels.png", "title")
    assert (tmp_path / "kernels.png").stat().st_size > 5_000


def test_unknown_models_are_answered_with_the_nearest(capsys):
    assert main(["bench", "models", "nat_tinny"]) == 2
    assert "did you mean 'nat_tiny'" in capsys.readouterr().err


@pytest.mark.heavy
def test_exports_are_timed_against_eager(tmp_path):
    argv = ["bench", "exports", "nat_atto", "--batch", "1", "--size", "64", "--rounds", "1", "--output", str(tmp_path)]
    assert main(argv) == 0
    rows = list(csv.DictReader((tmp_path / "exports.csv").open()))
    assert [row["runtime"] for row in rows][:4] == ["torch eager", "torch.compile", "onnxruntime", "onnxruntime int8"]
    assert float(rows[0]["times eager"]) == 1.0
