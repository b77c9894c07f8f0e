"""What the commands about recipes do: plan, explain, diff, recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from trainer.cli.plan_ablation import print_plan
from trainer.cli.plan_estimate import planned_settings, print_estimate
from trainer.data.profile import (
    check_counts,
    data_folder,
    find_profile,
    folder_majority_pct,
    ignored_files,
    val_stand_in,
)
from trainer.distributed.launch import asked_ranks
from trainer.models.build import assemble
from trainer.models.edit.replacement import Replacement
from trainer.models.trained import given_weights
from trainer.recipe.explain import diff_rows, diff_table, explain_rows, explain_table
from trainer.recipe.plan import make_plan
from trainer.recipe.profiles import PROFILES
from trainer.recipe.schema import from_random_weights, load_recipe
from trainer.recipe.shipped import find_recipe
from trainer.runs import summary
from trainer.runs.job import Job, plan_of, resolve
from trainer.tasks.teacher import open_teacher
from trainer.tools.matrix import untested_family

__all__ = ["Job", "diff", "explain", "given_weights", "plan", "plan_ablation"]


def plan(
    job: Job, gpus: int | None, procs: int | None, device: str, precision: str, results: Path
) -> None:
    """Print the plan of a run, shared by so many ranks, and what it will take. Raises UserError
    where they cannot.
    """
    job = dataclasses.replace(job, world_size=asked_ranks(gpus, procs, device, None))
    on_gpus = gpus is not None or (device == "cuda" and not torch.cuda.is_available())
    settings = planned_settings("cpu" if procs is not None else device, precision, on_gpus)
    folder = data_folder(job.data, job.data_dir)
    if job.data_dir is not None:
        check_counts(find_profile(job.data, folder), folder)
    planned, out = plan_of(job), summary.console()
    model, replacements = assemble(planned)
    teacher = open_teacher(planned)
    summary.plan_in_full(out, planned, model, replacements, teacher)
    if family := untested_family(job.model):
        line = f"note: untested here: results/matrix.md has no model of timm's {family}"
        out.print(line, style="yellow", markup=False, soft_wrap=True)
    counted_pct = folder_majority_pct(folder)
    summary.majority_line(out, planned.profile.majority_pct if folder is None else counted_pct)
    summary.ignored_lines(out, ignored_files(folder))
    summary.stand_in_line(out, val_stand_in(folder))
    print_estimate(out, planned, settings, results, model, job, teacher)


def plan_ablation(
    name: str, data_dir: Path | None, machine: Mapping[str, Any], results: Path, num_measured: int
) -> None:
    """Print the plan of an ablation. num_measured: steps to time for its estimate, 0 for none."""
    print_plan(summary.console(), name, data_dir, machine, results, num_measured)


def explain(job: Job, with_off: bool) -> None:
    """Print every value of a recipe with its origin. job: its data may be empty: no profile."""
    profile = find_profile(job.data, job.data_dir) if job.data else None
    written, positions, resolved, deviations = resolve(job, profile)
    replacements: tuple[Replacement, ...] = ()
    if resolved.model:
        # module replacement does not depend on the number of classes or images: without a data set,
        # ImageNet's profile
        profile = profile or PROFILES["imagenet-1k"]
        replacements = summary.module_replacements(
            make_plan(from_random_weights(resolved), model=job.model, profile=profile)
        )
    rows = explain_rows(written, positions, resolved, job.model, deviations, with_off=with_off)
    title = f"{written.name}.v{written.version} for {job.model}: {written.source}"
    out = summary.console()
    out.print(explain_table(rows, title))
    summary.off_note(out, rows)
    for sentence in written.unconfirmed:
        out.print(Text(f"not confirmed: {sentence}"))
    summary.replaced_lines(out, resolved, replacements)


def diff(a: str, b: str) -> None:
    """Print the values in which two recipes, given by name or path, differ."""
    first, second = (load_recipe(find_recipe(name)) for name in (a, b))
    titles = (f"{recipe.name}.v{recipe.version}" for recipe in (first, second))
    summary.console().print(diff_table(diff_rows(first, second), *titles))
