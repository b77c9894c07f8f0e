"""What the command recipes prints of one model: every recipe with a published score of it."""

from __future__ import annotations

import torch
from rich.table import Table

from trainer.base.commands import command
from trainer.base.terminal import open_terminal
from trainer.cli.recipe_list import AGAIN_ON
from trainer.models.build import assembled, gmacs
from trainer.recipe.plan import Plan, make_plan
from trainer.recipe.profiles import PROFILES
from trainer.recipe.published import Published, measured_again, newest_path, scores_of_model
from trainer.recipe.schema import Recipe, from_random_weights, load_recipe

_WIDE, _MEDIUM = 140, 110  # columns of a terminal that has room for all, and for timm's scores
_NOTES = (  # {0}: the command explain
    "top-1 %: as the recipe's source states it, px: of its training and test images. MACs: epochs x"
    " images x the model's multiply-adds, forward. timm and what is beyond: what timm measures of"
    " the public weights, the other sets at the smaller size. *: it changes the model ({0})."
)


def list_recipes_of(model: str) -> None:
    """One line for each recipe with a published score of a model, the best first, with what a run
    of it costs.

    Raises UserError where there is none.
    """
    out = open_terminal()
    counted: dict[str, float] = {}
    rows = []
    for score in scores_of_model(model):
        recipe = load_recipe(newest_path(score.recipe)).for_model(score.model)
        cost = multiply_adds(recipe, score.model, score.dataset, counted)
        rows.append(_own_cells(score, recipe, cost) | _cells_again(score.weights))
    names = ["recipe", "top-1 %", "epochs", "px", "MACs"]
    names += ["GPU hours", "timm"] if out.width >= _MEDIUM else []
    names += AGAIN_ON.values() if out.width >= _WIDE else []
    table = Table(*names)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.no_wrap, column.justify = True, "right"
    for row in rows:
        table.add_row(*(row.get(name, "") for name in names))
    out.print(table)
    out.print(_NOTES.format(command("explain", recipe="...", model=model)), markup=False)


def _own_cells(score: Published, recipe: Recipe, cost: float) -> dict[str, str]:
    name = f"{recipe.name}.v{recipe.version}"
    if recipe.model and recipe.model.pretrained:
        name += " (from weights)"
    if recipe.model and not recipe.model.is_plain:
        name += " *"
    top1 = f"{score.top1_pct:g}" + (f" ± {score.std_pct:g}" if score.std_pct is not None else "")
    if score.dataset != "imagenet-1k":
        top1 += f" {score.dataset}"
    return {
        "recipe": name,
        "top-1 %": top1,
        "epochs": f"{recipe.epochs}",
        "px": f"{recipe.image.train_px}/{recipe.image.test_px}",
        "MACs": f"{cost:.2e}".replace("e+", "e"),
        "GPU hours": "" if score.gpu_hours is None else f"{score.gpu_hours:g} {score.gpu}",
    }


def _cells_again(weights: str) -> dict[str, str]:
    """What timm measures: on ImageNet-1k a line for each size, on the others at the smallest."""
    again = measured_again(weights) if weights else []
    own = [one for one in again if one.dataset == "imagenet-1k"]
    least = min((one.test_px or 0 for one in own), default=0)
    others = {one.dataset: f"{one.top1_pct:.1f}" for one in again if one.test_px == least}
    return {"timm": "\n".join(f"{one.top1_pct:.2f} at {one.test_px}" for one in own)} | {
        name: others.get(dataset, "") for dataset, name in AGAIN_ON.items()
    }


def multiply_adds(
    recipe: Recipe, model: str, dataset: str, counted: dict[str, float] | None = None
) -> float:
    """Of the forward passes of a whole run: epochs times images times the model's. Images that grow
    count by their area.

    counted: of models that were counted before, by what they are.
    """
    plan = make_plan(from_random_weights(recipe), model=model, profile=PROFILES[dataset])
    train_px = recipe.image.train_px
    firsts = (epoch * plan.steps_per_epoch for epoch in range(recipe.epochs))
    epochs = sum((plan.train_px_at(step) / train_px) ** 2 for step in firsts)
    counted = {} if counted is None else counted
    section = plan.recipe.model.model_dump_json() if plan.recipe.model else ""
    key = f"{model} {dataset} {train_px} {section}"
    if key not in counted:
        counted[key] = _gmacs(plan) * 1e9
    return epochs * plan.draws_per_epoch * (recipe.augment_splits or 1) * counted[key]


def _gmacs(plan: Plan) -> float:
    """Billions of multiply-adds of one training image, of the model as the recipe changes it."""
    section = plan.recipe.model
    if section is None or (section.is_plain and section.layer_scale is None):
        with torch.device("meta"):
            model, _ = assembled(plan)
    else:  # parts are put where a forward pass finds them
        with torch.random.fork_rng(devices=[]):
            model, _ = assembled(plan)
    return gmacs(model, plan.profile.channels, plan.recipe.image.train_px)
