"""What is recorded of an attention is what it did: every family at an odd size; every variant in the long run."""

import contextlib

import foveate
import pytest
import timm
import torch
from foveate.blocks.large_kernel import LargeKernelAttention2d
from foveate.tasks import TaskError

# Whose maps must have the size that they were made for.
FIXED = ("vitrpb",)
WITHOUT = ("shiftvit",)


def fill(model, golden):
    """Give every parameter numbers that matter: a bias or scale that is misread then shows."""
    golden.fill(model)
    for module in model.modules():
        if isinstance(getattr(module, "attn", None), LargeKernelAttention2d):
            # A map that is added to its product with a convolution of itself grows without end over many blocks.
            module.ls1.gamma.data *= 0.02
            module.ls2.gamma.data *= 0.02
    return model.eval()


@contextlib.contextmanager
def outputs_kept(record, model):
    """Keep copies of what modules return, for some networks write into it."""
    kept, handles = {}, []
    for name in record.watched:

        def keep(module, args, out, name=name):
            kept.setdefault(name, out.clone())

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def assert_told(model, images, some=None):
    """Compare each call with the module's output, and its rows with what they must add up to."""
    with torch.no_grad():
        plain = model(images)
        with foveate.record_attention(model) as record, outputs_kept(record, model) as kept:
            recorded = model(images)
    assert torch.equal(plain, recorded)
    height, width = images.shape[2:]
    place = (width - 3, height // 2)
    for name in record.layers[:some]:
        call = record[name]
        if call.kind == "gate":
            expected = kept[name.partition("#")[0]]
            difference = (call.recorded.project(call.gate) - expected).abs().max()
            assert difference <= 1e-5 * expected.abs().max(), name
            continue
        assert call.check() < 1e-5, name
        if call.kind == "channel":
            matrix = call.matrix()
            assert matrix.shape[2] == matrix.shape[3] == call.values.shape[2]
            torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]), atol=1e-6, rtol=0)
            continue
        query = call.token_at(place)
        rows = call.matrix(softmax_only=True)
        assert rows.shape[2] == call.prefix + call.map_size[0] * call.map_size[1]
        if not call.signed or call.recorded.softmax:
            assert rows.min() >= 0
        expected = call.details["gates"] if "gates" in call.details else torch.ones_like(rows[..., 0])
        if call.normalised or call.recorded.softmax or "gates" in call.details:
            torch.testing.assert_close(rows.sum(-1), expected, atol=1e-6, rtol=1e-6)
        at = call.at(place)
        assert at.shape[2:] == images.shape[2:]
        row = call.matrix()[:, :, query] if call.recorded.softmax else rows[:, :, query]
        torch.testing.assert_close(at.sum((2, 3)) + call.outside(place), row.sum(-1), atol=1e-5, rtol=1e-5)
    return record


def test_every_family_tells_what_it_did(family, build, images, golden_module):
    model = fill(build(family), golden_module)
    size = (64, 64) if family.startswith(FIXED) else (75, 97)
    images = torch.nn.functional.interpolate(images, size)[:1]
    if family.startswith(WITHOUT):
        with pytest.raises(TaskError, match="moves channels by one position"), foveate.record_attention(model):
            pass
        return
    record = assert_told(model, images)
    assert not {reason for reason in record.skipped.values() if "no reader" in reason}


@pytest.mark.heavy
@pytest.mark.parametrize("name", foveate.list_models())
def test_every_variant_tells_what_it_did(name, golden_module):
    torch.manual_seed(0)
    if name.startswith(WITHOUT):
        pytest.skip("it has no attention")
    if name in ("foveate_davit_huge", "foveate_davit_giant"):
        pytest.skip("of 0.3 and 1.4 G parameters; its attention is that of the smaller ones")
    model = fill(timm.create_model(name, num_classes=5), golden_module)
    size = model.default_cfg["input_size"][1:] if name.startswith(FIXED) else (135, 97)
    if name.endswith("AAAA") or "transnext" in name:
        size = (160, 129)
    assert_told(model, torch.randn(1, 3, *size), some=None if max(size) < 200 else 2)
