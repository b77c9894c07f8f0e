"""Scoring the exported model of a finished run again, from its folder alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from trainer.base.settings import Settings
from trainer.data.dataset import OpenedData, open_data
from trainer.data.profile import data_folder
from trainer.engine.evaluate import evaluate
from trainer.engine.state import algorithms_kept, set_algorithms
from trainer.recipe.plan import PlanError
from trainer.runs.export import weights_digest
from trainer.runs.results import Row, read_row_file
from trainer.runs.run_folder import open_model, plan_of_run, recipe_of
from trainer.tasks import Scores


def most_moved(row: Row, settings: Settings) -> int:
    """Images by which a score found with these settings may differ from the row's.

    None where a CPU adds up in float32 what a CPU has added up so. Elsewhere, on a GPU, in another
    precision, or of a run that was compiled or went on elsewhere, sums come in another order: one
    in a thousand, at least one.
    """
    is_repeated = (
        row.bitwise
        and not row.compiled
        and settings.device == "cpu"
        and row.precision == settings.precision == "float32"
    )
    return 0 if is_repeated else max(1, row.num_val_images // 1000)


def images_off(row: Row, scores: Scores) -> int:
    """By how many images of the row's a score differs from its own, at least; of one that is no
    share of images, as many as would make that share.
    """
    points = abs(scores.main_pct - row.main_pct) if row.main_pct is not None else 100.0
    return math.ceil(points * row.num_val_images / 100 - 1e-6)


def rescore(folder: Path, settings: Settings, data_dir: Path | None) -> tuple[Row, Scores, str]:
    """The row of a run folder, and of its exported weights the scores on the validation images of
    now and the digest.

    Raises PlanError where the folder holds no finished run, DataError where its images are not
    found.
    """
    if not (folder / "row.json").exists():
        raise PlanError(
            f"{folder}: the run has not finished; rerun the command that started it to resume"
        )
    row = read_row_file(folder / "row.json")
    plan, settings = plan_of_run(folder), replace(settings, eval_images=row.eval_batch)
    memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
    model = open_model(folder)
    digest = weights_digest(model)
    model = model.to(settings.device, memory_format=memory_format)
    data = data_of_run(folder, row, data_dir)
    plan = plan.with_counts(data.train)
    with algorithms_kept():
        set_algorithms(settings)
        return row, evaluate(plan, settings, model, data.val_batches(plan, settings)), digest


def data_of_run(folder: Path, row: Row, data_dir: Path | None) -> OpenedData:
    """The images of now that a finished run was trained on. Raises DataError where there are
    none.
    """
    _, facts = recipe_of(folder)
    where = data_dir or facts["data_dir"]
    return open_data(
        plan_of_run(folder).profile,
        data_folder(facts["data"], Path(where) if where else None),
        in_beton=row.loader == "ffcv",
    )
