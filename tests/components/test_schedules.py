"""Schedules against timm's and torch's schedulers, numpy.interp and closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from timm.scheduler import PolyLRScheduler
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
    assert ((found >= 0) & (found <= 0.5)).all() and 0.5 in found


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
