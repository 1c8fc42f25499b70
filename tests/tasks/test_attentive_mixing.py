"""SMMix and Attentive CutMix: what is pasted where, by which attention, and what is learned from it."""

import pytest
import timm
import torch
import torch.nn.functional as F
from foveate import record_attention
from foveate.tasks import TaskError, engine
from foveate.tasks.classify.attentive_mixing import AttentiveMixing, _Look, paste_cells, paste_square
from foveate.tools.cli import main
from torch import nn


def batch(count=2, side=64):
    """Images of one value each, 1, 2, ..."""
    return torch.arange(1.0, count + 1).view(-1, 1, 1, 1).expand(count, 3, side, side).clone()


def look(importance, step):
    return _Look(importance, (step, step), torch.zeros(len(importance), 3))


def test_the_most_attended_square_covers_the_least_attended_one(monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda low, high, size: torch.tensor(2))
    images = torch.rand(2, 3, 64, 64)
    importance = torch.full((2, 4, 4), 0.5)
    importance[0, 2:, 2:], importance[0, :2, :2] = 0.9, 0.1  # of the first most at the bottom right, least top left
    importance[1, :2, 2:], importance[1, 2:, :2] = 0.9, 0.1
    mixed = paste_square(images, look(importance, 16))
    expected = images.clone()
    expected[0, :, :32, :32] = images[1, :, :32, 32:]
    expected[1, :, 32:, :32] = images[0, :, 32:, 32:]
    assert torch.equal(mixed.images, expected)
    assert mixed.pasted[0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert mixed.pasted[1].nonzero().tolist() == [[2, 0], [2, 1], [3, 0], [3, 1]]
    assert mixed.own_share.tolist() == [0.75, 0.75]  # 1 - s^2 / side^2


def test_a_square_has_a_quarter_to_three_quarters_of_the_side_and_is_whole():
    drawn = set()
    for seed in range(60):
        torch.manual_seed(seed)
        mixed = paste_square(batch(), look(torch.rand(2, 14, 14), 16 // 4))
        drawn |= {int(part.sum()) for part in mixed.pasted}
    assert drawn == {length**2 for length in range(3, 11)}
    # The last cells of a map are cut where the image is no multiple of its step.
    for seed in range(20):
        torch.manual_seed(seed)
        mixed = paste_square(batch(side=50), look(torch.rand(2, 4, 4), 16))
        other = (mixed.images != batch(side=50)).float().mean((1, 2, 3))
        assert torch.allclose(1 - other, mixed.own_share)


def test_the_most_attended_cells_are_copied_to_their_places():
    images = batch(2, 56)
    importance = torch.rand(2, 7, 7)
    mixed = paste_cells(images, look(importance, 8))
    assert mixed.pasted.sum((1, 2)).tolist() == [6, 6]
    assert torch.allclose(mixed.own_share, torch.tensor(1 - 6 / 49))
    best = importance[1].flatten().topk(6).indices
    assert set(mixed.pasted[0].flatten().nonzero()[:, 0].tolist()) == set(best.tolist())
    # Pixel by pixel, they are the other image's there and its own elsewhere.
    cells = F.interpolate(mixed.pasted[:, None].float(), scale_factor=8)
    assert torch.equal(mixed.images, torch.where(cells > 0, images.flip(0), images))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "nat_atto", "swin_tiny_patch4_window7_224"])
def test_it_looks_with_the_last_attention_and_leaves_the_model_as_it_was(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **({} if "nat" in name else {"img_size": 64}))
    model.train()
    model.head.eval()  # as if frozen
    images = torch.rand(2, 3, 64, 64)
    mixing = AttentiveMixing(1.0, 0.0)
    mixing.prepare(model, images[:1])
    state = torch.random.get_rng_state()
    mixing.mix(model, images, "attentive_cutmix")
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    assert not model.head.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    taken = {}

    def keep(images, look):
        taken["look"] = look
        return paste_cells(images, look)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foveate.tasks.classify.attentive_mixing.paste_cells", keep)
        mixing.mix(model, images, "attentive_cutmix")
    model.eval()
    with torch.no_grad(), record_attention(model) as record:
        logits = model(images)
    call = record[record.layers[-1]]
    count = call.map_size[0] * call.map_size[1]
    weights, _ = call.on_tokens(range(call.prefix, call.prefix + count))
    expected = weights[..., call.prefix :].mean((1, 2)).unflatten(1, call.map_size)
    assert torch.allclose(taken["look"].importance, expected, atol=1e-6)
    if name == "vit_tiny_patch16_224":
        assert torch.allclose(weights[:, :, 0].sum(-1), torch.ones(2, 3))
        assert torch.equal(weights, call.matrix()[:, :, 1:])
    assert torch.allclose(taken["look"].logits, logits, atol=1e-5)


class Reader(nn.Module):
    """A classifier whose features are the image's own pixels."""

    output_fmt = "NCHW"

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward_features(self, x):
        return x

    def forward_head(self, x):
        return self.fc(x.mean((2, 3)))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def test_the_losses_are_the_papers():
    torch.manual_seed(0)
    model, images = Reader(), torch.rand(2, 3, 4, 4)
    mixed = paste_square(images, _Look(torch.rand(2, 4, 4), (1, 1), model(images).detach()))
    targets, kept = torch.tensor([0, 2]), mixed.own_share[0]
    losses = AttentiveMixing(1.0, 0.0).loss(model, mixed, targets, F.cross_entropy, "smmix")
    logits = model(mixed.images)
    hard = F.cross_entropy(logits, targets) * kept + F.cross_entropy(logits, targets.flip(0)) * (1 - kept)
    assert losses["loss"].item() == pytest.approx(hard.item(), rel=1e-6)
    parts = []
    for part, label in ((~mixed.pasted, targets), (mixed.pasted, targets.flip(0))):
        mean = torch.stack([x[:, inside].mean(1) for x, inside in zip(mixed.images, part, strict=True)])
        parts.append(F.cross_entropy(model.fc(mean), label))
    assert losses["loss_regions"].item() == pytest.approx((sum(parts) / 2).item(), rel=1e-6)
    p = (kept * mixed.logits + (1 - kept) * mixed.logits.flip(0)).softmax(1)
    divergence = (p * (p.log() - logits.log_softmax(1))).sum(1).mean()
    assert losses["loss_consistency"].item() == pytest.approx(divergence.item(), abs=1e-6)


BOTH = (
    "data.size=64",
    "loss.smmix=0.5",
    "loss.attentive_cutmix=0.4",
    "loss.mixup=0.8",
    "epochs=1",
    "batch_size=2",
    "schedule.warmup_epochs=0",
)


def train(config_file, output, *overrides, resume=False):
    config = engine.load_config(config_file, overrides)
    return engine.train(config, output, resume=resume, progress=False)


def test_a_run_that_mixes_goes_on_to_the_same_bits(config_file, tmp_path, monkeypatch):
    ways = []
    draw = AttentiveMixing.draw

    def note(self):
        ways.append(draw(self))
        return ways[-1]

    monkeypatch.setattr(AttentiveMixing, "draw", note)
    whole = train(config_file, tmp_path / "whole", *BOTH, "checkpoint.interval=1")
    # The trial before, each batch, and what is tried again.
    assert {"smmix", "attentive_cutmix"} <= set(ways)
    assert {"train/loss_regions", "train/loss_consistency"} <= whole["history"][0].keys()

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("foveate.tasks.engine.hooks.RunHook.after_train_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config_file, tmp_path / "stopped", *BOTH, "checkpoint.interval=1")
    again = train(config_file, tmp_path / "stopped", *BOTH, "checkpoint.interval=1", resume=True)
    states = [torch.load(run["last"], weights_only=True)["state_dict"] for run in (whole, again)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert [entry["train/loss"] for entry in whole["history"]] == [entry["train/loss"] for entry in again["history"]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.name=resnet18", "model.kwargs={}", "loss.smmix=0.5"), r"loss.smmix looks with .*: nothing to record"),
        (("model.name=van_b0", "loss.attentive_cutmix=1"), r"loss.attentive_cutmix looks with the model's own att"),
        (("loss.smmix=0.5",), r"the last map is 1x1; take larger images \(data.size\)"),
        (("loss.smmix=0.7", "loss.attentive_cutmix=0.5"), "together they are at most 1"),
        (("loss.smmix=1.5",), "loss.smmix is 1.5, but must be a probability"),
        (("loss.smix=1.5",), "unknown key 'loss.smix'; did you mean 'loss.smmix'"),
    ],
)
def test_what_cannot_look_says_so(config_file, tmp_path, capsys, overrides, message):
    assert main(["train", str(config_file), "--output", str(tmp_path / "run"), *overrides]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    with pytest.raises(TaskError, match=message):
        raise TaskError(error)
