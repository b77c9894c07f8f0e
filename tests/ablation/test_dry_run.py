"""The one step before hours: every shape once, what fails named."""

import pytest

from support.repeats import repeat_of, shared_in
from trainer.ablation import dry_run
from trainer.ablation.dry_run import dry_run_shape, mark_tried, try_shapes, untried


def test_cells_that_differ_in_numbers_and_lengths_are_of_one_shape():
    shape = dry_run_shape(repeat_of(0.1).plan)
    assert shape == dry_run_shape(repeat_of(0.2, seed=7).plan)
    assert shape == dry_run_shape(
        repeat_of(0.1, overrides="epochs=1 lr.peak=1e-3 optimizer.weight_decay=0.5").plan
    )


@pytest.mark.parametrize(
    "overrides",
    [
        "loss.name=ce",
        "batch.norm_images=16",
        "image.train_px=48",
        "mix=null",
        "optimizer.name=adamw",
        "model.norm='{name: group_norm, groups: 8, eps: 1e-5}'",
    ],
)
def test_what_may_stop_a_step_is_another_shape(overrides):
    assert dry_run_shape(repeat_of(0.1).plan) != dry_run_shape(
        repeat_of(0.1, overrides=overrides).plan
    )


def test_a_shape_is_tried_once_under_the_same_runs(tmp_path):
    shared = shared_in(tmp_path)
    repeats = [repeat_of(0.1), repeat_of(0.2), repeat_of(0.1, overrides="loss.name=ce")]
    shapes = untried(repeats, shared)
    assert list(shapes.values()) == [repeats[0], repeats[2]]
    mark_tried(shared, dry_run_shape(repeats[0].plan))
    assert list(untried(repeats, shared).values()) == [repeats[2]]
    assert len(untried(repeats, shared_in(tmp_path / "other"))) == 2


def test_a_real_step_is_made_of_the_largest_images_and_one_batch_scored(tmp_path, monkeypatch):
    seen, scored = [], []
    steps = dry_run.optimizer_step

    def noting(state, window, step):
        batches = list(window)
        seen.append(
            (step, [(batch.step, len(batch.labels), batch.images.shape[-1]) for batch in batches])
        )
        return steps(state, iter(batches), step)

    monkeypatch.setattr(dry_run, "optimizer_step", noting)
    monkeypatch.setattr(
        dry_run,
        "evaluate",
        lambda plan, settings, model, batches: scored.extend(len(labels) for _, labels in batches),
    )
    growing = repeat_of(
        0.1,
        overrides="image.growth='{from_px: 16, from_epoch: 0, to_epoch: 2, multiple_px: 16, "
        "updated: per_epoch}'",
    )
    trials = list(try_shapes({"a": growing}, shared_in(tmp_path)))
    assert [(trial.shape, trial.error) for trial in trials] == [("a", None)]
    first_of_last_epoch = growing.plan.num_steps - growing.plan.steps_per_epoch
    assert seen == [
        (
            first_of_last_epoch,
            [(first_of_last_epoch, 8, growing.plan.train_px_at(first_of_last_epoch))] * 4,
        )
    ]
    assert scored == [128]
    assert [path.name for path in (tmp_path / "runs").rglob("*.*")] == [
        "dry_run.txt"
    ]  # no run was begun


def test_what_fails_is_told_in_one_line_and_the_others_are_tried(tmp_path, monkeypatch):
    def failing(state, window, step):
        if "ce" in state.plan.recipe.loss.name and state.plan.recipe.loss.name != "bce":
            raise MemoryError("1 TiB\nmore")
        return steps(state, window, step)

    steps = dry_run.optimizer_step
    monkeypatch.setattr(dry_run, "optimizer_step", failing)
    wrong = repeat_of(0.1, data_dir=tmp_path / "nowhere", data="cifar10")
    misfit = repeat_of(0.1, overrides="model.norm='{name: group_norm, groups: 7, eps: 1e-5}'")
    shapes = {
        "a": repeat_of(0.1, overrides="loss.name=ce"),
        "b": wrong,
        "c": repeat_of(0.2),
        "d": misfit,
    }
    first, second, third, fourth = try_shapes(shapes, shared_in(tmp_path))
    assert first.error == "MemoryError: 1 TiB" and not first.is_users
    assert first.log_tail[-2:] == ("MemoryError: 1 TiB", "more") and any(
        "failing" in line for line in first.log_tail
    )
    assert second.is_users and "nowhere" in second.error and "Traceback" not in second.error
    assert third.error is None
    assert fourth.is_users and "model.norm" in fourth.error


def test_a_mark_holds_for_these_versions_alone(monkeypatch):
    before = dry_run_shape(repeat_of(0.1).plan)
    monkeypatch.setattr(dry_run.provenance, "versions", lambda: {"torch": "0"})
    assert dry_run_shape(repeat_of(0.1).plan) != before
