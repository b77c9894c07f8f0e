"""Which image sits where, against timm's sampler and by properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.distributed_sampler import RepeatAugSampler

from trainer.base import streams
from trainer.data.order import epoch_order, micro_batch_ids, window
from trainer.recipe.plan import num_micro_batches_in


def step_micro_batches(
    step, num_images, repeats, batch_images, num_micro_batches, drop_last=False, seed=0
):
    steps_per_epoch = num_images // batch_images if drop_last else -(-num_images // batch_images)
    _, _, num_draws = window(step, num_images, batch_images, steps_per_epoch)
    fixed = (num_images, repeats, batch_images, num_micro_batches, steps_per_epoch, drop_last)
    number = num_micro_batches_in(num_draws, batch_images, num_micro_batches)
    return [micro_batch_ids(seed, step, j, *fixed) for j in range(number)]


@pytest.mark.parametrize("repeats", [1, 3, 4])
def test_ranks_of_timms_sampler_are_our_micro_batches(monkeypatch, repeats):
    num_images, batch_images, num_ranks, epoch = 1024, 64, 4, 2
    order = torch.from_numpy(streams.permutation(5, "order", epoch, num_images))
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: order)
    steps_per_epoch = num_images // batch_images
    for rank in range(num_ranks):
        timms = list(RepeatAugSampler(range(num_images), num_ranks, rank, num_repeats=repeats))
        steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
        ours = [
            step_micro_batches(s, num_images, repeats, batch_images, num_ranks, seed=5)[rank]
            for s in steps
        ]
        assert np.concatenate(ours)[:, 1].tolist() == timms


@given(
    num_images=st.integers(2, 200),
    repeats=st.integers(1, 4),
    norm_images=st.integers(1, 16),
    num_micro_batches=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
@settings(max_examples=150)
def test_micro_batches_of_an_epoch_are_its_draws(
    num_images, repeats, norm_images, num_micro_batches, epoch
):
    batch_images = norm_images * num_micro_batches
    order = epoch_order(0, epoch, num_images, repeats)
    steps_per_epoch = -(-num_images // batch_images)
    for step_in_epoch in range(steps_per_epoch):
        step = epoch * steps_per_epoch + step_in_epoch
        parts = step_micro_batches(step, num_images, repeats, batch_images, num_micro_batches)
        drawn = order[step_in_epoch * batch_images : (step_in_epoch + 1) * batch_images]
        assert sorted(map(tuple, np.concatenate(parts))) == sorted(map(tuple, drawn))
        sizes = [len(part) for part in parts]
        if len(drawn) == batch_images:
            assert sizes == [norm_images] * num_micro_batches  # as the page says
        else:
            assert max(sizes) - min(sizes) <= 1 and (min(sizes) >= 2 or len(sizes) == 1)


def test_an_epoch_shows_every_image_once_or_a_third_of_them_three_times():
    once, thrice = epoch_order(0, 0, 300, 1), epoch_order(0, 0, 300, 3)
    assert sorted(once[:, 1]) == list(range(300)) and not once[:, 2].any()
    images, counts = np.unique(thrice[:, 1], return_counts=True)
    assert len(images) == 100 and set(counts) == {3}
    assert len(np.unique(thrice, axis=0)) == 300


def test_repeats_of_an_image_fall_into_different_micro_batches():
    for part in step_micro_batches(1, 300, 3, 60, 3):
        assert len(np.unique(part[:, 1])) == len(part)


def test_drop_last_leaves_the_rest_of_an_epoch_out():
    assert [len(part) for part in step_micro_batches(2, 35, 1, 10, 2, drop_last=True)] == [5, 5]
    (epoch_1,) = {tuple(part[:, 0]) for part in step_micro_batches(3, 35, 1, 10, 2, drop_last=True)}
    assert set(epoch_1) == {1}


def test_epochs_and_seeds_have_their_own_orders_whatever_was_asked_before():
    first = epoch_order(0, 0, 50, 1)[:, 1].tolist()
    others = [
        epoch_order(seed, epoch, 50, 1)[:, 1].tolist() for seed, epoch in ((0, 1), (0, 2), (1, 0))
    ]
    assert first not in others
    assert epoch_order(0, 0, 50, 1)[:, 1].tolist() == first
