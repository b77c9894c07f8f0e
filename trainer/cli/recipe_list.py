"""What the command recipes prints."""

from __future__ import annotations

import yaml
from rich.markup import escape
from rich.table import Table

from trainer.base.terminal import open_terminal
from trainer.recipe.shipped import newest_recipe_paths

try:
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # PyYAML built without libyaml
    from yaml import SafeLoader  # type: ignore[assignment]


def list_recipes() -> None:
    """One line for each recipe: name, what is special, its score for ResNet-50 or its first model,
    source.

    Read as plain YAML: to check every value would import torch, which takes seconds.
    """
    table = Table("recipe", "what is special", "published top-1", "source")
    for path in newest_recipe_paths():
        recipe = yaml.load(path.read_text(), Loader=SafeLoader)
        scores = recipe.get("published", [])
        chosen = [score for score in scores if score["model"] == "resnet50"] or scores
        published = f"{chosen[0]['model']} {chosen[0]['top1_pct']} %" if chosen else "none"
        table.add_row(*map(escape, (path.stem, recipe["title"], published, recipe["source"])))
    open_terminal().print(table)
