"""What stands above a run."""

import dataclasses
import io
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from rich.console import Console

from support.rows import ROW
from trainer.base.settings import make_settings
from trainer.data.profile import majority_pct
from trainer.models.trained import given_weights
from trainer.runs import summary
from trainer.runs.job import Job, plan_of
from trainer.runs.plan_notes import busy_note, few_steps_note, scaling_note, warmup_note
from trainer.tasks import task_of

PRETRAINED = f"epochs=1 model.pretrained={{file: a.safetensors, sha256: {'a' * 64}}}"


def above(precision, recipe, data="imagenet-1k"):
    out = Console(file=io.StringIO(), width=200)
    settings = dataclasses.replace(make_settings("cpu", workers="0"), precision=precision)
    summary.plan_in_brief(out, plan_of(Job(recipe, "resnet50", data)), settings)
    return out.file.getvalue()


@pytest.mark.parametrize(
    ("recipe", "precision", "source"),
    [
        ("A2", "bf16", "fp16"),
        ("A2", "fp16", None),
        ("torchvision-v2", "bf16", "float32"),
        ("torchvision-v2", "float32", None),
        ("nvidia-v15-90", "float32", None),  # scored in several
        ("bcn", "bf16", None),  # no score
    ],
)
def test_a_precision_other_than_the_scores_is_noted(recipe, precision, source):
    notes = [line for line in above(precision, recipe).splitlines() if "note: precision" in line]
    assert len(notes) == (source is not None)
    assert all(precision in line and source in line for line in notes)


def test_other_data_than_the_scores_have_no_such_note():
    assert "note: precision" not in above("float32", "A2", "digits")


@pytest.mark.parametrize(
    ("recipe", "data", "overrides", "is_noted"),
    [
        ("A3", "digits", "", False),
        ("A3", "digits", "epochs=1", True),
        ("A1", "digits", "epochs=1", True),
        ("A1", "digits", "epochs=2", False),
        ("A1", "imagenet-1k", "epochs=1 lr.warmup_epochs=1", False),  # 625 steps at 1e-4: 12.5
        ("A1", "imagenet-1k", "epochs=1 lr.warmup_epochs=1 lr.warmup_from=1e-6", True),
        ("A1", "imagenet-1k", "", False),
        ("A3", "digits", PRETRAINED, False),
    ],
)
def test_a_run_too_short_to_learn_says_what_score_to_expect(recipe, data, overrides, is_noted):
    out = Console(file=io.StringIO(), width=300)
    plan = plan_of(Job(recipe, "resnet18", data, overrides=overrides))
    summary.plan_in_brief(out, plan, make_settings("cpu", workers="0"))
    lines = [line for line in out.file.getvalue().splitlines() if "chance" in line]
    assert len(lines) == is_noted
    assert all(f"1 of {plan.profile.num_classes:,} " in line for line in lines)
    assert all(f"{plan.num_steps} steps" in line for line in lines)


def test_a_finished_run_names_the_command_that_shows_its_curves(tmp_path):
    out = Console(file=io.StringIO(), width=300)
    settings = dataclasses.replace(make_settings("cpu", workers="0"), runs=tmp_path / "my runs")
    summary.row(out, ROW, settings, plan_of(Job("A2", "resnet50", "imagenet-1k")))
    line = next(line for line in out.file.getvalue().splitlines() if line.startswith("curves"))
    program, *words = shlex.split(line)[1:]
    assert words[-2:] == ["--logdir", str(tmp_path / "my runs")] and Path(program).exists()


def test_a_tag_that_means_weights_in_timm_is_said_to_load_none():
    def said(model: str, overrides: str = "") -> str:
        out = Console(file=io.StringIO(), width=300)
        summary.plan_in_brief(
            out,
            plan_of(Job("A3", model, overrides=overrides)),
            make_settings("cpu", workers="0"),
        )
        return out.file.getvalue()

    assert "a1_in1k" in said("resnet18.a1_in1k") and "random" in said("resnet18.a1_in1k")
    assert "weights=timm:resnet18.a1_in1k" in said("resnet18.a1_in1k")
    assert "random weights" not in said("resnet18")


@pytest.mark.parametrize(("num_classes", "shows_top5"), [(5, False), (6, True)])
def test_the_result_has_the_majority_class_and_top_5_only_where_it_says_something(
    num_classes, shows_top5
):
    out = Console(file=io.StringIO(), width=300)
    plan = plan_of(Job("A3", "resnet18"))
    profile = plan.profile.model_copy(update={"num_classes": num_classes})
    row = ROW.model_copy(update={"majority_pct": 31.25})
    settings = make_settings("cpu", workers="0")
    summary.row(out, row, settings, dataclasses.replace(plan, profile=profile))
    assert "majority class 31.2" in out.file.getvalue()
    assert ("top-5" in out.file.getvalue()) == shows_top5


@pytest.mark.parametrize(("majority_pct", "is_noted"), [(31.2, False), (32.0, True), (40.0, True)])
def test_a_run_that_is_no_better_than_one_answer_for_all_is_noted(majority_pct, is_noted):
    out = Console(file=io.StringIO(), width=300)
    row = ROW.model_copy(update={"majority_pct": majority_pct, "top1_pct": 32.0})
    summary.row(out, row, make_settings("cpu", workers="0"), plan_of(Job("A3", "resnet18")))
    assert ("note:" in out.file.getvalue()) == is_noted


@pytest.mark.parametrize(
    ("overrides", "has_weights", "is_noted"),
    [("epochs=1", True, True), ("epochs=1", False, True), ("epochs=9", True, False)],
)
def test_a_run_too_short_to_learn_is_noted_from_weights_too(
    tmp_path, overrides, has_weights, is_noted
):
    path = tmp_path / "test_resnet.pth"
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), path)
    given = given_weights(str(path), "test_resnet", tmp_path) if has_weights else None
    words = f"batch.images=128 batch.norm_images=128 {overrides}"
    out = Console(file=io.StringIO(), width=300)
    asked = Job("finetune-sgd", "test_resnet", overrides=words, weights=given)
    few_steps_note(out, plan_of(asked))
    assert bool(out.file.getvalue()) == is_noted


@pytest.mark.parametrize(
    ("overrides", "is_noted"),
    [("epochs=6", True), ("epochs=6 lr.warmup_epochs=1", False), ("epochs=20", False), ("", False)],
)
def test_a_shorter_run_that_is_mostly_warm_up_is_noted_with_what_shortens_it(overrides, is_noted):
    job = Job("A3", "resnet18", data="imagenet-1k", overrides=overrides)
    out = Console(file=io.StringIO(), width=300)
    warmup_note(out, plan_of(job))
    said = out.file.getvalue()
    assert bool(said) == is_noted
    if is_noted:  # what it says can be typed, and is enough
        mended = dataclasses.replace(job, overrides=said.partition('set="')[2].partition('"')[0])
        plan = plan_of(mended)
        assert plan.recipe.epochs == 6 and 0 < plan.num_warmup_steps < plan.num_steps / 3


@pytest.mark.parametrize(("load", "is_noted"), [(None, False), (0.2, False), (2.0, True)])
def test_a_busy_machine_is_noted(load, is_noted):
    out = Console(file=io.StringIO(), width=300)
    busy_note(out, load)
    assert bool(out.file.getvalue()) == is_noted


def test_the_majority_class_is_trainings_scored_on_val():
    train, val = np.array([0, 1, 1, 2]), np.array([0, 0, 0, 1, 2])
    assert majority_pct(train, val) == 20


@pytest.mark.parametrize(("num_classes", "shows_top5"), [(5, False), (6, True)])
def test_a_score_found_again_has_top_5_only_where_it_says_something(num_classes, shows_top5):
    out = Console(file=io.StringIO(), width=300)
    plan, settings = plan_of(Job("A3", "resnet18")), make_settings("cpu", workers="0")
    profile = plan.profile.model_copy(update={"num_classes": num_classes})
    task = task_of(dataclasses.replace(plan, profile=profile), settings)
    scores = task.scores((90.0, 100.0, 1.0), 100)
    row = ROW.model_copy(update={"top1_pct": 90.0, "num_val_images": 100})
    assert summary.rescored(out, row, scores, row.weights_sha256, settings)
    assert out.file.getvalue().count("top-1") == 2
    assert out.file.getvalue().count("top-5") == 2 * shows_top5


@pytest.mark.parametrize(
    ("overrides", "is_noted"),
    [("", True), ("lr.peak=1e-3", False), ("batch.images=64", True)],
)
def test_a_rate_that_was_made_for_another_batch_is_noted(overrides, is_noted):
    """A profile's batch too: A3 has no rule, and 0.008 is for 2,048 images."""
    out = Console(file=io.StringIO(), width=200)
    job = Job("A3", "resnet18", overrides=overrides)
    scaling_note(out, plan_of(job))
    text = out.file.getvalue()
    assert bool(text) == is_noted and ("2,048" in text and "lr-find" in text) == is_noted
