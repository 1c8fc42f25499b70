"""Plug-in gates for convolutional networks: CBAM, triplet, polarized self-attention, DAS."""

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from foveate.blocks import CBAM, DeformableGate, PolarizedAttention, TripletAttention

LAYERS = {
    "cbam": CBAM,
    "triplet": TripletAttention,
    "triplet_without_spatial": partial(TripletAttention, spatial=False),
    "polarized_parallel": PolarizedAttention,
    "polarized_sequential": partial(PolarizedAttention, layout="sequential"),
    "das": DeformableGate,
}


def randomise(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: value.abs() + 0.5 if name.endswith("var") else value for name, value in state.items()}


def batch_norm_shapes(name: str) -> dict[str, tuple[int]]:
    return {f"{name}.{leaf}": (1,) for leaf in ("weight", "bias", "running_mean", "running_var")}


def gate_of_pools(x: torch.Tensor, state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The authors' convolution over (maximum, mean) of the first axis, with batch norm and sigmoid."""
    pooled = torch.stack([x.max(1).values, x.mean(1)], dim=1)
    out = F.conv2d(pooled, state[f"{name}.conv.weight"], padding=3)
    norm = [state[f"{name}.bn.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")]
    return torch.sigmoid(F.batch_norm(out, *norm))


def test_cbam_reads_the_authors_weights():
    shapes = {
        "ChannelGate.mlp.1.weight": (2, 32),
        "ChannelGate.mlp.1.bias": (2,),
        "ChannelGate.mlp.3.weight": (32, 2),
        "ChannelGate.mlp.3.bias": (32,),
        "SpatialGate.spatial.conv.weight": (1, 2, 7, 7),
        **batch_norm_shapes("SpatialGate.spatial.bn"),
    }
    state = randomise(shapes)
    x = torch.randn(2, 32, 5, 9)

    def mlp(pooled):
        hidden = F.linear(pooled, state["ChannelGate.mlp.1.weight"], state["ChannelGate.mlp.1.bias"]).relu()
        return F.linear(hidden, state["ChannelGate.mlp.3.weight"], state["ChannelGate.mlp.3.bias"])

    expected = x * torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))[:, :, None, None]
    expected = expected * gate_of_pools(expected, state, "SpatialGate.spatial")
    block = CBAM(32).eval()
    block.load_state_dict(state)
    torch.testing.assert_close(block(x), expected)
    again = CBAM(32).eval()
    again.load_state_dict(block.state_dict())
    torch.testing.assert_close(again(x), expected)


def test_cbam_inside_a_network_reads_the_authors_names():
    net = timm.create_model("resnet18", block_args=dict(attn_layer=CBAM))
    state = {
        key.replace("channel.fc1", "ChannelGate.mlp.1").replace("channel.fc2", "ChannelGate.mlp.3"): value
        for key, value in net.state_dict().items()
    }
    state = {key: value[..., 0, 0] if ".mlp." in key and value.ndim == 4 else value for key, value in state.items()}
    other = timm.create_model("resnet18", block_args=dict(attn_layer=CBAM))
    other.load_state_dict(state)
    assert torch.equal(other.layer1[0].se.channel.fc1.weight, net.layer1[0].se.channel.fc1.weight)


@pytest.mark.parametrize("spatial", [True, False])
def test_triplet_has_the_authors_names_and_values(spatial):
    names = ("cw", "hc", "hw") if spatial else ("cw", "hc")
    shapes = {}
    for name in names:
        shapes |= {f"{name}.conv.conv.weight": (1, 2, 7, 7), **batch_norm_shapes(f"{name}.conv.bn")}
    state = randomise(shapes)
    x = torch.randn(2, 12, 5, 9)
    branches = []
    for name, order in zip(names, ((0, 2, 1, 3), (0, 3, 2, 1), (0, 1, 2, 3)), strict=False):
        turned = x.permute(order)
        branches.append((turned * gate_of_pools(turned, state, f"{name}.conv")).permute(order))
    block = TripletAttention(12, spatial).eval()
    block.load_state_dict(state)
    torch.testing.assert_close(block(x), sum(branches) / len(branches))
    assert sum(parameter.numel() for parameter in block.parameters()) == 100 * len(names)


@pytest.mark.parametrize("layout", ["parallel", "sequential"])
def test_polarized_has_the_authors_names_and_values(layout):
    channels, half = 16, 8
    shapes = {f"conv_{name}.weight": (half, channels, 1, 1) for name in ("v_right", "q_left", "v_left")}
    shapes["conv_q_right.weight"] = (1, channels, 1, 1)
    if layout == "parallel":
        shapes["conv_up.weight"] = (channels, half, 1, 1)
    else:
        shapes |= {"conv_up.0.weight": (2, half, 1, 1), "conv_up.0.bias": (2,)}
        shapes |= {"conv_up.1.weight": (2, 1, 1), "conv_up.1.bias": (2, 1, 1)}
        shapes |= {"conv_up.3.weight": (channels, 2, 1, 1), "conv_up.3.bias": (channels,)}
    state = randomise(shapes)
    x = torch.randn(2, channels, 5, 9)

    def project(name, x):
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def channel_gate(x):
        weights = project("conv_q_right", x).flatten(2).softmax(2)
        context = (project("conv_v_right", x).flatten(2) * weights).sum(2)[:, :, None, None]
        if layout == "parallel":
            return torch.sigmoid(project("conv_up", context))
        context = project("conv_up.0", context)
        context = F.layer_norm(context, (2, 1, 1), state["conv_up.1.weight"], state["conv_up.1.bias"]).relu()
        return torch.sigmoid(project("conv_up.3", context))

    def spatial_gate(x):
        query = project("conv_q_left", x).mean((2, 3))
        keys = project("conv_v_left", x).flatten(2)
        if layout == "sequential":
            keys = keys.softmax(2)
        scores = torch.einsum("bc,bcn->bn", query, keys)
        if layout == "parallel":
            scores = scores.softmax(1)
        return torch.sigmoid(scores).view(2, 1, 5, 9)

    if layout == "parallel":
        expected = x * channel_gate(x) + x * spatial_gate(x)
    else:
        expected = x * channel_gate(x)
        expected = expected * spatial_gate(expected)
    block = PolarizedAttention(channels, layout)
    block.load_state_dict(state)
    torch.testing.assert_close(block(x), expected)


def test_das_starts_as_a_plain_convolution_and_its_offsets_move_it():
    block = DeformableGate(20).eval()
    x = torch.randn(2, 20, 6, 9)
    compressed = block.act(block.norm1(block.pointwise(block.depthwise(x))))

    def convolve(x):
        return F.conv2d(x, block.deformable.weight, padding=1)

    torch.testing.assert_close(block(x), x * torch.sigmoid(block.norm2(convolve(compressed))))
    # An offset of one row for every sample is the convolution of the map one row further down.
    with torch.no_grad():
        block.offset.bias[0::2] = 1.0
    moved = F.pad(compressed, (0, 0, 0, 1))[:, :, 1:]
    expected = x * torch.sigmoid(block.norm2(convolve(moved)))
    torch.testing.assert_close(block(x)[:, :, 1:], expected[:, :, 1:])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [(1, 7), (9, 4)])
def test_any_map_size_gives_finite_gradients(name, size):
    block = LAYERS[name](16)
    x = torch.randn(2, 16, *size, requires_grad=True)
    out = block(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    for gradient in [x.grad, *(parameter.grad for parameter in block.parameters())]:
        assert gradient is not None
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_half_precision_compiles_and_exports(name):
    block = LAYERS[name](16).eval()
    x = torch.randn(1, 16, 9, 5)
    with torch.inference_mode():
        expected = block(x)
        torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), expected)
        torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), expected)
        half = block.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", LAYERS)
def test_is_an_attention_layer_of_timm(name):
    net = timm.create_model("resnet18", block_args=dict(attn_layer=LAYERS[name]), num_classes=3).eval()
    assert net.layer1[0].se is not None
    with torch.inference_mode():
        assert net(torch.randn(1, 3, 65, 97)).isfinite().all()


def test_wrong_settings_are_one_line():
    with pytest.raises(ValueError, match="'parallel' or 'sequential'; got 'both'"):
        PolarizedAttention(16, layout="both")
    with pytest.raises(ValueError, match="multiple of 8 channels; got 12"):
        PolarizedAttention(12, layout="sequential")
    with pytest.raises(ValueError, match="kernel_size must be odd; got 4"):
        DeformableGate(16, kernel_size=4)
