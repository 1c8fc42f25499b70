"""`foveate attend IMAGE` and ``--table``: pictures, the numbers beside them, and a row for each head."""

import csv
import json

import numpy as np
import pytest
from foveate.tools.cli import main
from PIL import Image

MODEL = ["--model", "nat_atto", "--untrained"]


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return str(path)


def test_a_picture_has_its_numbers_beside_it(photo, tmp_path, capsys):
    output = ["--output", str(tmp_path)]
    assert main(["attend", photo, *MODEL, "--at", "20,30", "31,0", "--layers", "stages.1.*", *output]) == 0
    assert (tmp_path / "photo_query.png").stat().st_size > 10_000
    told = json.loads((tmp_path / "photo_query.json").read_text())
    assert told["skipped"] == {}
    arrays = np.load(tmp_path / "photo_query.npz")
    assert [query["at"] for query in told["queries"][:1]] == [[20.0, 30.0]]
    for query in told["queries"]:
        assert query["check"] < 1e-5
        assert query["map"] == [4, 4]
    name = f"1.{told['queries'][0]['layer']}"
    weights = arrays[name].mean(0)
    best = told["queries"][len(told["queries"]) // 2]["best"][0]
    assert best["weight"] == pytest.approx(weights.max(), abs=1e-6)
    assert weights[best["row"], best["column"]] == weights.max()


def test_a_table_has_a_row_for_each_head(photo, tmp_path):
    assert main(["attend", photo, "--table", *MODEL, "--layers", "stages.2.*.0.*", "--output", str(tmp_path)]) == 0
    with (tmp_path / "heads.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["head"] for row in rows] == [str(head) for head in range(4)]
    assert all(float(row["entropy (bits)"]) <= float(row["of"]) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say what to do"),
        (["PHOTO"], "name one model"),
        (["PHOTO", *MODEL, "--at", "here"], "must be X,Y in pixels"),
        (["PHOTO", *MODEL, "--at", "224,0"], "is not on it"),
        (["PHOTO", *MODEL, "--animate", "5"], "at least 2 places"),
        (["PHOTO", *MODEL, "--layers", "stage.*"], "no module of NAT is named"),
        (["PHOTO", "--evaluate"], "neither an IMAGE"),
    ],
)
def test_what_cant_be_done_is_said(arguments, words, photo, capsys):
    assert main(["attend", *(photo if word == "PHOTO" else word for word in arguments)]) == 2
    assert words in capsys.readouterr().err
