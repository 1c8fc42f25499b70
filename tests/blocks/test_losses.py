"""A model's own losses: what is collected, from where, and what becomes of the output and of copies meanwhile."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from foveate.blocks.losses import collect_losses, report_logits, report_loss, wants_logits
from timm.models import checkpoint
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend


class Balanced(nn.Module):
    """A layer that wants its outputs small."""

    def __init__(self, name="balance"):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.name = name

    def forward(self, x):
        x = self.layer(x).tanh()
        if self.training:
            report_loss(self.name, 0.01 * x.square().mean())
        return x


class Net(nn.Module):
    def __init__(self, recompute=False):
        super().__init__()
        self.blocks = nn.ModuleList([Balanced(), Balanced()])
        self.head = nn.Linear(4, 3)
        self.aux_head = nn.Linear(4, 3)
        self.recompute = recompute

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x) if self.recompute else block(x)
        if self.training and wants_logits():
            report_logits("aux", self.aux_head(x), 0.4)
        return self.head(x)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def losses_of(net, batch):
    images, targets = batch
    criterion = partial(F.cross_entropy, target=targets)
    with collect_losses(criterion) as own:
        logits = net(images)
    return criterion(logits), own


def test_losses_of_one_name_are_added_and_logits_are_judged_like_the_output(batch):
    net = Net()
    _, own = losses_of(net, batch)
    assert list(own) == ["balance", "aux"]
    first = net.blocks[0].layer(batch[0]).tanh()
    second = net.blocks[1].layer(first).tanh()
    torch.testing.assert_close(own["balance"], 0.01 * (first.square().mean() + second.square().mean()))
    torch.testing.assert_close(own["aux"], 0.4 * F.cross_entropy(net.aux_head(second), batch[1]))


def test_nothing_is_reported_in_evaluation_or_where_nobody_collects(batch):
    net = Net()
    expected = net(batch[0])
    _, own = losses_of(net.eval(), batch)
    assert own == {}
    assert torch.equal(net.train()(batch[0]), expected)
    with collect_losses() as own:
        net(batch[0])
    assert list(own) == ["balance"]  # without a criterion, no head is asked


def test_the_innermost_collection_gets_them_and_an_error_ends_it(batch):
    with collect_losses() as outer:
        with collect_losses() as inner:
            report_loss("a", torch.ones(()))
        with pytest.raises(TypeError), collect_losses(torch.sum):
            Net()(None)
        report_loss("b", torch.ones(()))
    assert list(inner) == ["a"]
    assert list(outer) == ["b"]
    with collect_losses(torch.sum):
        report_logits("aux", torch.ones(1, 1), 1.0)
        with pytest.raises(ValueError, match="two modules report logits as 'aux'"):
            report_logits("aux", torch.ones(1, 1), 1.0)
    assert not wants_logits()


def gradients(net, batch, function=None):
    net.zero_grad()
    loss, own = losses_of(net if function is None else function, batch)
    (loss + sum(own.values())).backward()
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


def test_recomputed_blocks_give_the_same_gradients_and_report_once(batch):
    net = Net()
    expected = gradients(net, batch)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    net.recompute = True
    torch.testing.assert_close(gradients(net, batch), expected)
    loss, own = losses_of(net, batch)
    with collect_losses() as meanwhile:
        report_loss("other", torch.zeros(()))
    (loss + own["balance"]).backward()
    assert list(meanwhile) == ["other"]


def test_a_compiled_model_reports_in_one_graph_compiled_once(batch):
    net = Net()
    expected = gradients(net, batch)
    compilations = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=compilations, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(gradients(net, batch, compiled), expected)
    assert compilations.frame_count == 1


def test_copies_and_files_hold_nothing_of_them(batch):
    net = Net()
    keys = list(net.state_dict())
    losses_of(net, batch)
    torch.testing.assert_close(copy.deepcopy(net)(batch[0]), net(batch[0]))
    assert list(net.state_dict()) == keys
