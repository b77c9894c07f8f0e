"""How long the cells of an ablation are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from trainer.base.component import Page
from trainer.recipe import check, tree
from trainer.recipe.adapt import adaptation
from trainer.recipe.profiles import Adapt, Profile
from trainer.recipe.schema import ABOUT, Recipe, apply_overrides


class Budget(Page):
    """How long each cell is trained: a number of epochs, or a share of those that the recipe has on
    its data.

    What a recipe says in epochs (warm-up, drops of the rate, growth of the images, average) keeps
    its share of the run, as under a profile; what the ablation itself sets stays as it is written.
    """

    epochs: Annotated[int, Field(ge=1, le=10_000)] | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.epochs is None) == (self.share is None):
            raise ValueError("write either epochs or share")
        return self


def budget_lines(
    budget: Budget | None, page: Recipe, adapted: Recipe, profile: Profile
) -> dict[str, Any]:
    """The overrides, by path, that give a recipe on a data set the length of a budget.

    page: for one model. adapted: the same as the profile adapts it.

    Raises UserError where a recipe cannot be that short.
    """
    if budget is None:
        return {}
    epochs = budget.epochs or max(1, round(budget.share * adapted.epochs))
    if page.adapted_to == profile.name:
        return {"epochs": epochs} if epochs != adapted.epochs else {}
    adapt = (profile.adapt or Adapt()).model_copy(update={"epochs": epochs})
    shorter = profile.model_copy(update={"adapt": adapt})
    return lines_between(adapted, apply_overrides(page, adaptation(page, shorter), "budget")[0])


def lines_between(before: Recipe, after: Recipe) -> dict[str, Any]:
    """The overrides that make one recipe of another; an ingredient that becomes another one is
    written whole.
    """
    pages: list[Mapping[str, Any]] = [tree.plain(before), tree.plain(after)]
    found = [(label, new) for label, _, new in tree.differences(*pages)]
    changed = [(label, new) for label, new in found if label.partition(".")[0] not in ABOUT]
    renamed = [label.removesuffix(".name") for label, _ in changed if label.endswith(".name")]
    lines = {
        label: new
        for label, new in changed
        if not any(label.startswith(f"{section}.") for section in renamed)
    }
    sections = {
        label: check.value_at(pages[1], tree.find(Recipe, pages[1], label)) for label in renamed
    }
    return lines | sections
