"""Mixture of heads: the published modules and their balance loss, any attention, precision, refusals."""

import copy
import re

import pytest
import torch
from foveate.blocks import (
    AggregatedAttention2d,
    HeadRouter,
    MixtureOfHeads2d,
    UnitGlobalAttention2d,
    collect_losses,
    create_attention,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

PUBLISHED = {
    "moh_aggregated_s2_r2": (lambda: AggregatedAttention2d(96, 6, pretrain_size=(8, 10)), 6, 2, 2),
    "moh_aggregated_s4_r0": (lambda: AggregatedAttention2d(96, 4, pretrain_size=(8, 10)), 4, 4, 0),
    "moh_global_s3_r3": (lambda: UnitGlobalAttention2d(96, 8), 8, 3, 3),
}


def our_name(name: str) -> str:
    name = name.replace("cpb_fc", "cpb.fc")
    if name.startswith("wg"):
        return f"router.{name}"
    return name if name.startswith("proj.") else f"attention.{name}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_modules_are_the_published_ones(name, open_fixture):
    fixture = open_fixture(f"transnext_blocks/{name}")
    notes = fixture.spec["notes"]
    make, heads, shared, routed = PUBLISHED[name]
    attention = make()
    if "aggregated" in name:
        attention.sr_ratio = notes["kwargs"]["sr_ratio"]
    attention.cpb.pretrain_size = tuple(notes["pretrain_size"])
    moh = MixtureOfHeads2d(attention, heads, shared, routed, balance_weight=1.0)
    state = {our_name(key): value for key, value in fixture.state().items()}
    moh.load_state_dict({key: v.flatten(1) if key.endswith("sr.weight") else v for key, v in state.items()})
    x = fixture.input().unflatten(1, (notes["H"], notes["W"]))
    with collect_losses() as own:
        out = moh.train()(x)
    fixture.assert_output("out", out.flatten(1, 2), 1e-5 * fixture.spec["outputs"]["out"]["std"])
    if routed:
        fixture.assert_output("l_aux", own["balance"].reshape(1), 1e-5 * fixture.spec["outputs"]["l_aux"]["mean"])
    else:
        assert not own
    with collect_losses() as own, torch.no_grad():
        torch.testing.assert_close(moh.eval()(x), out.detach(), atol=1e-5, rtol=1e-5)
    assert not own


@pytest.mark.parametrize(
    "name",
    ["agent", "aggregated", "bilevel", "cross_shaped", "dilated", "global", "neighborhood", "quadtree", "window"],
)
def test_any_attention_can_have_its_heads_weighed(name):
    torch.manual_seed(0)
    moh = create_attention("moh", 32, 4, attention=name, shared_heads=1, routed_heads=2).eval()
    x = torch.randn(2, 16, 16, 32)
    plain = copy.deepcopy(moh.attention)
    weights = moh.router(x)
    assert ((weights > 0).sum(-1) == 3).all()
    expected = moh.proj(plain(x) * weights.repeat_interleave(8, -1))
    torch.testing.assert_close(moh(x), expected)
    assert not torch.allclose(moh(x), moh.proj(plain(x)))


def test_the_balance_counts_as_asked_for():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 4, 16)
    losses = {}
    for weight in (0.01, 0.25):
        torch.manual_seed(1)
        moh = create_attention("moh", 16, 4, attention="global", balance_weight=weight).train()
        with collect_losses() as own:
            moh(x)
        losses[weight] = own["balance"]
    torch.testing.assert_close(losses[0.25], 25 * losses[0.01])


def test_weights_are_those_of_the_paper():
    router = HeadRouter(8, 6, shared_heads=2, routed_heads=2)
    x = torch.randn(3, 5, 8)
    weights, loss = router.route(x)
    gates = router.wg(x).softmax(-1)
    parts = 2 * router.wg_0(x).softmax(-1)
    torch.testing.assert_close(weights.sum(-1), parts[..., 0] * 2 + parts[..., 1] * 2)
    chosen = weights[..., 2:] > 0
    assert (chosen.sum(-1) == 2).all()
    assert (gates[chosen].view(3, 5, 2).amin(-1) > gates.masked_fill(chosen, 0).amax(-1)).all()
    share = chosen.float().mean((0, 1))
    torch.testing.assert_close(loss, 4 * (share * gates.mean((0, 1))).sum())


def test_the_loss_has_gradients_once_under_checkpointing():
    moh = create_attention("moh", 16, 4, attention="global")
    moh.train()
    x = torch.randn(2, 4, 4, 16)
    grads = []
    for run in (moh, lambda x: checkpoint(moh, x, use_reentrant=False)):
        moh.zero_grad()
        with collect_losses() as own:
            out = run(x)
        (out.square().mean() + own["balance"]).backward()
        grads.append(moh.router.wg.weight.grad.clone())
    torch.testing.assert_close(grads[1], grads[0])
    assert grads[0].abs().max() > 0


def test_half_precision_chooses_the_heads_of_float32():
    torch.manual_seed(0)
    router = HeadRouter(64, 16, shared_heads=2, routed_heads=5).bfloat16()
    x = torch.randn(500, 64).bfloat16()
    exact = copy.deepcopy(router).double()
    chosen = exact(x.double()) > 0
    assert torch.equal(router(x) > 0, chosen)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(copy.deepcopy(router).float()(x.float()) > 0, chosen)
    # What half precision itself would choose is something else.
    logits = router.wg(x)
    low = torch.zeros_like(logits).scatter(-1, logits.topk(5).indices, 1.0) > 0
    assert not torch.equal(low, chosen[:, 2:])


@pytest.mark.parametrize(
    ("shared", "routed", "message"),
    [(5, 0, "got shared_heads 5"), (1, 4, "routed_heads 4"), (2, 0, "routed_heads 0"), (-1, 2, "shared_heads -1")],
)
def test_heads_that_do_not_add_up_are_one_line(shared, routed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        HeadRouter(8, 4, shared, routed)


def test_an_attention_without_projection_is_refused():
    with pytest.raises(ValueError, match="last layer is a linear one, proj"):
        MixtureOfHeads2d(nn.Identity(), 2)
    with pytest.raises(ValueError, match="nothing to weigh"):
        HeadRouter(8, 1, 1, 0)
