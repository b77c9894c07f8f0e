"""The training length of an ablation's cells."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from trainer.base.component import StrictModel
from trainer.recipe import check, tree
from trainer.recipe.adapt import adaptation
from trainer.recipe.profiles import Adapt, Profile
from trainer.recipe.schema import ABOUT, Recipe, apply_overrides


class Budget(StrictModel):
    """Training length of each cell: a number of epochs, or a share of the recipe's epochs on its
    data.

    Durations of the recipe in epochs (warm-up, learning-rate drops, image growth, averaging) are
    scaled with the run, as under a profile; values set by the ablation itself are not.
    """

    epochs: Annotated[int, Field(ge=1, le=10_000)] | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.epochs is None) == (self.share is None):
            raise ValueError("write either epochs or share")
        return self


def budget_lines(
    budget: Budget | None, recipe: Recipe, adapted: Recipe, profile: Profile
) -> dict[str, Any]:
    """The overrides, by path, that give a recipe on a data set the length of a budget.

    recipe: the recipe for one model. adapted: the same, adapted to the profile.

    Raises UserError where the recipe cannot be that short.
    """
    if budget is None:
        return {}
    epochs = budget.epochs or max(1, round((budget.share or 0.0) * adapted.epochs))
    if recipe.adapted_to == profile.name:
        return {"epochs": epochs} if epochs != adapted.epochs else {}
    adapt = (profile.adapt or Adapt()).model_copy(update={"epochs": epochs})
    shorter = profile.model_copy(update={"adapt": adapt})
    return lines_between(adapted, apply_overrides(recipe, adaptation(recipe, shorter), "budget")[0])


def lines_between(before: Recipe, after: Recipe) -> dict[str, Any]:
    """The overrides that turn one recipe into another; a component with a new name is written in
    full.
    """
    old, new_values = tree.plain(before), tree.plain(after)
    found = [(label, new) for label, _, new in tree.differences(old, new_values)]
    changed = [(label, new) for label, new in found if label.partition(".")[0] not in ABOUT]
    renamed = [label.removesuffix(".name") for label, _ in changed if label.endswith(".name")]
    lines = {
        label: new
        for label, new in changed
        if not any(label.startswith(f"{section}.") for section in renamed)
    }
    sections = {
        label: check.value_at(new_values, tree.find(Recipe, new_values, label)) for label in renamed
    }
    return lines | sections
