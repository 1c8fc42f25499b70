"""The order and the randomness of samples."""

import random

import numpy as np
import pytest
import torch
from foveate.tasks import TaskError
from foveate.tasks.data.classification import InputRule
from foveate.tasks.data.images import DamagedImageError
from foveate.tasks.engine.loading import Order, Samples, build_loader
from PIL import Image
from torch.utils.data import Dataset


class Draws(Dataset):
    """Every sample is what it draws; some are damaged."""

    collate = None

    def __init__(self, size, damaged=()):
        self.size, self.damaged = size, damaged

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.damaged:
            raise DamagedImageError(f"{index}: damaged")
        return index, random.random(), np.random.rand(), torch.rand(()).item()


@pytest.mark.parametrize(("size", "processes"), [(10, 1), (10, 2), (11, 3), (2, 5)])
def test_processes_share_an_epoch_and_only_fill_up_its_end(size, processes):
    orders = [Order(size, 3, rank, processes) for rank in range(processes)]
    had = [list(order) for order in orders]
    assert {len(part) for part in had} == {len(orders[0])} == {-(-size // processes)}
    merged = [had[place % processes][place // processes] for place in range(len(had[0]) * processes)]
    assert [place for _, place, _ in merged] == list(range(len(merged)))
    indices = [index for _, _, index in merged]
    assert sorted(indices[:size]) == list(range(size))
    assert indices[size:] == (indices * processes)[: len(indices) - size]


def test_epochs_and_seeds_have_orders_of_their_own_and_evaluation_has_none():
    def order(seed, epoch):
        sampler = Order(50, seed)
        sampler.epoch = epoch
        return [index for _, _, index in sampler]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert order(0, 1) == orders[1]
    assert order(None, 1) == list(range(50))


def test_an_epoch_that_begins_later_is_the_rest_of_the_whole_one():
    for rank in range(2):
        whole, rest = Order(11, 0, rank, 2), Order(11, 0, rank, 2)
        rest.start = 4
        assert list(rest) == list(whole)[4:]
        assert len(rest) == len(whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_sample_draws_depends_on_its_place_alone(workers):
    def load(epoch, workers, start=0, batch_size=4, rank=0, processes=1):
        loader = build_loader(Draws(13), batch_size, workers, seed=7, rank=rank, processes=processes)
        loader.sampler.epoch, loader.sampler.start = epoch, start
        return [row for batch in loader for row in zip(*(column.tolist() for column in batch), strict=True)]

    first = load(0, 0)
    assert len(first) == 12
    assert len({row[1:] for row in first}) == 12
    assert load(0, workers) == first
    assert load(0, workers, start=8) == first[8:]
    assert load(1, workers) != first
    shares = [load(0, 0, batch_size=2, rank=rank, processes=2) for rank in range(2)]
    assert [shares[place % 2][place // 2] for place in range(12)] == first


def test_the_next_sample_stands_in_for_a_damaged_one_on_request():
    with pytest.raises(DamagedImageError, match="2: damaged"):
        Samples(Draws(5, {2}), None)[0, 0, 2]
    samples = Samples(Draws(5, {2, 4}), None, skip_damaged=True)
    assert [samples[0, place, place][0] for place in range(5)] == [0, 1, 3, 3, 0]
    assert samples.damaged.tolist() == [False, False, True, False, True]
    assert samples.describe_damaged() == ["2: damaged", "4: damaged"]
    with pytest.raises(TaskError, match="every image"):
        Samples(Draws(2, {0, 1}), None, skip_damaged=True)[0, 0, 0]


def test_what_workers_found_damaged_is_known_to_all():
    loader = build_loader(Draws(6, {1, 5}), 2, workers=2, skip_damaged=True)
    assert len(list(loader)) == 3
    assert loader.dataset.damaged.nonzero().flatten().tolist() == [1, 5]


@pytest.mark.parametrize("policy", ["rand-m10-mstd0.5-inc1", "original", "augmix-m10"])
def test_the_strongest_augmentation_never_fails(policy):
    rule = InputRule(32, 3, (0.5,) * 3, (0.5,) * 3)
    transform = rule.transform({"auto_augment": policy})
    image = Image.new("RGB", (40, 30), "orange")
    random.seed(0)
    np.random.seed(0)
    for _ in range(200):
        assert transform(image).isfinite().all()
