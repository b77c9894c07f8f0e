"""Deviations from a recipe: recorded, never hidden."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeVar

from trainer.base.component import StrictModel
from trainer.base.errors import ConfigError, Error, OverrideError, Path, UserError
from trainer.recipe import tree
from trainer.recipe.check import (
    check,
    chosen,
    kinds_at,
    label_of,
    name_of,
    quoted,
    suggestion,
    tag_of,
    value_at,
    written,
)
from trainer.recipe.load import parse

Kind = TypeVar("Kind", bound=StrictModel)


@dataclass(frozen=True)
class Deviation:
    """One deviation of a run from its recipe.

    path: as the recipe writes it, items of a list by name. before, after: plain values, None for
    off. origin: who changed it, "set" or "profile".
    """

    path: str
    before: Any
    after: Any
    origin: str


def overrides_of(text: str) -> dict[str, Any]:
    """Text such as `epochs=5 mix={name: mixup, alpha: 0.2}` as plain values by label.

    Values are read as in a recipe: 5e-3 is a number; no, yes and 1:30 are refused.

    Raises OverrideError for an item that is no `path=value`, is there twice, or whose value
    misleads.
    """
    overrides: dict[str, Any] = {}
    for item in _items(text):
        label, equals, value = item.partition("=")
        found = hint = ""
        if not equals or not label:
            found, hint = "no path=value", "write for instance epochs=5"
        elif label in overrides:
            found, hint = f"{label} is set twice", "keep one"
        elif not value.strip():
            found, hint = "no value", f"write {label}=null to turn it off"
        elif value.strip().lower() == "off":
            found, hint = "off is written null", f"write {label}=null"
        if found:
            raise OverrideError(found, hint, place=f"set={item}", labels=(label,))
        try:
            overrides[label] = parse(value, "set")[0]
        except ConfigError as error:
            raise _about(error, f"set={item}", (label,)) from None
    return overrides


def _items(text: str) -> list[str]:
    """Text split at its spaces, but not within quotation marks or brackets."""
    try:
        words = shlex.split(text)
    except ValueError:
        raise OverrideError(
            "a quotation mark is not closed", "close it", place=f"set={text}"
        ) from None
    items: list[str] = []
    num_open = 0
    for word in words:
        if num_open > 0:
            items[-1] += f" {word}"
        else:
            items.append(word)
        num_open = sum(items[-1].count(mark) for mark in "[{") - sum(
            items[-1].count(mark) for mark in "]}"
        )
    return items


def overridden(
    recipe: Kind, overrides: Mapping[str, Any], origin: str, locked: Collection[str]
) -> tuple[Kind, tuple]:
    """A typed recipe with values in the place of others, and what that changed.

    A new `name` keeps the keys that both components have and drops the others. locked: top-level
    keys that stay.

    Raises OverrideError for a path that the recipe cannot have, or for values that do not fit.
    """
    before, after = tree.plain(recipe), _after(recipe, overrides, origin, locked)
    if after is None:
        return recipe, ()
    try:
        result = check(type(recipe), after)
    except ConfigError as error:
        labels = _blamed(recipe, after, error, overrides, locked)
        place = " ".join(_item(origin, label, overrides[label]) for label in labels)
        off: Mapping[str, Any] = {labels[0]: None} if error.can_be_off else {}
        if origin == "set":

            def attempt(items: Mapping[str, Any]) -> object:
                return check(type(recipe), _after(recipe, items, origin, locked) or before)

            error = mended(error, overrides, attempt)
            if off:  # what else has to be off then
                off = mended(error.raised_as(ConfigError, fix=off), overrides, attempt).fix
        raise _about(error, place, labels, off) from None
    return result, deviations_between(recipe, result, origin)


def check_keys(
    kind: type[StrictModel], data: Mapping[str, Any], overrides: Mapping[str, Any]
) -> None:
    """Refuse overrides of keys that data of a class cannot have, whatever their values. Raises
    OverrideError.
    """
    for label, value in overrides.items():
        try:
            tree.find(kind, data, label)
        except ConfigError as error:
            if error.kind == "unknown_key":
                raise _about(error, _item("set", label, value), (label,)) from None


def _after(
    recipe: StrictModel, overrides: Mapping[str, Any], origin: str, locked: Collection[str]
) -> dict[str, Any] | None:
    """The plain data of a recipe with values in the place of others, None where that changes
    nothing. Raises OverrideError for a path that the recipe cannot have.
    """
    kind, before = type(recipe), tree.plain(recipe)
    after = before
    for label, value in sorted(overrides.items(), key=lambda item: not item[0].endswith(".name")):
        try:
            after = _put(kind, after, label, tree.plain(value), locked)
        except ConfigError as error:
            raise _about(error, _item(origin, label, value), (label,)) from None
    changes = list(tree.differences(before, after))
    if not changes:
        return None
    # Scores are published for the recipe as it stands, and a value that was set is no longer
    # assumed.
    return tree.without_assumed(
        kind, {**after, "published": ()}, [label for label, _, _ in changes]
    )


def mended(
    error: Error, items: Mapping[str, Any], attempt: Callable[[Mapping[str, Any]], object]
) -> Error:
    """An error with all that would be refused after it, and the one set= that satisfies them; the
    error itself where it has no fix.

    items: the overrides as given. attempt: raises what is wrong with others.
    """
    found, given, items, fix = [error.found], items, dict(items), error.fix
    while any(items.get(key, ...) != value for key, value in fix.items()):
        items |= fix
        try:
            attempt(items)
            break
        except UserError as later:
            fix = later.fix
            if fix:
                found.append(later.found)
    if not error.fix:
        return error
    made = copy.copy(error)
    made.found, made.hint = " and ".join(dict.fromkeys(found)), f"use {as_set(items)}"
    made.fix = {key: value for key, value in items.items() if given.get(key, ...) != value}
    return made


def as_text(items: Mapping[str, Any]) -> str:
    """Overrides as overrides_of reads them: `epochs=5 loss.name=ce`."""
    return " ".join(f"{label}={written(value)}" for label, value in items.items())


def as_set(items: Mapping[str, Any]) -> str:
    """Overrides as the word that is typed: set="epochs=5 loss.name=ce"."""
    return f'set="{as_text(items)}"'


def _about(
    error: ConfigError, place: str, labels: tuple[str, ...], off: Mapping[str, Any] | None = None
) -> OverrideError:
    """An error of a value as one of the items that set it: null, not a missing key, turns a part
    off there. off: all that turns it off, where it is not that item alone.
    """
    word = f"write {as_text(off or {labels[0]: None})} to turn it off" if error.can_be_off else ""
    hint = ", or ".join(filter(None, [error.hint, word]))
    fields = {"hint": hint, "can_be_off": False, "place": place, "line": None, "labels": labels}
    return error.raised_as(OverrideError, **fields)


def deviations_between(
    recipe: StrictModel, result: StrictModel, origin: str
) -> tuple[Deviation, ...]:
    """Where a recipe differs from another in what it does."""
    found = tree.differences(tree.plain(recipe), tree.plain(result))
    return tuple(
        Deviation(label, before, after, origin)
        for label, before, after in found
        if label.partition(".")[0] not in ("published", "assumed", "unconfirmed", "adapted_to")
    )


def _put(
    kind: type[StrictModel], recipe: dict[str, Any], label: str, value: Any, locked: Collection[str]
) -> dict:
    if label.partition(".")[0] in locked:
        raise ConfigError(
            "this is what the recipe says about itself",
            "to change it, write a recipe of your own",
            kind="locked",
        )
    try:
        path = tree.find(kind, recipe, label)
    except ConfigError as error:
        if error.kind == "off" and label.endswith(".name"):
            raise _named_while_off(error, kind, recipe, label, value) from None
        raise
    section = value_at(recipe, path[:-1])
    if path[-1] == "name" and name_of(section) is not None:
        return tree.replaced(
            recipe, path[:-1], _renamed(kinds_at(kind, recipe, path[:-1]), section, value)
        )
    if value is None:  # off: of a switch that is its false
        fields = [one.model_fields for one in chosen(kinds_at(kind, recipe, path[:-1]), section)]
        if any(path[-1] in one and one[path[-1]].default is False for one in fields):
            value = False
    return tree.replaced(recipe, path, value)


def _named_while_off(
    error: ConfigError, kind: type[StrictModel], recipe: Mapping[str, Any], label: str, name: Any
) -> ConfigError:
    """A part that is off got a name alone: the component's own example of the rest."""
    part = label.removesuffix(".name")
    kinds = kinds_at(kind, recipe, tree.find(kind, recipe, part))
    example = next((getattr(one, "example", None) for one in kinds if tag_of(one) == name), None)
    if example is None:
        return error
    item = f"{part}={written({'name': name, **example})}"
    return error.raised_as(ConfigError, hint=f'set it whole: set="{item}"')


def _renamed(
    kinds: list[type[StrictModel]], section: Mapping[str, Any], name: Any
) -> dict[str, Any]:
    by_name = {str(tag_of(kind)): kind for kind in kinds}
    if not isinstance(name, str) or name not in by_name:
        raise ConfigError(
            f"{quoted(name)} is not known here{suggestion(str(name), by_name)}", kind="unknown_name"
        )
    return {
        **{key: value for key, value in section.items() if key in by_name[name].model_fields},
        "name": name,
    }


def _blamed(
    recipe: StrictModel,
    after: Mapping[str, Any],
    error: ConfigError,
    overrides: Mapping[str, Any],
    locked: Collection[str],
) -> tuple[str, ...]:
    """The overrides at fault: the nearest to the place that alone is refused alike, else those
    without which the others are fine, or are refused for something else, else the nearest.
    """

    def refusal(labels: Collection[str]) -> tuple[Path, str] | None:
        try:
            some = _after(recipe, {label: overrides[label] for label in labels}, "", locked)
            if some is not None:
                check(type(recipe), some)
        except (ConfigError, OverrideError) as other:  # as of a path that others make possible
            return other.path, other.found
        return None

    nearest, this = _nearest(after, error.path, overrides), (error.path, error.found)
    for label in dict.fromkeys([*nearest, *overrides]):
        if refusal([label]) == this:
            return (label,)
    without = {one: refusal([label for label in overrides if label != one]) for one in overrides}
    fine = tuple(label for label, other in without.items() if other is None)
    return fine or tuple(label for label, other in without.items() if other != this) or nearest


def _nearest(
    recipe: Mapping[str, Any], path: Path, overrides: Mapping[str, Any]
) -> tuple[str, ...]:
    """The overrides nearest to the place that is refused; all of them where none is near."""
    place = label_of(recipe, path).split(".")

    def shared(label: str) -> int:
        pairs = zip(label.split("."), place, strict=False)
        return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))

    nearest = max(map(shared, overrides))
    return tuple(label for label in overrides if shared(label) == nearest)


def _item(origin: str, label: str, value: Any) -> str:
    return f"{origin}={label}={value if isinstance(value, str) else quoted(value)}"
