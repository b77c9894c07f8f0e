"""What a step of a cell costs, measured, and which cells share a measurement."""

import dataclasses

import pytest

from support.loss_ablation import PAGE, written
from trainer.ablation.spec import load_ablation
from trainer.ablation.throughput import measure_throughput, shape_of
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.recipe.schema import apply_overrides


def test_the_pace_is_the_median_step_and_the_share_of_an_evaluation(tmp_path, monkeypatch):
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
    assert pace.run_s(plan) == pytest.approx(44 * 1.0 + 2 * 360 / 128)
    bounded = measure_throughput(
        plan, make_settings("cpu", workers="0"), open_data(plan.profile, None), 20, bound_s=0.5
    )
    assert bounded.num_steps == 1


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
