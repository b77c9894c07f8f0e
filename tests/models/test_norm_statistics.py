"""What norms that keep statistics of batches ask of a plan; torch itself is the reference."""

import pytest
import torch
from torch import nn

from support.plans import small_plan
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.models.build import assemble, build_model
from trainer.models.norm_statistics import check_precise_norm
from trainer.recipe.plan import PlanError
from trainer.runs.job import Job, plan_of

PRECISE = "precise_norm='{images: 24}' "


def test_precise_norm_is_refused_where_it_cannot_be_followed():
    plan = small_plan(overrides=PRECISE)
    with pytest.raises(
        PlanError,
        match=r"precise_norm: .*test_resnet.*leave precise_norm out",
    ):
        check_precise_norm(plan, nn.GroupNorm(1, 4))
    norm = nn.BatchNorm2d(3)
    with pytest.raises(
        PlanError,
        match=r"precise_norm.images 20 .*batch.norm_images 8; use 16 or 24",
    ):
        check_precise_norm(small_plan(overrides="precise_norm='{images: 20}'"), norm)
    with pytest.raises(
        PlanError,
        match=r'1408 images.*; use set="precise_norm.images=1408"',
    ):
        check_precise_norm(small_plan(overrides="precise_norm='{images: 1416}'"), norm)
    check_precise_norm(plan, norm)


def test_a_model_is_refused_with_its_plan_where_precise_norm_cannot_be_followed():
    plan = plan_of(
        Job("A3", "convnext_atto", data="digits", overrides=PRECISE + "model.zero_init_last=null")
    )
    with pytest.raises(
        PlanError,
        match=r"precise_norm: .*convnext_atto",
    ):
        assemble(plan)


ONE = "batch.images=8 batch.norm_images=1 image.train_px={px} image.test_px=64 drop_path=null "
GROUPED = "'model.norm={name: group_norm, groups: 8, eps: 1.0e-5}' "
GATE = GROUPED + "'model.attention={name: bam, reduction: 16, dilation: 4, num_convolutions: 2}' "
PAIRED = "{name: batch_channel_norm, groups: 8, eps: 1.0e-5, momentum: 0.1, statistics: batch}"


@pytest.mark.parametrize(
    ("px", "parts", "place", "is_cured_by_size"),
    [
        (32, "", r"layer4\.0\.bn1 ", True),
        (32, f"'model.norm={PAIRED}' ", r"layer4\.0\.bn1\.batch ", True),
        (64, GATE, r"layer\d\S* ", False),  # the gate's norm is behind a pooling
        (
            64,
            "'image.growth={from_px: 32, from_epoch: 0, to_epoch: 1, multiple_px: 32, "
            "updated: per_epoch}' ",
            "growth.from_px",
            True,
        ),
    ],
)
def test_statistics_of_one_value_are_refused_with_the_model_and_torch_agrees(
    px, parts, place, is_cured_by_size
):
    plan = small_plan("torchvision-v1", model="resnet18", overrides=ONE.format(px=px) + parts)
    with pytest.raises(PlanError, match=f"batch.norm_images 1: .*{place}") as caught:
        assemble(plan)
    assert "batch.norm_images of 2 or more" in str(caught.value) and "\n" not in str(caught.value)
    assert ("or larger images" in str(caught.value)) is is_cured_by_size
    pair = assemble(
        small_plan(
            "torchvision-v1",
            model="resnet18",
            overrides=ONE.format(px=px).replace("norm_images=1", "norm_images=2") + parts,
        )
    )[0]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        pair(torch.zeros(1, 3, plan.train_px_at(0), plan.train_px_at(0)))
    pair(torch.zeros(2, 3, plan.train_px_at(0), plan.train_px_at(0)))


ONE_LEFT = "batch.images=4 batch.norm_images=4 batch.drop_last=false"  # 1437 = 359 x 4 + 1


def test_a_last_step_of_one_image_is_refused_where_norms_sample_the_batch():
    with pytest.raises(PlanError, match="one image") as refused:
        build_model(small_plan(overrides=ONE_LEFT))
    assert refused.value.path == ("batch", "images")


def test_a_last_step_of_one_image_is_trained_where_no_norm_samples_the_batch():
    plan = small_plan(model="test_vit", overrides=ONE_LEFT)
    state = TrainingState(plan, make_settings("cpu", workers="0"))
    stream = open_data(plan.profile, None).train_stream(plan, state.settings, last := 359)
    assert plan.window_images(last) == 1
    assert optimizer_step(state, stream, last).isfinite()


@pytest.mark.parametrize(
    ("px", "parts"),
    [(64, ""), (32, GROUPED), (32, f"'model.norm={PAIRED.replace(': batch}', ': estimated}')}' ")],
)
def test_one_image_is_a_sample_where_every_statistic_has_two_values(px, parts):
    model, _ = assemble(
        small_plan("torchvision-v1", model="resnet18", overrides=ONE.format(px=px) + parts)
    )
    model(torch.zeros(1, 3, px, px))
