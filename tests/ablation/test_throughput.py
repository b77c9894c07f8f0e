"""What a step of a cell costs, measured, and which cells share a measurement."""

import dataclasses

import pytest
import torch

from support.loss_ablation import PAGE, written
from trainer.ablation.spec import load_ablation
from trainer.ablation.throughput import measure_throughput, shape_of
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.recipe.schema import apply_overrides


def test_the_pace_is_a_step_and_the_share_of_an_evaluation(tmp_path, monkeypatch):
    """With a clock that moves one second at each reading: a step is 1 s, one batch of val too."""
    plan = load_ablation(written(tmp_path, PAGE)).cells[0].plan
    ticks = iter(range(1000))
    monkeypatch.setattr("trainer.ablation.throughput.time.perf_counter", lambda: float(next(ticks)))
    made_fast = []
    monkeypatch.setattr("trainer.ablation.throughput.set_algorithms", made_fast.append)
    pace = measure_throughput(
        plan, make_settings("cpu", workers="0"), open_data(plan.profile, None), 3, bound_s=100.0
    )
    assert (pace.step_s, pace.num_steps) == (1.0, 3) and [one.device for one in made_fast] == [
        "cpu"
    ]  # as a run is
    assert pace.evaluation_s == pytest.approx(360 / 128)
    assert pace.start_s == 1.0  # until all is built
    assert pace.run_s(plan) == pytest.approx(1.0 + 44 * 1.0 + 2 * 360 / 128)


@pytest.mark.parametrize(
    ("steps_s", "bound_s", "found"),
    [
        ([30, 2, 9, 1, 4], 100, (1.0, 29.0, 4)),  # the fastest; the first is a run's start
        ([5, 3, 2, 4, 1, 1], 1, (2.0, 3.0, 3)),  # three, though two are beyond the bound
        ([50, 60, 50, 50], 1, (60.0, 0.0, 1)),  # one that takes far longer is enough
    ],
)
def test_the_first_step_is_none_and_of_three_or_more_the_fastest_counts(
    tmp_path, monkeypatch, steps_s, bound_s, found
):
    plan = load_ablation(written(tmp_path, PAGE)).cells[0].plan
    clock, left = [0.0], iter(steps_s)

    def step(state, stream, number):
        clock[0] += next(left)
        return torch.zeros(())

    monkeypatch.setattr("trainer.ablation.throughput.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("trainer.ablation.throughput.optimizer_step", step)
    pace = measure_throughput(
        plan,
        make_settings("cpu", workers="0"),
        open_data(plan.profile, None),
        len(steps_s) - 1,
        bound_s,
    )
    assert (pace.step_s, pace.start_s, pace.num_steps) == found


def test_a_shape_is_what_costs_time(tmp_path):
    plan = load_ablation(written(tmp_path, PAGE)).cells[0].plan

    def shape(overrides):
        return shape_of(
            dataclasses.replace(plan, recipe=apply_overrides(plan.recipe, overrides)[0])
        )

    assert shape_of(dataclasses.replace(plan, seed=1)) == shape("")
    for same in (
        "epochs=3",
        "lr.peak=0.1",
        "drop_path=0.2",
        "optimizer.weight_decay=0.1",
        "mix.mixup_alpha=0.9",
    ):
        assert shape(same) == shape(""), same
    for other in (
        "batch.norm_images=8",
        "image.train_px=40",
        "loss.name=ce",
        "mix=null",
        "model.dropout=0.1",
    ):
        assert shape(other) != shape(""), other
