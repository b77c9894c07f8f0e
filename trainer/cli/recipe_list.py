"""What the command recipes prints of all recipes, and the command which of public weights. Neither
imports torch, which takes seconds.
"""

from __future__ import annotations

from typing import Any

import yaml
from rich.markup import escape
from rich.table import Table

from trainer.base.commands import command
from trainer.base.terminal import open_terminal
from trainer.recipe.published import Published, measured_again, newest_path, score_of_weights
from trainer.recipe.shipped import newest_recipe_paths

try:
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # PyYAML built without libyaml
    from yaml import SafeLoader  # type: ignore[assignment]

# What timm measures again on beside ImageNet-1k val, and how a table calls it.
AGAIN_ON = {
    "imagenet-real": "ReaL",
    "imagenet-v2": "V2",
    "imagenet-a": "A",
    "imagenet-r": "R",
    "imagenet-sketch": "Sketch",
}


def list_recipes() -> None:
    """One line for each recipe: name, what is special, its score for ResNet-50 or its first model,
    source.

    Read as plain YAML: to check every value would import torch.
    """
    table = Table("recipe", "what is special", "published top-1", "source")
    for path in newest_recipe_paths():
        recipe = yaml.load(path.read_text(), Loader=SafeLoader)
        scores = recipe.get("published", [])
        chosen = [score for score in scores if score["model"] == "resnet50"] or scores
        published = f"{chosen[0]['model']} {chosen[0]['top1_pct']} %" if chosen else "none"
        if chosen and "data" in chosen[0]:
            published += f" on {chosen[0]['data']}"
        table.add_row(*map(escape, (path.stem, recipe["title"], published, recipe["source"])))
    open_terminal().print(table)


def name_recipe(weights: str) -> None:
    """The recipe that made public weights of timm, its score, and what timm measures of them.

    Raises UserError for weights of no recipe here.
    """
    score = score_of_weights(weights)
    path = newest_path(score.recipe)
    recipe = yaml.load(path.read_text(), Loader=SafeLoader)
    lines = {
        "weights": score.weights,
        "recipe": f"{path.stem}: {recipe['title']}",
        "published": f"{score.top1_pct:g} % at {score.test_px} px ({score.source})",
        **_again(score),
        "explain": command("explain", recipe=path.stem, model=score.model),
        "train": command(recipe=path.stem, model=score.model, data="imagenet-1k"),
    }
    out = open_terminal()
    for name, text in lines.items():
        out.print(f"{name:10} {text}", markup=False, soft_wrap=True)


def _again(score: Published) -> dict[str, str]:
    """What timm measures, a line for each set of images."""
    found: dict[str, Any] = {}
    for one in measured_again(score.weights):
        found.setdefault(one.dataset, []).append(f"{one.top1_pct:g} % at {one.test_px} px")
    named = {"imagenet-1k": "timm", **AGAIN_ON}
    return {named[dataset]: ", ".join(scores) for dataset, scores in found.items()}
