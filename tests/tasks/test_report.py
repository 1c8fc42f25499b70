"""What is left of a run can be sent: one file that fetches nothing."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from foveate.tasks import engine
from foveate.tasks.data.coco import encode_mask
from foveate.tasks.metrics.classes import measure_objects
from foveate.tasks.pictures.report import write_report
from foveate.tools.cli import main
from PIL import Image


class Reader(HTMLParser):
    """Cells of the tables, sources of the pictures, and tags that are open at the end."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.sources, self.open, self.titles = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.sources.append(dict(attributes)["src"])
        elif tag not in ("meta", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)
        elif self.open and self.open[-1] == "h2":
            self.titles.append(data)


def test_a_run_and_an_evaluation_leave_a_report(config_file, tmp_path, capsys):
    config = engine.load_config(config_file, ["epochs=2"])
    result = engine.train(config, tmp_path / "run", progress=False)
    page = Reader(text := (tmp_path / "run" / "report.html").read_text())
    assert not page.open
    assert len(page.sources) == len(result["pictures"]) == 4
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"https?://|<script|<link", text)
    assert {"accuracy", "f1", "precision", "recall", "bright", "dark"} <= set(page.cells)
    assert "again" in page.cells
    assert "schedule = dict(" in text
    argv = ["eval", str(config_file), str(result["best"]), "--output", str(tmp_path / "eval")]
    assert main([*argv, "--json", str(tmp_path / "metrics.json")]) == 0
    page = Reader((tmp_path / "eval" / "report.html").read_text())
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert f"{metrics['accuracy']:.4f}" in page.cells
    assert len(page.sources) == 3
    assert str(result["best"]) in page.cells


def test_names_are_no_markup_and_long_tables_are_cut(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    rows = [{"class": f"<b>{index}", "ap": index / 500 if index else float("nan")} for index in range(500)]
    write_report(
        tmp_path / "report.html", "A & B", {"x": "<i>"}, {"ap": 0.5}, rows, [("a.png", "a picture")], "a = '<'"
    )
    page = Reader((tmp_path / "report.html").read_text())
    assert "<b>499" in page.cells
    assert "300 more" in page.cells
    assert len([cell for cell in page.cells if cell.startswith("<b>")]) == 200
    assert page.titles == ["Measured", "A picture", "By class", "Settings"]


def test_objects_are_measured_by_class():
    box = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    mask = np.zeros((40, 40), np.uint8)
    mask[:10, :10] = 1
    masks = [encode_mask(mask), encode_mask(np.roll(mask, (20, 20), (0, 1)))]
    truth = {"boxes": box.double(), "labels": torch.tensor([0, 2]), "iscrowd": torch.tensor([0, 0]), "size": (40, 40)}
    truth |= {"area": torch.tensor([100.0, 100.0]), "masks": masks}
    detections = {"boxes": box[:1], "labels": torch.tensor([0]), "scores": torch.tensor([0.9]), "masks": masks[:1]}
    rows = measure_objects([detections], [truth], ["cat", "dog", "bird"], ("box", "mask"))
    assert [row["class"] for row in rows] == ["cat", "dog", "bird"]
    assert [row["objects"] for row in rows] == [1, 0, 1]
    for kind in ("box ap", "mask ap"):
        assert [row[kind] for row in rows] == pytest.approx([1, float("nan"), 0], nan_ok=True)
