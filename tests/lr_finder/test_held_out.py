"""The held-out slice: fixed, every class its share, never trained on; measuring it moves nothing."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional

from support.plans import small_plan
from trainer.base.errors import UserError
from trainer.base.settings import make_settings
from trainer.data.dataset import OpenedData, open_data
from trainer.lr_finder.api import trial_plan
from trainer.lr_finder.baseline import HeldOut, check_hold_out, hold_out
from trainer.recipe.sections import Batch
from trainer.runs.job import Job, plan_of


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


@pytest.mark.parametrize("num_train", [12, 40, 94, 100, 2000])
def test_a_batch_that_leaves_nothing_is_refused_once_with_one_that_is_taken(tmp_path, num_train):
    root = tmp_path / "photos"
    for split, number in (("train", num_train), ("val", 4)):
        for i in range(number):
            folder = root / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.png").touch()
    job = Job("A3", "resnet18", str(root), overrides="smoothing=null")
    with pytest.raises(UserError) as caught:
        plan_of(job, check_hold_out)
    [printed] = re.findall(r'set="([^"]*)"', caught.value.hint)
    plan = plan_of(replace(job, overrides=printed), check_hold_out)
    assert "smoothing=null" in printed and num_train - plan.recipe.batch.images >= 10
    labels = np.arange(num_train) % 2
    cut = hold_out(made_up(labels), plan.recipe.batch)
    assert cut.val.num_images >= 10 and cut.train.num_images >= plan.recipe.batch.images


def test_too_few_images_to_hold_out_have_no_set(tmp_path):
    plan = small_plan()
    few = replace(plan, profile=plan.profile.model_copy(update={"num_train": 11}))
    with pytest.raises(UserError) as caught:
        check_hold_out(few)
    assert not caught.value.fix and "more images" in caught.value.hint


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
