"""What a run left, read back: its page, its plan, its trained model."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from trainer.models import assembled
from trainer.plan import Plan, PlanError, make_plan
from trainer.profiles import Profile
from trainer.recipe import Recipe, load_recipe


def recipe_of(folder: Path) -> tuple[Recipe, dict]:
    """The resolved page and the facts of plan.json of a run folder.

    Raises PlanError where it is not a run folder.
    """
    try:
        facts = json.loads((folder / "plan.json").read_text())
    except (OSError, ValueError) as error:
        what = "there is no plan.json" if isinstance(error, OSError) else "its plan.json is damaged"
        raise PlanError(f"{folder}: not a run folder: {what}; the name of a folder under runs/ would do") from None
    return load_recipe(folder / "recipe.yaml"), facts


def plan_of_run(folder: Path) -> Plan:
    """The plan that a run folder was made by, as far as a model and its images depend on it.

    Raises PlanError where it is not a run folder.
    """
    recipe, facts = recipe_of(folder)
    profile = Profile.model_validate_json(json.dumps(facts["profile"]))
    return make_plan(recipe, model=facts["model"], profile=profile, seed=facts["seed"])


def open_model(folder: Path | str) -> nn.Module:
    """The trained model of a finished run, whatever its page changed in it: on the CPU, in evaluation mode.

    Raises PlanError where the folder holds no finished run.
    """
    folder = Path(folder)
    plan = plan_of_run(folder)
    if not (folder / "config.json").exists():
        raise PlanError(f"{folder}: the run has not finished; the command that started it goes on with it")
    with torch.random.fork_rng(devices=[]):  # the first weights are drawn, and at once written over
        model, _ = assembled(plan)
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    return model.eval()
