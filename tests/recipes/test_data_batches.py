"""Batches depend on seed, epoch and position, not on workers, on where a run resumes or on the process count."""

from __future__ import annotations

import multiprocessing
import random

import numpy as np
import pytest
import torch
from data_cases import make_folder, make_shards, opened

pytest.importorskip("timm")

AUGMENTED = {"auto_augment": "rand-m9-mstd0.5-inc1", "reprob": 0.5, "color_jitter": 0.4}


@pytest.fixture(scope="module", params=["folder", "shards", "digits"])
def data_set(request, tmp_path_factory):
    if request.param == "folder":
        return make_folder(tmp_path_factory.mktemp("folder"))
    if request.param == "shards":
        pytest.importorskip("webdataset")
        return make_shards(tmp_path_factory.mktemp("shards"))
    pytest.importorskip("sklearn")
    return "digits"


def first(batches, count=6):
    return [batch for batch, _ in zip(batches, range(count), strict=False)]


def same(left, right):
    assert len(left) == len(right)
    for (images, labels), (others, other_labels) in zip(left, right, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


def test_shapes_and_numbers(data_set):
    data = opened(data_set)
    batches = list(data.train(0))
    assert len(batches) == data.batches_per_epoch == data.train_images // 4
    for images, labels in batches:
        assert images.shape == (4, 3, 8, 8) and images.dtype == torch.float32 and images.is_contiguous()
        assert labels.shape == (4,) and labels.dtype == torch.int64
    assert data.in_chans == 3 and len(data.mean) == len(data.std) == 3
    assert sum(len(labels) for _, labels in data.evaluate()) == data.eval_images


def test_workers_do_not_matter(data_set):
    here, there = opened(data_set, **AUGMENTED), opened(data_set, workers=2, **AUGMENTED)
    for epoch in (0, 1):
        same(first(here.train(epoch)), first(there.train(epoch)))
    same(list(here.evaluate()), list(there.evaluate()))
    same(first(here.train(2)), first(there.train(2)))


def test_a_resumed_run_sees_the_same(data_set):
    whole = first(opened(data_set, **AUGMENTED).train(3))
    same(first(opened(data_set, **AUGMENTED).train(3, start=2), 4), whole[2:])
    workers = opened(data_set, workers=2, **AUGMENTED)
    next(workers.train(5))
    same(first(workers.train(3, start=5), 1), whole[5:])


def test_epochs_and_seeds_differ(data_set):
    orders = [first(opened(data_set, seed=seed).train(epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for left, right in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(orders[left][0][0], orders[right][0][0])


@pytest.mark.parametrize("world", [2, 4])
def test_processes_together_take_one_batch(data_set, world):
    alone = opened(data_set, batch_size=8, **AUGMENTED)
    ranks = [opened(data_set, rank, world, batch_size=8 // world, **AUGMENTED) for rank in range(world)]
    assert {rank.batches_per_epoch for rank in ranks} == {alone.batches_per_epoch}
    parts = [first(rank.train(1), 3) for rank in ranks]
    together = [tuple(map(torch.cat, zip(*batches, strict=True))) for batches in zip(*parts, strict=True)]
    same(together, first(alone.train(1), 3))


def test_all_processes_draw_the_same_sizes(data_set):
    sizes = [8, 12, 16]
    seen = []
    for rank in range(2):
        data = opened(data_set, rank, 2, batch_size=2, sizes=sizes)
        seen.append([images.shape[-1] for epoch in range(3) for images, _ in first(data.train(epoch), 7)])
    assert seen[0] == seen[1] and set(seen[0]) == set(sizes)
    assert {images.shape[-1] for images, _ in opened(data_set, sizes=sizes).evaluate()} == {8}


def test_the_generators_of_a_run_are_left_alone(data_set):
    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    def after(workers):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        data = opened(data_set, workers=workers, **AUGMENTED)
        first(data.train(0), 2)
        first(data.evaluate(), 2)
        return drawn()

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    assert after(0) == after(2)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    assert drawn() == after(0)


def test_two_runs_beside_each_other(data_set):
    data = opened(data_set, workers=1)
    pairs = list(zip(first(data.train(0)), first(data.train(0)), strict=True))
    running, beside = data.train(0), data.train(0)
    same([next(running), next(beside), next(running)], [*pairs[0], pairs[1][0]])


def test_workers_that_are_started_afresh(tmp_path):
    data_set = make_folder(tmp_path)
    expected = first(opened(data_set, **AUGMENTED).train(0), 2)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        same(first(opened(data_set, workers=1, **AUGMENTED).train(0), 2), expected)
    finally:
        multiprocessing.set_start_method(before, force=True)
