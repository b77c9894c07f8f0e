"""The recipes that come with the suite, by name. Imports neither torch nor timm: a command refuses
a name that does not exist before it has loaded them.
"""

from __future__ import annotations

import re
from pathlib import Path

from trainer.base.errors import UserError, did_you_mean, printable
from trainer.base.provenance import shipped_folder

_FILE_NAME = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_-]*)\.v(?P<version>[1-9][0-9]*)")


class RecipeError(UserError):
    """A recipe that is not there, or an override that does not fit it."""


def recipe_paths(folder: Path | None = None) -> list[Path]:
    """All recipes in a folder, by default the one that comes with the package, by name and
    version.
    """
    found = [
        (_FILE_NAME.fullmatch(path.stem), path)
        for path in (folder or recipes_folder()).glob("*.yaml")
    ]
    named = [(match["name"].lower(), int(match["version"]), path) for match, path in found if match]
    return [path for _, _, path in sorted(named)]


def newest_recipe_paths() -> list[Path]:
    """The newest version of each recipe; older ones are kept for the rows that cite them."""
    return list({path.stem.rpartition(".v")[0]: path for path in recipe_paths()}.values())


def recipes_folder() -> Path:
    """The folder of the recipes that come with the suite."""
    return shipped_folder("recipes")


def find_recipe(name: str) -> Path:
    """The recipe that a name means: A1 is its newest version, A1.v1 that version, a path to a .yaml
    file that file.

    Raises RecipeError for a name that no recipe has.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    paths = recipe_paths()
    named = {path.stem.rpartition(".v")[0]: path for path in paths} | {
        path.stem: path for path in paths
    }
    if name not in named:
        near = did_you_mean(name, dict.fromkeys(p.stem.rpartition(".v")[0] for p in paths))
        near = near or did_you_mean(name, named)
        there_are = ", ".join(path.stem for path in paths)
        raise RecipeError(
            f"recipe={printable(name)}: there is no such recipe{near}; there are {there_are}"
        )
    return named[name]
