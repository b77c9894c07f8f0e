"""The plan that a run folder keeps, `plan.json` and `recipe.yaml`, and what must still be so where
a run is resumed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.base.disk import write_atomically
from trainer.base.errors import DataError, PlanError
from trainer.base.json_text import json_file
from trainer.base.settings import Settings
from trainer.data.content import differ
from trainer.recipe.plan import Plan
from trainer.runs.row import deviation_rows

if TYPE_CHECKING:
    from trainer.runs.job import Job


def write_plan(
    folder: Path,
    job: Job,
    plan: Plan,
    content_sha256: str | None = None,
    settings: Settings | None = None,
) -> None:
    """Put the resolved recipe and the plan into the run folder. content_sha256: of the images.
    settings: of which lines its curves have; None as they are by default.
    """
    folder.mkdir(parents=True, exist_ok=True)
    epochs = range(plan.recipe.epochs)
    facts = {
        "model": plan.model,
        "data": job.data,
        "data_dir": str(Path(job.data_dir).resolve()) if job.data_dir else None,
        "profile": plan.profile.model_dump(mode="json"),
        "content_sha256": content_sha256,
        "seed": plan.seed,
        "bad_images": plan.bad_images,
        "page_digest": plan.page_digest,
        "recipe_digest": plan.recipe.digest,
        "plugins": dict(plan.plugins),
        "steps_per_epoch": plan.steps_per_epoch,
        "num_steps": plan.num_steps,
        "num_micro_batches": plan.num_micro_batches,
        "world_size": plan.world_size,
        **_lines_of(settings or Settings),
        "lr_at_epoch_starts": [plan.lr_at(epoch * plan.steps_per_epoch) for epoch in epochs],
        "deviations": [row.model_dump() for row in deviation_rows(plan)],
    }
    write_atomically(folder / "recipe.yaml", plan.recipe.to_yaml().encode())
    write_atomically(folder / "plan.json", (json.dumps(facts, indent=2) + "\n").encode())


def check_same_images(folder: Path, content_sha256: str | None) -> None:
    """Refuse to resume over images that were rewritten under the same names and sizes."""
    if not any((folder / "checkpoints").glob("step_*.pt")):
        return
    try:
        before = json_file(folder / "plan.json").get("content_sha256")
    except (OSError, ValueError, AttributeError):  # none, or damaged: then nothing is known
        return
    if differ(before, content_sha256):
        raise DataError(
            f"{folder}: was begun on other images, which had the same names and sizes",
            "restore the images, or remove that folder to start anew",
        )


def _lines_of(settings: Settings | type[Settings]) -> dict[str, int]:
    """What says at which steps the curves of a run have lines, as plan.json has it."""
    return {"log_every": settings.log_steps, "eval_every": settings.eval_every_epochs}


def check_same_lines(folder: Path, settings: Settings) -> None:
    """Refuse to resume with other lines in the curves than the run was begun with."""
    if not any((folder / "checkpoints").glob("step_*.pt")):
        return
    try:
        facts = json_file(folder / "plan.json")
        before = {key: facts.get(key, value) for key, value in _lines_of(Settings).items()}
    except (OSError, ValueError, AttributeError):  # none, or damaged: then nothing is known
        return
    if other := [name for name, value in _lines_of(settings).items() if before[name] != value]:
        words = " ".join(f"{name}={before[name]}" for name in other)
        remedy = f"use {words}, or remove that folder to start anew"
        raise PlanError(f"{folder}: was begun with {words}", remedy)
