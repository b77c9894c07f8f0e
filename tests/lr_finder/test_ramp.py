"""A number of the page at every step of a trial: found by its path, refused where it means nothing,
set for good.
"""

from dataclasses import replace

import numpy as np
import pytest

import trainer.lr_finder.baseline
from support.plans import small_plan
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.lr_finder.api import trial_plan
from trainer.lr_finder.baseline import hold_out
from trainer.lr_finder.ramp import (
    RATE,
    RampError,
    check_effect,
    find_scalar,
    ramp_values,
    without_schedule,
)
from trainer.lr_finder.trial import TrialFolder, Trials
from trainer.recipe.overrides import OverrideError

NUM_STEPS = 3


@pytest.fixture(autouse=True, scope="module")
def _small_slice():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.lr_finder.baseline, "MOST_IMAGES", 40)
        yield


def scalar_of(text, recipe="A1", overrides=""):
    return find_scalar(small_plan(recipe, overrides=overrides).recipe, text)


@pytest.mark.parametrize(
    ("text", "label", "own"),
    [
        ("exponential", RATE, 5e-3),
        ("linear", RATE, 5e-3),
        ("peak", RATE, 5e-3),
        ("weight_decay", "optimizer.weight_decay", 0.01),
        ("optimizer.betas.0", "optimizer.betas.0", 0.9),
        ("magnitude", "augment.rand_augment.magnitude", 7),
        ("smoothing", "smoothing", 0.1),
        ("augment.2.magnitude_std", "augment.rand_augment.magnitude_std", 0.5),
        ("optimizer.clip_adaptive", "optimizer.clip_adaptive", None),
    ],
)
def test_a_number_is_found_by_its_path_or_by_a_last_name_that_is_there_once(text, label, own):
    found = scalar_of(text)
    assert (found.label, found.own) == (label, own)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("batch.images", "lr.peak"),
        ("epochs", "weight_decay"),
        ("image.train_px", "lr.peak"),
        ("repeats", "lr.peak"),
        ("lr.warmup_epochs", "lr.peak"),
        ("lr.schedule.end", "lr.peak"),
        ("average.decay", "weight_decay"),
        ("version", "lr.peak"),
        ("optimizer", "optimizer.betas"),
        ("optimizer.betas", "optimizer.betas.0"),
        ("loss.name", "lr.peak"),
        ("interpolation", "augment.rand_augment.interpolation"),
        ("wieght_decay", "did you mean weight_decay?"),
        ("optimizer.wieght_decay", "weight_decay"),
    ],
)
def test_what_has_no_ramp_is_refused_with_what_would_do(text, remedy):
    with pytest.raises(RampError, match="^ramp=") as error:
        scalar_of(text, overrides="average='{name: ema, decay: 0.9, every_steps: 2}'")
    assert remedy in str(error.value) and "\n" not in str(error.value)


def values(text, low=None, high=None, num_steps=5, recipe="A1"):
    plan = small_plan(recipe)
    return ramp_values(plan.recipe, find_scalar(plan.recipe, text), text, low, high, num_steps)


def test_the_learning_rate_goes_in_equal_ratios_or_in_equal_steps():
    assert values("exponential", num_steps=8) == pytest.approx(10.0 ** np.arange(-6, 2))
    assert values("exponential", 1e-3, 1e-1, 3) == pytest.approx([1e-3, 1e-2, 1e-1])
    assert values("linear", 1e-3, 9e-3) == pytest.approx([1e-3, 3e-3, 5e-3, 7e-3, 9e-3])


def test_other_numbers_start_from_the_pages_own():
    assert values("weight_decay", num_steps=3) == pytest.approx([1e-4, 1e-2, 1.0])
    found = values("optimizer.betas.0", num_steps=3)
    assert found[0] == 0 and 0.99 < found[-1] < 1 and found[1] == pytest.approx(found[-1] / 2)
    assert values("optimizer.betas.0", 0.5, 0.9, 3) == pytest.approx([0.5, 0.7, 0.9])


@pytest.mark.parametrize(
    ("text", "low", "high", "remedy"),
    [
        ("exponential", 1.0, 1e-3, "from=1e-06 to=10"),
        ("exponential", 0.0, 1.0, "from=1e-06"),
        ("linear", -1.0, 1.0, "from=1e-06"),
        ("exponential", 1e-3, 1000.0, "at most 100"),
        ("exponential", 1e-3, float("inf"), "from=1e-06 to=10"),
        ("weight_decay", 1e-3, 2.0, "at most 1"),
        ("smoothing", 0.0, 0.5, "above 0"),
        ("optimizer.clip_adaptive", None, None, "from=<number>"),
    ],
)
def test_a_range_that_the_page_cannot_take_is_refused(text, low, high, remedy):
    with pytest.raises((RampError, OverrideError)) as error:
        values(text, low, high)
    assert remedy in str(error.value) and "\n" not in str(error.value)


def test_a_whole_number_is_rounded_and_what_was_used_is_known():
    found = scalar_of("num_ops")
    assert (
        found.is_whole
        and found.used(2.6) == 3.0
        and found.override(2.6) == {"augment.rand_augment.num_ops": 3}
    )


@pytest.mark.parametrize(
    ("label", "low", "high", "overrides"),
    [
        ("model.layer_scale", 1e-6, 1e-2, "model.layer_scale=1e-6"),
        ("model.start.head_std", 0.01, 0.1, "model.start.head_std=0.01"),
    ],
)
def test_what_only_makes_the_first_weights_is_refused(label, low, high, overrides):
    plan = small_plan("A1", "test_convnext", overrides)
    with pytest.raises(RampError, match="first weights"):
        check_effect(
            replace(plan, recipe=without_schedule(plan.recipe)),
            find_scalar(plan.recipe, label),
            low,
            high,
        )


# every kind of place: the optimizer's groups, clipping, targets, mixing, loss, augmentation; of the
# model itself both as ordinary tests, since it is built anew at every step, in the way of a run
KINDS = [
    ("optimizer.weight_decay", 0.3, "A1", ""),
    ("optimizer.betas.0", 0.5, "A1", ""),
    ("optimizer.eps", 1e-2, "A1", ""),
    ("optimizer.clip_global_norm", 0.01, "A1", ""),
    ("optimizer.momentum", 0.5, "torchvision-v1", ""),
    ("optimizer.weight_decay", 0.2, "mosaic-mild", ""),
    ("smoothing", 0.4, "A1", ""),
    ("mix.mixup_alpha", 3.0, "A1", "mix.cutmix_share=0.01"),
    ("loss.threshold", 0.5, "A3", ""),
    ("augment.rand_augment.magnitude", 1.0, "A1", ""),
    ("augment.random_resized_crop.area.0", 0.3, "A1", ""),
    ("drop_path", 0.7, "A1", ""),
    ("model.dropout", 0.8, "A1", "model.dropout=0.1"),
]
AS_DRILLS = [
    pytest.param(
        *kind, marks=[] if kind[0] in ("drop_path", "model.dropout") else pytest.mark.drill
    )
    for kind in KINDS
]


def trials(label, recipe, overrides):
    plan = small_plan(recipe, overrides=f"batch.norm_images=32 {overrides}")
    cut = hold_out(open_data(plan.profile, None), plan.recipe.batch)
    settings = make_settings("cpu", workers="0")
    return Trials(
        trial_plan(plan, cut),
        settings,
        cut,
        find_scalar(plan.recipe, label),
        np.ones(NUM_STEPS),
        TrialFolder(None),
    )


@pytest.mark.parametrize(
    ("label", "value", "recipe", "overrides"),
    AS_DRILLS,
    ids=[f"{kind[2]}-{kind[0]}" for kind in KINDS],
)
def test_a_ramp_that_stays_at_a_value_is_the_page_with_that_value_bit_for_bit(
    label, value, recipe, overrides
):
    """And not the page as it stands: the value is turned to."""
    there = trials(label, recipe, overrides)
    constant = there(0, np.full(NUM_STEPS, value), "probe")
    assert constant.values.tolist() == [value] * NUM_STEPS
    page = trials(RATE, recipe, f"{overrides} {label}={value}")
    fixed = page(0, np.full(NUM_STEPS, page.plan.recipe.lr.peak), "probe")
    assert constant.losses.tolist() == fixed.losses.tolist()
    own = there(0, np.full(NUM_STEPS, there.scalar.own), "probe")
    assert own.losses.tolist() != constant.losses.tolist()
