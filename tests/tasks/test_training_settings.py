"""Every setting of training against the plain formula, on a model small enough to do it by hand."""

import copy
import itertools
import json
import math
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import foveate
import pytest
import timm
import torch
from foveate.blocks.losses import collect_losses, report_loss
from foveate.tasks import TaskError, engine
from foveate.tasks.classify import task as classify
from foveate.tasks.data.images import FULL_WHITE
from foveate.tasks.dense.build import freeze_statistics
from foveate.tasks.engine import hooks, run_folder
from foveate.tasks.engine import runner as runner_module
from foveate.tasks.engine.config import task_class_of
from foveate.tasks.engine.hooks import SeedHook
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn
from torch.utils.data import TensorDataset

CONFIGS = Path(foveate.__file__).parent / "configs"
START = torch.tensor([[1.0, -2.0]])


class Line(nn.Module):
    """A linear layer, and a copy of its weights and of what it computes at every call in training."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1, bias=False)
        self.fc.weight.data.copy_(START)
        self.seen = []

    def forward(self, x):
        out = self.fc(x)
        if self.training and torch.is_grad_enabled():  # a checkpoint's own look at the last batch is no step
            self.seen.append((self.fc.weight.detach().clone(), out.detach(), x))
        return out


class Inputs(TensorDataset):
    """Inputs that are no pictures."""

    white = FULL_WHITE
    collate = None

    def inventory(self):
        return []


class LineTask:
    """A task of the engine: the mean of the line's outputs is what is minimised."""

    DEFAULTS: ClassVar[dict] = {}
    FREE = ()
    metric = "loss"
    shown = ("loss",)
    classes: ClassVar[list] = ["line"]
    inputs = torch.tensor([[1.0, 2.0], [3.0, 5.0], [-1.0, 4.0], [2.0, 0.0]])

    def __init__(self, config):
        self.train_set = self.val_set = Inputs(self.inputs, torch.zeros(len(self.inputs)))
        self.model = Line()

    def check_data(self, training=True):
        return []

    def build_model(self):
        return self.model

    def loss(self, model, x, _):
        return {"loss": model(x).mean()}

    def predict(self, model, x):
        return list(model(x))

    def measure(self, predictions, targets):
        return {"loss": float(torch.stack(predictions).mean())}

    def measure_classes(self, predictions, targets):
        return []

    def draw(self, predictions, targets, folder, epoch, indices):
        return []

    def card(self):
        return {"task": "line", "model": "line", "classes": self.classes}


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Train a task with the engine by plain gradient descent; return the task and the last checkpoint."""
    config = copy.deepcopy(engine.DEFAULTS)
    tasks = []

    def run(task_class=LineTask, folder="run", **settings):
        def make(config):
            tasks.append(task_class(config))
            return tasks[-1]

        monkeypatch.setattr(import_module("foveate.tasks.engine.train"), "task_class_of", lambda name: make)
        monkeypatch.setattr(hooks, "format_config", repr)
        monkeypatch.setattr(run_folder, "format_config", repr)  # it knows the keys of the house's tasks alone
        make.FREE, make.DEFAULTS = (), {}
        settings = {"epochs": 1, "batch_size": 4, "ema": None, "precision": "float32"} | settings
        optimizer = {"name": "sgd", "lr": 0.1, "weight_decay": 0.0, "kwargs": {"momentum": 0.0, "nesterov": False}}
        schedule = {"name": "step", "steps": (), "warmup_epochs": 0, "warmup_iterations": 0}
        whole = config | {"task": "line", "device": "cpu", "workers": 0} | settings
        whole["optimizer"] = config["optimizer"] | optimizer | settings.get("optimizer", {})
        whole["schedule"] = config["schedule"] | schedule | settings.get("schedule", {})
        result = engine.train(whole, tmp_path / folder, progress=False)
        return tasks[-1], torch.load(result["last"], weights_only=True)

    return run


def weights_of(checkpoint):
    return checkpoint["state_dict"]["fc.weight"]


GRADIENT = LineTask.inputs.mean(0, keepdim=True)


def test_a_plain_step(train):
    _, checkpoint = train()
    torch.testing.assert_close(weights_of(checkpoint), START - 0.1 * GRADIENT)


class ReportingLine(Line):
    """A line that would have its outputs lower still."""

    def forward(self, x):
        out = super().forward(x)
        if self.training:
            report_loss("own", 0.5 * out.mean())
        return out


class ReportingTask(LineTask):
    def __init__(self, config):
        super().__init__(config)
        self.model = ReportingLine()


def test_losses_that_a_model_reports_are_trained_on_and_logged_by_name(train, tmp_path):
    task, checkpoint = train(ReportingTask)
    torch.testing.assert_close(weights_of(checkpoint), START - 0.15 * GRADIENT)
    (entry,) = json.loads((tmp_path / "run" / "history.json").read_text())
    own = 0.5 * task.model.seen[-1][1].mean().item()
    assert entry["train/loss_own"] == pytest.approx(own)
    assert entry["train/loss"] == pytest.approx(2 * own)  # the task's alone, as in validation


class MixtureTask(LineTask):
    """A mixture of heads in the line's place, whose routers report how even their choices are."""

    inputs = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def __init__(self, config):
        super().__init__(config)
        options = dict(embed_dim=24, head_dim=6, depths=(1, 1, 1, 1), img_size=32, num_classes=1)
        heads = dict(shared_heads=(4, 2, 1, 0), routed_heads=(0, 4, 8, 16))
        self.model = timm.create_model("moh_transnext_base_50", drop_path_rate=0.0, **options, **heads)
        self.reported = []

    def loss(self, model, x, _):
        with collect_losses() as own:
            logits = model(x)
        if torch.is_grad_enabled():
            self.reported.append(own["balance"].item())
        report_loss("balance", own["balance"])
        return {"loss": logits.mean()}


def test_the_balance_of_heads_reaches_the_history(train, tmp_path):
    task, _ = train(MixtureTask)
    (entry,) = json.loads((tmp_path / "run" / "history.json").read_text())
    assert task.reported[-1] > 0
    assert entry["train/loss_balance"] == pytest.approx(task.reported[-1], rel=1e-5)


def test_gradients_are_clipped_to_their_norm(train):
    _, checkpoint = train(optimizer={"clip_grad": 0.5})
    torch.testing.assert_close(weights_of(checkpoint), START - 0.1 * 0.5 * GRADIENT / GRADIENT.norm())
    _, checkpoint = train(folder="long", optimizer={"clip_grad": 1e3})
    torch.testing.assert_close(weights_of(checkpoint), START - 0.1 * GRADIENT)


def test_accumulated_batches_are_one(train):
    task, checkpoint = train(batch_size=2, optimizer={"accumulate": 2})
    torch.testing.assert_close(weights_of(checkpoint), START - 0.1 * GRADIENT)
    assert all(torch.equal(weight, START) for weight, *_ in task.model.seen)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_layers_compute_in_the_precision(train, precision, dtype):
    # The scale of float16 begins too high for these gradients: two steps are left out.
    epochs = 3 if precision == "float16" else 1
    task, checkpoint = train(precision=precision, epochs=epochs)
    assert {out.dtype for _, out, _ in task.model.seen} == {dtype}
    assert weights_of(checkpoint).dtype == torch.float32
    torch.testing.assert_close(weights_of(checkpoint), START - 0.1 * GRADIENT, atol=0.02, rtol=0)


def test_the_average_takes_momentum_of_the_new_weights(train):
    """mmengine copies the weights of the first step; the second is averaged."""
    _, checkpoint = train(epochs=2, ema=0.25)
    first, second = START - 0.1 * GRADIENT, START - 0.2 * GRADIENT
    torch.testing.assert_close(weights_of(checkpoint), 0.75 * first + 0.25 * second)


class Pixels(Line):
    """A convolution and a batch norm on images."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        self.layouts = [y.is_contiguous(memory_format=torch.channels_last) for y in (x, self.conv.weight)]
        return super().forward(self.norm(self.conv(x)).mean((2, 3)))


class PixelTask(LineTask):
    inputs = torch.arange(4 * 3 * 5 * 5).view(4, 3, 5, 5) / 100

    def __init__(self, config):
        super().__init__(config)
        self.model = Pixels()


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_and_weights_lie_channels_last(train, channels_last):
    task, _ = train(PixelTask, channels_last=channels_last)
    assert task.model.layouts == [channels_last, channels_last]


@pytest.mark.parametrize("wanted", [False, True])
def test_batch_norms_of_several_gpus_are_one(monkeypatch, wanted):
    """What the engine wraps for several processes, on a machine without GPUs."""
    model = Pixels()
    model.memory_format = torch.preserve_format
    monkeypatch.setattr(Pixels, "to", lambda self, *args, **kwargs: self)
    monkeypatch.setattr(runner_module, "MMDistributedDataParallel", lambda module, **kwargs: module)
    process = SimpleNamespace(
        _device=torch.device("cuda", 0),
        _train_dataloader=None,
        distributed=True,
        _config={"sync_batchnorm": wanted},
    )
    wrapped = runner_module.TaskRunner.wrap_model(process, None, model)
    assert isinstance(wrapped.norm, nn.SyncBatchNorm) == wanted


def test_norm_eval_keeps_the_statistics():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5)).train()
    freeze_statistics(model)
    assert [module.training for module in model] == [True, False, True]
    model(torch.randn(2, 3, 4, 4))
    assert torch.equal(model[1].running_mean, torch.zeros(2))


@pytest.mark.parametrize("recipe", ["detect/mask_rcnn_nat_atto_nuclei", "segment/upernet_nat_atto_nuclei"])
def test_dense_recipes_obey_norm_eval(recipe):
    """The backbone's batch norms compute with their own statistics at every batch of training, the head's don't."""
    config = engine.load_config(
        CONFIGS / f"{recipe}.py", ["model.norm_eval=True", "model.backbone=ela_t_resnet18", "device=cpu"]
    )
    task = task_class_of(config["task"])(config)
    seen = {}

    class Seen(Exception):
        pass

    def record(module, args):
        seen.update({name: norm.training for name, norm in model.named_modules() if isinstance(norm, nn.BatchNorm2d)})
        raise Seen

    model = task.build_model().train()
    next(m for m in model.modules() if isinstance(m, nn.Conv2d)).register_forward_pre_hook(record)
    items = [task.train_set[index] for index in range(2)]
    images, targets = task.train_set.collate(items)
    with pytest.raises(Seen):
        task.loss(model, images, targets)
    backbone = {training for name, training in seen.items() if name.startswith("backbone.")}
    assert backbone == {False}


def test_labels_are_smoothed():
    config = engine.load_config(CONFIGS / "classify/nat_atto_digits.py", ["loss.label_smoothing=0.2", "loss.mixup=0.0"])
    task = classify.Classify(config)
    logits = torch.randn(3, len(task.classes))
    targets = torch.tensor([0, 4, 9])
    share = torch.full_like(logits, 0.2 / len(task.classes))
    share[range(3), targets] += 0.8
    expected = -(share * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(task.loss(lambda _: logits, torch.zeros(3, 1, 1, 1), targets)["loss"], expected)


def test_every_batch_and_process_has_a_seed_of_its_own():
    def drawn(iteration, rank=0, seed=5):
        SeedHook(seed).before_train_iter(SimpleNamespace(iter=iteration, rank=rank), 0)
        return torch.rand(3).tolist()

    first = drawn(0)
    assert drawn(0) == first
    others = [drawn(1), drawn(2), drawn(0, rank=1), drawn(0, seed=6)]
    assert all(other != first for other in others)
    assert len({tuple(other) for other in others}) == len(others)


def optimizer_of(net, **settings):
    """The optimizer that the engine builds, its groups' rates and decays by parameter."""
    defaults = {"name": "sgd", "lr": 0.1, "weight_decay": 0.05, "kwargs": {}, "layer_decay": None, "no_decay": None}
    defaults |= {"factors": {}, "accumulate": 1, "clip_grad": None, "lr_batch": None}
    config = {"optimizer": defaults | settings, "precision": "float32", "batch_size": 8}
    run = SimpleNamespace(_config=config, net=net, _device=torch.device("cpu"))
    wrapper = runner_module.TaskRunner.build_optim_wrapper(run, None)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = wrapper.optimizer.param_groups
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_rates_decay_by_layer():
    net = timm.create_model("nat_atto", num_classes=2)
    rates = {name: rate for name, (rate, _) in optimizer_of(net, layer_decay=0.5).items()}
    assert rates["head.fc.weight"] == pytest.approx(0.1)
    matcher = net.group_matcher()
    from timm.models import group_parameters

    layers = group_parameters(net, matcher, reverse=True)
    last = max(layers.values())
    assert last > 3
    for name, layer in layers.items():
        assert rates[name] == pytest.approx(0.1 * 0.5 ** (last - layer)), name


def test_rates_decay_by_layer_beside_names_and_factors():
    net = timm.create_model("nat_atto", num_classes=2)
    plain = optimizer_of(net, layer_decay=0.5)
    both = optimizer_of(net, layer_decay=0.5, no_decay=("rpb",), factors={"stages.1": 3.0})
    for name, (rate, decay) in both.items():
        assert rate == pytest.approx(plain[name][0] * (3.0 if "stages.1" in name else 1.0)), name
        assert (decay == 0) == ("rpb" in name)
    with pytest.raises(TaskError, match="Line has no layers that timm tells apart"):
        optimizer_of(Line(), layer_decay=0.5)


@pytest.mark.parametrize(("backbone", "layers"), [("nat_atto", 11), ("resnet18", 5)])
def test_rates_of_a_detector_decay_by_its_backbone_s_layers_or_stages(backbone, layers):
    net = foveate.create_detector("faster_rcnn", backbone, num_classes=2, channels=16)
    rates = {name: rate for name, (rate, _) in optimizer_of(net, layer_decay=0.5).items()}
    assert {rate for name, rate in rates.items() if not name.startswith("backbone.features.")} == {0.1}
    inside = {rate for name, rate in rates.items() if name.startswith("backbone.features.")}
    assert sorted(inside) == pytest.approx([0.1 * 0.5**step for step in range(layers, 0, -1)])


def test_the_rate_is_in_proportion_to_the_images_of_a_step(monkeypatch):
    net = timm.create_model("nat_atto", num_classes=2)
    assert {rate for rate, _ in optimizer_of(net, lr_batch=32, accumulate=2).values()} == {0.05}
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert {rate for rate, _ in optimizer_of(net, lr_batch=32, accumulate=2).values()} == {0.2}


def test_biases_norms_and_named_parameters_do_not_decay():
    net = timm.create_model("nat_atto", num_classes=2)
    settings = optimizer_of(net)
    assert all(
        (decay == 0) == (net.get_parameter(name).ndim <= 1 or name in net.no_weight_decay())
        for name, (_, decay) in settings.items()
    )
    named = optimizer_of(net, no_decay=("rpb", "fc"), factors={"head": 10.0})
    assert all((decay == 0) == ("rpb" in name or "fc" in name) for name, (_, decay) in named.items())
    assert all(rate == pytest.approx(1.0 if "head" in name else 0.1) for name, (rate, _) in named.items())


def test_the_average_forgets_the_start_while_it_warms_up(train):
    task, last = train(epochs=3, ema=0.1, ema_warmup=2)
    weights = [weight for weight, _, _ in task.model.seen[2:]] + [last["ema_state_dict"]["module.net.fc.weight"]]
    average = START.clone()
    for step, weight in enumerate(weights):
        # mmengine begins with the first weights that it sees.
        average = weight.clone() if step == 0 else average.lerp(weight, max(0.1, 2 / (2 + step)))
    torch.testing.assert_close(last["state_dict"]["fc.weight"], average)


class Worse(LineTask):
    """Its metric is best after the second epoch."""

    metric = "score"
    shown = ("score",)
    scores = (1.0, 3.0, 2.0, 3.0, 2.0, 9.0)

    def __init__(self, config):
        super().__init__(config)
        self.measured = iter(self.scores)

    def measure(self, predictions, targets):
        return {"score": next(self.measured)}


def test_a_run_ends_when_its_metric_gets_no_better(train, tmp_path):
    _, last = train(Worse, epochs=6, early_stop=2)
    assert [entry["val/score"] for entry in last["history"]] == [1.0, 3.0, 2.0, 3.0]
    assert "ends early: score was best in epoch 2 (early_stop=2)" in (tmp_path / "run" / "log.txt").read_text()
    _, last = train(Worse, "again", epochs=6, early_stop=2, val_interval=2)
    assert [entry.get("val/score") for entry in last["history"]] == [None, 1.0, None, 3.0, None, 2.0]


EPOCHS = 6
COSINE = [0.1 * (0.2 + 0.8 * (1 + math.cos(math.pi * step / 12)) / 2) for step in range(12)]
SCHEDULES = {
    "cosine": ({"name": "cosine", "final_factor": 0.2}, COSINE),
    "cosine after a warmup": (
        {"name": "cosine", "final_factor": 0.2, "warmup_iterations": 4, "warmup_factor": 0.2},
        [0.1 * (0.2 + 0.8 * step / 3) for step in range(4)]  # the last of them at the full rate, as in mmengine
        + [0.1 * (0.2 + 0.8 * (1 + math.cos(math.pi * step / 8)) / 2) for step in range(8)],
    ),
    "cosine after a warmup that would fill the run, and takes a fifth of it": (
        {"name": "cosine", "final_factor": 0.2, "warmup_epochs": EPOCHS, "warmup_factor": 0.2},
        [0.1 * 0.2, 0.1] + [0.1 * (0.2 + 0.8 * (1 + math.cos(math.pi * step / 10)) / 2) for step in range(10)],
    ),
    "poly": (
        {"name": "poly", "final_factor": 0.0, "power": 0.9},
        [0.1 * (1 - step / 11) ** 0.9 for step in range(12)],
    ),
    "step": ({"name": "step", "steps": (2, 4), "gamma": 0.1}, [0.1] * 4 + [0.01] * 4 + [0.001] * 4),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_follow_the_schedule(train, name):
    """With a gradient of one, every step is as long as the rate."""

    class UnitTask(LineTask):
        def loss(self, model, x, _):
            return {"loss": model(x).mean() * 0 + model.fc.weight.sum()}

    schedule, expected = SCHEDULES[name]
    task, checkpoint = train(UnitTask, epochs=EPOCHS, batch_size=2, schedule=schedule)
    weights = [weight[0, 0].item() for weight, *_ in task.model.seen[1:]] + [weights_of(checkpoint)[0, 0].item()]
    steps = [before - after for before, after in itertools.pairwise(weights)]
    assert steps == pytest.approx(expected, abs=2e-6)


def test_segmenters_see_rgb_of_imagenet_by_default():
    """The published recipes' means of 123.675, 116.28, 103.53 and their deviations, red first."""
    from foveate.tasks.segment.task import Segment

    data = Segment.DEFAULTS["data"]
    torch.testing.assert_close(255 * torch.tensor(data["mean"]), torch.tensor([123.675, 116.28, 103.53]))
    torch.testing.assert_close(255 * torch.tensor(data["std"]), torch.tensor([58.395, 57.12, 57.375]))


def test_hooks_of_mmengine_are_called(train, capsys):
    @HOOKS.register_module(force=True)
    class Notes(Hook):
        def __init__(self, text):
            self.text = text

        def after_train_epoch(self, runner):
            print(self.text, runner.epoch)

    train(custom_hooks=[{"type": "Notes", "text": "noted"}], epochs=2)
    assert capsys.readouterr().out.split() == ["noted", "0", "noted", "1"]


@pytest.mark.parametrize(
    ("described", "reason"),
    [
        ({"type": "EMAHok"}, r"custom_hooks\[0\]: mmengine has no hook 'EMAHok'; did you mean 'EMAHook'"),
        ({"type": "EarlyStoppingHook", "speed": 1}, r"custom_hooks\[0\]: EarlyStoppingHook: .*speed"),
        ("EMAHook", r"custom_hooks\[0\] is 'EMAHook'; a hook is dict"),
    ],
)
def test_wrong_hooks_are_named(train, described, reason):
    with pytest.raises(TaskError, match=reason):
        train(custom_hooks=[described])


def test_a_run_may_stop_early_by_mmengine_s_hook(train):
    stop = {"type": "EarlyStoppingHook", "monitor": "val/loss", "patience": 1, "min_delta": 1e9}
    _, checkpoint = train(custom_hooks=[stop], epochs=9)
    assert len(checkpoint["history"]) < 4
