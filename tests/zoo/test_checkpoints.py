"""Checkpoints: every published format in, anything else refused in one line, nothing ever executed."""

import argparse
import collections
import io
import json
import os
import pickle
import sys
import types
import zipfile
from functools import partial

import foveate
import numpy as np
import pytest
import timm
import torch
from foveate import zoo
from foveate.zoo.checkpoint import CheckpointError, arrays, open_checkpoint, state_of
from foveate.zoo.checkpoint.arrays import MAX_STEPS


def load(name, path, **options):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **options).eval()


@pytest.fixture(scope="module")
def published(open_fixture):
    return open_fixture("nat/nat_mini")


@pytest.fixture(scope="module")
def state(published):
    return published.state()


@pytest.fixture(scope="module")
def expected(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "nat_mini.pth"
    torch.save(state, path)
    return load("nat_mini", path).state_dict()


def assert_same(model, expected):
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"state_dict": {}, "state_dict_ema": state},
        lambda state: {"module." + key: value for key, value in state.items()},
        lambda state: {"state_dict": {"module._orig_mod." + key: value for key, value in state.items()}},
        lambda state: {"meta": {}, "state_dict": {"backbone." + key: value for key, value in state.items()}},
        lambda state: {
            "ema_state_dict": {f"module.{key}": value for key, value in state.items()} | {"steps": torch.ones(1)}
        },
    ],
    ids=["state_dict", "model", "ema first", "DataParallel", "compiled", "detector", "mmengine's other"],
)
def test_wrapped_checkpoints_load(wrap, state, expected, tmp_path):
    torch.save(wrap(state), tmp_path / "wrapped.pth")
    assert_same(load("nat_mini", tmp_path / "wrapped.pth"), expected)


def test_which_of_several_state_dicts_is_read_is_said(state, expected, tmp_path, caplog):
    """mmengine's `state_dict` is the average where it holds both."""
    path = tmp_path / "both.pth"
    torch.save({"state_dict": state, "ema_state_dict": {key: value + 1 for key, value in state.items()}}, path)
    assert_same(load("nat_mini", path), expected)
    (record,) = [record for record in caplog.records if record.name == "foveate.zoo.checkpoint.reading"]
    assert "both.pth: its state_dict is read, not its ema_state_dict; " in record.getMessage()


@pytest.mark.parametrize("name", ["nat_mini", "dinat_mini"])
def test_hub_format_gives_the_same_model(name, golden_folder, open_fixture, tmp_path):
    """The hub's transformers files name the same tensors otherwise, split qkv and stack the layer scales."""
    rows = json.loads((golden_folder / "hf_keys" / f"hf_keys_{name}.json").read_text())["rows"]
    authors = open_fixture(f"{name.removesuffix('_mini')}/{name}").state()
    hub = {}
    for key, shape, official, part in rows:
        value = authors[official] if part is None else authors[official].chunk(3)[part]
        hub[key] = value.reshape(shape)
    torch.save(authors, tmp_path / "authors.pth")
    torch.save(hub, tmp_path / "hub.bin")
    assert_same(load(name, tmp_path / "hub.bin"), load(name, tmp_path / "authors.pth").state_dict())


@pytest.mark.parametrize("library", ["hf", "mmpretrain"])
def test_vans_formats_give_the_same_model(library, golden_folder, open_fixture, tmp_path):
    rows = json.loads((golden_folder / "hf_keys" / f"{library}_keys_van_b0.json").read_text())["rows"]
    authors = open_fixture("van/van_b0").state()
    # transformers' files hold a norm that nothing uses.
    theirs = {key: torch.ones(shape) if name is None else authors[name] for key, shape, name, _ in rows}
    assert len(theirs) >= len(authors)
    torch.save(authors, tmp_path / "authors.pth")
    torch.save({"state_dict": theirs, "meta": {}}, tmp_path / "theirs.pth")
    assert_same(load("van_b0", tmp_path / "theirs.pth"), load("van_b0", tmp_path / "authors.pth").state_dict())


def test_hub_format_with_layer_scale(open_fixture, tmp_path):
    authors = open_fixture("nat/nat_small").state()
    torch.save(authors, tmp_path / "authors.pth")
    hub = {}
    for key, value in authors.items():
        key = key.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        key = key.replace("patch_embed.norm", "embeddings.norm")
        key = key.replace("levels.", "encoder.levels.").replace(".blocks.", ".layers.")
        key = key.replace(".norm1.", ".layernorm_before.").replace(".norm2.", ".layernorm_after.")
        key = key.replace("attn.proj", "attention.output.dense").replace("attn.rpb", "attention.self.rpb")
        key = key.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        if key.startswith("norm."):
            key = key.replace("norm.", "layernorm.")
        if key.startswith("head."):
            hub[key.replace("head.", "classifier.")] = value
        elif ".attn.qkv." in key:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                hub["nat." + key.replace("attn.qkv", f"attention.self.{part}")] = third
        elif key.endswith("gamma1"):
            second = authors[key.replace("encoder.", "").replace(".layers.", ".blocks.").replace("gamma1", "gamma2")]
            hub["nat." + key.replace("gamma1", "layer_scale_parameters")] = torch.stack([value, second])
        elif not key.endswith("gamma2"):
            hub["nat." + key] = value
    torch.save(hub, tmp_path / "hub.bin")
    assert_same(load("nat_small", tmp_path / "hub.bin"), load("nat_small", tmp_path / "authors.pth").state_dict())


def test_own_names_load_unchanged(expected, tmp_path):
    torch.save(expected, tmp_path / "own.pth")
    assert_same(load("nat_mini", tmp_path / "own.pth"), expected)


def test_safetensors_load(expected, tmp_path):
    from safetensors.torch import save_file

    save_file(expected, tmp_path / "own.safetensors")
    assert_same(load("nat_mini", tmp_path / "own.safetensors"), expected)


def test_save_for_hf_round_trip_is_bit_exact(published, state, tmp_path):
    torch.save(state, tmp_path / "nat_mini.pth")
    model = load("nat_mini", tmp_path / "nat_mini.pth")
    timm.models.save_for_hf(model, tmp_path / "hub")
    assert_same(timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True), model.state_dict())


def test_other_classes_and_channels_are_adapted(state, expected, tmp_path):
    torch.save(state, tmp_path / "nat_mini.pth")
    model = load("nat_mini", tmp_path / "nat_mini.pth", num_classes=7, in_chans=1)
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 7)
    assert torch.equal(model.stages[3].blocks[4].attn.rpb, expected["stages.3.blocks.4.attn.rpb"])
    torch.testing.assert_close(model.stem.proj[0].weight, expected["stem.proj.0.weight"].sum(1, keepdim=True))


def test_a_fine_tuned_classifier_is_kept(tmp_path):
    """timm would drop a classifier whose class count differs from the table's; the file's own count decides."""
    tuned = timm.create_model("nat_atto", num_classes=7)
    torch.save(tuned.state_dict(), tmp_path / "tuned.pth")
    assert_same(load("nat_atto", tmp_path / "tuned.pth", num_classes=7), tuned.state_dict())


def test_a_file_without_a_classifier_starts_a_new_one_if_classes_were_chosen(state, expected, tmp_path):
    backbone = {key: value for key, value in state.items() if not key.startswith("head.")}
    torch.save(backbone, tmp_path / "nat_mini.pth")
    for classes in (10, 1000):
        model = load("nat_mini", tmp_path / "nat_mini.pth", num_classes=classes)
        assert model.head.fc.out_features == classes
        assert set(model.load_report.missing) == {"head.fc.weight", "head.fc.bias"}
        assert "2 keep their initial values" in str(model.load_report)
        body = {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
        assert all(torch.equal(value, expected[key]) for key, value in body.items())
    with pytest.raises(zoo.CheckpointError, match=r"no classifier: give num_classes=1000 to start a new one"):
        load("nat_mini", tmp_path / "nat_mini.pth")


def test_a_file_of_other_classes_is_refused_unless_they_were_chosen(tmp_path):
    tuned = timm.create_model("nat_atto", num_classes=12)
    torch.save(tuned.state_dict(), tmp_path / "tuned.pth")
    with pytest.raises(zoo.CheckpointError, match="has 12 classes, nat_atto has 10: give num_classes=12") as error:
        load("nat_atto", tmp_path / "tuned.pth")
    assert "\n" not in str(error.value)
    for classes in (1000, 7, 0):
        model = load("nat_atto", tmp_path / "tuned.pth", num_classes=classes)
        assert model.num_classes == classes
        assert torch.equal(model.state_dict()["stem.norm.weight"], tuned.state_dict()["stem.norm.weight"])
        assert model.load_report.unexpected == ("head.fc.bias", "head.fc.weight")
        assert model.load_report.missing == (("head.fc.weight", "head.fc.bias") if classes else ())
    overlay = dict(file=str(tmp_path / "tuned.pth"), num_classes=12)
    assert_same(timm.create_model("nat_atto", pretrained=True, pretrained_cfg_overlay=overlay), tuned.state_dict())
    # Features need no classifier, whatever its classes.
    foveate.create_backbone("nat_atto", checkpoint=tmp_path / "tuned.pth")
    timm.models.save_for_hf(tuned, tmp_path / "hub")
    assert_same(timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True), tuned.state_dict())


def test_another_kernel_size_resamples_the_bias_and_says_so(state, tmp_path, caplog):
    torch.save(state, tmp_path / "nat_mini.pth")
    model = load("nat_mini", tmp_path / "nat_mini.pth", kernel_size=11)
    assert model.stages[0].blocks[0].attn.rpb.shape == (2, 21, 21)
    assert len(model.load_report.reshaped) == 18
    assert model.load_report.reshaped[0] == ("stages.0.blocks.0.attn.rpb", (2, 13, 13), (2, 21, 21), "bicubic")
    assert "18 reshaped (stages.0.blocks.0.attn.rpb 2x13x13 to 2x21x21, bicubic" in caplog.text


@pytest.mark.parametrize("shape", [(0,), (32, 0, 3, 3), (16, 3, 3, 3), (32, 3, 5, 5), (32, 27)])
def test_a_first_kernel_that_differs_in_more_than_its_inputs_is_refused(shape, state, tmp_path):
    torch.save(state | {"stem.proj.0.weight": torch.zeros(shape)}, tmp_path / "nat_mini.pth")
    with pytest.raises(CheckpointError, match=r"1 of another shape \(stem\.proj\.0\.weight\)"):
        load("nat_mini", tmp_path / "nat_mini.pth")


def test_the_report_tells_what_became_of_every_entry(state, tmp_path):
    torch.save(state, tmp_path / "nat_mini.pth")
    assert str(load("nat_mini", tmp_path / "nat_mini.pth").load_report) == f"{len(state)} entries matched"
    grey = load("nat_mini", tmp_path / "nat_mini.pth", in_chans=1).load_report
    assert grey.reshaped == (("stem.proj.0.weight", (32, 3, 3, 3), (32, 1, 3, 3), "input channels adapted"),)
    backbone = foveate.create_backbone("nat_mini", setting="detection", checkpoint=tmp_path / "nat_mini.pth")
    dense = backbone.features.model.load_report
    assert "out_norms.0.weight" in dense.missing
    assert "norm.weight" in dense.unexpected
    host = timm.create_model("resnet18").state_dict()
    torch.save(host, tmp_path / "resnet18.pth")
    report = load("ela_t_resnet18", tmp_path / "resnet18.pth").load_report
    assert report.matched == len(host)
    assert all(".se." in key for key in report.missing)


def test_a_classifier_starts_a_dense_backbone(state, expected, tmp_path):
    torch.save(state, tmp_path / "nat_mini.pth")
    backbone = foveate.create_backbone("nat_mini", setting="detection", checkpoint=tmp_path / "nat_mini.pth")
    model = backbone.features.model
    assert torch.equal(model.stages[2].blocks[1].mlp.fc1.weight, expected["stages.2.blocks.1.mlp.fc1.weight"])
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in model.out_norms)


@pytest.mark.parametrize(
    "create", [partial(foveate.create_segmenter, "upernet"), partial(foveate.create_detector, "mask_rcnn")]
)
def test_the_backbone_of_our_own_dense_models_is_read(create, tmp_path):
    whole = create("nat_atto", num_classes=3)
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    recipe = "segmentation" if hasattr(whole, "predict") else "detection"
    backbone = foveate.create_backbone("nat_atto", setting=recipe, checkpoint=tmp_path / "whole.pth")
    assert_same(backbone, whole.backbone.state_dict())


def test_a_checkpoint_of_another_model_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "nat_mini.pth")
    for name in ("nat_tiny", "dinat_s_tiny", "nat_isotropic_small"):
        with pytest.raises(zoo.CheckpointError, match=f"not one of {name}: .* entries match") as error:
            load(name, tmp_path / "nat_mini.pth")
        assert "\n" not in str(error.value)


def test_a_load_that_matches_little_is_refused_whatever_the_class_count(state, tmp_path):
    """With another class count timm loads unstrictly, and a file of other names would load nothing."""
    torch.save({"x." + key: value for key, value in state.items()}, tmp_path / "other.pth")
    for options in (dict(num_classes=7), dict(features_only=True)):
        with pytest.raises(zoo.CheckpointError, match="0 of"):
            load("nat_mini", tmp_path / "other.pth", **options)


def test_a_truncated_file_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for size in (0, 100, len(whole) // 2):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        with pytest.raises(zoo.CheckpointError, match=r"cut\.pth: truncated, or not a checkpoint") as error:
            load("nat_mini", tmp_path / "cut.pth")
        assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(zoo.CheckpointError, match=r"nowhere\.pth: no such file"):
        load("nat_mini", tmp_path / "nowhere.pth")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_detectron2s_pickles_of_arrays_are_read(protocol, tmp_path):
    arrays = {
        "float": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big": np.arange(3, dtype=">f8"),
        "half": np.ones((2, 0, 3), np.float16),
        "one": np.array(True),
        "number": np.float32(0.5),
    }
    arrays["shared"] = arrays["float"]
    file = {"model": collections.OrderedDict(arrays), "__author__": "Detectron2 Model Zoo", "list": [1, (2.5, None)]}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps(file, protocol))
    read = open_checkpoint(path).content
    assert (read["__author__"], read["list"]) == ("Detectron2 Model Zoo", [1, (2.5, None)])
    for name, array in arrays.items():
        if name == "number":
            assert read["model"][name] == 0.5
        else:
            assert read["model"][name].tolist() == array.tolist()
            assert read["model"][name].shape == array.shape


RECORD = np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")])


def nested(times):
    value = []
    for _ in range(times):
        value = [value, value]
    return value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (lambda path: Payload(path), "could run code when read"),
        (lambda path: np.array([Payload(path)], dtype=object), "could run code when read|objects|none of plain"),
        (lambda path: np.array([{}], dtype=object), "objects|none of plain"),
        (lambda path: np.float32, "'numpy.float32', which could run code"),
        (lambda path: {1, 2}, "could run code|EMPTY_SET"),
        (lambda path: RECORD, "records"),
        (lambda path: np.array(["text"]), "none of plain numbers"),
    ],
)
def test_a_pickle_of_anything_else_builds_nothing(value, reason, protocol, tmp_path):
    refuses_to_build(value, reason, protocol, tmp_path)


def test_a_pickle_that_means_a_billion_things_builds_nothing(tmp_path):
    refuses_to_build(lambda path: nested(30), "nested more than 32 deep, or endlessly", 2, tmp_path)


def refuses_to_build(value, reason, protocol, tmp_path):
    made, path = tmp_path / "made", tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": np.ones(2), "b": value(made)}}, protocol))
    with pytest.raises(zoo.CheckpointError, match=reason) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not made.exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",  # more bytes than there are
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # a memo of two billion
        b"\x80\x02}q\x00h\x00h\x05.",  # nothing there
        b"\x80\x02(((((.",
        b"\x80\x02cos\nsystem\nU\x04true\x85R.",
        b"\x80\x02ccollections\nOrderedDict\n)R}q\x01Usb.",
        pickle.dumps({"model": {"a": np.ones(9)}}, 2)[:-20],
    ],
)
def test_a_crafted_pickle_costs_nothing(raw, tmp_path):
    (tmp_path / "model.pkl").write_bytes(raw)
    with pytest.raises(zoo.CheckpointError, match=r"not read|not a checkpoint|without a 'model'"):
        open_checkpoint(tmp_path / "model.pkl")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_is_never_executed(write, state, tmp_path):
    write({"state_dict": state, "args": Payload(tmp_path / "executed")}, tmp_path / "evil.pth")
    with pytest.raises(zoo.CheckpointError, match=r"evil\.pth: not read: .*only tensors and plain types") as error:
        load("nat_mini", tmp_path / "evil.pth")
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def config_node(monkeypatch):
    """Pickle settings as yacs does; reading must not need yacs, so it is gone when the test calls the returned one."""

    class CfgNode(dict):
        def __init__(self, items):
            super().__init__(items)
            self.__dict__["__immutable__"] = True

    module = types.ModuleType("yacs.config")
    CfgNode.__module__, CfgNode.__qualname__, module.CfgNode = "yacs.config", "CfgNode", CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)

    def forget():
        monkeypatch.delitem(sys.modules, "yacs.config")
        monkeypatch.delitem(sys.modules, "yacs")

    return CfgNode, forget


def test_training_files_with_yacs_settings_load(config_node, state, expected, tmp_path):
    node, forget = config_node
    settings = node({"MODEL": node({"NAME": "nat", "DEPTHS": [3, 4]}), "AUG": None})
    training = {
        "model": state,
        "optimizer": {"state": {0: {"step": torch.ones(1)}}},
        "config": settings,
        "args": argparse.Namespace(lr=1e-3, config=settings),
        "max_accuracy": np.float64(81.8),
        "epoch": np.int64(299),
        "best": torch.ones(1),
        "state_dict_ema": {},
    }
    torch.save(training, tmp_path / "training.pth")
    forget()
    assert_same(load("nat_mini", tmp_path / "training.pth"), expected)


def test_settings_do_not_smuggle_code(config_node, state, tmp_path):
    """Not inside of the settings, not as their state, and not from the module that they come from."""
    node, forget = config_node
    inside = node({"A": Payload(tmp_path / "executed")})
    beside = node({})
    beside.__dict__["hook"] = Payload(tmp_path / "executed")
    arguments = argparse.Namespace(hook=Payload(tmp_path / "executed"))
    sys.modules["yacs.config"].load_cfg = load_cfg = types.FunctionType(Payload.__reduce__.__code__, {}, "load_cfg")
    load_cfg.__module__, load_cfg.__qualname__ = "yacs.config", "load_cfg"
    for i, settings in enumerate((inside, beside, arguments, load_cfg)):
        torch.save({"model": state, "config": settings}, tmp_path / f"evil{i}.pth")
    forget()
    for i in range(4):
        with pytest.raises(zoo.CheckpointError, match="it pickles objects, which could run code when read"):
            load("nat_mini", tmp_path / f"evil{i}.pth")
    assert not (tmp_path / "executed").exists()
    # The payload is live: whoever unpickled it would notice.
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_a_model_without_weights_says_so():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for foveate_host_atto"):
        timm.create_model("foveate_host_atto", pretrained=True)


def test_a_file_of_safetensors_that_begins_like_a_pickle_is_read(tmp_path):
    from safetensors.torch import save_file

    for length in range(300):
        save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors", {"note": "a" * length})
        if (tmp_path / "x.safetensors").read_bytes()[:1] == b"\x80":
            break
    else:
        pytest.fail("no header of a length that begins like a pickle")
    assert torch.equal(open_checkpoint(tmp_path / "x.safetensors").content["x"], torch.ones(2))
    (tmp_path / "x.safetensors").rename(tmp_path / "x.bin")
    assert torch.equal(open_checkpoint(tmp_path / "x.bin").content["x"], torch.ones(2))


class _Pickled:
    """Pickles as a call of NumPy's, with a state of anybody's choice."""

    def __init__(self, function, arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


SCALAR = np.float64().__reduce__()[0]


@pytest.mark.parametrize("value", [np.float64(0.25), np.int32(-7), np.bool_(True), np.float16(0.5), np.uint8(200)])
def test_numpy_scalars_are_read_as_numbers(value, tmp_path):
    torch.save({"x": torch.zeros(1), "best": value}, tmp_path / "file.pth")
    best = open_checkpoint(tmp_path / "file.pth").content["best"]
    assert best == value.item()
    assert type(best) is type(value.item())


@pytest.mark.parametrize(
    "value",
    [
        _Pickled(SCALAR, (np.dtype("f8"), b"1234")),
        _Pickled(SCALAR, (np.dtype("f8"), b"1" * 9)),
        _Pickled(SCALAR, ("f8", b"12345678")),
        _Pickled(SCALAR, (np.dtype("O"), b"12345678")),
        _Pickled(np.dtype, ("f8", False, True), (3, "<", None, ("a",), {"a": (1, 2)}, 2**40, -1, 0)),
        _Pickled(np.dtype, ("V8", False, True), (3, "|", (1, (2**40,)), None, None, 8, 1, 0)),
        _Pickled(np.dtype, ("f8", False, True), (1,)),
        _Pickled(np.dtype, (7,)),
    ],
)
def test_numpy_states_that_make_no_sense_are_refused(value, tmp_path):
    torch.save({"x": torch.zeros(1), "best": value}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "file.pth")
    assert "\n" not in str(error.value)


def test_doubled_lists_are_refused_at_once(tmp_path, monkeypatch):
    items, calls = [0], []
    for _ in range(29):
        items = [items, items]
    path = tmp_path / "file.pkl"
    path.write_bytes(pickle.dumps({"model": items}, protocol=2))
    walk = arrays._Machine._finished
    monkeypatch.setattr(arrays._Machine, "_finished", lambda *call: calls.append(1) or walk(*call))
    with pytest.raises(CheckpointError, match="not read"):
        open_checkpoint(path)
    assert len(calls) < 100


def test_a_flipped_bit_is_seen(tmp_path):
    path = tmp_path / "file.pth"
    torch.save({"state_dict": {"weight": torch.ones(1000)}}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(9).numpy().tobytes()) + 3] ^= 1
    path.write_bytes(content)
    assert torch.load(path)["state_dict"]["weight"].sum() != 1000
    with pytest.raises(CheckpointError, match=r"damaged: the checksum of .*data/0 is another"):
        open_checkpoint(path)


def test_what_follows_an_archive_is_seen(tmp_path):
    """A download that goes on behind its file would be read, and its hash recorded."""
    torch.save({"weight": torch.ones(3)}, tmp_path / "file.pth")
    with open(tmp_path / "file.pth", "ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match=r"file.pth: damaged: 4 bytes follow its archive"):
        open_checkpoint(tmp_path / "file.pth")


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(3)}, tmp_path / "file.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert open_checkpoint(tmp_path / "file.pth").state["weight"].sum() == 3


def compressed(path):
    torch.save({"weight": torch.zeros(10**6)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def of_many_things(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02(" + b"}" * (MAX_STEPS + 9) + b"l.")
        archive.writestr("archive/version", b"3")


def of_many_things_before_1_6(path):
    legacy = io.BytesIO()
    torch.save({}, legacy, _use_new_zipfile_serialization=False)
    start = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    assert legacy.getvalue().startswith(start)
    path.write_bytes(start + b"\x80\x02(" + b"}" * (MAX_STEPS + 9) + b"l.")


@pytest.mark.parametrize(
    ("write", "reason"),
    [(compressed, "compressed"), (of_many_things, "more than"), (of_many_things_before_1_6, "more than")],
)
def test_small_files_that_mean_much_are_not_read(write, reason, tmp_path, monkeypatch):
    monkeypatch.setattr("foveate.zoo.checkpoint.reading.MAX_STEPS", 10_000)
    monkeypatch.setitem(globals(), "MAX_STEPS", 10_000)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it is read"))
    write(tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=f"not read: .*{reason}"):
        open_checkpoint(tmp_path / "file.pth")


def test_a_state_dict_that_holds_itself_or_too_much_is_refused(tmp_path):
    inner, outer = {"weight": torch.zeros(1)}, {}
    inner["model"], outer["state_dict"] = outer, inner
    outer["module"] = inner
    torch.save(inner, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="holds itself, endlessly"):
        _ = open_checkpoint(tmp_path / "file.pth").state
    many = dict.fromkeys(map(str, range(100_001)), torch.zeros(1))
    with pytest.raises(CheckpointError, match="100,001 entries, more than any model"):
        state_of(many)


@pytest.mark.parametrize("name", [3, None, (1, 2), b"weight"])
def test_entries_have_names_of_text(name, tmp_path):
    state = timm.create_model("foveate_host_atto").state_dict()
    torch.save({"state_dict": state | {name: torch.zeros(1)}}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="no entry's name"):
        load("foveate_host_atto", tmp_path / "file.pth")


def test_what_else_a_file_holds_is_not_walked(tmp_path):
    content = {"state_dict": timm.create_model("foveate_host_atto").state_dict(), "args": {}, "log": [1]}
    content["args"]["all"] = content
    for _ in range(40):
        content["log"] = [content["log"], content["log"]]
    torch.save(content, tmp_path / "file.pth")
    load("foveate_host_atto", tmp_path / "file.pth")


@pytest.mark.parametrize("classes", [{}, {"num_classes": 1000}, {"num_classes": 7}])
@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("head.fc.bias", None),
        ("head.fc.weight", None),
        ("head.fc.bias", torch.zeros(3)),
        ("head.fc.bias", torch.zeros(())),
    ],
)
def test_half_a_classifier_is_none(entry, value, classes, tmp_path):
    state = timm.create_model("foveate_host_atto").state_dict() | {entry: value}
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match=rf"{entry}[,)]|the checkpoint has no classifier"):
        load("foveate_host_atto", tmp_path / "half.pth", **classes)


def test_a_classifier_of_other_inputs_is_not_the_models(tmp_path):
    state = timm.create_model("foveate_host_atto").state_dict()
    torch.save(state | {"head.fc.weight": torch.zeros(1000, 5)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"1 of another shape \(head\.fc\.weight\)$"):
        load("foveate_host_atto", tmp_path / "other.pth")
