"""Trials of one seed train on the same images: they are made once, and stay what a run sees."""

import gc
import os
from dataclasses import replace
from itertools import islice

import pytest
import torch

from support.plans import small_plan
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.lr_finder.batches import SeedBatches
from trainer.tasks import task_of

STEPS = 3


@pytest.fixture(scope="module")
def plan():
    """A2 with RandAugment, erasing, mixing and three repeats, two micro-batches a step."""
    plan = small_plan("A2", "test_resnet", "batch.images=64 batch.norm_images=32")
    return replace(plan, num_steps=STEPS)


@pytest.fixture(scope="module")
def settings():
    return make_settings("cpu", workers="0")


@pytest.fixture(scope="module")
def data(plan):
    return open_data(plan.profile, None)


def prepared(plan, settings, batches):
    task = task_of(plan, settings)
    return [(batch.step, batch.micro_batch, *task.prepare(batch)) for batch in batches]


def assert_same(found, wanted):
    assert [one[:2] for one in found] == [one[:2] for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one[2], other[2]) and torch.equal(one[3], other[3])


@pytest.mark.parametrize("num_kept", [0, 1, 3, 100])
@pytest.mark.parametrize("num_taken", [1, 2, 5])
def test_whatever_was_kept_a_trial_sees_what_a_run_does(plan, settings, data, num_kept, num_taken):
    wanted = prepared(plan, settings, data.train_stream(plan, settings, 0))
    assert len(wanted) == 2 * STEPS
    one = next(SeedBatches(settings, data).of(plan))
    room = sum(part.nbytes for part in one if isinstance(part, torch.Tensor))
    room += sum(values.nbytes for each in one.drawn for values in each.values())
    batches = SeedBatches(settings, data, most_bytes=num_kept * room)
    # a trial that ends within a step, then one that goes to its end, then it again
    assert_same(prepared(plan, settings, islice(batches.of(plan), num_taken)), wanted[:num_taken])
    for _ in range(2):
        assert_same(prepared(plan, settings, batches.of(plan)), wanted)
    assert len(batches._kept) == min(num_kept, 2 * STEPS)


def test_what_is_kept_holds_no_file_of_a_loader_process(plan, data):
    """Images of 64 KiB or more come in a file of their own."""
    settings = make_settings("cpu", workers="1")
    batches = SeedBatches(settings, data)
    before = len(os.listdir("/proc/self/fd"))
    assert len(list(islice(batches.of(plan), 2 * STEPS))) == 2 * STEPS
    gc.collect()
    assert len(batches._kept) == 2 * STEPS and len(os.listdir("/proc/self/fd")) == before


def test_images_are_read_once_for_all_trials_of_a_seed(plan, settings, data, monkeypatch):
    images, reads = data.train, []
    read = type(images).read
    monkeypatch.setattr(
        type(images), "read", lambda self, place: reads.append(place) or read(self, place)
    )
    batches = SeedBatches(settings, data)
    list(islice(batches.of(plan), 2 * STEPS))
    assert reads
    del reads[:]
    list(islice(batches.of(plan), 2 * STEPS))
    assert not reads
    other = replace(plan, seed=plan.seed + 1)
    wanted = prepared(other, settings, data.train_stream(other, settings, 0))
    assert_same(prepared(other, settings, batches.of(other)), wanted)
