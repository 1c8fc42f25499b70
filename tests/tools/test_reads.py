"""A published dense file is located once and read once, whoever asks for it."""

from collections import Counter

import foveate
import pytest
import safetensors
import timm
import torch
from foveate.tools.cli import main
from foveate.zoo import weights
from PIL import Image

SMALL = {"retinanet": {"channels": 16}, "upernet": {"channels": 16}}


def create(head, backbone, **options):
    make = foveate.create_detector if head == "retinanet" else foveate.create_segmenter
    return make(head, backbone, **options)


@pytest.fixture
def counted(monkeypatch):
    """How often files are located, and how often each is read."""
    reads = Counter()
    load, safe_open, located = torch.load, safetensors.safe_open, weights._located
    monkeypatch.setattr(torch, "load", lambda path, **options: reads.update([str(path)]) or load(path, **options))
    monkeypatch.setattr(safetensors, "safe_open", lambda path, *how: reads.update([str(path)]) or safe_open(path, *how))
    monkeypatch.setattr(weights, "_located", lambda text, where: reads.update(["located"]) or located(text, where))
    return reads


@pytest.fixture
def file(request, tmp_path):
    """A dense model's file: of ours, or with the backbone as another library has it."""
    head, backbone, ours = request.param
    state = create(head, backbone, num_classes=3, **SMALL[head]).state_dict()
    if not ours:
        state = {key: value for key, value in state.items() if not key.startswith("backbone.")}
        state |= {
            f"backbone.{key}": value for key, value in timm.create_model(backbone, num_classes=0).state_dict().items()
        }
    torch.save({"state_dict": state}, tmp_path / "dense.pth")
    return head, backbone, tmp_path / "dense.pth"


CASES = [
    ("retinanet", "nat_atto", True),
    ("retinanet", "nat_atto", False),
    ("retinanet", "resnet18", False),
    ("upernet", "nat_atto", False),
    ("upernet", "resnet18", True),
]


@pytest.mark.parametrize("file", CASES, indirect=True, ids=str)
def test_a_dense_model_reads_its_file_once(file, counted):
    head, backbone, path = file
    model = create(head, backbone, checkpoint=path)
    assert all(".out_norms." in key for key in model.load_report.missing)  # a classifier has none
    assert counted == {"located": 1, str(path): 1}


@pytest.mark.parametrize("file", CASES[1:3], indirect=True, ids=str)
def test_a_file_that_comes_from_afar_is_read_as_it_comes(file, counted, tmp_path, monkeypatch):
    head, backbone, path = file
    name = f"{backbone}.demo"
    source = weights.Source("authors", "listed", "https://nowhere.invalid/dense.pth", file="dense.pth")
    monkeypatch.setattr(weights, "table", lambda: {name: weights.Weights(name, "detect", "coco", (source,), "")})
    monkeypatch.setenv("FOVEATE_WEIGHTS_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "mirror" / name).mkdir(parents=True)
    there = path.rename(tmp_path / "mirror" / name / "dense.pth")
    assert create(head, backbone, checkpoint=name).load_report.matched > 50
    assert counted == {"located": 1, str(there): 1}


@pytest.mark.parametrize("file", [CASES[1], CASES[4]], indirect=True, ids=str)
def test_a_command_reads_its_file_once(file, counted, tmp_path, capsys):
    head, backbone, path = file
    Image.new("RGB", (97, 65), "teal").save(tmp_path / "photo.png")
    main(["weights", "verify", str(path), "--model", backbone, "--images", str(tmp_path / "photo.png")])
    assert f"model      {backbone}, {head}\n" in capsys.readouterr().out
    assert counted == {"located": 1, str(path): 1}

    counted.clear()
    main(["weights", "convert", str(path), str(converted := tmp_path / "dense.safetensors"), "--model", backbone])
    assert counted == {"located": 1, str(path): 1}

    counted.clear()
    main(["predict", str(tmp_path / "photo.png"), "--checkpoint", str(converted), "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "photo.png").is_file()
    assert counted[str(converted)] == 1
