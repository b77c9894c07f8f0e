"""early_stopping ends a run after the evaluation that its patience asks for, and no sooner."""

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from support.plans import small_set
from trainer.base.exits import EXIT_DONE, EXIT_STOPPED
from trainer.base.settings import make_settings
from trainer.base.signals import Stopped, StopRequest
from trainer.cli.main import app
from trainer.data.dataset import open_data
from trainer.engine import train
from trainer.recipe.sections import EarlyStopping
from trainer.runs.job import Job, plan_of, run_job

# no step moves the weights by what an answer would show, so that the first epoch is the best
STANDING = small_set(
    "epochs=6 batch.images=96 batch.norm_images=96"
    " 'lr={peak: 1e-12, updated: per_step, schedule: {name: constant}}'"
    " early_stopping.patience_epochs=2 precise_norm=null"
    " 'model={norm: {name: group_norm, groups: 4, eps: 1e-5}}'"
)


def run(folder, overrides=STANDING):
    """(exit code, row, plan, what was said)."""
    job, said = Job("A2", "test_resnet", overrides=overrides), io.StringIO()
    plan = plan_of(job)
    settings = make_settings("cpu", workers="0", runs=folder / "runs", results=folder / "results")
    with StopRequest() as stop:
        data, console = open_data(plan.profile, None), Console(file=said, width=200)
        code, row = run_job(job, plan, settings, data, console, stop)
    return code, row, plan, said.getvalue()


@pytest.mark.parametrize(
    "scores, patience, is_over",
    [
        ([10.0], 1, False),
        ([10.0, 10.0], 1, True),  # as good is no better
        ([10.0, 11.0], 1, False),
        ([10.0, 12.0, 11.0, 11.9], 3, False),
        ([10.0, 12.0, 11.0, 11.9, 12.0], 3, True),
        ([10.0, 12.0, 11.0, 11.9, 12.1], 3, False),
        ([], 1, False),
    ],
)
def test_patience_is_counted_from_the_best_epoch(scores, patience, is_over):
    curve = dict(enumerate(scores, start=1))
    assert EarlyStopping(patience_epochs=patience).is_over(curve) is is_over


def test_a_run_that_learns_nothing_ends_early_with_a_row_that_says_so(tmp_path):
    code, row, plan, said = run(tmp_path)
    assert code == EXIT_DONE and row.status == "finished"
    assert row.steps == 3 * plan.steps_per_epoch < plan.num_steps
    assert "early_stopping.patience_epochs" in {one.path for one in row.deviations} | {
        f"{one.path}.patience_epochs" for one in row.deviations
    }
    assert "early_stopping" in said
    words = ["verify", "--run", row.run, "--runs", tmp_path / "runs"]
    found = CliRunner().invoke(app, [*map(str, words), "--results", str(tmp_path / "results")])
    assert found.exit_code == 0, found.output
    assert run(tmp_path)[1].finished_utc == row.finished_utc  # found, not made again


def test_stopped_and_resumed_it_ends_at_the_same_epoch(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")[1]
    spe, real = whole.steps // 3, train.optimizer_step
    for number in (spe, 3 * spe - 1):  # at the first epoch's end, and in the last

        def stopping(state, loader, step, number=number):
            if step == number:
                raise Stopped("SIGTERM")
            return real(state, loader, step)

        monkeypatch.setattr(train, "optimizer_step", stopping)
        assert run(tmp_path / "again")[0] == EXIT_STOPPED
    monkeypatch.setattr(train, "optimizer_step", real)
    again = run(tmp_path / "again")[1]
    assert (again.steps, again.weights_sha256) == (whole.steps, whole.weights_sha256)
    assert again.percentages == whole.percentages
