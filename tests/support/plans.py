"""Small plans for tests: a shipped recipe on the digits, cut short."""

import shlex

from trainer.runs.job import Job, plan_of

SMALL = {"epochs": "2", "batch.images": "32", "batch.norm_images": "8"}


def small_set(overrides: str = "") -> str:
    """The text of set= that cuts a recipe short; `overrides` come in place of its own items."""
    given = dict(item.split("=", 1) for item in shlex.split(overrides))
    return " ".join(shlex.quote(f"{path}={value}") for path, value in {**SMALL, **given}.items())


def small_plan(recipe="A2", model="test_resnet", overrides="", **job):
    """A plan over few steps of small batches."""
    return plan_of(Job(recipe=recipe, model=model, overrides=small_set(overrides), **job))
