"""The command that trains with what a range test has found."""

from __future__ import annotations

import shlex

from trainer.ablation.cells import text_of
from trainer.lr_finder.ramp import Scalar
from trainer.recipe import tree
from trainer.recipe.overrides import overrides_of
from trainer.recipe.schema import Recipe
from trainer.runs.job import Job


def train_command(job: Job, recipe: Recipe, scalar: Scalar, value: float) -> str:
    """`make recipe=... set="... lr.peak=..."`: the user's own items, but for those that this replaces."""
    given = {"recipe": job.recipe, "model": job.model, "data": job.data}
    given |= {"data_dir": str(job.data_dir)} if job.data_dir else {}
    words = [f"{name}={shlex.quote(text)}" for name, text in given.items()]
    items = _with_ends(recipe, scalar, float(f"{value:.3g}"))
    ours = {
        label: each if isinstance(each, int) else float(f"{each:.3g}")
        for label, each in items.items()
    }
    theirs = {
        label: each for label, each in overrides_of(job.overrides).items() if label not in ours
    }
    text = text_of(theirs | ours)
    is_plain = not set(text) & set('"\\$`')
    return " ".join(["make", *words, f'set="{text}"' if is_plain else f"set={shlex.quote(text)}"])


def _with_ends(recipe: Recipe, scalar: Scalar, value: float) -> dict[str, float | int]:
    """The value and, where a warm-up would now start above it or a schedule end there, those in proportion."""
    given = scalar.override(value)
    if not scalar.is_rate:
        return given
    lr, ends = recipe.lr, {}
    if (lr.warmup_from or 0) > value:
        ends["lr.warmup_from"] = lr.warmup_from * value / lr.peak
    if lr.schedule.end_rate() > value:
        ends |= tree.changed("lr.schedule", lr.schedule, lr.schedule.scaled_by(value / lr.peak))
    return given | ends
