"""The learning rate against the schedulers of timm and torch and against ConvNeXt's closed form."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from timm.scheduler import CosineLRScheduler
from torch.optim import lr_scheduler

from trainer.components.learning_rate import LearningRate
from trainer.components.piecewise_schedules import StepDecay
from trainer.components.schedules import Cosine

A1 = {
    "peak": 5e-3,
    "warmup_epochs": 5,
    "warmup_from": 1e-4,
    "updated": "per_epoch",
    "schedule": {"name": "cosine", "end": 1e-6, "period": "run"},
}
VISION = {
    "peak": 0.5,
    "warmup_epochs": 5,
    "warmup_from": 5e-3,
    "updated": "per_epoch",
    "schedule": {"name": "cosine", "end": 0.0, "period": "after_warmup"},
}


def page(base=A1, **changes):
    return LearningRate.model_validate({**base, **changes})


def sgd(lr):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def rates_of_torch(optimizer, scheduler, num_epochs):
    rates = []
    for _ in range(num_epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("epochs", [6, 100, 600])
def test_a1_equals_timms_cosine_without_prefix(epochs):
    optimizer = sgd(5e-3)
    scheduler = CosineLRScheduler(optimizer, epochs, lr_min=1e-6, warmup_t=5, warmup_lr_init=1e-4)
    expected = [optimizer.param_groups[0]["lr"]]
    for epoch in range(1, epochs):
        scheduler.step(epoch)
        expected.append(optimizer.param_groups[0]["lr"])
    ours = [page().at(epoch * 7, 7, epochs) for epoch in range(epochs)]
    assert ours == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_torchvision_v2_equals_torchs_sequence():
    optimizer = sgd(0.5)
    scheduler = lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=5),
            lr_scheduler.CosineAnnealingLR(optimizer, T_max=595, eta_min=0.0),
        ],
        milestones=[5],
    )
    expected = rates_of_torch(optimizer, scheduler, 600)
    ours = [page(VISION).at(epoch, 1, 600) for epoch in range(600)]
    assert ours == pytest.approx(
        expected, rel=1e-6, abs=1e-9
    )  # torch multiplies its way down: 600 roundings


def test_a_warmup_that_holds_equals_torchs_constant_factor():
    optimizer = sgd(0.5)
    scheduler = lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.ConstantLR(optimizer, factor=0.01, total_iters=5),
            lr_scheduler.CosineAnnealingLR(optimizer, T_max=25, eta_min=0.0),
        ],
        milestones=[5],
    )
    expected = rates_of_torch(optimizer, scheduler, 30)
    ours = [page(VISION, warmup_holds=True).at(epoch, 1, 30) for epoch in range(30)]
    assert ours == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_torchvision_v1_equals_torchs_steps():
    optimizer = sgd(0.1)
    expected = rates_of_torch(
        optimizer, lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1), 90
    )
    schedule = StepDecay(every_epochs=30, factor=0.1)
    for updated in ("per_epoch", "per_step"):
        rate = LearningRate(peak=0.1, updated=updated, schedule=schedule)
        assert [rate.at(epoch * 4 + 3, 4, 90) for epoch in range(90)] == pytest.approx(
            expected, rel=1e-6
        )


@pytest.mark.parametrize(("warmup_epochs", "steps_per_epoch"), [(20, 13), (1, 1), (1, 2)])
def test_convnext_equals_its_linspace_and_cosine(warmup_epochs, steps_per_epoch):
    epochs, peak, end = 30, 4e-3, 1e-6
    num_warmup = warmup_epochs * steps_per_epoch
    rest = np.arange(epochs * steps_per_epoch - num_warmup)
    falling = end + 0.5 * (peak - end) * (1 + np.cos(math.pi * rest / len(rest)))
    expected = np.concatenate([np.linspace(0.0, peak, num_warmup), falling])
    rate = LearningRate(
        peak=peak,
        warmup_epochs=warmup_epochs,
        warmup_from=0.0,
        warmup_ends_at_peak=True,
        updated="per_step",
        schedule=Cosine(end=end, period="after_warmup"),
    )
    ours = [rate.at(step, steps_per_epoch, epochs) for step in range(epochs * steps_per_epoch)]
    assert ours == pytest.approx(expected, rel=1e-6, abs=1e-12)


@given(st.integers(1, 50), st.integers(6, 60), st.sampled_from(["run", "after_warmup"]))
def test_per_epoch_is_a_staircase_of_per_step_at_one_step_an_epoch(steps_per_epoch, epochs, period):
    schedule = {"name": "cosine", "end": 1e-6, "period": period}
    stairs, steps = page(schedule=schedule), page(schedule=schedule, updated="per_step")
    for step in range(epochs * steps_per_epoch):
        assert stairs.at(step, steps_per_epoch, epochs) == steps.at(
            step // steps_per_epoch, 1, epochs
        )


@given(
    st.integers(1, 40),
    st.integers(6, 40),
    st.sampled_from(["per_epoch", "per_step"]),
    st.booleans(),
)
def test_the_rate_rises_once_then_falls_within_its_bounds(
    steps_per_epoch, epochs, updated, ends_at_peak
):
    rate = page(VISION, updated=updated, warmup_ends_at_peak=ends_at_peak)
    rates = np.array(
        [rate.at(step, steps_per_epoch, epochs) for step in range(epochs * steps_per_epoch)]
    )
    assert rates[0] == 5e-3 and rates.max() == pytest.approx(0.5) and rates.min() >= 0
    summit = 5 * steps_per_epoch
    assert (np.diff(rates[: summit + 1]) >= 0).all() and (np.diff(rates[summit:]) <= 0).all()
    assert rates[summit] == 0.5


def test_without_warmup_the_first_rate_is_the_peak():
    assert page(warmup_epochs=None, warmup_from=None).at(0, 10, 100) == 5e-3


@pytest.mark.parametrize(
    ("scaling", "expected"), [(None, 0.5), ("linear", 0.03125), ("sqrt", 0.125)]
)
def test_the_peak_follows_the_batch_by_the_pages_rule(scaling, expected):
    assert page(VISION, scaling=scaling).scaled(1024, 64) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peak": 0.0}, "greater than 0"),
        ({"peak": -5e-3}, "greater than 0"),
        ({"peak": 500.0}, "less than or equal to 100"),
        ({"peak": float("nan")}, "finite"),
        ({"warmup_epochs": None}, "warmup_from stands without warmup_epochs"),
        ({"warmup_from": None}, "warmup_epochs stands without warmup_from"),
        (
            {"warmup_epochs": None, "warmup_from": None, "warmup_multiplies": True},
            "warmup_multiplies stands without warmup_epochs",
        ),
        ({"base": VISION, "warmup_multiplies": True}, "write schedule.period: run"),
        (
            {"warmup_epochs": None, "warmup_from": None, "warmup_ends_at_peak": True},
            "warmup_ends_at_peak stands without warmup_epochs",
        ),
        ({"warmup_holds": True, "warmup_ends_at_peak": True}, "keep one of them"),
        ({"warmup_epochs": 0}, "greater than or equal to 1"),
        ({"warmup_epochs": 5.0}, "integer"),
        ({"warmup_from": -1e-4}, "greater than or equal to 0"),
        ({"warmup_from": 1.0}, "warmup_from 1 is above the peak 0.005"),
        (
            {"schedule": {"name": "cosine", "end": 1.0, "period": "run"}},
            "schedule.end 1 is above the peak 0.005",
        ),
        (
            {"schedule": {"name": "cosine", "end": -1e-6, "period": "run"}},
            "greater than or equal to 0",
        ),
        ({"schedule": {"name": "cosine", "end": 1e-6}}, "Field required"),
        (
            {"schedule": {"name": "step", "every_epochs": 0, "factor": 0.1}},
            "greater than 0",
        ),
        ({"schedule": {"name": "step", "every_epochs": 30, "factor": 1.5}}, "less than 1"),
        (
            {"schedule": {"name": "step", "every_epochs": 30, "factor": 0.1, "end": 0.0}},
            "Extra inputs",
        ),
        ({"updated": "per_batch"}, "per_epoch"),
        ({"scaling": "cubic"}, "linear"),
    ],
)
def test_absurd_pages_are_refused_in_one_line(changes, words):
    with pytest.raises(ValidationError, match=words) as refusal:
        page(**changes)
    (error,) = refusal.value.errors()
    assert "\n" not in error["msg"]
