"""Two processes on the CPU that train together: a model's own losses reach both, and the history as their mean."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import foveate
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from foveate.blocks.losses import collect_losses
from foveate.tasks import engine
from foveate.tasks.classify.task import Classify
from foveate.tasks.data import classification
from foveate.tasks.data.samples import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

SMALL = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), focus_depths=(1, 1), groups=(2, 2), head_dim=16)


def gradients_of(net, model, images, targets):
    criterion = partial(F.cross_entropy, target=targets)
    with collect_losses(criterion) as own:
        logits = net(images)
    (criterion(logits) + sum(own.values())).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def overlock():
    torch.manual_seed(0)
    model = timm.create_model("overlock_xt", num_classes=5, aux_head=True, drop_path_rate=0.0, **SMALL).train()
    model.set_grad_checkpointing()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # in training each process has the statistics of its own images
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3])


def work(rank, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = overlock()
    images, targets = (part.chunk(2)[rank] for part in batch())
    torch.save(gradients_of(DistributedDataParallel(model), model, images, targets), folder / f"gradients{rank}.pth")

    digits = tuple(part[:24] for part in load_digits())
    classification.load_digits, classification.DIGITS_TRAIN = lambda: digits, 16
    losses, loss = [], Classify.loss

    def recorded(*args):
        value = loss(*args)
        if torch.is_grad_enabled():  # a checkpoint's own look at the last batch is no step
            losses.append(value)
        return value

    Classify.loss, Classify.draw = recorded, lambda *args: []  # pictures take most of the time
    options = ["model.name=overlock_xt", "model.kwargs={}", "model.kwargs.aux_head=True", "grad_checkpointing=True"]
    options += [f"model.kwargs.{key}={value}" for key, value in SMALL.items()]
    options += ["epochs=1", "schedule.warmup_epochs=0", "batch_size=8", "device=cpu", "ema=0.1"]
    config = engine.load_config(Path(foveate.__file__).parent / "configs/classify/host_atto_digits.py", options)
    engine.train(config, folder / "run", progress=False)
    (folder / f"losses{rank}.json").write_text(json.dumps({name: value.item() for name, value in losses[-1].items()}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left: their gradients of halves of a batch, and a run with the losses of its only batch."""
    folder = tmp_path_factory.mktemp("processes")
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return folder


def test_both_have_the_gradients_of_the_whole_batch_and_of_the_auxiliary_head(folder):
    model = overlock()
    expected = gradients_of(model, model, *batch())
    assert expected["aux_head.2.weight"].abs().max() > 1e-3
    for rank in range(2):
        actual = torch.load(folder / f"gradients{rank}.pth", weights_only=True)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_the_history_has_the_mean_of_both_by_name(folder):
    (entry,) = json.loads((folder / "run" / "history.json").read_text())
    both = [json.loads((folder / f"losses{rank}.json").read_text()) for rank in range(2)]
    assert both[0].keys() == {"loss", "loss_aux"}
    for name in both[0]:
        assert both[0][name] != both[1][name]
        assert entry[f"train/{name}"] == pytest.approx((both[0][name] + both[1][name]) / 2, rel=1e-5)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
