"""Units are worked out once, exactly, or refused with the nearest that fit."""

import dataclasses

import numpy as np
import pytest

from support.plans import small_plan
from trainer.base.errors import OverrideError, UserError
from trainer.recipe import check, tree
from trainer.recipe.adapt import adaptation, images_of_rate, rates_by_rule
from trainer.recipe.plan import PlanError, make_plan
from trainer.recipe.profiles import PROFILES, Adapt
from trainer.recipe.schema import Recipe, apply_overrides, load_recipe
from trainer.recipe.shipped import find_recipe
from trainer.runs.job import Job, plan_of


def imagenet(recipe, model="resnet50", overrides="", **job):
    return plan_of(Job(recipe=recipe, model=model, data="imagenet-1k", overrides=overrides, **job))


@pytest.mark.parametrize(
    ("recipe", "num_steps"), [("A1", 375_000), ("A2", 187_500), ("A3", 62_500)]
)
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


@pytest.mark.parametrize("augment", ["[{name: flip}]", "[]"])
def test_images_without_a_common_size_are_refused_by_the_plan(augment):
    with pytest.raises(OverrideError) as caught:
        small_plan(overrides=f"'augment={augment}'")
    assert caught.value.labels == ("augment",) and "random_resized_crop" in caught.value.hint


def test_repeats_show_a_third_of_the_images_three_times():
    plan = imagenet("A1")
    assert plan.draws_per_epoch == 625 * 2048
    assert plan.unique_per_epoch == -(-625 * 2048 // 3)


def test_one_batch_is_four_statistics_samples():
    plan = imagenet("A1")
    assert plan.num_micro_batches == 4 and plan.micro_batches(0) == 4


@pytest.mark.parametrize(("recipe", "largest"), [("A1", 1024), ("A3", 1024), ("gn-ws", 256)])
def test_ranks_share_what_is_smaller_than_they_are_many(recipe, largest):
    plan = imagenet(recipe)
    for world_size in (1, 2, 3, 4, 8, largest):
        shared = make_plan(plan.recipe, "resnet50", plan.profile, world_size=world_size)
        assert shared.num_steps == plan.num_steps
        assert shared.part_images(0) >= plan.recipe.batch.images // largest
    with pytest.raises(PlanError) as caught:
        make_plan(plan.recipe, "resnet50", plan.profile, world_size=2 * largest)
    assert caught.value.path == ("batch", "images") and f"or {largest} ranks" in str(caught.value)


def test_a_batch_larger_than_the_set_is_refused_with_one_that_fits():
    with pytest.raises(
        PlanError, match="batch.images=1280 batch.norm_images=256 batch.drop_last=true"
    ):
        small_plan(overrides="batch.images=2048 batch.norm_images=256 batch.drop_last=true")
    with pytest.raises(PlanError, match="batch.images=1437 batch.norm_images=1437"):
        small_plan(overrides="batch.images=2048 batch.norm_images=2048 batch.drop_last=true")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_outside_its_range_is_refused(seed):
    with pytest.raises(PlanError, match="seed="):
        small_plan(seed=seed)


def test_the_run_name_changes_with_all_that_may_change_the_score_and_with_nothing_else():
    plan = small_plan()
    base = plan.run_name("f")
    assert base.startswith("A2.v2-test_resnet-digits-s0-") and len(base.rsplit("-", 1)[1]) == 6
    others = [
        small_plan(seed=1).run_name("f"),
        small_plan(model="test_convnext").run_name("f"),
        small_plan(overrides="smoothing=null drop_path=0.3").run_name("f"),
        small_plan(bad_images="skip").run_name("f"),
        small_plan().run_name("g"),
        dataclasses.replace(
            plan, profile=plan.profile.model_copy(update={"mean": (0.5, 0.5, 0.5)})
        ).run_name("f"),
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


FFCV_RAMPS = {16: (11, 13), 24: (17, 20), 32: (23, 27), 40: (29, 34), 56: (41, 48), 88: (65, 76)}


def growing(epochs, **growth):
    text = ", ".join(f"{key}: {value}" for key, value in growth.items())
    return f"epochs={epochs} image.train_px=192 'image.growth={{{text}}}'"


@pytest.mark.parametrize("epochs", FFCV_RAMPS)
def test_ffcvs_sizes_are_numpys(epochs):
    start, end = FFCV_RAMPS[epochs]
    ramp = growing(
        epochs, from_px=160, from_epoch=start, to_epoch=end, multiple_px=32, updated="per_epoch"
    )
    plan = imagenet("torchvision-v1", overrides=ramp)
    sizes = [plan.train_px_at(epoch * plan.steps_per_epoch) for epoch in range(epochs)]
    line = np.interp(np.arange(epochs), [start, end], [160, 192])
    assert sizes == (np.round(line / 32).astype(int) * 32).tolist() and {160, 192} == set(sizes)
    for epoch, side in enumerate(sizes):  # one size for all of an epoch
        assert plan.train_px_at((epoch + 1) * plan.steps_per_epoch - 1) == side


def test_sizes_may_grow_by_the_step():
    ramp = growing(10, from_px=96, from_epoch=4, to_epoch=8, multiple_px=4, updated="per_step")
    plan = imagenet("torchvision-v1", overrides=ramp)
    steps = np.arange(0, plan.num_steps, 101)
    line = np.interp(steps / plan.steps_per_epoch, [4, 8], [96, 192])
    assert [plan.train_px_at(step) for step in steps.tolist()] == (np.round(line / 4) * 4).astype(
        int
    ).tolist()
    assert imagenet("A1").train_px_at(7) == 224


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (growing(90, from_px=192, from_epoch=1, to_epoch=2, multiple_px=32, updated="per_step"), "not below train_px 192"),
        (growing(90, from_px=150, from_epoch=1, to_epoch=2, multiple_px=32, updated="per_step"), "150 is no multiple"),
        (growing(90, from_px=128, from_epoch=2, to_epoch=2, multiple_px=32, updated="per_step"), "not before to_epoch 2"),
        (growing(90, from_px=128, from_epoch=2, to_epoch=91, multiple_px=32, updated="per_step"), "to_epoch 91 does not fit"),
        ("'lr.schedule={name: piecewise_linear, points: [[0, 1.0], [91, 0.0]]}'", "points 91 does not fit .* 90; use set="),
        ("'lr.schedule={name: multi_step, at_epochs: [30, 90], factor: 0.1}'", "at_epochs 90 does not fit .* use set="),
        ("'lr.schedule={name: warmup_stable_decay, decay_epochs: 91, end: 0.0, shape: linear}'", "decay_epochs 91 does not fit"),
        ("loss={name: jensen_shannon, weight: 12, loss: {name: ce}}", "none; add augment_splits: 3"),
        ("augment_splits=3", "as ce does not; use jensen_shannon"),
        ("augment_splits=3 'loss={name: jensen_shannon, weight: 12, loss: {name: ce}}'", "nothing in augment makes them differ"),
        ("smoothing=0.1 'loss={name: focal, gamma: 2, threshold: 0.2}'", "erased by loss.threshold 0.2"),
    ],
)  # fmt: skip
def test_numbers_that_would_do_nothing_are_refused_in_one_line(overrides, words):
    with pytest.raises(UserError, match=words) as refusal:
        imagenet("torchvision-v1", overrides=overrides)
    assert "\n" not in str(refusal.value)


def test_splits_are_not_mixed():
    with pytest.raises(
        UserError, match="mixup_or_cutmix blends the images that jensen_shannon compares"
    ):
        imagenet(
            "A2",
            overrides=(
                "augment_splits=3 'loss={name: jensen_shannon, weight: 12, loss: {name: bce}}'"
            ),
        )


def test_a_warmup_in_steps_must_fit_into_the_run():
    warmup = "lr.updated=per_step lr.warmup_from=0 lr.warmup_steps="
    assert imagenet("torchvision-v1", overrides=f"{warmup}1000").num_warmup_steps == 1000
    with pytest.raises(PlanError, match="does not fit into the run's 450450 steps"):
        imagenet("torchvision-v1", overrides=f"{warmup}450451")


def page_with(tmp_path, **sections):
    """torchvision's first recipe with other sections, as a recipe of its own; the digits' profile then
    adapts it.
    """
    page = imagenet("torchvision-v1").recipe
    lines = {"name": "own", "published": (), "assumed": {}, **sections}
    text = check.check(Recipe, {**tree.plain(page), **lines}).to_yaml()
    path = tmp_path / "own.v1.yaml"
    path.write_text(text)
    return plan_of(Job(recipe=str(path), model="resnet18", data="digits")), path


LR = {"peak": 0.5, "updated": "per_step"}


def test_an_adapted_schedule_keeps_its_shares_of_the_run(tmp_path):
    schedules = {
        "points": {"name": "piecewise_linear", "points": ((0.0, 0.1), (10.0, 1.0), (90.0, 0.0))},
        "at_epochs": {"name": "multi_step", "at_epochs": (30, 60, 62), "factor": 0.1},
        "decay_epochs": {
            "name": "warmup_stable_decay",
            "decay_epochs": 18,
            "end": 0.0,
            "shape": "linear",
        },
    }
    expected = {
        "points": ((0.0, 0.1), (1.0, 1.0), (9.0, 0.0)),
        "at_epochs": (3, 6),
        "decay_epochs": 2,
    }
    for key, schedule in schedules.items():
        plan, _ = page_with(tmp_path, lr={**LR, "schedule": schedule})
        assert plan.recipe.epochs == 9 and getattr(plan.recipe.lr.schedule, key) == expected[key]
        assert f"lr.schedule.{key}" in {change.path for change in plan.deviations}


def test_an_adapted_warmup_in_steps_keeps_its_share_of_the_run(tmp_path):
    lr = {**LR, "warmup_steps": 45_000, "warmup_from": 0.0, "schedule": {"name": "constant"}}
    plan, _ = page_with(tmp_path, lr=lr)  # a tenth of 90 x 5004 steps
    assert (
        plan.num_warmup_steps == round(0.1 * 9 * 44)
        and plan.num_warmup_steps == plan.recipe.lr.warmup_steps
    )


@pytest.mark.parametrize(
    ("train_px", "growth"),
    [
        (None, {"from_px": 160, "multiple_px": 32}),
        (96, {"from_px": 80, "multiple_px": 16}),
        (64, {"from_px": 56, "multiple_px": 8}),
        (32, None),  # 27 px would leave ConvNeXt nothing
    ],
)
def test_adapted_growth_keeps_its_ratio_and_its_share_or_is_off(tmp_path, train_px, growth):
    image = {
        "train_px": 192,
        "test_px": 256,
        "test_crop_share": 0.875,
        "test_interpolation": "bilinear",
    }
    whole = {
        "from_px": 160,
        "from_epoch": 45,
        "to_epoch": 60,
        "multiple_px": 32,
        "updated": "per_epoch",
    }
    plan, path = page_with(tmp_path, image={**image, "growth": whole})
    profile = plan.profile.model_copy(update={"adapt": Adapt(train_px=train_px, epochs=9)})
    changes = adaptation(load_recipe(path), profile)
    recipe, deviations = apply_overrides(load_recipe(path), changes, "profile")
    if growth is None:
        assert recipe.image.growth is None and "image.growth" in {
            change.path for change in deviations
        }
        return
    assert recipe.image.growth.model_dump(exclude_none=True) == {
        **whole,
        **growth,
        "from_epoch": 4.5,
        "to_epoch": 6.0,
    }


def test_an_adapted_average_keeps_its_share_of_the_run():
    page = imagenet("convnext", model="convnext_tiny")
    small = plan_of(Job(recipe="convnext", model="convnext_tiny", data="digits"))
    share = 1 / (1 - page.recipe.average.decay) / page.num_steps
    kept = 1 / (1 - small.recipe.average.decay) * small.recipe.average.every_steps / small.num_steps
    assert kept == pytest.approx(share, rel=0.02)


def changed_by_digits(recipe, model="resnet18"):
    plan = plan_of(Job(recipe=recipe, model=model, data="digits"))
    return plan, {change.path: (change.before, change.after) for change in plan.deviations}


def test_precise_norm_is_cut_to_what_full_steps_have_or_is_off():
    page = imagenet("pycls-dds", overrides="precise_norm='{images: 8192}'").recipe
    digits = PROFILES["digits"]
    assert adaptation(page, digits)["precise_norm.images"] == 1437 // 32 * 32
    for num_train, norm_images, found in [
        (1_281_167, 32, {}),
        (1_281_167, 48, {"precise_norm.images": 8192 // 48 * 48}),
        (5000, 48, {"precise_norm.images": 5000 // 96 * 96}),
        (90, 48, {"precise_norm": None}),
    ]:
        adapt = Adapt(batch_images=96, norm_images=norm_images)
        profile = digits.model_copy(update={"adapt": adapt, "num_train": num_train})
        changes = adaptation(page, profile)
        assert {
            path: value for path, value in changes.items() if path.startswith("precise_norm")
        } == found


def test_a_decay_apart_from_the_rate_follows_the_batch_where_the_page_has_a_rule():
    plan, changed = changed_by_digits("bit-i1k")
    batch_images = plan.recipe.batch.images
    assert plan.recipe.optimizer.weight_decay == pytest.approx(
        1e-4 * batch_images / 256
    )  # the source's own rule
    assert (
        plan.recipe.lr.peak == pytest.approx(0.1 * batch_images / 256)
        and "optimizer.weight_decay" in changed
    )
    for recipe in (
        "mosaic-mild",
        "torchvision-v1",
    ):  # no rule for another batch; a decay that is multiplied by the rate
        assert "optimizer.weight_decay" not in changed_by_digits(recipe)[1]


@pytest.mark.parametrize("name", ["convnext", "A2-mmpretrain", "pycls-dds", "bit-i1k"])
def test_a_profile_without_warmup_leaves_out_all_that_is_about_it(name):
    profile = PROFILES["imagenet-1k"].model_copy(update={"adapt": Adapt(epochs=3, warmup_epochs=0)})
    recipe = load_recipe(find_recipe(name))
    recipe = recipe.for_model(recipe.published[0].model if recipe.published else "resnet50")
    adapted, _ = apply_overrides(recipe, adaptation(recipe, profile), "profile")
    lr = adapted.lr
    assert lr.num_warmup_steps(10) == 0 and lr.at(0, 10, 3) == lr.peak
    assert not (lr.warmup_ends_at_peak or lr.warmup_multiplies or lr.warmup_updated)


def test_lighting_is_refused_before_the_first_step_where_there_are_no_colours():
    with pytest.raises(
        UserError, match='these images have 1 channel; use set="augment.lighting=null"'
    ):
        plan_of(Job("pycls-dds", "resnet50", data="mnist-grey"))
    plan_of(Job("pycls-dds", "resnet50", data="mnist-grey", overrides="augment.lighting=null"))


@pytest.mark.parametrize(
    ("norm_images", "images", "words"),
    [
        (
            16,
            16,
            (
                "model.norm.images 16: the 16 images .* which is batch_norm; use"
                ' set="model.norm.images=8"'
            ),
        ),
        (16, 15, "one virtual batch"),  # the one image that is left joins it
        (2, 2, "batch.norm_images of 4 or more"),
        (16, 14, None),
        (16, 8, None),
    ],
)
def test_one_virtual_batch_in_a_micro_batch_is_refused(norm_images, images, words):
    ghost = f"'model.norm={{name: ghost_batch_norm, images: {images}, momentum: 0.1, eps: 1.0e-5}}'"
    text = f"batch.images=32 batch.norm_images={norm_images} {ghost}"
    if words is None:
        small_plan("torchvision-v1", overrides=text)
        return
    with pytest.raises(PlanError, match=words):
        small_plan("torchvision-v1", overrides=text)


@pytest.mark.parametrize(
    ("splits", "words"), [(3, None), (2, "model.norm.splits=3"), (None, "augment_splits=3")]
)
def test_a_norm_for_each_split_wants_as_many_splits(splits, words):
    """The norm has 3, or 2 where the images have 3."""
    number = splits or 3
    text = f"'model.norm={{name: split_batch_norm, splits: {number}, momentum: 0.1, eps: 1.0e-5}}'"
    if splits:
        loss = "'loss={name: jensen_shannon, weight: 12, loss: {name: ce}}'"
        text += f" augment_splits=3 mix=null repeats=null {loss}"
    if words is None:
        assert small_plan("A3", overrides=text).recipe.model.norm.splits == 3
        return
    with pytest.raises(PlanError) as refused:
        small_plan("A3", overrides=text)
    assert words in refused.value.hint and refused.value.path == ("model", "norm", "splits")


@pytest.mark.parametrize(
    "norm", ["{name: no_norm}", "{name: instance_norm, eps: 1.0e-5, affine: false}"]
)
def test_a_start_at_zero_needs_a_gamma(norm):
    with pytest.raises(
        UserError, match="model.norm has no gamma that could start at zero; write false"
    ):
        small_plan("torchvision-v1", overrides=f"model.zero_init_last=true 'model.norm={norm}'")
    small_plan("torchvision-v1", overrides=f"'model.norm={norm}'")
    small_plan("A2", overrides=f"'model.norm={norm}'")  # timm's default is no word of the recipe
    affine = "{name: instance_norm, eps: 1.0e-5, affine: true}"
    small_plan("torchvision-v1", overrides=f"model.zero_init_last=true 'model.norm={affine}'")


def rates(recipe, overrides):
    plan = plan_of(Job(recipe=recipe, model="resnet18", overrides=overrides))
    return plan, rates_by_rule(plan.recipe, plan.deviations)


def test_another_batch_by_an_override_leaves_the_rate_and_tells_what_the_rule_would_make_of_it():
    alone, none = rates("nvidia-v15-90", "")
    plan, would_be = rates("nvidia-v15-90", "batch.images=128")
    assert none is None and plan.recipe.lr == alone.recipe.lr  # an override is what was written
    assert would_be["lr.peak"] == pytest.approx(4 * alone.recipe.lr.peak)
    items = " ".join(f"{path}={value}" for path, value in would_be.items())
    followed, after = rates("nvidia-v15-90", f"batch.images=128 {items}")
    assert after is None and followed.recipe.lr.peak == pytest.approx(4 * alone.recipe.lr.peak)
    # per 32 images the same walk of rate and decay, as where a data profile has another batch
    decay = [one.recipe.optimizer.weight_decay * one.recipe.lr.peak for one in (alone, followed)]
    assert alone.recipe.optimizer.decay_follows_rate and decay[1] == pytest.approx(4 * decay[0])


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("nvidia-v15-90", "batch.images=128 lr.peak=0.3"),
        ("nvidia-v15-90", "batch.norm_images=16"),
        ("nvidia-v15-90", "batch.images=32"),
    ],
)
def test_no_rule_is_told_where_none_was_left_out(recipe, overrides):
    plan, none = rates(recipe, overrides)
    assert none is None and images_of_rate(plan.deviations) == 2048  # of nvidia-v15-90
    assert rates("A1", "batch.images=128")[1] == {}  # A1 has no rule
    assert rates("A1", "")[1] == {}  # nor for the batch that a profile gives it
    assert rates("A1", "lr.peak=0.001")[1] is None


@pytest.mark.parametrize(
    ("overrides", "at_fault"),
    [
        # the place that is refused is of none of them
        (
            "smoothing=0.1 epochs=1 repeats=2 drop_path=0.1 lr.warmup_epochs=5",
            {"epochs", "lr.warmup_epochs"},
        ),
        ("drop_path=0.1 batch.images=31 epochs=3 average=null", {"batch.images"}),
        ("drop_path=0.1 epochs=3 batch.norm_images=24", {"batch.norm_images"}),
        ("epochs=3 smoothing=0.1 'loss={name: bce, threshold: 0.2}' drop_path=0.2", {"loss"}),
        ("epochs=3 smoothing=0.1 loss.threshold=0.1 drop_path=0.2", {"loss.threshold"}),
        (
            "epochs=3 batch.images=48 batch.norm_images=12 mix.images=9",
            {"mix.images"},
        ),
        ("epochs=3 drop_path=0.2 lr.warmup_epochs=4", {"epochs", "lr.warmup_epochs"}),
    ],
)
def test_a_refusal_names_the_overrides_at_fault_and_no_others(overrides, at_fault):
    with pytest.raises(OverrideError) as caught:
        plan_of(Job(recipe="A1", model="resnet18", overrides=overrides))
    assert set(caught.value.labels) == at_fault
    assert all(f"{label}=" in str(caught.value).partition(": ")[0] for label in at_fault)
