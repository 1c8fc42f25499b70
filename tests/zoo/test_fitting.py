"""The one strict loader: what fits, what is kept, resampled or left out, and what is refused in which words."""

import pytest
import torch
from foveate.zoo.checkpoint import Checkpoint, CheckpointError, fit, load, open_checkpoint
from torch import nn


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.fixture
def state(model):
    return {key: torch.full_like(value, 7) for key, value in model.state_dict().items()}


def test_all_of_a_file_arrives_in_all_of_a_model(model, state):
    report = load(model, state, "file.pth")
    assert all((value == 7).all() for value in model.state_dict().values())
    assert (report.matched, report.missing, report.unexpected, report.reshaped) == (7, (), (), ())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda state: state.pop("0.bias"), r"1 missing \(0.bias\)"),
        (lambda state: state.update(more=torch.ones(1)), r"1 unexpected \(more\)"),
        (lambda state: state.update({"0.bias": torch.ones(5)}), r"1 of another shape \(0.bias\)"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(model, state, change, fault):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    change(state)
    with pytest.raises(CheckpointError, match=f"^file.pth: the weights don't fit the model: {fault}; look elsewhere$"):
        load(model, state, "file.pth", hint="; look elsewhere")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=f"^no such model: [67] of 7 entries match, {fault}$"):
        fit(state, model, "no such model", counts=True)


def test_what_is_kept_stays_and_is_told_whether_or_not_the_file_has_it(model, state):
    before = model[0].bias.clone()
    del state["1.num_batches_tracked"]
    report = load(model, state, "file.pth", initial=["0.bias", "1.num_batches_tracked"])
    assert torch.equal(model[0].bias, before)
    assert (report.matched, report.missing, report.unexpected) == (5, ("0.bias", "1.num_batches_tracked"), ("0.bias",))


def test_what_is_resampled_is_told_by_the_report_alone(model, state):
    small = state["0.weight"] = torch.ones(2, 3)

    def resize(key, value, size, of):
        assert (key, tuple(size), of) == ("0.weight", (4, 3), model)
        return value.repeat(2, 1), "doubling"

    fitted, report = fit(state, model, "no such model", resize=resize)
    assert fitted["0.weight"].shape == (4, 3)
    assert report.reshaped == (("0.weight", (2, 3), (4, 3), "doubling"),)
    assert state["0.weight"] is small
    assert not any(vars(value) for value in fitted.values())
    with pytest.raises(CheckpointError, match="of another shape"):
        fit(state, model, "no such model", resize=lambda *entry: None)


def test_a_checkpoint_that_is_read_is_not_read_again(state, tmp_path):
    torch.save({"state_dict": state, "card": {"task": "classify"}}, tmp_path / "file.pth")
    checkpoint = open_checkpoint(tmp_path / "file.pth")
    (tmp_path / "file.pth").unlink()
    assert isinstance(checkpoint, Checkpoint)
    assert open_checkpoint(checkpoint) is checkpoint
    assert str(checkpoint) == str(tmp_path / "file.pth")
    assert checkpoint.card == {"task": "classify"}
    assert checkpoint.state.keys() == state.keys()
