"""Schedules against timm's and torch's schedulers, numpy.interp and closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from scipy import stats
from timm.scheduler import (
    CosineLRScheduler,
    PlateauLRScheduler,
    PolyLRScheduler,
    StepLRScheduler,
    TanhLRScheduler,
    create_scheduler_v2,
)
from torch.optim import lr_scheduler

from trainer.base.component import registered
from trainer.components.learning_rate import LearningRate
from trainer.components.schedules import Schedule


def rate(updated="per_step", peak=0.5, **fields):
    """A learning rate from its schedule's fields; those that start with lr_ are the section's own."""
    own = {
        key.removeprefix("lr_"): fields.pop(key) for key in list(fields) if key.startswith("lr_")
    }
    return LearningRate.model_validate(
        {"peak": peak, "updated": updated, "schedule": fields, **own}
    )


def rates(lr, steps_per_epoch, epochs):
    return np.array(
        [lr.at(step, steps_per_epoch, epochs) for step in range(epochs * steps_per_epoch)]
    )


def sgd(lr):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


FFCV_RAMPS = {16: (11, 13), 24: (17, 20), 32: (23, 27), 40: (29, 34), 56: (41, 48), 88: (65, 76)}


@pytest.mark.parametrize("epochs", FFCV_RAMPS)
def test_ffcvs_lines_are_numpys(epochs):
    """Its script interpolates the epochs' rates, and between two of them the steps'."""
    lr = rate(peak=1.7, name="piecewise_linear", points=((0, 1e-4), (2, 1.0), (epochs, 0.0)))
    starts = np.interp(np.arange(epochs + 1), [0, 2, epochs], [1e-4 * 1.7, 1.7, 0.0])
    expected = [np.interp(np.arange(313), [0, 313], [a, b]) for a, b in itertools.pairwise(starts)]
    np.testing.assert_allclose(
        rates(lr, 313, epochs), np.concatenate(expected), rtol=1e-12, atol=1e-15
    )


def test_lines_hold_their_last_share_and_may_take_a_step_for_an_epoch():
    points = ((0.0, 0.0), (1.5, 1.0), (3.0, 0.25))
    found = rates(rate(peak=2.0, name="piecewise_linear", points=points), 4, 5)
    np.testing.assert_allclose(
        found, np.interp(np.arange(20) / 4, [0, 1.5, 3], [0, 2, 0.5]), atol=1e-15
    )
    assert found[-1] == 0.5
    stairs = rates(rate("per_epoch", 2.0, name="piecewise_linear", points=points), 4, 5)
    np.testing.assert_allclose(stairs, np.repeat(found[::4], 4))


@pytest.mark.parametrize("period", ["run", "after_warmup"])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_polynomial_equals_timms(power, period):
    after = period == "after_warmup"
    lr = rate(
        "per_epoch",
        name="polynomial",
        power=power,
        end=1e-3,
        period=period,
        lr_warmup_epochs=3,
        lr_warmup_from=0.01,
    )
    optimizer = sgd(0.5)
    scheduler = PolyLRScheduler(
        optimizer,
        20 - 3 * after,
        power,
        lr_min=1e-3,
        warmup_t=3,
        warmup_lr_init=0.01,
        warmup_prefix=after,
    )
    for epoch in range(20):
        scheduler.step(epoch)
        assert lr.at(epoch * 7 + 3, 7, 20) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-9
        )


def timms_rates(optimizer, scheduler, epochs, steps_per_epoch=None):
    """The rates of a scheduler of timm's at every epoch, or at every step."""
    found = []
    for number in range(epochs * (steps_per_epoch or 1)):
        (scheduler.step_update if steps_per_epoch else scheduler.step)(number)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("k_decay", [0.5, 1.5])
def test_k_decay_equals_timms(k_decay):
    page = {"end": 1e-3, "period": "run", "k_decay": k_decay}
    for fields, kind, own in (
        ({"name": "cosine"}, CosineLRScheduler, {}),
        ({"name": "polynomial", "power": 0.9}, PolyLRScheduler, {"power": 0.9}),
    ):
        optimizer = sgd(0.5)
        scheduler = kind(optimizer, 20, lr_min=1e-3, k_decay=k_decay, **own)
        lr = rate("per_epoch", **page, **fields)
        assert rates(lr, 1, 20) == pytest.approx(timms_rates(optimizer, scheduler, 20), rel=1e-9)


@pytest.mark.parametrize("steps_per_epoch", [None, 7])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize(("growth", "decay"), [(None, None), (2.0, 0.5), (1.5, None)])
def test_cosine_cycles_equal_timms(growth, decay, after, steps_per_epoch):
    lr = rate(
        "per_step" if steps_per_epoch else "per_epoch", name="cosine_cycles", cycle_epochs=5,
        growth=growth, decay=decay, end=1e-3, period="after_warmup" if after else "run",
        k_decay=1.2, lr_warmup_epochs=3, lr_warmup_from=0.01,
    )  # fmt: skip
    optimizer, per = sgd(0.5), steps_per_epoch or 1
    scheduler = CosineLRScheduler(
        optimizer, 5 * per, lr_min=1e-3, cycle_mul=growth or 1.0, cycle_decay=decay or 1.0,
        cycle_limit=100, warmup_t=3 * per, warmup_lr_init=0.01, warmup_prefix=after,
        t_in_epochs=steps_per_epoch is None, k_decay=1.2,
    )  # fmt: skip
    expected = timms_rates(optimizer, scheduler, 40, steps_per_epoch)
    assert rates(lr, per, 40) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("patience", "cooldown"), [(0, None), (2, None), (1, 3)])
def test_a_plateau_is_torchs_and_timms(patience, cooldown):
    lr = rate(
        "per_epoch", name="plateau", factor=0.3, patience_epochs=patience, threshold=1e-2,
        cooldown_epochs=cooldown, end=1e-3, lr_warmup_epochs=3, lr_warmup_from=0.01,
    )  # fmt: skip
    scores = np.random.default_rng(patience).normal(np.linspace(50, 60, 40), 4).tolist()
    optimizer = sgd(0.5)
    with pytest.warns(FutureWarning):
        scheduler = PlateauLRScheduler(
            optimizer, 0.3, patience, threshold=1e-2, cooldown_t=cooldown or 0, warmup_t=3,
            warmup_lr_init=0.01, lr_min=1e-3,
        )  # fmt: skip
    seen = []
    for epoch in range(40):
        seen.append(optimizer.param_groups[0]["lr"])
        assert lr.at(epoch * 7 + 3, 7, 40, scores=scores[:epoch]) == pytest.approx(seen[-1])
        scheduler.step(epoch + 1, scores[epoch])
    assert len(set(seen[3:])) > 2


@pytest.mark.parametrize("after", [True, False])
def test_tanh_equals_timms(after):
    warmup = {"lr_warmup_epochs": 3, "lr_warmup_from": 0.01} if after else {}
    period = "after_warmup" if after else "run"
    lr = rate("per_epoch", name="tanh", lower=-7.0, upper=3.0, end=1e-3, period=period, **warmup)
    optimizer = sgd(0.5)
    scheduler = TanhLRScheduler(
        optimizer,
        20 - 3 * after,
        lr_min=1e-3,
        warmup_t=3 * after,
        warmup_lr_init=0.01,
        warmup_prefix=after,
    )
    assert rates(lr, 1, 20) == pytest.approx(timms_rates(optimizer, scheduler, 20), rel=1e-9)


def test_exponential_equals_torchvisions_sequence():
    optimizer = sgd(0.5)
    scheduler = lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=5),
            lr_scheduler.ExponentialLR(optimizer, gamma=0.9),
        ],
        milestones=[5],
    )
    expected = []
    for _ in range(30):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    page = {"name": "exponential", "factor": 0.9, "period": "after_warmup"}
    stairs = rate("per_epoch", **page, lr_warmup_epochs=5, lr_warmup_from=0.005)
    assert rates(stairs, 1, 30) == pytest.approx(expected, rel=1e-6)
    curve = rates(rate("per_step", **page), 4, 10)
    assert curve == pytest.approx([0.5 * 0.9 ** (step / 4) for step in range(40)], rel=1e-12)


@pytest.mark.parametrize("steps_per_epoch", [None, 7])
@pytest.mark.parametrize("every", [2.4, 0.7, 3.0])
def test_steps_of_a_fraction_of_epochs_equal_timms(every, steps_per_epoch):
    optimizer, number = sgd(0.5), steps_per_epoch or 1
    scheduler = StepLRScheduler(
        optimizer, every * number, 0.97, warmup_prefix=False, t_in_epochs=steps_per_epoch is None
    )
    updated = "per_step" if steps_per_epoch else "per_epoch"
    lr = rate(updated, name="step", every_epochs=every, factor=0.97)
    expected = timms_rates(optimizer, scheduler, 40, steps_per_epoch)
    assert rates(lr, number, 40) == pytest.approx(expected, rel=1e-9)


def test_a_whole_number_of_epochs_has_one_spelling():
    pages = [rate(name="step", every_epochs=every, factor=0.1) for every in (30, 30.0)]
    assert [repr(page.schedule.every_epochs) for page in pages] == ["30", "30"]
    assert pages[0].model_dump_json() == pages[1].model_dump_json()


COOLED = [
    ({"name": "cosine", "period": "run"}, "cosine"),
    ({"name": "polynomial", "power": 0.1, "period": "run"}, "poly"),
    ({"name": "tanh", "lower": -7.0, "upper": 3.0, "period": "run"}, "tanh"),
]


@pytest.mark.parametrize(("fields", "sched"), COOLED)
@pytest.mark.parametrize("updated", ["per_epoch", "per_step"])
def test_a_cooldown_equals_timms(fields, sched, updated):
    """timm's train.py trains for as long as its factory says, which counts the cooldown on top."""
    optimizer, steps = sgd(0.5), 3 if updated == "per_step" else 1
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched, 20, cooldown_epochs=4, min_lr=1e-3, step_on_epochs=updated == "per_epoch",
        updates_per_epoch=steps,
    )  # fmt: skip
    lr = rate(updated, end=1e-3, lr_cooldown_epochs=4, **fields)
    expected = timms_rates(optimizer, scheduler, epochs, steps if updated == "per_step" else None)
    assert epochs == 24 and rates(lr, steps, epochs) == pytest.approx(expected, rel=1e-9)
    assert rates(lr, 5, epochs)[-20:].tolist() == [1e-3] * 20


NOISE = {"from_share": 0.42, "to_share": 0.9, "std": 1.0, "limit": 0.67}


@pytest.mark.parametrize(("std", "limit"), [(1.0, 0.67), (0.1, 0.67), (0.3, 0.2)])
def test_noise_is_distributed_as_timms(std, limit):
    noise = {**NOISE, "std": std, "limit": limit, "from_share": 0.0, "to_share": 1.0}
    found = rates(rate(name="constant", lr_noise=noise), 4000, 1) / 0.5 - 1
    bound = stats.truncnorm(-limit / std, limit / std, scale=std)
    assert stats.kstest(found, bound.cdf).pvalue > 1e-3 and np.abs(found).max() < limit
    timms = StepLRScheduler(
        sgd(0.5), 1, noise_range_t=0, noise_std=std, noise_pct=limit, noise_seed=0
    )
    others = [timms._calculate_noise(t) for t in range(2000)]
    assert stats.ks_2samp(found, others).pvalue > 1e-3


def test_noise_moves_the_rate_where_timms_does():
    """Between shares of the epochs before a cooldown, once an update, the same for a seed."""
    smooth = {"name": "cosine", "end": 1e-3, "period": "run", "lr_cooldown_epochs": 4}
    lr, plain = rate("per_epoch", **smooth, lr_noise=NOISE), rate("per_epoch", **smooth)
    ratio = (rates(lr, 2, 24) / rates(plain, 2, 24))[::2]
    optimizer = sgd(0.5)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", 20, cooldown_epochs=4, min_lr=1e-3, noise=[0.42, 0.9]
    )
    expected = np.array(timms_rates(optimizer, scheduler, 24)) / rates(plain, 1, 24)
    assert (np.abs(ratio - 1) > 1e-9).tolist() == (np.abs(expected - 1) > 1e-6).tolist()
    assert np.array_equal(rates(lr, 2, 24)[::2], rates(lr, 2, 24)[1::2])
    assert lr.at(25, 2, 24, seed=1) != lr.at(25, 2, 24, seed=0) == lr.at(25, 2, 24)


def test_multi_step_equals_torchs():
    lr, optimizer = rate("per_epoch", name="multi_step", at_epochs=(3, 6, 7), factor=0.1), sgd(0.5)
    scheduler = lr_scheduler.MultiStepLR(optimizer, [3, 6, 7], 0.1)
    for epoch in range(10):
        expected = optimizer.param_groups[0]["lr"]
        assert (
            lr.at(epoch * 5, 5, 10)
            == pytest.approx(expected)
            == pytest.approx(lr.at(epoch * 5 + 4, 5, 10))
        )
        optimizer.step()
        scheduler.step()


def test_a_constant_rate_stays():
    found = rates(rate(name="constant", lr_warmup_epochs=1, lr_warmup_from=0.0), 4, 5)
    assert found.tolist() == [0.0, 0.125, 0.25, 0.375] + [0.5] * 16


@pytest.mark.parametrize(("shape", "left"), [
    ("linear", lambda t: 1 - t),
    ("cosine", lambda t: (1 + math.cos(math.pi * t)) / 2),
    ("one_minus_sqrt", lambda t: 1 - math.sqrt(t)),
])  # fmt: skip
def test_a_stable_rate_decays_over_the_last_epochs(shape, left):
    lr = rate(
        name="warmup_stable_decay",
        decay_epochs=4,
        end=0.1,
        shape=shape,
        lr_warmup_steps=5,
        lr_warmup_from=0.0,
    )
    found = rates(lr, 3, 10)
    assert found[:5].tolist() == [0.5 * step / 5 for step in range(5)] and set(found[5:18]) == {0.5}
    np.testing.assert_allclose(
        found[18:], [0.1 + 0.4 * left(step / 12) for step in range(12)], atol=1e-12
    )


def test_a_warmup_in_steps_is_one_in_epochs_of_as_many():
    cosine = {"name": "cosine", "end": 0.0, "period": "after_warmup"}
    steps = rate(**cosine, lr_warmup_steps=14, lr_warmup_from=1e-3)
    epochs = rate(**cosine, lr_warmup_epochs=2, lr_warmup_from=1e-3)
    np.testing.assert_array_equal(rates(steps, 7, 9), rates(epochs, 7, 9))
    assert (
        steps.num_warmup_steps(7) == epochs.num_warmup_steps(7) == 14
        and rate(name="constant").num_warmup_steps(7) == 0
    )


@pytest.mark.parametrize("kind", registered(Schedule), ids=lambda kind: kind.__name__)
def test_every_schedules_example_is_a_page(kind):
    lr = rate(name=kind.model_fields["name"].default, **kind.example)
    found = rates(lr, 5, 100)
    assert ((found >= 0) & (found <= 0.5)).all() and found.max() == pytest.approx(0.5, rel=1e-5)


POINTS = "rise from 0"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "piecewise_linear", "points": ((0, 1.0),)}, "at least 2"),
        ({"name": "piecewise_linear", "points": ((1, 0.5), (2, 1.0))}, POINTS),
        ({"name": "piecewise_linear", "points": ((0, 0.5), (2, 1.0), (2, 0.0))}, POINTS),
        ({"name": "piecewise_linear", "points": ((0, 0.5), (2, 0.9))}, "highest share is 0.9"),
        ({"name": "piecewise_linear", "points": ((0, 0.5), (2, 1.1))}, "less than or equal to 1"),
        ({"name": "piecewise_linear", "points": ((0, 0.5), (2, 1.0)), "lr_warmup_epochs": 1, "lr_warmup_from": 0.0}, "its own warm-up"),
        ({"name": "multi_step", "at_epochs": (), "factor": 0.1}, "at least 1"),
        ({"name": "multi_step", "at_epochs": (30, 30), "factor": 0.1}, "does not rise"),
        ({"name": "multi_step", "at_epochs": (0, 30), "factor": 0.1}, "greater than or equal to 1"),
        ({"name": "polynomial", "power": 0.0, "end": 0.0, "period": "run"}, "greater than 0"),
        ({"name": "polynomial", "power": 1.0, "end": 1.0, "period": "run"}, "schedule.end 1 is above the peak 0.5"),
        ({"name": "constant", "end": 0.0}, "Extra inputs"),
        ({"name": "tanh", "lower": 3.0, "upper": 3.0, "end": 0.0, "period": "run"}, "not below upper"),
        ({"name": "step", "every_epochs": 0, "factor": 0.1}, "greater than 0"),
        ({"name": "constant", "lr_cooldown_epochs": 3}, "constant has no end"),
        ({"name": "constant", "lr_noise": {**NOISE, "to_share": 0.4}}, "start earlier"),
        ({"name": "constant", "lr_noise": {**NOISE, "limit": 1.0}}, "less than 1"),
        ({"name": "warmup_stable_decay", "decay_epochs": 0, "end": 0.0, "shape": "linear"}, "greater than or equal to 1"),
        ({"name": "warmup_stable_decay", "decay_epochs": 1, "end": 0.0, "shape": "square"}, "one_minus_sqrt"),
        ({"name": "constant", "lr_warmup_steps": 5}, "warmup_steps stands without warmup_from"),
        ({"name": "constant", "lr_warmup_steps": 5, "lr_warmup_epochs": 1, "lr_warmup_from": 0.0}, "keep one of them"),
        ({"name": "constant", "lr_warmup_steps": 5, "lr_warmup_from": 0.0, "updated": "per_epoch"}, "updated: per_step"),
    ],
)  # fmt: skip
def test_absurd_schedules_are_refused_in_one_line(fields, words):
    with pytest.raises(ValidationError, match=words) as refusal:
        rate(**fields)
    assert all("\n" not in error["msg"] for error in refusal.value.errors())


def test_a_schedule_is_chosen_by_its_name():
    with pytest.raises(ValidationError, match="one_cycle"):
        TypeAdapter(Schedule).validate_python({"name": "one_cycle"})
