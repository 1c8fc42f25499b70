"""What torch's tools do with every family: a table of what holds, each cell of which is run."""

import copy
import pickle

import pytest
import timm
import torch
import torch.distributed as dist
from foveate.kernels import set_neighborhood_backend
from timm.models._features_fx import create_feature_extractor as timms_extractor
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models.feature_extraction import create_feature_extractor as torchvisions_extractor

# What refuses says so in one line, which names what does.
TORCHVISION = r"use timm's create_model\(..., features_only=True\)"


def torchvisions_refusal(family: str) -> str | None:
    return None if family.startswith("ela_") else TORCHVISION  # those are timm's own models


# Which tools refuse which families; everything else holds.
REFUSED = {"torchvision": torchvisions_refusal}


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def compiles(model: nn.Module, images: Tensor, backend: str) -> None:
    model.train()
    expected = model(images)
    expected.square().sum().backward()
    grads = gradients(model)
    model.zero_grad()
    torch.compiler.reset()
    actual = torch.compile(model, backend=backend, fullgraph=True)(images)
    same(actual, expected)
    actual.square().sum().backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, grads[name], atol=2e-3, rtol=2e-3)


def aot_eager(model: nn.Module, images: Tensor) -> None:
    compiles(model, images, "aot_eager")


def inductor(model: nn.Module, images: Tensor) -> None:
    compiles(model, images, "inductor")


def jit_trace(model: nn.Module, images: Tensor) -> None:
    # Traces twice and compares the graphs.
    with torch.no_grad():
        same(torch.jit.trace(model.eval(), images)(images), model(images))


def middle(model: nn.Module) -> tuple[str, nn.Module]:
    names = dict(model.named_modules())
    name = next(name for name in ("stages.1", "layer2", "blocks.1") if name in names)
    return name, names[name]


def extracts(model: nn.Module, images: Tensor, create) -> None:
    (name, module), seen = middle(model.eval()), []
    extracted = create(model, [name])(images)[name]
    module.register_forward_hook(lambda _, inputs, out: seen.append(out))
    model(images)
    same(extracted, seen[0])


def timm_fx(model: nn.Module, images: Tensor) -> None:
    extracts(model, images, timms_extractor)


def torchvision(model: nn.Module, images: Tensor) -> None:
    extracts(model, images, torchvisions_extractor)


def export(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        same(torch.export.export(model.eval(), (images,)).module()(images), model(images))


def vmap_of_grad(model: nn.Module, images: Tensor) -> None:
    parameters, buffers = dict(model.eval().named_parameters()), dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, (parameters, buffers), (image[None],)).square().sum()

    per_image = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
    for i, image in enumerate(images):
        model.zero_grad()
        model(image[None]).square().sum().backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(per_image[name][i], parameter.grad, atol=2e-3, rtol=2e-3)


def double_backward(model: nn.Module, images: Tensor) -> None:
    images = images.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # torch's own fused attention has first derivatives only
        (gradient,) = torch.autograd.grad(model.eval()(images).square().sum(), images, create_graph=True)
        gradient.square().sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.any()


def ddp(model: nn.Module, images: Tensor) -> None:
    alone = copy.deepcopy(model).train()
    alone(images).square().sum().backward()
    wrapped = nn.parallel.DistributedDataParallel(model.train())
    wrapped(images).square().sum().backward()  # a parameter without a gradient would make the next one fail
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, gradients(alone)[name], atol=2e-3, rtol=2e-3)
    wrapped(images).sum().backward()


def deepcopy(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model.eval())(images), model(images))


def pickled(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(model.eval()))(images), model(images))


TOOLS = {
    tool.__name__: tool
    for tool in (
        *(aot_eager, inductor, jit_trace, timm_fx, torchvision, export),
        *(vmap_of_grad, double_backward, ddp, deepcopy, pickled),
    )
}
SLOW = {"aot_eager", "inductor"}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A process group of this process alone."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", [pytest.param(t, marks=pytest.mark.heavy if t in SLOW else ()) for t in TOOLS])
def test_a_tool_holds_or_refuses_in_one_line(family, model, images, tool, one_process):
    refusal = REFUSED[tool](family) if tool in REFUSED else None
    if refusal is None:
        TOOLS[tool](model, images)
        return
    with pytest.raises(Exception, match=refusal) as raised:
        TOOLS[tool](model, images)
    assert len(str(raised.value).splitlines()) == 1


def test_the_ways_out_lead_out(build, images):
    """What the refusals name does it."""
    set_neighborhood_backend("tiled")
    try:
        double_backward(build("nat_atto"), images)
    finally:
        set_neighborhood_backend(None)
    model = timm.create_model("nat_atto", features_only=True, feature_cls="fx", out_indices=(0, 1))
    assert [x.shape[-1] for x in model(images)] == model.feature_info.channels()
