"""Where each value of a recipe comes from, how two recipes differ, and the tables that the recipes'
README shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel
from rich.table import Table
from rich.text import Text

from trainer.recipe import tree
from trainer.recipe.load import Positions
from trainer.recipe.overrides import Deviation
from trainer.recipe.schema import ABOUT, Recipe, Score, load_recipe
from trainer.recipe.shipped import newest_recipe_paths
from trainer.recipe.tree import shown

T = TypeVar("T")

_ORIGINS = {"set": "override"}
_STYLES = {"assumed": "yellow", "per_model": "cyan", "profile": "magenta", "override": "red"}


class ExplainedValue(NamedTuple):
    """One value of a recipe.

    value: None for off. origin: recipe, assumed, per_model, profile or override. line: in the
    file, None for what the file does not hold. note: why it is assumed, or what it was before.
    """

    path: str
    value: Any
    origin: str
    line: int | None
    note: str


class RecipeDifference(NamedTuple):
    """One path at which two recipes differ; None for off."""

    path: str
    a: Any
    b: Any


def explain_rows(
    written: Recipe,
    positions: Positions,
    recipe: Recipe,
    model: str,
    deviations: Sequence[Deviation] = (),
    with_off: bool = False,
) -> list[ExplainedValue]:
    """Every value of `recipe` in the order of its file, and where it came from.

    written, positions: as open_recipe gives them. recipe: the one of `model`, deviations made.
    An assumption that something is off is a row too; with_off: so is all else that the recipe could
    have and does not.
    """
    values = {
        label: value
        for label, value in tree.leaves(tree.plain(recipe)).items()
        if _is_science(label)
    }
    off = [*recipe.assumed, *(change.path for change in deviations if change.after is None)]
    off += list(_off(recipe)) if with_off else []
    values |= {
        label: None for label in off if not any(f"{key}.".startswith(f"{label}.") for key in values)
    }
    return [
        _row(label, value, written, positions, recipe, model, deviations)
        for label, value in values.items()
    ]


def diff_rows(a: Recipe, b: Recipe) -> list[RecipeDifference]:
    """Where two recipes differ in what they do; what they say about themselves is left out."""
    return [
        RecipeDifference(*found)
        for found in tree.differences(tree.plain(a), tree.plain(b))
        if _is_science(found[0])
    ]


def explain_table(rows: Sequence[ExplainedValue], title: str) -> Table:
    """The rows of explain_rows for a terminal."""
    table = Table(
        "path", "value", "origin", "line", "note", title=Text(title), title_justify="left"
    )
    for row in rows:
        line = "" if row.line is None else str(row.line)
        cells = (
            row.path,
            shown(row.value, exact=row.origin != "profile"),
            row.origin,
            line,
            row.note,
        )
        # Text: a list in brackets is no markup
        table.add_row(*map(Text, cells), style=_STYLES.get(row.origin))
    return table


def diff_table(rows: Sequence[RecipeDifference], a: str, b: str) -> Table:
    """The rows of diff_rows for a terminal; a and b are the recipes' names."""
    table = Table("path", a, b)
    for row in rows:
        table.add_row(*map(Text, (row.path, shown(row.a, exact=True), shown(row.b, exact=True))))
    return table


def recipes_table(folder: str = "") -> str:
    """All recipes but the roadmap's as a Markdown table: what is special, the best-known score,
    what is assumed.

    Recipes whose titles differ in the number of epochs alone are one row. folder: what leads from
    the Markdown file to the recipes, such as "recipes/".
    """
    lines = [
        "| recipe | what is special | published top-1 % | assumed keys | source |",
        "|---|---|---|---|---|",
    ]
    for series in _series():
        first, *others = series
        links = ", ".join(
            [_link(first, folder), *(_link(recipe, folder, short=True) for recipe in others)]
        )
        title = first.title
        if others:
            epochs = [f"{recipe.epochs}" for recipe in series]
            title = title.replace(
                f"{first.epochs} epochs", f"{', '.join(epochs[:-1])} or {epochs[-1]} epochs"
            )
        lines.append(
            f"| {links} | {title} | {_best_known(series)} | {len(first.assumed)} | {first.source} |"
        )
    return "\n".join(lines)


def roadmap_table(folder: str = "") -> str:
    """The recipes that lead from a ResNet-50 to a ConvNeXt-T as a Markdown table: steps with the
    paper's scores.
    """
    lines = ["| recipe | step | published top-1 % |", "|---|---|---|"]
    for recipe in filter(_is_roadmap, _all_recipes()):
        step = recipe.title.partition(", step ")[2]
        lines.append(f"| {_link(recipe, folder)} | {step} | {_best_known([recipe])} |")
    return "\n".join(lines)


def scores_table() -> str:
    """The scores of all recipes that have several models as a Markdown table, top-1 %: models down,
    recipes across.

    A recipe of one model has its score in recipes_table or roadmap_table.
    """
    found = [
        recipe for recipe in _all_recipes() if len({score.model for score in recipe.published}) > 1
    ]
    models = list(dict.fromkeys(score.model for recipe in found for score in recipe.published))
    lines = [f"| model | {' | '.join(map(_link, found))} |", "|---" * (len(found) + 1) + "|"]
    for model in models:
        scores = [
            ", ".join(_score(one) for one in recipe.published if one.model == model)
            for recipe in found
        ]
        lines.append(f"| {model} | {' | '.join(scores)} |")
    return "\n".join(lines)


def assumed_table() -> str:
    """All assumptions as a Markdown table: the key, what was chosen and why, and in which
    recipes.
    """
    lines = ["| key | what was chosen, and why | recipes |", "|---|---|---|"]
    lines += [
        f"| `{label}` | {why} | {where} |"
        for (label, why), where in _where(lambda recipe: recipe.assumed.items())
    ]
    return "\n".join(lines)


def unconfirmed_table() -> str:
    """All that could not be confirmed as a Markdown table: what, and in which recipes."""
    lines = ["| what could not be confirmed | recipes |", "|---|---|"]
    lines += [f"| {what} | {where} |" for what, where in _where(lambda recipe: recipe.unconfirmed)]
    return "\n".join(lines)


def _where(texts: Callable[[Recipe], Iterable[T]]) -> Iterator[tuple[T, str]]:
    """Each of all recipes' texts, and the recipes that have it."""
    found = _all_recipes()
    names = [_identity(recipe) for recipe in found]
    places: dict[T, list[int]] = {}
    for place, recipe in enumerate(found):
        for text in texts(recipe):
            places.setdefault(text, []).append(place)
    for text, where in places.items():
        yield text, _listed(where, names)


def _row(label, value, written, positions, recipe, model, deviations) -> ExplainedValue:
    """One row. The newest change to a value is its origin: deviation, line for the model,
    assumption, recipe.
    """
    changes = [change for change in deviations if _covers(change.path, label)]
    if changes:
        first, last = changes[0], changes[-1]
        return ExplainedValue(
            label,
            value,
            _ORIGINS.get(last.origin, last.origin),
            None,
            f"was {shown(first.before, exact=first.origin != 'profile')}",
        )
    lines = written.per_model.get(model, {})
    path = tree.find(Recipe, tree.plain(recipe), label)
    if any(_covers(key, label) for key in tree.leaves(lines)):
        return ExplainedValue(
            label, value, "per_model", positions.line(("per_model", model, *path)), ""
        )
    key = next((key for key in recipe.assumed if _covers(key, label)), None)
    if value is None:
        path = ("assumed", key) if key else ()
    line = positions.line(path) if path else None
    return ExplainedValue(
        label, value, "assumed" if key else "recipe", line, recipe.assumed[key] if key else ""
    )


def _covers(path: str, label: str) -> bool:
    return f"{label}.".startswith(f"{path}.")


def _is_science(label: str) -> bool:
    return label.partition(".")[0] not in ABOUT


def _off(part: Any, label: str = "") -> Iterator[str]:
    """The labels of all that a recipe could have and does not."""
    if isinstance(part, tuple) and all(isinstance(item, BaseModel) for item in part):
        for item in part:
            yield from _off(item, f"{label}.{item.name}")
    elif isinstance(part, BaseModel):
        on = tree.plain(part)
        for key, value in part:
            inner = f"{label}.{key}" if label else key
            if not _is_science(inner):
                continue
            if key in on:
                yield from _off(value, inner)
            else:
                yield inner


def _all_recipes() -> list[Recipe]:
    """The newest version of each recipe by name, the numbers in a name by their value."""
    return sorted(map(load_recipe, newest_recipe_paths()), key=lambda recipe: _words(recipe.name))


def _words(name: str) -> list[str | int]:
    """A name's letters and numbers, taking turns."""
    return [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", name.lower())]


def _is_roadmap(recipe: Recipe) -> bool:
    return recipe.name.startswith("roadmap-")


def _series() -> list[list[Recipe]]:
    """All recipes but the roadmap's, those whose titles differ in the number of epochs alone
    together.
    """
    series: dict[tuple, list[Recipe]] = {}
    for recipe in _all_recipes():
        if not _is_roadmap(recipe):
            title = recipe.title.replace(f"{recipe.epochs} epochs", "")
            series.setdefault((title, recipe.source, *recipe.assumed), []).append(recipe)
    return list(series.values())


def _best_known(series: Sequence[Recipe]) -> str:
    """The score of a ResNet-50, or of the first model, on each recipe that has one; all scores of a
    recipe of one model.
    """
    known = [_known(recipe.published) for recipe in series if recipe.published]
    shown = ", ".join(" / ".join(map(_score, scores)) for scores in known)
    return f"{known[0][0].model} {shown}" if known else "none stated"


def _known(published: Sequence[Score]) -> Sequence[Score]:
    if len({score.model for score in published}) == 1:
        return published
    return [next((score for score in published if score.model == "resnet50"), published[0])]


def _listed(places: Sequence[int], names: Sequence[str]) -> str:
    """Names by their places; three or more in a row as the first and the last."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return ", ".join(_run(run[0], run[-1], names) for run in runs)


def _run(first: int, last: int, names: Sequence[str]) -> str:
    return (
        f"{names[first]} … {names[last]}"
        if last - first > 1
        else ", ".join(names[first : last + 1])
    )


def _identity(recipe: Recipe) -> str:
    return f"{recipe.name}.v{recipe.version}"


def _link(recipe: Recipe, folder: str = "", short: bool = False) -> str:
    """A Markdown link to a recipe; short: named by the last word of its name."""
    name = _identity(recipe)
    return f"[{name.rpartition('-')[2] if short else name}]({folder}{name}.yaml)"


def _score(score: Score) -> str:
    spread = f" ± {score.std_pct}" if score.std_pct is not None else ""
    seeds = f" ({score.num_seeds} seeds)" if score.num_seeds is not None else ""
    data = f" on {score.data}" if score.data is not None else ""
    return f"{score.top1_pct}{spread}{seeds}{data}"
