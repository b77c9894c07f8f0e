"""Published scores as data, results/published.csv: what the recipes' sources state, and what timm
measured again on public weights. Imports neither torch nor timm.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.base.commands import command
from trainer.base.errors import UserError, did_you_mean, printable
from trainer.base.provenance import SHIPPED_ROOT
from trainer.recipe.shipped import newest_recipe_paths, recipes_folder


@dataclass(frozen=True)
class Published:
    """One score, top-1 in per cent.

    recipe: its name, without a version. dataset: what it was measured on: imagenet-1k (val),
    imagenet-real, imagenet-v2 (matched frequency), imagenet-a, imagenet-r, imagenet-sketch, or a
    set known by name. weights: timm's name of the public weights that were measured, "" where timm
    has none of this score. measured_by: "" for the recipe's source itself. gpu_hours, gpu: what the
    source says one run took, over all its GPUs.
    """

    recipe: str
    model: str
    top1_pct: float
    std_pct: float | None
    num_seeds: int | None
    train_px: int | None
    test_px: int | None
    source: str
    dataset: str
    weights: str
    measured_by: str
    gpu_hours: float | None
    gpu: str


@functools.cache
def published_scores() -> tuple[Published, ...]:
    """All of them, in the order of the file."""
    with _path().open(newline="", encoding="utf-8") as file:
        return tuple(_score(row) for row in csv.DictReader(file))


def _path() -> Path:
    inside = recipes_folder() / "published.csv"  # of a wheel
    return inside if inside.is_file() else SHIPPED_ROOT / "results" / "published.csv"


def _score(row: dict[str, str]) -> Published:
    return Published(
        recipe=row["recipe"],
        model=row["model"],
        top1_pct=float(row["top1_pct"]),
        std_pct=float(row["std_pct"]) if row["std_pct"] else None,
        num_seeds=int(row["num_seeds"]) if row["num_seeds"] else None,
        train_px=int(row["train_px"]) if row["train_px"] else None,
        test_px=int(row["test_px"]) if row["test_px"] else None,
        source=row["source"],
        dataset=row["dataset"],
        weights=row["weights"],
        measured_by=row["measured_by"],
        gpu_hours=float(row["gpu_hours"]) if row["gpu_hours"] else None,
        gpu=row["gpu"],
    )


def newest_path(recipe: str) -> Path:
    """The file of the newest version of a recipe."""
    return next(path for path in newest_recipe_paths() if path.stem.rpartition(".v")[0] == recipe)


def scores_of_model(model: str) -> list[Published]:
    """The sources' own scores of a model, the best of each set of images first.

    model: a timm name; a tag of weights is not asked for. Raises UserError where no recipe has one.
    """
    name = model.partition(".")[0]
    own = [one for one in published_scores() if not one.measured_by]
    found = [one for one in own if one.model == name]
    if not found:
        models = list(dict.fromkeys(one.model for one in own))
        raise UserError(
            f"model={printable(model)}: no recipe has a published score of it"
            f"{did_you_mean(name, models)}",
            "any recipe trains it that results/matrix.md has for its family",
        )
    return sorted(found, key=lambda one: (one.dataset != "imagenet-1k", one.dataset, -one.top1_pct))


def measured_again(weights: str) -> list[Published]:
    """What timm measured on public weights, by set of images and size."""
    return [one for one in published_scores() if one.measured_by and one.weights == weights]


def score_of_weights(weights: str) -> Published:
    """The source's score of public weights of timm, with the recipe that made them.

    weights: as timm names them, `resnet50.a1_in1k`, with or without `timm:`. Raises UserError for
    weights of no recipe here.
    """
    name = weights.removeprefix("timm:")
    known = {one.weights: one for one in published_scores() if one.weights and not one.measured_by}
    if name in known:
        return known[name]
    model = name.partition(".")[0]
    same = [one for one in known.values() if one.model == model]
    near = did_you_mean(name, known) if not same else ""
    raise UserError(
        f"weights={printable(weights)}: not known to be of any recipe here{near}",
        f"known of {model}: {_listed(same)}" if same else f"{command('recipes')} lists the recipes",
    )


def _listed(scores: Iterable[Published]) -> str:
    return ", ".join(f"{one.weights} ({newest_path(one.recipe).stem})" for one in scores)
