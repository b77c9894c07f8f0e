"""An ablation: one question, its YAML file, and the cells that answer it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from trainer.ablation.budget import Budget, budget_lines
from trainer.ablation.cells import Cell, overrides_text
from trainer.ablation.designs import Design, Variant, check_apart, not_empty, put_over
from trainer.base.component import StrictModel
from trainer.base.errors import (
    ConfigError,
    OverrideError,
    UserError,
    all_of,
    did_you_mean,
    printable,
)
from trainer.base.errors import Path as ValuePath
from trainer.base.provenance import shipped_folder
from trainer.data.profile import find_profile
from trainer.models.build import check_model_name
from trainer.recipe.check import quoted, refuse, suggestion
from trainer.recipe.load import Positions, load_yaml
from trainer.recipe.overrides import Deviation
from trainer.recipe.plan import Plan, make_plan
from trainer.recipe.profiles import Profile
from trainer.recipe.schema import Recipe, apply_overrides
from trainer.recipe.shipped import find_recipe
from trainer.runs.job import Job, published_recipe, resolve

Text = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[str, ...], AfterValidator(not_empty)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


class AblationError(UserError):
    """An ablation that does not exist."""


class Published(StrictModel):
    """A published top-1 of one cell, in per cent, on the source's model and data.

    model: the one of the ablation's models that it is for; None for all of them.
    """

    cell: str
    model: str | None = None
    top1_pct: Annotated[float, Field(ge=0, le=100)]
    source: Text


class AblationPage(StrictModel):
    """An ablation file: a question, what all cells share, and the design that varies the rest.

    name: that of the file, which may be left out. recipe: of all cells, unless a change of the
    design names another. models, data: every combination is a group of cells with its own base.
    set: overrides by path that all cells share. source: of the question. smallest_points: the
    smallest difference of top-1 that would matter, stated before it is measured: seeds are planned
    for it. published: the sources' scores, by cell.
    """

    file_is: ClassVar[str] = "ablation"
    name: Name = ""
    title: Text
    question: Text
    source: Text = ""
    recipe: Text
    models: Names
    data: Names
    seeds: Annotated[tuple[Seed, ...], AfterValidator(not_empty)]
    budget: Budget | None = None
    set: dict[str, Any] = {}
    design: Design
    smallest_points: Annotated[float, Field(gt=0, le=100)] = 1.0
    published: tuple[Published, ...] = ()

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for key in ("models", "data", "seeds"):
            values = getattr(self, key)
            for number, value in enumerate(values):
                if value in values[:number]:
                    raise refuse((key, number), f"{value} is listed twice", "keep one")
        check_apart(self.set, ("set",))
        return self

    @model_validator(mode="after")
    def _scores_have_cells(self) -> Self:
        names = [variant.name for variant in self.design.variants()]
        for number, score in enumerate(self.published):
            for key, value, known in (
                ("cell", score.cell, names),
                ("model", score.model, self.models),
            ):
                if value is not None and value not in known:
                    sentence = (
                        f"{quoted(value)} is no {key} of this ablation{suggestion(value, known)}"
                    )
                    raise refuse(("published", number, key), sentence)
            if (score.cell, score.model) in [
                (other.cell, other.model) for other in self.published[:number]
            ]:
                raise refuse(("published", number), f"{score.cell} has a score already", "keep one")
        return self


@dataclass(frozen=True)
class Ablation:
    """An ablation file with its cells: planned, checked against each other, the base of each group
    first.

    seeds: every cell is run with each. page: the file as written. path: of the file. positions: the
    lines of its keys. places: the key that defines a cell, by the cell's name.
    """

    name: str
    question: str
    title: str
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    page: AblationPage
    path: Path
    positions: Positions
    places: Mapping[str, ValuePath]

    @property
    def runs(self) -> list[tuple[Cell, int]]:
        """Every cell with every seed, in the order in which they are run: the first seed of every
        cell first, so that the table is complete early.
        """
        return [(cell, seed) for seed in self.seeds for cell in self.cells]

    def located(self, error: UserError, cell: Cell) -> ConfigError:
        """An error of one cell with the line that defines the cell."""
        return self.positions.located(
            error, self.places[cell.name], f"the cell {cell.name}, {cell.group}"
        )


def ablations_folder() -> Path:
    """The folder of the ablations that come with the suite."""
    return shipped_folder("ablations")


def ablation_paths() -> list[Path]:
    """The ablation files that come with the package, by name."""
    return sorted(ablations_folder().glob("*.yaml"))


def find_ablation(name: str) -> Path:
    """The file of an ablation: ablations/<name>.yaml, or the given path to a .yaml file.

    Raises AblationError for an unknown name.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    known = {path.stem: path for path in ablation_paths()}
    if name not in known:
        hint = did_you_mean(name, known)
        raise AblationError(
            f"ablation={printable(name)}: unknown ablation{hint}; valid: {', '.join(known)}"
        )
    return known[name]


def load_ablation(source: Path | str) -> Ablation:
    """Load an ablation by name or path: every cell planned, nothing run, no image read.

    Raises UserError; errors in the file as `file:line: what was found; what to do`, all that are
    wrong with its cells, or with what they are made of, at once.
    """
    path = find_ablation(source) if isinstance(source, str) else source
    page, positions = load_yaml(path, AblationPage)
    page, faults = _named(page, path, positions), list[ConfigError]()
    placed = [found for group in _groups(page, positions, faults) for found in group]
    if faults:
        raise all_of(faults)
    places = {cell.name: place for cell, place in placed}
    cells = tuple(cell for cell, _ in placed)
    return Ablation(
        page.name, page.question, page.title, page.seeds, cells, page, path, positions, places
    )


def _named(page: AblationPage, path: Path, positions: Positions) -> AblationPage:
    """The same with its file's name. Raises ConfigError where it has another, or cannot have it."""
    if page.name and page.name != path.stem:
        raise positions.error(
            ("name",), f"name is {page.name}, but the file is {path.name}", "rename one of them"
        )
    try:
        TypeAdapter(Name).validate_python(path.stem)
    except ValidationError:
        hint = "rename it: letters, digits, - and _, the first a letter or a digit"
        raise positions.error((), f"the file's name is {path.stem!r}", hint) from None
    return page.model_copy(update={"name": path.stem})


@dataclass(frozen=True)
class _Start:
    """A recipe for a model, adapted to a profile: what cells apply their overrides to, read once
    for all of them.
    """

    original: Recipe
    adapted: Recipe
    deviations: tuple[Deviation, ...]
    digest: str
    model: str
    profile: Profile

    def plan(self, overrides: str, seed: int) -> Plan:
        """The plan that plan_of gives for the same job."""
        recipe, changes = apply_overrides(self.adapted, overrides, "set")
        deviations = self.deviations + changes
        return make_plan(
            recipe, self.model, self.profile, seed, page_digest=self.digest, deviations=deviations
        )


def _start(recipe: str, model: str, data: str, profile: Profile) -> _Start:
    original, _, adapted, deviations = resolve(Job(recipe, model, data), profile)
    digest = (published_recipe(original) or original).for_model(model).digest
    return _Start(original.for_model(model), adapted, deviations, digest, model, profile)


def _groups(
    page: AblationPage, positions: Positions, faults: list[ConfigError]
) -> Iterator[Iterator[tuple[Cell, ValuePath]]]:
    """The cells of each model on each data set, with the keys that define them. faults: gets what
    is wrong; with a recipe, a model or a data set there are no cells.
    """
    recipes = {page.recipe: ("recipe",)} | dict(
        variant.recipe for variant in page.design.variants() if variant.recipe
    )
    profiles: dict[str, Profile] = {}
    for name, place in recipes.items():
        with _noted(faults):
            _check_recipe(name, place, positions)
    for number, model in enumerate(page.models):
        with _noted(faults):
            _located(check_model_name, ("models", number), positions, model)
    for number, data in enumerate(page.data):
        with _noted(faults):
            _check_file(data, ("data", number), positions)
            profiles[data] = _located(find_profile, ("data", number), positions, data)
    if not faults:
        for data in page.data:
            for model in page.models:
                yield _cells(page, positions, model, data, profiles[data], faults)


@contextlib.contextmanager
def _noted(faults: list[ConfigError]) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        faults.append(error)


def _located(function, path: ValuePath, positions: Positions, value: str):
    """A function of a value in the file; its UserError gets the line of the value."""
    try:
        return function(value)
    except UserError as error:
        raise positions.located(error, path) from None


def _check_recipe(name: str, path: ValuePath, positions: Positions) -> None:
    """Refuse an unknown recipe at the line that names it; errors within it have their own line."""
    _check_file(name, path, positions)
    _located(find_recipe, path, positions, name)


def _check_file(name: str, path: ValuePath, positions: Positions) -> None:
    if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
        raise positions.error(
            path, f"{quoted(name)}: no such file", "use the path of a .yaml file, or a known name"
        )


def _cells(
    page: AblationPage,
    positions: Positions,
    model: str,
    data: str,
    profile: Profile,
    faults: list[ConfigError],
) -> Iterator[tuple[Cell, ValuePath]]:
    """The cells of one group, the base first. faults: gets those of a cell without a valid plan,
    that equals the base, or that is the same run as another.
    """
    group = f"{model} on {data}"
    suffix = ", ".join([model] * (len(page.models) > 1) + [data] * (len(page.data) > 1))
    known: dict[str, str] = {}
    starts: dict[str, _Start] = {}
    for variant in page.design.variants():
        recipe, _ = variant.recipe or (page.recipe, ())
        cell: Cell | None = None
        with _noted(faults):
            _check_budget(page, positions, variant)
            try:
                start = starts[recipe] = starts.get(recipe) or _start(recipe, model, data, profile)
                shorter = budget_lines(page.budget, start.original, start.adapted, profile)
                text = overrides_text(variant.over(put_over(shorter, page.set)))
                plan = start.plan(text, page.seeds[0])
            except UserError as error:
                raise _located_in_cell(error, page, positions, variant, group) from None
            key = plan.identity.key
            if key in known:
                found = f"the cell {variant.name} {_same_as(known, key)}, {group}"
                raise positions.error(variant.place, found, "leave it out")
            known[key] = variant.name
            name = f"{variant.name} ({suffix})" if suffix else variant.name
            score = _score(page, variant, model)
            cell = Cell(
                name=name,
                recipe=recipe,
                model=model,
                data=data,
                overrides=text,
                levels=variant.levels,
                is_base=len(known) == 1,
                group=group,
                published=score.top1_pct if score else None,
                published_source=score.source if score else "",
                plan=plan,
            )
        if cell:
            yield cell, variant.place


def _same_as(known: Mapping[str, str], key: str) -> str:
    base = next(iter(known.values()))
    return (
        f"is the same as the base {base}"
        if known[key] == base
        else f"is the same run as {known[key]}"
    )


def _score(page: AblationPage, variant: Variant, model: str) -> Published | None:
    """The published score of a cell: that of its model, else the one for all models."""
    scores = {score.model: score for score in page.published if score.cell == variant.name}
    return scores.get(model) or scores.get(None)


def _check_budget(page: AblationPage, positions: Positions, variant: Variant) -> None:
    if page.budget is None:
        return
    places = [(("set",), page.set)] + [
        ((*place, "set"), change.set) for place, change in variant.changes
    ]
    for place, lines in places:
        if "epochs" in lines:
            raise positions.error(
                (*place, "epochs"),
                "the budget sets the number of epochs already",
                "leave one of them out",
            )


def _located_in_cell(
    error: UserError, page: AblationPage, positions: Positions, variant: Variant, group: str
) -> ConfigError:
    """An error of a cell, at the line of the override that caused it, else of the cell; one within
    a recipe or a profile has its own line.
    """
    changes = [(*place, "set", label) for place, change in variant.changes for label in change.set]
    about = error.labels if isinstance(error, OverrideError) else (".".join(map(str, error.path)),)
    named = [
        place
        for place in [*(("set", label) for label in page.set), *changes]
        if any(
            f"{one}.".startswith(f"{place[-1]}.") or f"{place[-1]}.".startswith(f"{one}.")
            for one in about
        )
    ]
    path = named[-1] if named else variant.place
    # a key within the value
    inner = (*path, *error.path[len(str(path[-1]).split(".")) :]) if named else path
    path = inner if inner in positions.lines else path
    return positions.located(error, path, f"the cell {variant.name}, {group}")
