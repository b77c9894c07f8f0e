"""What a run left, read back: its recipe, its plan, its trained model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from trainer.base.disk import must_write, open_regular
from trainer.base.errors import ConfigError, did_you_mean
from trainer.base.json_text import json_file
from trainer.base.names import check_links, inside
from trainer.models.build import assembled, check_model_name
from trainer.recipe import tree
from trainer.recipe.check import check
from trainer.recipe.plan import Plan, PlanError, make_plan
from trainer.recipe.profiles import Profile
from trainer.recipe.schema import Recipe, load_recipe
from trainer.runs.checkpoint import remove_unfinished
from trainer.runs.lock import Lock, acquire

_FACTS = {
    "model": str,
    "data": str,
    "data_dir": (str, type(None)),
    "profile": dict,
    "seed": int,
    "bad_images": str,
}


def own_folder(folder: Path, check: Callable[[], None] = lambda: None) -> Lock:
    """This process's lock on a run's folder, free of what a killed one left half written.

    check: called while another machine's lock is waited for; what it raises ends the wait.

    Raises what acquire, inside, check_links and must_write do.
    """
    inside(folder.parent, folder.name, "run")
    check_links(folder)
    with must_write(folder):
        own = acquire(folder, check=check)
        remove_unfinished(folder)
        return own


def find_run_folder(run: str, runs: Path) -> Path:
    """The folder of a run, by its name or as a path.

    Raises PlanError where it is no run folder, FolderError for a name that leads out of the runs.
    """
    if run and os.path.isfile(Path(run) / "plan.json"):
        return Path(run)
    folder = inside(runs, run, "run")
    if not os.path.isfile(folder / "plan.json"):
        known = sorted(path.parent.name for path in runs.glob("*/plan.json"))
        near = did_you_mean(run, known[-1000:]) or f"; use one of the {len(known)} in {runs}"
        raise PlanError(f"run={run}: not a run folder: there is no {folder / 'plan.json'}{near}")
    return folder


def recipe_of(folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """The resolved recipe and the facts of plan.json of a run folder.

    Raises PlanError where it is not a run folder, ConfigError for what is wrong in its recipe.
    """
    try:
        facts = json_file(folder / "plan.json")
        wrong = [name for name, kind in _FACTS.items() if not isinstance(facts[name], kind)]
        if wrong:
            raise ValueError(wrong[0])
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "there is no plan.json" if isinstance(error, OSError) else "its plan.json is damaged"
        raise PlanError(
            f"{folder}: not a run folder: {what}; use the name of a folder under runs/"
        ) from None
    return load_recipe(folder / "recipe.yaml"), facts


def plan_of_run(folder: Path) -> Plan:
    """The plan that a run folder was made by, as far as a model and its images depend on it.

    Raises PlanError where it is not a run folder.
    """
    recipe, facts = recipe_of(folder)
    try:
        profile = check(Profile, tree.from_json(facts["profile"]))
    except ConfigError as error:
        raise PlanError(
            f"{folder / 'plan.json'}: profile: {error}; put the file back as the run wrote it"
        ) from None
    check_model_name(facts["model"])
    return make_plan(
        recipe,
        model=facts["model"],
        profile=profile,
        seed=facts["seed"],
        bad_images=facts["bad_images"],
        plugins=facts.get("plugins"),
    )


def exported_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The exported weights of a run. Raises UnfitFile for what is no file, whatever safetensors
    does for one that holds no weights.
    """
    path = folder / "model.safetensors"
    with open_regular(path):  # safetensors would wait for a pipe
        return safetensors.torch.load_file(path)


def open_model(folder: Path | str) -> nn.Module:
    """The trained model of a finished run, whatever its recipe changed in it: on the CPU, in
    evaluation mode.

    Raises PlanError where the folder holds no finished run.
    """
    folder = Path(folder)
    plan = plan_of_run(folder)
    if not (folder / "config.json").exists():
        raise PlanError(
            f"{folder}: the run has not finished; rerun the command that started it to resume"
        )
    with torch.random.fork_rng(devices=[]):  # the first weights are drawn, and at once written over
        model = plan.recipe.of_task.model_of(plan, assembled(plan)[0])
    try:
        model.load_state_dict(exported_weights(folder))
    except (
        Exception
    ) as error:  # whatever a reader raises over anybody's bytes, or weights of another model
        reason = " ".join(str(error).split())[:200]
        raise PlanError(
            f"{folder / 'model.safetensors'}: not the weights of this run ({reason}); put the file"
            " back as it was"
        ) from None
    return model.eval()
