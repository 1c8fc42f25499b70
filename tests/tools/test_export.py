import json

import numpy as np
import pytest
import timm
import torch
from foveate.tasks import TaskError
from foveate.tasks.export import Options, aligned, differences, export_model
from foveate.tasks.export.check import accepted
from foveate.tasks.export.onnx_file import run_onnx
from foveate.tasks.export.program import symbolic, trace
from foveate.tasks.export.quantize_program import InDtype
from foveate.tasks.predictors import load_predictor
from foveate.tools.cli import main
from foveate.zoo.library_errors import run_fault, untranslated
from timm.layers import PatchEmbed
from timm.models.swin_transformer import PatchMerging
from torch import nn


def test_a_classifier_of_a_run_is_exported_for_any_batch(digits_run, tmp_path, capsys):
    path = tmp_path / "new" / "digits.pt2"
    assert main(["export", str(digits_run), str(path), "--dynamic-batch"]) == 0
    text = capsys.readouterr().out
    assert "any number x 1 x 32x32; outputs: output [1, 10]" in text
    assert "import foveate" not in text
    extra = {"foveate": ""}
    exported = torch.export.load(path, extra_files=extra).module()
    card = json.loads(extra["foveate"])
    assert card["classes"] == [str(digit) for digit in range(10)]
    assert card["input"]["mean"] == [0.69]
    images = torch.randn(5, 1, 32, 32)
    with torch.no_grad():
        expected = load_predictor(digits_run / "best.pth").model(images)
        assert torch.allclose(exported(images), expected, atol=1e-5)
    assert [file.name for file in path.parent.iterdir()] == ["digits.pt2"]


def test_errors_of_onnxruntime_are_raised_and_not_printed_too(tmp_path, capfd):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    file = tmp_path / "fixed.onnx"
    shape = onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, [1], [4])
    node = onnx.helper.make_node("Reshape", ["x", "shape"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None]) for name in "xy")
    opset = [onnx.helper.make_opsetid("", 17)]
    graph = onnx.helper.make_graph([node], "reshape", [x], [y], [shape])
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), file)
    run = run_onnx(file)
    assert run(torch.ones(4))[0].shape == (4,)
    with pytest.raises(Exception, match="Reshape"):
        run(torch.ones(3))
    assert capfd.readouterr().err == ""


def test_onnx_is_run_and_compared(digits_run, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "digits.onnx"
    assert main(["export", str(digits_run / "last.pth"), str(path), "--batch", "2"]) == 0
    assert "greatest difference from the model" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).normal(size=(2, 1, 32, 32)).astype(np.float32)
    (logits,) = session.run(["output"], {"images": images})
    with torch.no_grad():
        expected = load_predictor(digits_run / "last.pth").model(torch.from_numpy(images))
    assert np.abs(logits - expected.numpy()).max() < 1e-4
    card = json.loads(session.get_modelmeta().custom_metadata_map["foveate"])
    assert card["shape"] == [2, 1, 32, 32]
    assert card["task"] == "classify"


def test_safetensors_hold_the_weights_and_the_card(digits_run, tmp_path):
    from safetensors import safe_open

    path = tmp_path / "digits.safetensors"
    assert main(["export", str(digits_run / "best.pth"), str(path)]) == 0
    state = load_predictor(digits_run / "best.pth").model.state_dict()
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["foveate"])["model"] == "nat_atto"
        assert set(file.keys()) == set(state)
        assert all(torch.equal(file.get_tensor(key), value) for key, value in state.items())


def test_a_name_without_weights_is_exported_on_request(tmp_path, refused, capsys):
    path = tmp_path / "maps.pt2"
    message = refused("export", "foveate_host_atto", str(path))
    assert "No pretrained weights exist for foveate_host_atto" in message
    assert "--untrained exports random weights" in message
    argv = ["export", "nat_atto", str(path), "--untrained", "--features", "--size", "45", "70"]
    assert main(argv) == 0
    shapes = "map0 [1, 16, 12, 18], map1 [1, 32, 6, 9], map2 [1, 64, 3, 5], map3 [1, 128, 2, 3]"
    assert shapes in capsys.readouterr().out


@pytest.mark.parametrize(("name", "classifier"), [("test_resnet", "fc."), ("nat_atto", "head.fc.")])
def test_a_name_takes_weights_of_as_many_classes_and_channels_as_there_are(name, classifier, tmp_path, refused):
    from safetensors.torch import load_file

    weights, output = tmp_path / "own.pth.tar", tmp_path / "x.safetensors"
    state = timm.create_model(name, num_classes=7, in_chans=4).state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, weights)
    assert main(["export", name, str(output), "--checkpoint", str(weights)]) == 0
    written = load_file(output)
    assert all(torch.equal(written[key], value) for key, value in state.items())
    torch.save({key: value for key, value in state.items() if not key.startswith(classifier)}, weights)
    argv = ("export", name, str(tmp_path / "x.pt2"), "--checkpoint", str(weights))
    assert "own.pth.tar: has no classifier, and so no answer; --features exports its maps" in refused(*argv)
    assert main([*argv, "--features", "--size", "32"]) == 0
    assert "checkpoint is not one of" in refused("export", "vit_tiny_patch16_224", *argv[2:])


def test_a_run_s_file_under_a_name_says_itself_what_it_is(digits_run, tmp_path, refused):
    from safetensors import safe_open

    path, argv = tmp_path / "x.safetensors", ("--checkpoint", str(digits_run / "best.pth"))
    assert main(["export", "nat_atto", str(path), *argv]) == 0
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["foveate"])["classes"][7] == "7"
    assert "best.pth: holds nat_atto, not nat_tiny; " in refused("export", "nat_tiny", str(path), *argv)


class Wrong(nn.Module):
    """Computes something else when exported."""

    def forward(self, x):
        return x + 1e-3 * torch.compiler.is_exporting()


def test_a_file_that_computes_something_else_is_not_written(tmp_path):
    path = tmp_path / "model.pt2"
    path.write_text("the file before")
    with pytest.raises(TaskError, match=r"its output differs .* of its standard deviation, more than 1.0e-05"):
        export_model(Wrong(), torch.randn(1, 3, 8, 8), path, {})
    assert path.read_text() == "the file before"
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    facts = export_model(Wrong(), torch.randn(1, 3, 8, 8), path, {}, Options(tolerance=1e-2))
    assert 0 < facts["difference"] < 1e-2


class Ordered(nn.Module):
    """Adds in another order when exported, and what it is told to."""

    def __init__(self, more):
        super().__init__()
        torch.manual_seed(0)
        self.more, self.weight = more, nn.Parameter(torch.randn(12, 8, 8))

    def forward(self, x):
        a, b, c, d = (x * self.weight).chunk(4, 1)
        if torch.compiler.is_exporting():
            return a + (b + (c + d)) + self.more
        return a + b + c + d


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_may_differ_by_their_own_rounding_and_no_more(dtype, tmp_path):
    torch.manual_seed(0)  # of images at random, one in fifty is rounded further apart than twice
    images, path = torch.randn(2, 12, 8, 8), tmp_path / "model.pt2"
    assert export_model(InDtype(Ordered(0), dtype), images, path, {})["difference"] > 1e-4
    path.unlink()
    called = Options(called="small.pt2")
    with pytest.raises(TaskError, match=r"^small.pt2: not written: .* more than .* or what its own rounding explains"):
        export_model(InDtype(Ordered(10 * torch.finfo(dtype).eps), dtype), images, path, {}, called)
    assert not path.exists()


class Random(nn.Module):
    def forward(self, x):
        return x / 0.0 - x / 0.0


def test_nan_is_no_agreement(tmp_path):
    with pytest.raises(TaskError, match="not written"):
        export_model(Random(), torch.randn(1, 3, 8, 8), tmp_path / "model.pt2", {})


class Small(nn.Module):
    """A convolution and a layer norm, with a reduction whose axes opset 17 takes otherwise."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return nn.functional.pad(x, (0, 1)).amax((2, 3)) + x.mean((2, 3))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_file_is_the_same_from_one_export_to_the_next(suffix, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    paths = [tmp_path / f"{name}{suffix}" for name in ("first", "other")]
    for path in paths:
        export_model(Small().eval(), torch.randn(2, 3, 8, 9), path, {"a": 1}, Options(dynamic_batch=True))
    first, other = (path.read_bytes() for path in paths)
    assert first == other
    assert str(tmp_path).encode() not in first
    assert b"test_export" not in first


def test_large_weights_lie_in_a_file_beside(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    facts = export_model(Small().eval(), torch.randn(1, 3, 8, 8), path, {}, Options(external_from=100))
    assert [file.name for file in facts["files"]] == ["model.onnx", "model.onnx.data"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert onnxruntime.InferenceSession(path).run(None, {"images": np.zeros((1, 3, 8, 8), np.float32)})[0].shape == (
        1,
        8,
    )


def test_opset_17_is_written_and_run(tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    export_model(Small().eval(), torch.randn(1, 3, 8, 8), path, {}, Options(opset=17, dynamic_size=True))
    written = pytest.importorskip("onnx").load(path)
    (opset,) = written.opset_import
    assert opset.version == 17
    # Axes that became attributes are left behind as constants of nothing.
    used = {name for node in written.graph.node for name in node.input}
    assert {constant.name for constant in written.graph.initializer} <= used


class Unknown(nn.Module):
    def forward(self, x):
        return torch.linalg.svdvals(x)


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(TaskError, match=r"ONNX has no aten\.\S*svd\S*; \.pt2 holds all that torch has"):
        export_model(Unknown(), torch.randn(1, 3, 8, 8), tmp_path / "model.onnx", {})
    assert not list(tmp_path.iterdir())


class OneSize(nn.Module):
    def forward(self, x):
        return x.reshape(-1, 3 * 8 * 8)


def test_a_model_of_one_size_is_refused_for_any(tmp_path):
    with pytest.raises(TaskError, match=r"OneSize can't be exported for images of any size: .* without --dynamic-size"):
        export_model(OneSize(), torch.randn(1, 3, 8, 8), tmp_path / "x.pt2", {}, Options(dynamic_size=True))


class Merged(nn.Module):
    """Patches that are merged three times, each padded to a multiple."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches = PatchEmbed(None, 4, 3, 8, norm_layer=nn.LayerNorm, output_fmt="NHWC", dynamic_img_pad=True)
        self.merges = nn.Sequential(*(PatchMerging(8 * 2**level) for level in range(3)))

    def forward(self, x):
        return self.merges(self.patches(x))


def test_sides_that_are_padded_stand_once_in_the_sizes_of_a_graph():
    model = Merged().eval()
    with symbolic(True):
        program = trace(model, torch.randn(1, 3, 64, 64), False, True)
    assert program.state_dict.keys() == model.state_dict().keys()
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    shape = str(output.args[0][0].meta["val"].shape)
    assert "Mod" not in shape
    assert len(shape) < 80
    module = program.module()
    for size in ((64, 64), (45, 70), (33, 95)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(module(images), model(images))


def test_what_onnx_cant_write_for_any_size_may_be_for_one(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")

    def fail(*args):
        raise TaskError("torch.onnx can't write this model: no such rank")

    monkeypatch.setattr("foveate.tasks.export.files.write_onnx", fail)
    call = Small().eval(), torch.randn(1, 3, 8, 8), tmp_path / "x.onnx", {}
    with pytest.raises(TaskError, match=r"^Small can't be .* any size: .* rank; export it for one, without --dynamic-"):
        export_model(*call, Options(dynamic_size=True))
    with pytest.raises(TaskError, match=r"no such rank$"):
        export_model(*call)


class Turned(nn.Module):
    """Of upright images it computes something else, which a graph doesn't."""

    def forward(self, x):
        return x.amax((2, 3)) if x.shape[2] < x.shape[3] else x.amin((2, 3))


def test_a_file_that_is_right_for_some_sizes_may_be_for_one(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(TaskError, match=r"its output differs .* export it for one size, without --dynamic-size$"):
        export_model(Turned(), torch.randn(1, 3, 9, 10), tmp_path / "x.onnx", {}, Options(dynamic_size=True))


class OneImage(nn.Module):
    def forward(self, x):
        return {1: x.mean((2, 3))}[len(x)]


def test_what_a_model_itself_does_not_take_is_named(tmp_path):
    with pytest.raises(TaskError, match=r"OneImage does not take images of 3x3x8x8: 3$"):
        export_model(OneImage(), torch.randn(1, 3, 8, 8), tmp_path / "x.pt2", {}, Options(dynamic_batch=True))


def test_a_file_that_its_runtime_refuses_is_one_line(tmp_path, monkeypatch):
    def refuse(file):
        raise RuntimeError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : no kernel for X(25)\nat source.cc")

    monkeypatch.setattr("foveate.tasks.export.files.run_program", refuse)
    with pytest.raises(TaskError, match=r"not written: the file can't be read: .* no kernel for X\(25\)$"):
        export_model(Small().eval(), torch.randn(1, 3, 8, 8), tmp_path / "x.pt2", {})
    assert not list(tmp_path.iterdir())


def test_what_runtimes_say_is_told_without_where_in_their_source_they_are():
    place = "/src/core/reshape_helper.h:91 onnxruntime::Helper::Helper(const onnxruntime::Shape&, bool)"
    start = "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Reshape node. Name:'view_7' "
    for where in (f"{place} ", f"{place} ".replace(" ", " void ", 1), "/src/core/reshape.cc:9 Run ", ""):
        error = RuntimeError(f"{start}Status Message: {where}{{4,5}} can't be {{4,2}}")
        assert run_fault(error) == "Reshape (view_7): {4,5} can't be {4,2}"
    folding = RuntimeError("Error during constant folding for node 'node_split' (::SplitToSequence)")
    folding.__cause__ = AttributeError("no ndim")
    assert untranslated(folding) == "onnxscript fails on SplitToSequence: no ndim"


def test_detections_of_equal_scores_may_swap():
    boxes, scores, labels = torch.rand(1, 3, 4), torch.tensor([[0.9, 0.5, 0.5 - 1e-6]]), torch.tensor([[2, 0, 1]])
    order = torch.tensor([0, 2, 1])
    expected = {"boxes": boxes, "scores": scores, "labels": labels}
    found = list(aligned({"boxes": boxes[:, order], "scores": scores, "labels": labels[:, order]}, expected, 1e-4))
    assert torch.equal(found[0], boxes)
    assert torch.equal(found[2], labels)
    wrong = list(aligned({"boxes": boxes, "scores": scores, "labels": labels[:, [1, 0, 2]]}, expected, 1e-4))
    assert not torch.equal(wrong[2], labels)
    # Where the scores differ, they are what is wrong, not the boxes.
    lower = list(aligned({"boxes": boxes, "scores": scores - 0.01, "labels": labels}, expected, 1e-4))
    assert torch.equal(lower[0], boxes)


def test_detections_of_one_box_are_told_apart_by_their_masks():
    masks = torch.eye(3).bool().view(1, 3, 1, 3)
    expected = {"boxes": torch.ones(1, 3, 4), "scores": torch.tensor([[0.5, 0.5, 0.5]])}
    expected |= {"labels": torch.zeros(1, 3, dtype=torch.long), "masks": masks}
    *_, found = aligned(expected | {"masks": masks[:, [2, 0, 1]]}, expected, 1e-4)
    assert torch.equal(found, masks)


class Single(nn.Module):
    """Stays in float32, and answers by what rounding leaves of a difference."""

    def forward(self, x):
        if x.dtype == torch.float64:
            raise TaskError("it computes in float32")
        return x[:, 0, 0, 0] - 0.9999


def test_what_stays_in_float32_has_rounding_all_the_same():
    images = torch.ones(2, 3, 8, 8)
    (limit,) = accepted(Single(), images, [Single()(images)], 1e-5)
    assert limit > 1e-5


class Scored(nn.Module):
    OUTPUTS = ("scores", "sizes")

    def forward(self, x):
        return [x.mean((2, 3)) / 15, x.mean((2, 3)) / 15]


def test_scores_may_differ_by_what_float32_tells_apart_of_1():
    images = torch.rand(1, 3, 8, 8)
    expected = Scored()(images)
    scores, sizes = accepted(Scored(), images, expected, 1e-5)
    spread = max(expected[0].std(), 0.05 * expected[0].max()).item()
    assert scores * spread == pytest.approx(2**-23)
    assert sizes == 1e-5


class Panoptic(nn.Module):
    OUTPUTS = ("segments", "areas", "count")


def test_one_pixel_on_an_edge_is_no_difference_but_in_a_count_and_two_are():
    expected = [torch.ones(1, 8, 8, dtype=torch.long), torch.tensor([[64, 0]]), torch.tensor([1])]
    for pixels, apart in ((1, 0.0), (2, float("inf"))):
        got = [value.clone() for value in expected]
        got[0].flatten()[:pixels] = 0
        got[1][0, 0] -= pixels
        assert differences(Panoptic(), got, expected, 1e-5) == [apart, apart, 0.0]
    assert differences(Panoptic(), [*expected[:2], torch.tensor([2])], expected, 1e-5) == [0.0, 0.0, float("inf")]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["nat_atto", "x.bin", "--untrained"], "must be .onnx (ONNX), .pt2 (torch.export), .safetensors"),
        (["nat_tinny", "x.pt2"], "did you mean 'nat_tiny'?"),
        (["absent.pth", "x.pt2"], "absent.pth: no such file"),
        (["nat_atto", "x.pt2", "--untrained", "--size", "1", "2", "3"], "one or two numbers"),
        (["nat_atto", "x.pt2", "--untrained", "--batch", "0"], "--batch: must be a whole number, at least 1; got 0"),
        (["nat_atto", "x.onnx", "--untrained", "--opset", "12"], "--opset is 12, but must be 17 to 23"),
        (
            ["vit_tiny_patch16_224", "x.pt2", "--untrained", "--size", "64"],
            "VisionTransformer does not take images of 1x3x64x64",
        ),
    ],
)
def test_a_wrong_request_is_refused(argv, reason, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reason in refused("export", *argv)
    assert not list(tmp_path.iterdir())


def test_missing_packages_name_the_extra(refused, monkeypatch):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "onnxscript" else find(name, *rest)
    )
    message = refused("export", "nat_atto", "x.onnx", "--untrained")
    assert "needs the package onnxscript: pip install 'foveate[export]'" in message


class Biased(nn.Module):
    """Biases of every position by an MLP of its distance."""

    def __init__(self):
        super().__init__()
        self.distances = nn.Buffer(torch.linspace(0, 1, 64)[:, None])
        self.first, self.last = nn.Linear(1, 512), nn.Linear(512, 1)

    def forward(self, x):
        return x.flatten(2) + self.last(self.first(self.distances * 3).relu())[:, 0]


def test_constants_are_folded_unless_they_are_larger_than_what_they_come_of(tmp_path):
    pytest.importorskip("onnxruntime")
    path, model = tmp_path / "x.onnx", Biased().eval()
    export_model(model, torch.randn(1, 3, 8, 8), path, {})
    graph = pytest.importorskip("onnx").load(path).graph
    assert "Mul" not in {node.op_type for node in graph.node}
    assert [64, 512] not in [list(tensor.dims) for tensor in graph.initializer]
    assert path.stat().st_size < sum(x.nbytes for x in model.state_dict().values()) + 10_000


def test_no_rule_of_onnxscript_looks_through_the_graph_at_every_node(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    rewriter, seen, export = pytest.importorskip("onnxscript.rewriter"), [], torch.onnx.export
    before = rewriter._DEFAULT_REWRITE_RULES

    def spy(*args, **options):
        seen.extend(rewriter._DEFAULT_REWRITE_RULES)
        return export(*args, **options)

    monkeypatch.setattr("torch.onnx.export", spy)
    export_model(Small().eval(), torch.randn(1, 3, 8, 8), tmp_path / "x.onnx", {})
    assert len(seen) > 0.9 * len(before)
    assert all(rule._target_pattern.has_single_output_node for rule in seen)
    assert rewriter._DEFAULT_REWRITE_RULES is before
