"""First filters from the patches of the training images: their answers are uncorrelated."""

import dataclasses

import numpy as np
import pytest
import torch

from support.plans import small_plan
from support.ranked import on_ranks
from trainer.base.errors import UserError
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.data.decode import BadImage
from trainer.data.patches import planned_over
from trainer.data.transforms import normalize
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step, train
from trainer.models.build import build_model
from trainer.recipe.plan import make_plan

WHITENED = "'model.whitening={images: 50, patch_px: 2, eps: 0.0005}'"
SETTINGS = make_settings("cpu", workers="0")


def planned(overrides="", data="digits", **changes):
    plan = small_plan("A3", "airbench94", f"{WHITENED} {overrides}", data=data)
    plan = dataclasses.replace(plan, **changes)
    return planned_over(plan, open_data(plan.profile, None).train)


def shown(plan):
    """The images, [50, C, 32, 32] float64, normalized, as the validation's path shows them."""
    data = open_data(plan.profile, None)
    turned = dataclasses.replace(data, val=data.train)
    images = torch.cat([images for images, _ in turned.val_batches(plan, SETTINGS)])
    places = [i * len(images) // 50 for i in range(50)]
    return normalize(images[places], plan.profile).double()


@pytest.mark.parametrize("data", ["digits", "digits-grey"])
def test_the_filters_are_those_of_the_images_patches(data):
    plan = planned(data=data)
    images = shown(plan)
    channels = images.shape[1]
    size = 4 * channels
    columns = torch.nn.functional.unfold(images, 2)  # [50, size, places]
    rows = columns.transpose(1, 2).reshape(-1, size)
    moment = rows.T @ rows / len(rows)
    model = build_model(plan)
    weight = model.whiten.weight
    assert weight.shape == (2 * size, channels, 2, 2) and not weight.requires_grad
    filters = weight.detach().double().reshape(2 * size, size)
    half = filters[:size]
    torch.testing.assert_close(filters[size:], -half, rtol=0, atol=0)
    values = torch.linalg.eigvalsh(moment)
    torch.testing.assert_close(
        half @ moment @ half.T, torch.diag(values / (values + 5e-4)), rtol=1e-3, atol=1e-4
    )
    answers = rows @ half[-1]
    assert answers.square().mean() == pytest.approx(1, rel=0.01)


def test_they_do_not_depend_on_the_seed_and_others_do():
    first, second = (build_model(planned(seed=seed)).state_dict() for seed in (0, 1))
    assert torch.equal(first["whiten.weight"], second["whiten.weight"])
    assert not torch.equal(first["whiten.bias"], second["whiten.bias"])
    plain = build_model(small_plan("A3", "airbench94")).state_dict()
    assert torch.equal(first["groups.0.conv1.weight"], plain["groups.0.conv1.weight"])


def whitened(ranks):
    plan = planned("batch.images=32 batch.norm_images=16")
    whole = make_plan(plan.recipe, plan.model, plan.profile, world_size=ranks.world_size)
    data = open_data(plan.profile, None)
    state = TrainingState(planned_over(whole, data.train), SETTINGS, ranks)
    before = state.model.whiten.weight.detach().clone()
    loader = data.train_stream(state.plan, SETTINGS, 0, ranks)
    for step in range(2):
        optimizer_step(state, loader, step)
    assert torch.equal(state.model.whiten.weight, before)
    return before


def test_ranks_have_the_same_and_keep_them():
    (alone,), pair = (on_ranks(whitened, number) for number in (1, 2))
    assert all(torch.equal(each, alone) for each in pair)


def test_before_the_images_are_open_they_are_random_and_nothing_trains():
    plan = small_plan("A3", "airbench94", WHITENED)
    assert not build_model(plan).whiten.weight.requires_grad
    with pytest.raises(AssertionError, match="planned_over"):
        train(TrainingState(plan, SETTINGS), open_data(plan.profile, None))


class OneBad:
    """Training images of which one cannot be decoded."""

    def __init__(self, images):
        self._images, self.num_images = images, images.num_images

    def read(self, i):
        if i == 0:
            raise BadImage("cannot be decoded", place="0.jpg")
        return self._images.read(i)


def test_a_bad_image_is_left_out_where_bad_images_are_skipped():
    plan = small_plan("A3", "airbench94", WHITENED)
    images = OneBad(open_data(plan.profile, None).train)
    with pytest.raises(BadImage):
        planned_over(plan, images)
    skipping = planned_over(dataclasses.replace(plan, bad_images="skip"), images)
    assert skipping.patches.number == 49 * 31 * 31


def test_more_images_than_there_are_is_all_of_them():
    plan = small_plan("A3", "airbench94", WHITENED.replace("50", "9999"))
    data = open_data(plan.profile, None)
    found = planned_over(plan, data.train).patches
    assert found.number == data.train.num_images * 31 * 31
    assert np.array_equal(np.array(found.products), np.array(found.products).T)


@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
def test_another_first_convolution_is_refused(model):
    with pytest.raises(UserError, match=r"model\.whitening") as error:
        build_model(small_plan("A3", model, WHITENED))
    assert error.value.hint


def test_given_weights_are_not_overwritten():
    with pytest.raises(UserError, match="pretrained"):
        small_plan("A3", "airbench94", f"{WHITENED} 'model.pretrained={{}}'")
