"""Doors by kinds of file: what is claimed is filled, ours are read by every command, others are refused in a line."""

import json
import pickle
from pathlib import Path

import foveate
import numpy as np
import pytest
import timm
import torch
from foveate.tasks.classify import create_classifier
from foveate.tools.cli import main
from foveate.zoo import CheckpointError
from foveate.zoo.checkpoint import open_checkpoint
from PIL import Image

SMALL = {"retinanet": {"channels": 16}, "upernet": {"channels": 16}}
# Backbones of ours and of timm's, with features of each kind.
BACKBONES = ("nat_atto", "resnet18", "test_convnext")


def create(head: str, backbone, **options):
    make = foveate.create_detector if head == "retinanet" else foveate.create_segmenter
    return make(head, backbone, **options)


def published(model, backbone: str) -> dict[str, torch.Tensor]:
    """A dense model's file with the heads' names of ours and the backbone's as its own library has them."""
    whole = timm.create_model(backbone).state_dict()
    heads = {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.")}
    body = {
        f"backbone.{key}": torch.rand_like(value) if value.is_floating_point() else value
        for key, value in whole.items()
    }
    return heads | {key: value for key, value in body.items() if not key.startswith(("backbone.head", "backbone.fc"))}


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (97, 65), "teal").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# ---------------------------------------------------------------------------------------------- the backbone of a file
@pytest.mark.parametrize("head", SMALL)
@pytest.mark.parametrize("backbone", ["resnet18", "test_convnext"])
def test_a_dense_file_fills_a_backbone_of_timm_and_the_report_counts_the_whole_model(head, backbone, tmp_path):
    path = tmp_path / "dense.pth"
    state = published(create(head, backbone, num_classes=3, **SMALL[head]), backbone)
    torch.save({"state_dict": state}, path)
    model = create(head, backbone, checkpoint=path)
    loaded = model.backbone.state_dict()
    flat = {key.removeprefix("backbone.").replace(".", "_"): value for key, value in state.items()}
    for key, value in loaded.items():
        assert torch.equal(value, flat[key.removeprefix("features.").replace(".", "_")])
    counted = model.load_report.matched + len(model.load_report.missing)
    assert counted == len(model.state_dict())
    assert model.load_report.missing == ()


@pytest.mark.parametrize("head", SMALL)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_dense_file_whose_backbone_is_anothers_is_refused_and_named(head, backbone, tmp_path, refused):
    """Today's fault: 36 entries matched, and a random backbone."""
    path, output = tmp_path / "dense.pth", str(tmp_path / "out.safetensors")
    state = published(create(head, backbone, num_classes=3, **SMALL[head]), backbone)
    foreign = {key.replace("backbone.", "backbone.trunk."): value for key, value in state.items()}
    torch.save({"state_dict": foreign}, path)
    doors = {
        "create": lambda: create(head, backbone, checkpoint=path),
        "backbone": lambda: foveate.create_backbone(backbone, out_indices=(-2, -1), checkpoint=path),
        "overlay": lambda: foveate.create_backbone(
            backbone, out_indices=(-2, -1), pretrained=True, pretrained_cfg_overlay={"file": str(path)}
        ),
        "backbone_kwargs": lambda: create(
            head, backbone, backbone_kwargs={"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
        ),
        "classifier": lambda: create_classifier(backbone, 10, checkpoint=str(path)),
    }
    for name, door in doors.items():
        with pytest.raises(CheckpointError, match=r"\d+ missing \(.+\)") as error:
            door()
        assert "\n" not in str(error.value), name
    for argv in (["verify", str(path)], ["convert", str(path), output]):
        assert "missing (" in refused("weights", *argv, "--model", backbone)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_of_heads_alone_counts_the_backbone_as_missing(tmp_path):
    model = create("upernet", "resnet18", num_classes=3, channels=16)
    heads = {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.")}
    torch.save(heads, tmp_path / "heads.pth")
    report = create("upernet", "resnet18", checkpoint=tmp_path / "heads.pth").load_report
    assert report.matched + len(report.missing) == len(model.state_dict())
    assert {key.split(".")[0] for key in report.missing} == {"backbone"}


# --------------------------------------------------------------------------------------------- files that we write
@pytest.fixture(scope="module")
def ours(digits_run, tmp_path_factory):
    """Every kind of file that a command writes: name, path, what `verify` calls its model."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    convert = ["weights", "convert"]

    def written(name: str, *argv: str):
        path = folder / f"{name}.safetensors"
        assert main([*argv[:-1], str(path), *(argv[-1] or ())]) == 0
        return path

    files = {"trained": digits_run / "best.pth"}
    files["trained, converted"] = written("trained", *convert, str(files["trained"]), ())
    files["trained, exported"] = written("exported", "export", str(digits_run), ())
    files["exported, converted"] = written("again", *convert, str(files["trained, exported"]), ())
    files["a name, exported"] = written("named", "export", "test_resnet", ("--untrained",))
    for name, classes in (("nat_atto", 10), ("test_resnet", 12)):
        torch.save(timm.create_model(name, num_classes=classes).state_dict(), folder / f"{name}.pth")
        files[f"{name}, converted"] = written(name, *convert, str(folder / f"{name}.pth"), ("--model", name))
    for head in SMALL:
        for backbone in ("nat_atto", "resnet18"):
            options = SMALL[head] | ({"min_size": 64, "max_size": 96} if head == "retinanet" else {})
            torch.save(create(head, backbone, num_classes=3, **options).state_dict(), folder / f"{head}_{backbone}.pth")
            name = f"{head} on {backbone}"
            source = str(folder / f"{head}_{backbone}.pth")
            files[f"{name}, converted"] = written(f"{head}_{backbone}", *convert, source, ("--model", backbone))
    return files


KINDS = (
    "trained",
    "trained, converted",
    "trained, exported",
    "exported, converted",
    "a name, exported",
    "nat_atto, converted",
    "test_resnet, converted",
    "retinanet on nat_atto, converted",
    "retinanet on resnet18, converted",
    "upernet on nat_atto, converted",
    "upernet on resnet18, converted",
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_that_takes_a_file_reads_every_file_of_ours(kind, ours, photo, tmp_path, capsys, refused):
    path = str(ours[kind])
    assert main(["weights", "verify", path, "--images", str(photo)]) == 0
    assert "photo.png: " in capsys.readouterr().out
    output = tmp_path / "converted.safetensors"
    assert main(["weights", "convert", path, str(output)]) == 0
    card = json.loads(open_checkpoint(output).metadata["foveate"])
    assert main(["predict", str(photo), "--checkpoint", path, "--output", str(tmp_path / "out")]) == 0
    assert main(["predict", str(photo), "--model", path, "--output", str(tmp_path / "out")]) == 0
    exported = tmp_path / "exported.safetensors"
    assert main(["export", path, str(exported)]) == 0
    assert json.loads(open_checkpoint(exported).metadata["foveate"])["classes"] == card["classes"]
    # And once more what these two wrote.
    for file in (output, exported):
        assert main(["predict", str(photo), "--model", str(file), "--output", str(tmp_path / "out")]) == 0
        assert main(["weights", "verify", str(file), "--images", str(photo)]) == 0
    if card["task"] == "classify":
        folder = tmp_path / "hub"
        assert main(["weights", "push", path, "--output", str(folder)]) == 0
        assert len(json.loads((folder / "config.json").read_text())["label_names"]) == len(card["classes"])
    # What the file says of itself decides.
    wrong = "davit_tiny" if "nat_atto" in kind or "resnet" in kind else "biformer_tiny"
    for argv in (["verify", path], ["convert", path, str(tmp_path / "no.safetensors")]):
        assert f"not of {wrong}; leave out --model" in refused("weights", *argv, "--model", wrong)


def test_a_classifiers_file_is_measured_and_trained_from(ours, tmp_path, capsys):
    recipe = "classify/nat_atto_digits"
    for kind in ("trained, converted", "trained, exported"):
        assert main(["eval", recipe, str(ours[kind]), "--json", str(tmp_path / "metrics.json")]) == 0
        assert main(["eval", recipe, str(ours["trained"]), "--json", str(tmp_path / "expected.json")]) == 0
        assert (tmp_path / "metrics.json").read_text() == (tmp_path / "expected.json").read_text()
    argv = ["train", recipe, "epochs=1", "schedule.warmup_epochs=0", f"model.checkpoint={ours['trained, converted']}"]
    assert main([*argv, "--output", str(tmp_path / "run")]) == 0


def test_a_backbone_alone_is_read_by_what_takes_one(tmp_path, refused, photo):
    """Of ours and of timm's: without a classifier, a file is a backbone, and says so."""
    for name in ("quadtree_b0", "test_resnet"):
        options = {"setting": "detection"} if name == "quadtree_b0" else {}
        body = foveate.create_backbone(name, **options)
        inner = getattr(body.features, "model", body.features)
        torch.save(inner.state_dict(), tmp_path / f"{name}.pth")
        path = tmp_path / f"{name}.safetensors"
        assert main(["weights", "convert", str(tmp_path / f"{name}.pth"), str(path), "--model", name]) == 0
        assert main(["weights", "verify", str(path)]) == 0
        again = foveate.create_backbone(name, checkpoint=path, **options)
        assert all(torch.equal(value, body.state_dict()[key]) for key, value in again.state_dict().items())
        for command in (["predict", str(photo), "--checkpoint"], ["export"]):
            argv = [*command, str(path), *([str(tmp_path / "x.pt2")] if command == ["export"] else [])]
            assert "holds a backbone alone, which has no answer" in refused(*argv)


def test_the_option_names_a_model_only_where_the_keys_leave_it_open(tmp_path, refused):
    path = tmp_path / "plain.pth"
    torch.save(timm.create_model("nat_atto", num_classes=10).state_dict(), path)
    assert "not one of nat_tiny" in refused("weights", "verify", str(path), "--model", "nat_tiny")
    assert "not one of resnet18" in refused("weights", "verify", str(path), "--model", "resnet18")
    assert main(["weights", "verify", str(path), "--model", "nat_atto"]) == 0


# --------------------------------------------------------------------------------------------- files that nobody reads
def _truncated(path):
    torch.save(timm.create_model("nat_atto").state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])


class _Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def _arrays(path):
    arrays = {"backbone.conv1.weight": np.ones((3, 3), np.float32), "x": _Payload(path.with_name("made"))}
    path.write_bytes(pickle.dumps({"model": arrays}, 2))


def _objects(path):
    torch.save({"state_dict": {"backbone.conv1.weight": torch.ones(3), "x": _Payload(path.with_name("made"))}}, path)


BROKEN = {
    "truncated": (_truncated, "truncated, or not a checkpoint"),
    "arrays": (_arrays, "which could run code when read"),
    "objects": (_objects, "which could run code when read"),
    "no state": (lambda path: torch.save({"epoch": 3}, path), r"state dict|doesn't say which model"),
    "text": (lambda path: path.write_text("no weights"), "not read|not a checkpoint"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_file_of_weights_is_refused_alike_by_every_door(kind, tmp_path, photo, refused):
    write, reason = BROKEN[kind]
    path = tmp_path / "file.pth"
    write(path)
    doors = (
        lambda: foveate.create_backbone("resnet18", checkpoint=path),
        lambda: foveate.create_backbone("nat_atto", checkpoint=path),
        lambda: create_classifier("resnet18", 3, checkpoint=str(path)),
        lambda: create_classifier("nat_atto", 3, checkpoint=str(path)),
        lambda: create("retinanet", "resnet18", checkpoint=path),
        lambda: create("upernet", "nat_atto", checkpoint=path),
    )
    for door in doors:
        with pytest.raises(CheckpointError, match=reason) as error:
            door()
        assert "\n" not in str(error.value)
    digits = "classify/nat_atto_digits"
    for argv in (
        ["weights", "verify", str(path), "--model", "nat_atto"],
        ["weights", "convert", str(path), str(tmp_path / "x.safetensors"), "--model", "resnet18"],
        ["predict", str(photo), "--checkpoint", str(path)],
        ["export", str(path), str(tmp_path / "x.pt2")],
        ["eval", digits, str(path)],
        ["train", digits, f"model.checkpoint={path}", "--output", str(tmp_path / "run")],
    ):
        message = refused(*argv)
        assert not path.with_name("made").exists()
        assert any(part.replace("\\", "") in message for part in reason.split("|")), message


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_an_exported_model_is_no_checkpoint_and_what_takes_it_is_named(suffix, tmp_path, photo, refused):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"PK\x03\x04")
    for argv in (
        ["weights", "verify", str(path)],
        ["weights", "convert", str(path), str(tmp_path / "x.safetensors")],
        ["export", str(path), str(tmp_path / "x.pt2")],
        ["eval", str(path)],
        ["eval", "classify/nat_atto_digits", str(path)],
        ["attend", str(photo), "--model", str(path)],
        ["train", "classify/nat_atto_digits", f"model.checkpoint={path}", "--output", str(tmp_path / "run")],
    ):
        assert f"an exported model, no checkpoint; `foveate predict IMAGE --model {path}` takes it" in refused(*argv)
    assert not (tmp_path / "run").exists()
