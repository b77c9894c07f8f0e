"""Units are worked out once, exactly, or refused with the nearest that fit."""

import dataclasses

import pytest

from plans import small_plan
from trainer.job import Job, plan_of
from trainer.plan import PlanError, make_plan


def imagenet(recipe, model="resnet50", overrides="", **job):
    return plan_of(Job(recipe=recipe, model=model, data="imagenet-1k", overrides=overrides, **job))


@pytest.mark.parametrize(("recipe", "num_steps"), [("A1", 375_000), ("A2", 187_500), ("A3", 62_500)])
def test_rsb_step_counts_are_the_papers(recipe, num_steps):
    plan = imagenet(recipe)  # arXiv:2110.00476, Table 2: 375k, 188k, 63k
    assert (plan.num_steps, plan.steps_per_epoch) == (num_steps, 625)
    assert plan.deviations == ()


def test_torchvision_keeps_the_last_smaller_step():
    plan = imagenet("torchvision-v1")
    assert plan.steps_per_epoch == 5005  # ceil(1281167 / 256)
    assert plan.window_images(5004) == 1_281_167 - 5004 * 256
    assert plan.draws_per_epoch == 1_281_167


def test_torchvisions_sampler_of_repeats_leaves_whole_steps_only():
    plan = imagenet("torchvision-v2")
    assert plan.steps_per_epoch == 1_281_167 // 256 * 256 // 8 // 128 == 1251
    assert plan.window_images(1250) == 1024


def test_a_statistics_sample_of_one_image_is_taken_as_written():
    plan = small_plan("convnext", "test_convnext", "batch.images=8 batch.norm_images=1 mix=null")
    assert plan.micro_batches(0) == 8


def test_repeats_show_a_third_of_the_images_three_times():
    plan = imagenet("A1")
    assert plan.draws_per_epoch == 625 * 2048
    assert plan.unique_per_epoch == -(-625 * 2048 // 3)


def test_one_batch_is_four_statistics_samples():
    plan = imagenet("A1")
    assert plan.num_micro_batches == 4 and plan.micro_batches(0) == 4


@pytest.mark.parametrize(("world_size", "fits"), [(1, True), (2, True), (3, False), (4, True), (8, False)])
def test_ranks_must_share_the_micro_batches_exactly(world_size, fits):
    plan = imagenet("A1")
    if fits:
        assert make_plan(plan.recipe, "resnet50", plan.profile, world_size=world_size).world_size == world_size
    else:
        with pytest.raises(PlanError, match="1, 2, 4 ranks would do"):
            make_plan(plan.recipe, "resnet50", plan.profile, world_size=world_size)


def test_a_batch_larger_than_the_set_is_refused_with_one_that_fits():
    with pytest.raises(PlanError, match='set="batch.images=1280" would do'):
        small_plan(overrides="batch.images=2048 batch.norm_images=256 batch.drop_last=true")
    with pytest.raises(PlanError, match='set="batch.images=1437 batch.norm_images=1437" would do'):
        small_plan(overrides="batch.images=2048 batch.norm_images=2048 batch.drop_last=true")


def test_a_last_step_of_one_image_is_refused():
    with pytest.raises(PlanError, match="one image"):
        small_plan(overrides="batch.images=4 batch.norm_images=4 batch.drop_last=false")  # 1437 = 359 x 4 + 1


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_outside_its_range_is_refused(seed):
    with pytest.raises(PlanError, match="seed="):
        small_plan(seed=seed)


def test_the_run_name_changes_with_all_that_may_change_the_score_and_with_nothing_else():
    plan = small_plan()
    base = plan.run_name("f")
    assert base.startswith("A2.v1-test_resnet-digits-s0-") and len(base.rsplit("-", 1)[1]) == 6
    others = [
        small_plan(seed=1).run_name("f"),
        small_plan(model="test_convnext").run_name("f"),
        small_plan(overrides="smoothing=null drop_path=0.3").run_name("f"),
        small_plan(bad_images="skip").run_name("f"),
        small_plan().run_name("g"),
        dataclasses.replace(plan, profile=plan.profile.model_copy(update={"mean": (0.5, 0.5, 0.5)})).run_name("f"),
    ]
    assert len({base, *others}) == 7
    assert small_plan().run_name("f") == base


@pytest.mark.parametrize(("recipe", "peak_of"), [
    ("A1", lambda images: 5e-3),  # no rule
    ("torchvision-v2", lambda images: 0.5 * images / 1024),
    ("torchvision-v1", lambda images: 0.1 * images / 256),
])  # fmt: skip
def test_a_profile_adapts_by_the_pages_own_rule_and_records_it(recipe, peak_of):
    plan = plan_of(Job(recipe=recipe, model="resnet50", data="digits"))
    changed = {change.path: change for change in plan.deviations}
    assert {change.origin for change in plan.deviations} == {"profile"}
    assert changed["batch.images"].after == plan.recipe.batch.images
    assert plan.recipe.lr.peak == pytest.approx(peak_of(plan.recipe.batch.images))
    assert ("lr.peak" in changed) is (recipe != "A1")


def test_an_adapted_average_keeps_its_share_of_the_run():
    page = imagenet("convnext", model="convnext_tiny")
    small = plan_of(Job(recipe="convnext", model="convnext_tiny", data="digits"))
    share = 1 / (1 - page.recipe.average.decay) / page.num_steps
    kept = 1 / (1 - small.recipe.average.decay) * small.recipe.average.every_steps / small.num_steps
    assert kept == pytest.approx(share, rel=0.02)
