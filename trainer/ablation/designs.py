"""Designs: from the factors, parts, steps or cells of an ablation to named variants of its base.

The first variant of every design is the base, which the others are compared with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from trainer.base.component import StrictModel
from trainer.recipe.check import Path, refuse

MAX_DESIGN_CELLS = 1000
MAX_LABEL_LENGTH = 60


def _label(text: str) -> str:
    """A name that is valid in a table, a file name and a plot."""
    if (
        not text
        or text != text.strip()
        or "|" in text
        or "`" in text
        or len(text) > MAX_LABEL_LENGTH
    ):
        raise ValueError(
            f"use 1 to {MAX_LABEL_LENGTH} characters, without | and ` and without outer spaces"
        )
    return text


def not_empty(items: tuple) -> tuple:
    """A list with at least one item. Pydantic's min_length counts valid items only."""
    if not items:
        raise ValueError("write at least one")
    return items


Label = Annotated[str, AfterValidator(_label)]


class CellChange(StrictModel):
    """One named change: overrides of the base by dotted path, perhaps of another recipe.

    recipe: in place of the ablation's. set: any YAML value by path, null for off.

    Raises ValueError for two paths of which one is within the other.
    """

    name: Label
    recipe: str | None = None
    set: dict[str, Any] = {}

    @model_validator(mode="after")
    def _paths_are_apart(self) -> Self:
        check_apart(self.set, ("set",))
        return self


Changes = Annotated[tuple[CellChange, ...], AfterValidator(not_empty)]


class DesignFactor(StrictModel):
    """A factor and its levels in the order of the table."""

    name: Label
    levels: Changes

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        _check_names(self.levels, ("levels",))
        return self


Factors = Annotated[tuple[DesignFactor, ...], AfterValidator(not_empty)]


@dataclass(frozen=True)
class Variant:
    """A cell without model and data: the changes to the base, in order, each with its path in the
    file.

    place: path of the key that defines it. levels: (factor, level) pairs. at_once: the changes are
    of different factors, so their order does not matter.
    """

    name: str
    changes: tuple[tuple[Path, CellChange], ...]
    levels: tuple[tuple[str, str], ...]
    place: Path
    at_once: bool = False

    @property
    def recipe(self) -> tuple[str, Path] | None:
        """The recipe in place of the ablation's, and the path of the key that says so."""
        named = [
            (change.recipe, (*place, "recipe")) for place, change in self.changes if change.recipe
        ]
        return named[-1] if named else None

    def over(self, lines: Mapping[str, Any]) -> dict[str, Any]:
        """The variant's changes merged over the overrides that all cells share."""
        layers = [change.set for _, change in self.changes]
        if self.at_once:
            layers = [{label: value for layer in layers for label, value in layer.items()}]
        for layer in layers:
            lines = put_over(lines, layer)
        return dict(lines)


class OneAtATime(StrictModel):
    """One factor at a time: the base, then each level of each factor alone."""

    name: Literal["one_at_a_time"]
    base: Label
    factors: Factors

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        _check_names(self.factors, ("factors",))
        for number, factor in enumerate(self.factors):
            _check_against_base(factor.levels, ("factors", number, "levels"), self.base)
        return self

    def variants(self) -> Iterator[Variant]:
        """The base, then one variant for each level."""
        at_base = {factor.name: self.base for factor in self.factors}
        yield Variant(self.base, (), tuple(at_base.items()), ("design", "base"))
        for number, factor in enumerate(self.factors):
            for place, level in _placed(factor.levels, ("design", "factors", number, "levels")):
                name = level.name if len(self.factors) == 1 else f"{factor.name}: {level.name}"
                levels = tuple({**at_base, factor.name: level.name}.items())
                yield Variant(name, ((place, level),), levels, place)


class Full(StrictModel):
    """Full factorial: every combination of the factors' levels; the base has the first of each.

    Raises ValueError for factors that set the same path, and for too many combinations.
    """

    name: Literal["full"]
    factors: Factors

    @model_validator(mode="after")
    def _factors_are_apart(self) -> Self:
        _check_names(self.factors, ("factors",))
        num_cells = 1
        for number, factor in enumerate(self.factors):
            num_cells *= len(factor.levels)
            for earlier in self.factors[:number]:
                _check_factors_apart(earlier, factor, number)
        if num_cells > MAX_DESIGN_CELLS:
            raise refuse(
                ("factors",),
                f"{num_cells} combinations",
                f"the maximum is {MAX_DESIGN_CELLS}, leave out factors or levels",
            )
        return self

    def variants(self) -> Iterator[Variant]:
        """All combinations, the last factor's levels changing fastest."""
        placed = [
            _placed(factor.levels, ("design", "factors", n, "levels"))
            for n, factor in enumerate(self.factors)
        ]
        for changes in itertools.product(*placed):
            names = [change.name for _, change in changes]
            levels = tuple(zip((factor.name for factor in self.factors), names, strict=True))
            yield Variant(", ".join(names), changes, levels, changes[-1][0], at_once=True)


class LeaveOneOut(StrictModel):
    """The base with all its parts, then without each of them: a part's changes remove it."""

    name: Literal["leave_one_out"]
    base: Label
    parts: Changes

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        _check_against_base(self.parts, ("parts",), self.base)
        return self

    def variants(self) -> Iterator[Variant]:
        """The base, then one variant for each part that is left out."""
        yield Variant(self.base, (), (("left out", "nothing"),), ("design", "base"))
        for place, part in _placed(self.parts, ("design", "parts")):
            yield Variant(
                f"without {part.name}", ((place, part),), (("left out", part.name),), place
            )


class Cumulative(StrictModel):
    """The base, then steps, each on top of the previous ones; a step that names a recipe restarts
    from that.
    """

    name: Literal["cumulative"]
    base: Label
    steps: Changes

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        _check_against_base(self.steps, ("steps",), self.base)
        return self

    def variants(self) -> Iterator[Variant]:
        """The base, then one variant after each step."""
        yield Variant(self.base, (), (("step", self.base),), ("design", "base"))
        taken: tuple[tuple[Path, CellChange], ...] = ()
        for place, step in _placed(self.steps, ("design", "steps")):
            taken = ((place, step),) if step.recipe else (*taken, (place, step))
            yield Variant(step.name, taken, (("step", step.name),), place)


class Listed(StrictModel):
    """An explicit list of cells; the first is the base."""

    name: Literal["listed"]
    cells: Changes

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        _check_names(self.cells, ("cells",))
        return self

    def variants(self) -> Iterator[Variant]:
        """One variant for each cell."""
        for place, cell in _placed(self.cells, ("design", "cells")):
            yield Variant(cell.name, ((place, cell),), (("cell", cell.name),), place)


Design = Annotated[
    OneAtATime | Full | LeaveOneOut | Cumulative | Listed, Field(discriminator="name")
]


def put_over(lines: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Merge overrides by path: a new path replaces older ones at or within it, and is written into
    an older section that contains it.

    A new `name` of a section replaces the older paths within it too: they belong to the component
    that it replaces.
    """
    sections = [label.removesuffix(".name") for label in layer]
    result = {
        old: value
        for old, value in lines.items()
        if old not in layer and not any(old.startswith(f"{section}.") for section in sections)
    }
    for label, value in layer.items():
        around = [
            old
            for old in result
            if label.startswith(f"{old}.") and isinstance(result[old], Mapping)
        ]
        if around:
            result[around[0]] = _within(
                result[around[0]], label.removeprefix(f"{around[0]}.").split("."), value
            )
        else:
            result[label] = value
    return result


def _within(section: Any, keys: Sequence[str], value: Any) -> dict[str, Any]:
    section = section if isinstance(section, Mapping) else {}
    first, *rest = keys
    if not rest and value is None:
        return {key: part for key, part in section.items() if key != first}
    return {**section, first: _within(section.get(first), rest, value) if rest else value}


def check_apart(labels: Mapping[str, Any], place: Path) -> None:
    """Refuse two paths of which one is within the other."""
    for label in labels:
        for around in labels:
            if label.startswith(f"{around}."):
                raise refuse(
                    (*place, label),
                    f"{label} is within {around}, which is set too",
                    "write it there",
                )


def _placed(changes: Sequence[CellChange], place: Path) -> list[tuple[Path, CellChange]]:
    return [((*place, number), change) for number, change in enumerate(changes)]


def _check_names(named: Sequence[CellChange | DesignFactor], place: Path) -> None:
    names = [one.name for one in named]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise refuse(
                (*place, number, "name"), f"{name} is listed twice", "give each its own name"
            )


def _check_against_base(changes: Sequence[CellChange], place: Path, base: str) -> None:
    _check_names(changes, place)
    for number, change in enumerate(changes):
        if change.name == base:
            raise refuse(
                (*place, number, "name"),
                f"{base} is the name of the base",
                "give each its own name",
            )


def _check_factors_apart(earlier: DesignFactor, factor: DesignFactor, number: int) -> None:
    """Refuse two factors that set the same path: one would undo the other."""
    before = {label for level in earlier.levels for label in level.set}
    names_recipe = any(level.recipe for level in earlier.levels)
    for place, level in _placed(factor.levels, ("factors", number, "levels")):
        if level.recipe and names_recipe:
            raise refuse(
                (*place, "recipe"), f"{earlier.name} sets the recipe already", "only one factor can"
            )
        for label in level.set:
            both = [
                old
                for old in before
                if old == label or old.startswith(f"{label}.") or label.startswith(f"{old}.")
            ]
            if both:
                found = f"{label} is set by the factor {earlier.name} too ({both[0]})"
                raise refuse((*place, "set", label), found, "set it in one factor")
