"""Ranks that share a sample of statistics make the run of one process that has all of it."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from support import pieced, ranked
from support.pieced import relative
from support.plans import small_plan
from support.ranked import on_ranks
from trainer.base.errors import PlanError
from trainer.distributed.communicator import alone
from trainer.distributed.joined_norms import _BatchNorm
from trainer.models.build import build_model
from trainer.recipe.plan import make_plan

# smooth, as in test_communicator.py; stochastic depth, mixing, repeats, LAMB, an average; last
# steps of 13 and of 3 images
SMOOTH = "lr.peak=5e-4 'model={stem: {name: patchify, patch_px: 4}, activation: {name: silu}%s}'"
SHARED = (
    " batch.images=16 batch.norm_images=8 batch.drop_last=false"
    " average='{name: ema, decay: 0.9, every_steps: 1}'"
)
FEW = " batch.images=6 batch.norm_images=6 batch.drop_last=false"
BCN = ", norm: {name: batch_channel_norm, groups: 4, eps: 1e-5, momentum: 0.1, statistics: %s}"
GROUPS = ", norm: {name: group_norm, groups: 4, eps: 1e-5}"


def assert_one_run(steps, most, num_ranks, *words):
    whole = on_ranks(steps, 1, *words)[0]
    for rank in on_ranks(steps, num_ranks, *words):
        assert rank["losses"] == pytest.approx(whole["losses"], rel=most)
        for kind in ("weights", "average", "buffers"):
            assert relative(rank[kind], whole[kind]) < most, kind
    return whole


def test_two_groups_of_two_ranks_make_the_weights_of_one_process():
    whole = assert_one_run(ranked.steps, 1e-5, 4, "A1", "test_resnet", SMOOTH % "" + SHARED, -6, 8)
    assert {len(ids) for _, _, ids in whole["ids"]} == {6, 7, 8}


@pytest.mark.drill
@pytest.mark.parametrize(
    ("num_ranks", "recipe", "overrides"),
    [
        (4, "A1", SMOOTH % (BCN % "batch") + SHARED),
        (4, "A1", SMOOTH % (BCN % "estimated") + SHARED),
        (3, "A1", SMOOTH % GROUPS + SHARED),  # each micro-batch on all ranks
        (3, "A1", SMOOTH % "" + SHARED),
        (4, "torchvision-v2", SMOOTH % "" + SHARED),  # the partner is the image before
        (4, "A1", SMOOTH % "" + SHARED.replace("norm_images=8", "norm_images=16 mix.images=4")),
        (4, "torchvision-v1", SMOOTH % "" + FEW),  # a last step of three images on one rank
        (2, "A1", SMOOTH % ", dropout: 0.5" + SHARED.replace("norm_images=8", "norm_images=16")),
    ],
)
def test_any_number_of_ranks_that_share_samples_makes_the_same_run(num_ranks, recipe, overrides):
    assert_one_run(ranked.steps64, 1e-10, num_ranks, recipe, "test_resnet", overrides, -3, 5)


def test_the_joined_norm_is_torchs_and_its_gradient_the_derivative():
    torch.manual_seed(0)
    for shape in ((6, 3), (4, 3, 5, 2)):
        x = (3 + torch.randn(shape, dtype=torch.float64)).requires_grad_()
        if len(shape) == 4:
            x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
        norm = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(3).double()
        nn.init.normal_(norm.weight)
        running = torch.zeros(3).double(), torch.ones(3).double()
        given = *running, 0.1, norm.eps, alone()
        found = _BatchNorm.apply(x, norm.weight, norm.bias, *given)
        torch.testing.assert_close(found, norm(x))
        torch.testing.assert_close(running, (norm.running_mean, norm.running_var))
        assert gradcheck(lambda *each: _BatchNorm.apply(*each, *given), (x, norm.weight, norm.bias))
        assert gradcheck(lambda each: _BatchNorm.apply(each, None, None, *given), x)


def shared_by(world_size, overrides):
    plan = small_plan(overrides=overrides)
    return make_plan(plan.recipe, plan.model, plan.profile, world_size=world_size)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            "'model={norm: {name: ghost_batch_norm, images: 4, momentum: 0.1, eps: 1e-5}}'",
            "GhostBatchNorm2d",
        ),
        (
            "'model={norm: {name: split_batch_norm, splits: 2, momentum: 0.1, eps: 1e-5}}' mix=null"
            " repeats=null augment_splits=2 'loss={name: jensen_shannon, weight: 12, loss: {name: ce}}'",
            "SplitBatchNorm2d",
        ),
        ("mix.images=16", 'set="mix.images=8"'),
    ],
)
def test_norms_that_cannot_join_refuse_ranks_that_share_a_sample(overrides, named):
    build_model(shared_by(2, overrides))
    with pytest.raises(PlanError) as caught:
        build_model(shared_by(8, overrides))
    assert named in str(caught.value) and "1, 2" in str(caught.value)


@pytest.mark.drill
def test_a_part_that_does_not_fit_into_memory_is_split_again(tmp_path):
    words = "A1", "test_resnet", SMOOTH % GROUPS + " drop_path=null" + SHARED, 3
    whole = pieced.steps(alone(), str(tmp_path / "a"), *words)
    for rank in on_ranks(pieced.auto_steps, 4, str(tmp_path / "b"), *words, "oom@2"):
        assert rank["num_pieces"] == 2
        assert relative(rank["weights"], whole["weights"]) < 1e-5
