"""From what was asked to a plan; where a result comes from."""

import hashlib
import json
import subprocess
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
from rich.console import Console

from support.plans import small_plan, small_set
from support.rows import ROW
from trainer.base import provenance
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.engine.state import TrainingState
from trainer.recipe import tree
from trainer.recipe.plan import PlanError
from trainer.runs.job import Job, plan_of, run_job, run_name
from trainer.runs.plan_file import write_plan
from trainer.runs.results import store_row
from trainer.runs.row import deviation_of_head
from trainer.runs.run_folder import recipe_of


def test_the_page_is_adapted_first_and_overridden_second():
    plan = plan_of(Job("A1", "resnet50", overrides="epochs=3"))
    assert [(change.path, change.origin) for change in plan.deviations if change.path == "epochs"] == [
        ("epochs", "profile"), ("epochs", "set"),
    ]  # fmt: skip
    assert plan.recipe.epochs == 3


def test_the_rows_digest_is_the_pages_not_the_deviating_runs():
    assert (
        plan_of(Job("A1", "resnet50", overrides="epochs=3")).page_digest
        == plan_of(Job("A1.v2", "resnet50", "imagenet-1k")).recipe.digest
    )


def test_again_takes_the_first_name_without_a_row(tmp_path):
    plan, settings = small_plan(), make_settings("cpu", results=tmp_path)
    name = plan.run_name("f")
    job = Job("A2", "test_resnet", again=True)
    assert run_name(job, plan, settings, "f") == name
    for taken, free in ((name, f"{name}-2"), (f"{name}-2", f"{name}-3")):
        store_row(tmp_path, ROW.model_copy(update={"run": taken}))
        assert run_name(job, plan, settings, "f") == free


def test_a_row_of_another_recipe_under_a_runs_name_is_not_taken_for_its_own(tmp_path):
    """A name has 24 bits of its digest: where two recipes share one, neither is taken for the
    other.
    """
    plan, settings, data = (
        small_plan(),
        make_settings("cpu", results=tmp_path),
        SimpleNamespace(fingerprint="f" * 64, content_sha256="c" * 64),
    )
    own = ROW.model_copy(
        update={
            "run": plan.run_name(data.fingerprint),
            "resolved_recipe": json.loads(json.dumps(tree.plain(plan.recipe))),
        }
    )
    job, out = Job("A2", "test_resnet"), Console(quiet=True)
    store_row(tmp_path, own)
    assert run_job(job, plan, settings, data, out, StopRequest()) == (0, own)
    store_row(
        tmp_path, own.model_copy(update={"resolved_recipe": own.resolved_recipe | {"epochs": 77}})
    )
    with pytest.raises(PlanError, match=own.run):
        run_job(job, plan, settings, data, out, StopRequest())


@pytest.mark.parametrize(
    ("num_classes", "head", "is_told"),
    [(12, "kept", True), (10, "kept", False), (12, "new", False)],
)
def test_a_classifier_that_starts_anew_is_a_deviation_of_the_row(
    tmp_path, num_classes, head, is_told
):
    """Its recipe says kept, which is where the shape fits."""
    path = tmp_path / "a.safetensors"
    model = timm.create_model("test_resnet", num_classes=num_classes)
    safetensors.torch.save_file(model.state_dict(), path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    start = f"model.pretrained={{file: {path}, sha256: {sha256}, head: {head}}}"
    state = TrainingState(small_plan(overrides=f"'{start}'"), make_settings("cpu"))
    found = deviation_of_head(state)
    assert [(one.path, one.before, one.after, one.origin) for one in found] == [
        ("model.pretrained.head", "kept", "new", "weights")
    ] * is_told


def test_the_run_folders_plan_is_readable_and_its_page_re_loads(tmp_path):
    job = Job("A2", "test_resnet", overrides=small_set("smoothing=0.05 loss.threshold=null"))
    plan = plan_of(job)
    write_plan(tmp_path, job, plan)
    recipe, facts = recipe_of(tmp_path)
    assert recipe.digest == plan.recipe.digest
    assert facts["num_steps"] == plan.num_steps and len(facts["lr_at_epoch_starts"]) == 2
    assert {change["path"]: change["after"] for change in facts["deviations"]}[
        "smoothing"
    ] == "0.05"


@pytest.mark.parametrize("content", [None, "", "{"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    with pytest.raises(PlanError, match="not a run folder"):
        recipe_of(tmp_path)


def test_the_commit_is_gits_and_rows_do_not_make_it_dirty(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "results").mkdir()
    for name in ("program.py", "results/row.json"):
        (tmp_path / name).write_text("1")
    git("add", "-A")
    git("commit", "-qm", "first")
    monkeypatch.setattr(provenance, "PACKAGE_ROOT", tmp_path)
    assert provenance.commit() == (git("rev-parse", "HEAD"), False)
    (tmp_path / "results/row.json").write_text("2")
    assert provenance.commit()[1] is False
    (tmp_path / "program.py").write_text("2")
    assert provenance.commit()[1] is True


def test_outside_a_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE_ROOT", tmp_path)
    assert provenance.commit() == (None, None)


def test_versions_name_what_can_move_a_result():
    import torch

    found = provenance.versions()
    assert (
        found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    )
    assert {"python", "timm", "trainer", "torchvision"} <= set(found)
    json.dumps(found)
