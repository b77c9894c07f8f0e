"""What is recorded of a run: its row, and what trackers are told of it before its first step."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.base import provenance
from trainer.base.errors import UserError
from trainer.base.memory import peak_mem_mib, reserved_mem_mib
from trainer.base.settings import Settings
from trainer.engine.micro_batches import norm_images_used
from trainer.models.build import gmacs, num_parameters
from trainer.models.weights import weights_path
from trainer.recipe import tree
from trainer.recipe.overrides import Deviation
from trainer.recipe.plan import Plan
from trainer.recipe.tree import shown
from trainer.runs.expected import whole_curve
from trainer.runs.loggers.tracker import About
from trainer.runs.results import Row, RowDeviation, SizeScore, read_row_file

if TYPE_CHECKING:
    from trainer.runs.job import Job


def make_row(
    name: str, plan: Plan, settings: Settings, data, outcome, weights_sha256: str | None
) -> Row:
    """The row of an outcome."""
    state = outcome.state
    program = provenance.running_program()
    return Row(
        run=name,
        **_what_ran(plan, data),
        deviations=(
            *deviation_rows(plan),
            *deviation_of_memory(state),
            *deviation_of_data(data),
            *deviation_of_head(state),
        ),
        status=outcome.status,
        **_scores(plan, data, outcome),
        **_costs(plan, settings, state),
        **_machine(plan, settings, data, state.progress),
        weights_sha256=weights_sha256,
        commit=program.commit,
        dirty=program.dirty,
        finished_utc=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _what_ran(plan: Plan, data) -> dict[str, Any]:
    """Of a row: the recipe, the model, the images and the seed."""
    recipe = plan.recipe
    return {
        "recipe": recipe.name,
        "version": recipe.version,
        "digest": plan.page_digest,
        "model": plan.model,
        "data": plan.profile.name,
        "data_fingerprint": data.fingerprint,
        "content_sha256": data.content_sha256,
        "ignored_files": data.ignored,
        "split": data.split,
        "seed": plan.seed,
        "resolved_recipe": tree.plain(recipe),
        "teacher": recipe.distill and recipe.distill.teacher,
        "teacher_sha256": recipe.distill and recipe.distill.sha256,
        "bad_images": plan.bad_images,
        "plugins": dict(plan.plugins),
        "task": recipe.of_task.name,
        "num_val_images": plan.profile.num_val,
        "epochs": recipe.epochs,
        "batch_images": recipe.batch.images,
        "norm_images": recipe.batch.norm_images,
    }


def _scores(plan: Plan, data, outcome) -> dict[str, Any]:
    """Of a row: the last evaluation, which a diverged run has not, and those before it."""
    state, is_counted = outcome.state, plan.recipe.of_task.is_counted
    progress = state.progress
    records = progress.scores if outcome.status == "finished" else {}
    found = {which: state.task.restored(record) for which, record in records.items()}
    scores = found.pop(state.scored, None)
    other = next(iter(found.values()), None)
    percentages = scores.percentages() if scores else {}
    majority_pct = state.task.majority_pct(data.train, data.val)
    by_epoch = whole_curve(outcome.run.curve, progress.step // plan.steps_per_epoch)
    return {
        "scored": state.scored,
        "top1_pct": percentages.get("top1_pct"),
        "top5_pct": percentages.get("top5_pct"),
        "scores_pct": {key: one for key, one in percentages.items() if key not in Row.model_fields},
        "class_pct": dict(zip(data.classes, scores.of_classes() if scores else (), strict=False)),
        "loss_nats": scores.loss_nats if scores else None,
        "other_top1_pct": other.main_pct if other else None,
        "num_top1_by_epoch": tuple(round(one * plan.profile.num_val / 100) for one in by_epoch)
        if is_counted
        else (),
        "score_by_epoch_pct": () if is_counted else by_epoch,
        "majority_pct": None if majority_pct is None else round(majority_pct, 4),
    }


def _costs(plan: Plan, settings: Settings, state) -> dict[str, Any]:
    """Of a row: size, time and memory."""
    shown_px, _ = plan.recipe.of_task.evaluation_px(plan.recipe.image)
    progress, sizes = state.progress, (plan.profile.channels, shown_px)
    return {
        "steps": progress.step,
        "num_params": num_parameters(state.model),
        "gmacs": round(gmacs(state.model, *sizes), 6),
        "images_per_s": round(progress.num_seen / progress.train_s, 2) if progress.train_s else 0.0,
        "train_s": round(progress.train_s, 2),
        "compile_s": round(progress.compile_s, 2),
        "peak_mem_mib": round(peak_mem_mib(settings), 1),
        "reserved_mem_mib": reserved_mem_mib(settings),
    }


def _machine(plan: Plan, settings: Settings, data, progress) -> dict[str, Any]:
    """Of a row: where and on what it ran, and what went otherwise than asked."""
    return {
        "num_replaced_images": progress.num_replaced,
        "precision": settings.precision,
        "loader": data.loader_name(settings),
        "eval_batch": settings.eval_images,
        "num_workers": settings.num_workers,
        "num_threads": settings.num_threads,
        "world_size": plan.world_size,
        "numa": settings.numa,
        "bitwise": settings.is_bitwise and not progress.changes,
        "changes": tuple(progress.changes),
        "injected": tuple(progress.injected),
        "stop_if": settings.stop_if,
        "activation_checkpointing": settings.activation_checkpointing,
        "compiled": settings.compile,
        "compile_mode": settings.compile_mode,
        "cuda_graphs": settings.cuda_graphs,
        "half_group_norm": settings.half_group_norm,
        "device": provenance.device_name(settings.device),
        "versions": provenance.versions(),
    }


def deviation_rows(plan: Plan) -> tuple[RowDeviation, ...]:
    """The plan's deviations for reading: values as in YAML, "off" where absent; what a profile
    worked out is rounded.
    """
    return tuple(map(_deviation_row, plan.deviations))


def _deviation_row(change: Deviation) -> RowDeviation:
    before, after = shown(change.before), shown(change.after, exact=change.origin != "profile")
    if before == after:
        before, after = shown(change.before, exact=True), shown(change.after, exact=True)
    return RowDeviation(path=change.path, before=before, after=after, origin=change.origin)


def deviation_of_memory(state) -> tuple[RowDeviation, ...]:
    """Of a row: norms sampled fewer images than the recipe says, as memory had run out under
    micro_batch=auto.
    """
    asked, used = state.plan.recipe.batch.norm_images, norm_images_used(state)
    if used == asked:
        return ()
    return (
        RowDeviation(path="batch.norm_images", before=str(asked), after=str(used), origin="memory"),
    )


def deviation_of_data(data) -> tuple[RowDeviation, ...]:
    """Of a row: images were not read as they are in their files, but as a .beton has them."""
    if not data.changes:
        return ()
    return (RowDeviation(path="data", before="as its files", after=data.changes, origin="data"),)


def deviation_of_head(state) -> tuple[RowDeviation, ...]:
    """Of a row: pretrained weights had no classifier of this shape, so it started anew."""
    section = state.plan.recipe.model
    pretrained = section and section.pretrained
    is_timms = state.plan.recipe.of_task.is_timms  # else there is no classifier to be loaded
    if not pretrained or pretrained.head == "new" or state.is_head_loaded or not is_timms:
        return ()
    path = "model.pretrained.head"
    return (RowDeviation(path=path, before="kept", after="new", origin="weights"),)


def size_scores(state) -> tuple[SizeScore, ...]:
    """Of a row: the scores at the image sizes of test_px=, the smallest first."""
    return tuple(
        SizeScore(
            test_px=px,
            top1_pct=scores.top1_pct,
            top5_pct=scores.top5_pct,
            loss_nats=scores.loss_nats if math.isfinite(scores.loss_nats) else None,
        )
        for px, scores in sorted(state.size_scores.items())
    )


def parent_of(plan: Plan) -> dict[str, str | None]:
    """The run whose weights a plan starts from, as its row names it, with the digest of its last
    ones if they are those, and the run that its teacher is of; empty where they are no run's.
    """
    pretrained, distill = plan.recipe.model and plan.recipe.model.pretrained, plan.recipe.distill
    found: dict[str, str | None] = {}
    if pretrained and (run := _run_of(pretrained.file)):
        row, is_last = run
        found |= {"parent": row.run, "parent_sha256": row.weights_sha256 if is_last else None}
    if distill and (run := _run_of(distill.weights)):
        found["teacher_run"] = run[0].run
    return found


def _run_of(weights: str | None) -> tuple[Row, bool] | None:
    """The row of the run that weights are of, and whether they are its last ones, not those of its
    best epoch; None where they are no run's, or it is not there any more.
    """
    if weights is None:
        return None
    path = weights_path(weights)
    try:
        return read_row_file(path.parent / "row.json"), path.name == "model.safetensors"
    except UserError:
        return None


def about_run(folder: Path, job: Job, plan: Plan, settings: Settings, data) -> About:
    """What trackers are told of a run before its first step."""
    deviations: dict[str, str] = {}
    for change in deviation_rows(plan):
        before = f"{deviations[change.path]}; " if change.path in deviations else ""
        deviations[change.path] = f"{before}{change.before} -> {change.after} ({change.origin})"
    program = provenance.running_program()
    config = {
        "recipe": tree.plain(plan.recipe),
        "digest": plan.page_digest,
        "deviations": deviations,
        "model": plan.model,
        "seed": plan.seed,
        "data": {
            "name": plan.profile.name,
            "fingerprint": data.fingerprint,
            "content_sha256": data.content_sha256,
            "split": data.split,
        },
        "machine": {
            "device": provenance.device_name(settings.device),
            "precision": settings.precision,
            "loader": data.loader_name(settings),
            "world_size": plan.world_size,
        },
        "versions": provenance.versions() | {"commit": program.commit},
    }
    files = ("recipe.yaml", "plan.json")
    return About(folder.name, str(folder.resolve()), files, config, job.ablation, job.cell)
