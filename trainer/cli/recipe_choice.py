"""What the command recipes prints of one model: every recipe with a published score of it."""

from __future__ import annotations

import torch
from rich.table import Table

from trainer.base.terminal import open_terminal
from trainer.cli.recipe_list import AGAIN_ON
from trainer.models.build import assembled, gmacs
from trainer.recipe.plan import Plan, make_plan
from trainer.recipe.profiles import PROFILES
from trainer.recipe.published import Published, measured_again, newest_path, scores_of_model
from trainer.recipe.schema import Recipe, from_random_weights, load_recipe

_WIDE = 140  # columns of a terminal that has room for the other sets of images
_NOTES = (
    "Published scores are their sources' own; 224, 288 px, ReaL ... are timm's measurements of the"
    " public weights (make which weights=<name> has all). 1e18 multiply-adds: epochs x images of an"
    " epoch x those of the model, forward."
)


def list_recipes_of(model: str) -> None:
    """One line for each recipe with a published score of a model, the best first, with what a run
    of it costs.

    Raises UserError where there is none.
    """
    scores = scores_of_model(model)
    out = open_terminal()
    is_wide = out.width >= _WIDE
    names = ["recipe", "top-1 %", "epochs", "train px", "test px", "1e18 mult-adds", "GPU hours"]
    table = Table(*names, "timm", *(AGAIN_ON.values() if is_wide else ()))
    for column in table.columns[1:]:
        column.no_wrap, column.justify = True, "right"
    counted: dict[str, float] = {}
    for score in scores:
        recipe = load_recipe(newest_path(score.recipe)).for_model(score.model)
        cost = multiply_adds(recipe, score.model, score.dataset, counted)
        table.add_row(*_own_cells(score, recipe, cost), *_cells_again(score.weights, is_wide))
    out.print(table)
    out.print(_NOTES, markup=False)


def _own_cells(score: Published, recipe: Recipe, cost: float) -> tuple[str, ...]:
    name = f"{recipe.name}.v{recipe.version}"
    if recipe.model and recipe.model.pretrained:
        name += " (from weights)"
    top1 = f"{score.top1_pct:g}" + (f" ± {score.std_pct:g}" if score.std_pct is not None else "")
    if score.dataset != "imagenet-1k":
        top1 += f" {score.dataset}"
    hours = "" if score.gpu_hours is None else f"{score.gpu_hours:g} {score.gpu}"
    image = recipe.image
    sizes = f"{image.train_px}", f"{image.test_px}"
    return name, top1, f"{recipe.epochs}", *sizes, f"{cost / 1e18:.3g}", hours


def _cells_again(weights: str, is_wide: bool) -> list[str]:
    again = measured_again(weights) if weights else []
    own = ", ".join(
        f"{one.top1_pct:.2f} at {one.test_px}" for one in again if one.dataset == "imagenet-1k"
    )
    least = min((one.test_px or 0 for one in again), default=0)  # one size, so that columns compare
    others = {one.dataset: f"{one.top1_pct:.1f}" for one in again if one.test_px == least}
    return [own, *(others.get(dataset, "") for dataset in AGAIN_ON if is_wide)]


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
    if section is None or section.is_plain:
        with torch.device("meta"):
            model, _ = assembled(plan)
    else:  # parts are put where a forward pass finds them
        with torch.random.fork_rng(devices=[]):
            model, _ = assembled(plan)
    return gmacs(model, plan.profile.channels, plan.recipe.image.train_px)
