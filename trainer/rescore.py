"""Scoring the exported model of a finished run again, from its folder alone."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.data.opened import open_data
from trainer.evaluate import Scores, evaluate
from trainer.job import recipe_of
from trainer.plan import PlanError, make_plan
from trainer.profiles import Profile, data_folder
from trainer.results import Row, read_row_file
from trainer.settings import Settings


def rescore(folder: Path, settings: Settings, data_dir: Path | None) -> tuple[Row, Scores]:
    """The row of a run folder, and the scores of its exported weights on the validation images of now.

    Raises PlanError where the folder holds no finished run, DataError where its images are not found.
    """
    import timm
    import torch

    recipe, facts = recipe_of(folder)
    if not (folder / "row.json").exists() or not (folder / "config.json").exists():
        raise PlanError(f"{folder}: the run has not finished; the command that started it goes on with it")
    row = read_row_file(folder / "row.json")
    profile = Profile.model_validate_json(json.dumps(facts["profile"]))
    plan = make_plan(recipe, model=facts["model"], profile=profile, seed=facts["seed"])
    memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).to(settings.device, memory_format=memory_format)
    where = data_dir or facts["data_dir"]
    data = open_data(profile, data_folder(facts["data"], Path(where) if where else None))
    return row, evaluate(plan, settings, model, data.val_batches(plan, settings))


