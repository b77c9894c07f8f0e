"""The held-out slice: fixed, every class its share, never trained on; measuring it moves nothing."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional

from support.plans import small_plan
from trainer.base.settings import make_settings
from trainer.data.dataset import OpenedData, open_data
from trainer.data.index import DataError
from trainer.lr_finder.api import trial_plan
from trainer.lr_finder.baseline import HeldOut, hold_out
from trainer.recipe.sections import Batch


def made_up(labels):
    labels = np.asarray(labels)
    images = SimpleNamespace(
        num_images=len(labels),
        labels=labels,
        fingerprint="made up",
        classes=("a",),
        num_channels=3,
        is_in_memory=True,
    )
    return OpenedData(images, images)


@pytest.fixture(scope="module")
def cut():
    plan = small_plan()
    return open_data(plan.profile, None), hold_out(open_data(plan.profile, None), plan.recipe.batch)


def test_the_slice_is_a_tenth_of_train_every_class_its_share_and_nothing_is_in_both(cut):
    opened, halves = cut
    assert halves.val.num_images == 144  # a tenth of 1,437
    both = np.concatenate([halves.train.places, halves.val.places])
    assert sorted(both) == list(range(1437))
    of_train, of_slice = (
        np.bincount(labels, minlength=10) for labels in (opened.train.labels, halves.val.labels)
    )
    assert np.abs(of_slice - of_train * 144 / 1437).max() <= 1
    for place in (0, 77, 143):
        assert (
            halves.val.read(place).tobytes()
            == opened.train.read(int(halves.val.places[place])).tobytes()
        )
        assert halves.val.labels[place] == opened.train.labels[halves.val.places[place]]


def test_it_is_the_same_each_time_and_has_a_fingerprint_of_its_own(cut):
    opened, halves = cut
    again = hold_out(opened, small_plan().recipe.batch)
    assert (again.val.places == halves.val.places).all()
    assert len({opened.train.fingerprint, halves.train.fingerprint, halves.val.fingerprint}) == 3


def test_of_a_large_set_it_is_1024_images_of_nearly_all_classes():
    labels = np.random.default_rng(0).integers(0, 1000, 50_000)
    halves = hold_out(made_up(labels), Batch(images=256, norm_images=256))
    counts = np.bincount(labels[halves.val.places], minlength=1000)
    assert counts.sum() == 1024 and counts.max() <= 2 and (counts > 0).mean() > 0.7


def test_no_class_loses_its_last_image():
    labels = [0] * 90 + [1] * 9 + [2]
    places = hold_out(made_up(labels), Batch(images=8, norm_images=8)).val.places
    assert 99 not in places and len(places) == 10


@pytest.mark.parametrize("images", [7, 18, 89])
def test_no_step_is_left_with_a_single_image(images):
    left = hold_out(made_up([0, 1] * 50), Batch(images=images, norm_images=images)).train.num_images
    assert left % images != 1 and left >= images


def test_a_batch_that_leaves_nothing_is_refused_with_one_that_would_do():
    with pytest.raises(
        DataError, match=r'100 training images that leaves 2 .* set="batch.images=90"'
    ):
        hold_out(made_up([0, 1] * 50), Batch(images=98, norm_images=1, drop_last=True))


def measured(overrides, model, cut, seed=0):
    """A page's slice, a model with weights that are not the first ones, and the plan."""
    plan = trial_plan(small_plan(model=model, overrides=overrides), cut[1])
    torch.manual_seed(seed)
    net = timm.create_model(model, num_classes=10)
    return HeldOut(plan, make_settings("cpu", workers="0"), cut[1]), net, plan


def test_the_loss_is_the_pages_own_with_the_statistics_of_the_images(cut):
    held_out, net, _plan = measured(
        "'loss={name: ce}' smoothing=0.1 drop_path=null", "test_resnet", cut
    )
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = held_out.loss(net)
    assert found == held_out.loss(net) and net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    # the same by hand: training mode, in parts of 36 images, torch's own smoothing
    images = (held_out.images.float() / 255 - 0.3047) / 0.3756
    parts = zip(images.tensor_split(4), held_out.labels.tensor_split(4), strict=True)
    with torch.no_grad():
        losses = [
            functional.cross_entropy(net(some), labels, label_smoothing=0.1, reduction="sum")
            for some, labels in parts
        ]
    assert found == pytest.approx(float(sum(losses)) / 144, rel=1e-5)


def test_nothing_is_dropped_while_it_is_measured(cut):
    held_out, net, _ = measured("", "test_convnext", cut)
    for module in net.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.9
    net.head.drop.p = 0.9
    assert held_out.loss(net) == held_out.loss(net)


def test_weights_that_are_no_numbers_leave_the_running_statistics_alone(cut):
    held_out, net, _ = measured("", "test_resnet", cut)
    with torch.no_grad():
        (
            net.conv1[0].weight.fill_(math.nan)
            if hasattr(net.conv1, "__getitem__")
            else net.conv1.weight.fill_(math.nan)
        )
    assert math.isnan(held_out.loss(net))
    assert all(torch.isfinite(buffer).all() for buffer in net.buffers())
