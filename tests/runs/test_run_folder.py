"""A run folder gives back the trained model, whatever its recipe changed in it."""

import io
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console

from support.plans import small_set
from trainer.base.exits import EXIT_DONE
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.data.dataset import open_data
from trainer.engine.evaluate import evaluate
from trainer.recipe.plan import PlanError
from trainer.runs import summary as show
from trainer.runs.export import is_timms, weights_digest
from trainer.runs.job import Job, plan_of, run_job
from trainer.runs.plan_file import write_plan
from trainer.runs.run_folder import open_model, plan_of_run

CHANGED = (
    "'model.norm={name: group_norm, groups: 16, eps: 1e-5}' 'model.activation={name: prelu, slope:"
    " 0.25}'"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(plan, row, run folder, settings) of a short run of a model that timm does not have."""
    folder = tmp_path_factory.mktemp("finished")
    job = Job(
        "A2",
        "test_resnet",
        overrides=small_set(f"epochs=1 batch.images=96 batch.norm_images=48 {CHANGED}"),
    )
    plan = plan_of(job)
    settings = make_settings("cpu", workers="0", runs=folder / "runs", results=folder / "results")
    out = Console(file=io.StringIO(), width=140)
    with StopRequest() as stop:
        code, row = run_job(job, plan, settings, open_data(plan.profile, None), out, stop)
    assert code == EXIT_DONE
    return plan, row, settings.runs / row.run, settings


def test_the_opened_model_has_the_rows_weights_and_gives_its_scores(finished):
    _, row, folder, settings = finished
    model = open_model(folder)
    assert weights_digest(model) == row.weights_sha256 and not model.training
    assert {type(module).__name__ for module in model.modules()} >= {"GroupNorm", "PReLU"}
    plan = plan_of_run(folder)
    scores = evaluate(
        plan, settings, model, open_data(plan.profile, None).val_batches(plan, settings)
    )
    assert (scores.top1_pct, scores.top5_pct) == (row.top1_pct, row.top5_pct)
    assert scores.loss_nats == pytest.approx(row.loss_nats, rel=1e-6)


def test_timm_refuses_a_changed_model_by_its_name(finished):
    """Its norms and activations have the shapes of timm's own: loaded by the model's own name, it
    would be another function without a word.
    """
    plan, _, folder, _ = finished
    assert not is_timms(plan)
    with pytest.raises(RuntimeError, match=r"test_resnet\+A2"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_the_end_of_a_run_says_how_to_open_its_model(finished):
    plan, row, folder, settings = finished
    out = Console(file=io.StringIO(), width=400, highlight=False)
    show.row(out, row, settings, plan)
    lines = out.file.getvalue().splitlines()
    (line,) = [line for line in lines if line.startswith("model ")]
    assert f"trainer.runs.run_folder.open_model('{folder}')" in line and "local-dir" not in line


def test_opening_a_model_leaves_torchs_generator_alone(finished):
    _, _, folder, _ = finished
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    open_model(folder)
    assert torch.equal(torch.rand(3), expected)


def test_the_plan_of_a_run_folder_is_the_one_it_was_made_by(finished):
    plan, _, folder, _ = finished
    found = plan_of_run(folder)
    assert found.recipe.digest == plan.recipe.digest
    assert (found.model, found.seed, found.profile, found.num_steps) == (
        plan.model,
        plan.seed,
        plan.profile,
        plan.num_steps,
    )


def test_a_run_that_has_not_finished_is_refused(tmp_path: Path):
    job = Job("A2", "test_resnet", overrides=small_set())
    write_plan(tmp_path, job, plan_of(job))
    with pytest.raises(PlanError, match="has not finished"):
        open_model(tmp_path)
