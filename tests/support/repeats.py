"""Repeats of made-up cells, and rows that belong to them."""

import functools

from support.plans import small_set
from support.rows import ROW
from trainer.ablation.cell_run import Repeat, Shared
from trainer.runs.job import Job, plan_of
from trainer.runs.row import deviation_rows


@functools.cache
def repeat_of(smoothing: float, seed: int = 0, overrides: str = "", **job) -> Repeat:
    asked = Job(
        "A1",
        "test_resnet",
        seed=seed,
        overrides=small_set(f"smoothing={smoothing:g} {overrides}"),
        **job,
    )
    plan = plan_of(asked)
    return Repeat(plan.identity.key, f"{smoothing:g}", seed, asked, plan)


def row_of(repeat: Repeat, again: str = "", **facts):
    plan = repeat.plan
    identity = {
        "run": plan.run_name(ROW.data_fingerprint) + again, "recipe": plan.recipe.name,
        "version": plan.recipe.version, "digest": plan.page_digest, "model": plan.model,
        "data": plan.profile.name, "seed": plan.seed, "deviations": deviation_rows(plan),
    }  # fmt: skip
    return ROW.model_copy(update=identity | facts)


def shared_in(folder, **settings) -> Shared:
    return Shared(runs=folder / "runs", results=folder / "results", **{"device": "cpu", **settings})
