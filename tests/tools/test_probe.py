"""`foveate probe` and `foveate embed`: tables and files that are right, errors that name the cause."""

import csv
import sys

import numpy as np
import pytest
import torch
from foveate.tasks.data.classification import Digits
from foveate.tools.cli import main
from foveate.tools.embed import _write_parquet

ARGUMENTS = ("--untrained", "--size", "32", "--seeds", "2", "--epochs", "3", "--k", "5", "--workers", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digits 0 and 1 as training and held-out images, two channels short of what models take."""
    root = tmp_path_factory.mktemp("digits")
    for split, count in (("train", 60), ("val", 30)):
        digits = Digits(split)
        for index in [index for index, label in enumerate(digits.targets) if label < 2][:count]:
            file = root / split / f"class_{digits.targets[index]}" / f"{index:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            digits.image(index).save(file)
    return root


def rows(output):
    with (output / "probe.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_models_are_probed_side_by_side_and_features_made_once(folder, tmp_path, capsys, monkeypatch):
    argv = ["probe", str(folder), "--models", "nat_atto,vit_tiny_patch16_224", *ARGUMENTS, "--output", str(tmp_path)]
    assert main(argv) == 0
    first = rows(tmp_path)
    assert [row["model"] for row in first] == ["nat_atto", "vit_tiny_patch16_224"]
    assert first[1]["tokens"] == "4 x 192"
    assert all(float(row["k-NN"]) > 90 for row in first)
    assert all("±" in row["linear"] and "±" in row["attentive"] for row in first)
    assert "nat_atto: seed 1: linear" in capsys.readouterr().out

    # No image is read again.
    monkeypatch.setattr("foveate.tasks.data.class_folder.read_image", None)
    assert main([*argv, "--probes", "attentive,knn"]) == 0
    again = rows(tmp_path)
    assert "linear" not in again[0]
    assert [(row["k-NN"], row["attentive"]) for row in again] == [(row["k-NN"], row["attentive"]) for row in first]


def test_a_file_that_changed_is_read_again(folder, tmp_path):
    argv = ["probe", str(folder), "--models", "nat_atto", *ARGUMENTS, "--probes", "knn", "--output", str(tmp_path)]
    assert main(argv) == 0
    file = next((folder / "val").glob("*/*.png"))
    file.write_bytes(file.read_bytes() + b"\0")
    assert main(argv) == 0
    assert len(list((tmp_path / "features").glob("*/facts.json"))) == 3


def test_the_published_recipe_sees_augmented_images(folder, tmp_path):
    argv = ["probe", str(folder), "--models", "nat_atto", *ARGUMENTS, "--published", "--batch", "16"]
    assert main([*argv, "--seeds", "1", "--output", str(tmp_path)]) == 0
    (row,) = rows(tmp_path)
    assert 0 <= float(row["linear"]) <= 100
    # Of training images nothing is kept but what k-NN needs, and that serves a linear probe.
    assert len(list((tmp_path / "features").glob("*/with_tokens"))) == 1
    argv = ["probe", str(folder), "--models", "nat_atto", *ARGUMENTS, "--probes", "linear", "--output", str(tmp_path)]
    assert main(argv) == 0
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_a_trained_classifier_s_own_input_is_used(digits_run, tmp_path):
    argv = ["probe", "digits", "--models", str(digits_run / "best.pth"), "--probes", "knn", "--output", str(tmp_path)]
    assert main(argv) == 0
    assert float(rows(tmp_path)[0]["k-NN"]) > 90


def test_what_cannot_be_probed_is_told(folder, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ("--models", "nat_atto", *ARGUMENTS)
    assert "nowhere: no such folder" in refused("probe", "nowhere", *base)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert "empty/train: holds no folder; each class needs one" in refused("probe", "empty", *base)
    message = refused("probe", str(folder), "--models", "nat_atto,nat_tinny", *ARGUMENTS)
    assert "unknown model 'nat_tinny'; did you mean 'nat_tiny'?" in message
    for split in ("train", "val"):
        (tmp_path / "one" / split / "cat").mkdir(parents=True)
        Digits("val").image(0).save(tmp_path / "one" / split / "cat" / "a.png")
    assert "one: has one class, 'cat'" in refused("probe", "one", *base)
    for split in ("train", "val"):
        (tmp_path / "one" / split / "dog").mkdir(parents=True)
        (tmp_path / "one" / split / "dog" / "bad.png").write_bytes(b"no image")
    assert "dog/bad.png: not an image, or damaged" in refused("probe", "one", *base)
    assert "foveate_host_atto: no weights were published; give a checkpoint, or --untrained" in refused(
        "probe", str(folder), "--models", "foveate_host_atto"
    )
    assert "unknown probe 'lineer'; did you mean 'linear'?" in refused("probe", "one", *base, "--probes", "lineer")
    assert "queries that fit: 32, 64, 16" in refused("probe", str(folder), *base, "--queries", "48")
    assert "--lr is -1.0, but must be 0 or more" in refused("probe", str(folder), *base, "--lr", "-1")


def test_embeddings_are_those_of_the_model(folder, tmp_path, capsys):
    output = tmp_path / "out" / "e.npz"
    argv = ["embed", str(folder / "val"), "--model", "nat_atto", "--untrained", "--size", "32", "--output", str(output)]
    assert main(argv) == 0
    assert "30 embeddings of 128 numbers" in capsys.readouterr().out
    written = np.load(output)
    assert written["embeddings"].shape == (30, 128)
    assert written["paths"][0].startswith("class_0/")
    assert str(written["model"]) == "nat_atto"
    # Files of one class lie nearer to each other.
    vectors = torch.nn.functional.normalize(torch.from_numpy(written["embeddings"]), dim=1)
    labels = torch.tensor([path.startswith("class_1") for path in written["paths"]])
    nearest = (vectors @ vectors.T - 2 * torch.eye(30)).argmax(1)
    assert (labels[nearest] == labels).float().mean() > 0.9


def test_what_cannot_be_embedded_is_told(tmp_path, refused, capsys, monkeypatch):
    base = ("--model", "nat_atto", "--untrained", "--size", "32")
    output = str(tmp_path / "e.npz")
    assert "none: no such folder" in refused("embed", str(tmp_path / "none"), *base, "--output", output)
    assert "no image in this folder" in refused("embed", str(tmp_path), *base, "--output", output)
    Digits("val").image(0).save(tmp_path / "good.png")
    assert ".npz or .parquet" in refused("embed", str(tmp_path), *base, "--output", str(tmp_path / "e.csv"))
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert "bad.png: not an image, or damaged" in refused("embed", str(tmp_path), *base, "--output", output)
    assert np.load(output)["paths"].tolist() == ["good.png"]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = refused("embed", str(tmp_path), *base, "--output", str(tmp_path / "e.parquet"))
    assert "needs pyarrow, which isn't installed: pip install pyarrow, or write .npz" in message


def test_parquet_is_read_by_others(folder, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    base = ["embed", str(folder / "val"), "--model", "nat_atto", "--untrained", "--size", "32", "--output"]
    assert main([*base, str(tmp_path / "e.parquet")]) == 0
    assert main([*base, str(tmp_path / "e.npz")]) == 0
    table, expected = parquet.read_table(tmp_path / "e.parquet"), np.load(tmp_path / "e.npz")
    assert table["path"].to_pylist() == expected["paths"].tolist()
    assert np.array_equal(np.array(table["embedding"].to_pylist(), np.float32), expected["embeddings"])


def test_names_of_files_that_are_no_utf8_reach_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    _write_parquet(str(tmp_path / "e.parquet"), ["\udcffä.png"], np.zeros((1, 2), np.float32), "a model")
    assert parquet.read_table(tmp_path / "e.parquet")["path"].to_pylist() == [r"\udcffä.png"]
