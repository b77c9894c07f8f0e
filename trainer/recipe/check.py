"""Plain data to typed values, or one error: where, what was found, what to do.

pydantic finds what is wrong; this file says it in one sentence that a user can act on, and knows
the keys of every section and component, so that it can suggest the one that was meant.

A place has one name everywhere: its label, as recipes and users write it: lr.peak, and
augment.rand_augment.magnitude for an item of a list, by its name, or by its number where it has
none. tree.find reads labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import ValidationError

from trainer.base.component import StrictModel, is_kind, registered, tag_of
from trainer.base.errors import ConfigError, Path, did_you_mean

Kind = TypeVar("Kind", bound=StrictModel)

# What a recipe says about itself; the rest is what it does.
ABOUT = (
    "name", "version", "title", "source", "adapted_to", "assumed", "unconfirmed", "per_model",
    "published",
)  # fmt: skip
_WANTED = {
    "int_type": "write a whole number",
    "int_from_float": "write a whole number",
    "float_type": "write a number",
    "finite_number": "write a finite number",
    "bool_type": "write true or false",
    "string_type": "write text",
    "tuple_type": "write a list: [..., ...]",
    "dict_type": "write a mapping: {key: value}",
    "model_type": "write a mapping: {key: value}",
    "model_attributes_type": "write a mapping: {name: ..., key: value}",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
# What a text is made of, by the pattern that its field has.
_MADE_OF = {
    r"^[0-9a-f]{64}$": "64 hex digits in small letters, as sha256sum prints them",
    r"^[A-Za-z0-9][A-Za-z0-9_-]*$": (
        "letters A to Z, digits, - and _, the first a letter or a digit"
    ),
    r"^[\w.+-]+$": "letters, digits and . + - _ only",
}
_LONGEST_QUOTE = 60


def refuse(
    path: Path,
    found: str,
    hint: str = "",
    kind: str = "conflict",
    fix: Mapping[str, Any] | None = None,
) -> ConfigError:
    """What a recipe's own validator raises: the path is counted from the recipe being validated."""
    return ConfigError(found, hint, path=path, kind=kind, fix=fix)


def check(kind: type[Kind], data: Mapping[str, Any], line: Callable[[Path], int] = len) -> Kind:
    """Plain data as a value of `kind`.

    line: of a path, which orders several errors: the first is raised; without lines the one that is
    nested least.

    Raises ConfigError for the first thing that is wrong; its path is counted from the data, and
    `others` has what else is wrong.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False)
    missing: dict[Path, list[str | int]] = {}
    errors = []
    for one in found:
        path = _untagged(data, one["loc"])
        if one["type"] == "missing":
            missing.setdefault(path[:-1], []).append(path[-1])
        else:
            errors.append(_error(kind, data, path, one))
    # A missing key beside one that is wrong is the same key, mistyped.
    wrong = {error.path[:-1] for error in errors}
    errors += [
        _missing(kind, data, path, keys) for path, keys in missing.items() if path not in wrong
    ]
    first, *others = sorted(errors, key=lambda error: line(error.path))
    first.others = tuple(others)
    raise first from None


def suggestion(word: str, choices: Iterable[str]) -> str:
    """The nearest choice as a question, or all the choices when none is near."""
    known = sorted(choices)
    return did_you_mean(word, known) or f"; known: {', '.join(known)}"


def label_of(data: Any, path: Path) -> str:
    """A path as a label: items of a list by their names, or by their numbers where they have
    none.
    """
    parts = []
    for part in path:
        data = value_at(data, (part,))
        name = name_of(data) if isinstance(part, int) else None
        parts.append(name if isinstance(name, str) else str(part))
    return ".".join(parts)


def name_of(item: Any) -> Any:
    """The name that a component's plain data has; None where it has none."""
    return item.get("name") if isinstance(item, Mapping) else None


def quoted(value: Any) -> str:
    """What was found, short and on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 3] + "..."


def written(value: Any) -> str:
    """A value as a recipe and set= read it, on one line, without quotation marks."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {written(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(written, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def kinds_in(annotation: Any) -> list[type[StrictModel]]:
    """The recipe classes that an annotation names, through unions, tuples and Annotated."""
    if get_origin(annotation) is Annotated:
        return kinds_in(get_args(annotation)[0])
    if (
        isinstance(annotation, type)
        and get_origin(annotation) is None
        and issubclass(annotation, StrictModel)
    ):
        return list(registered(annotation)) if is_kind(annotation) else [annotation]
    return [kind for argument in get_args(annotation) for kind in kinds_in(argument)]


def chosen(kinds: Sequence[type[StrictModel]], data: Any) -> list[type[StrictModel]]:
    """Those of the classes that the data's own `name` chooses; a section is always chosen."""
    return [kind for kind in kinds if tag_of(kind) in (None, name_of(data))]


def kinds_at(kind: type[StrictModel], data: Any, path: Path) -> list[type[StrictModel]]:
    """The classes that may stand at `path` of the data; none where the value is not a section or an
    component.
    """
    kinds = [kind]
    for part in path:
        if isinstance(part, str):
            annotations = [
                one.model_fields[part].annotation
                for one in chosen(kinds, data)
                if part in one.model_fields
            ]
            kinds = [found for annotation in annotations for found in kinds_in(annotation)]
        data = value_at(data, (part,))
    return kinds


def unknown_key(kind: type[StrictModel], data: Any, path: Path) -> ConfigError:
    """The error of the last key of `path`, which none of the classes that may stand there has."""
    key, section = str(path[-1]), path[:-1]
    kinds = kinds_at(kind, data, section)
    here = chosen(kinds, value_at(data, section)) or kinds
    elsewhere = [str(tag_of(one)) for one in kinds if one not in here and key in one.model_fields]
    if elsewhere:
        found = f"{key} is a key of {' and '.join(elsewhere)}, not of {tag_of(here[0])}"
        return ConfigError(found, "leave it out", path=path, kind="unknown_key")
    known = {key for one in here for key in one.model_fields}
    found = f"{quoted(key)} is no key of {_place(kind, data, section)}"
    near = did_you_mean(key, known) if section else ""  # without a section it was left out
    labels = dict.fromkeys(_labels(kind, data))
    labels.pop(label_of(data, path), None)
    ends = [label for label in labels if f".{label}".endswith(f".{key}")]
    if ends and not near:
        return ConfigError(found, f"use {' or '.join(ends)}", path=path, kind="unknown_key")
    return ConfigError(f"{found}{suggestion(key, known)}", path=path, kind="unknown_key")


def _labels(kind: type[StrictModel], data: Any, path: Path = ()) -> Iterator[str]:
    """Every key that data of a class has or may have, by its label: of a component that is off
    there are none.
    """
    value = value_at(data, path)
    here = chosen(kinds_at(kind, data, path), value)
    keys: list[str | int] = [key for one in here for key in one.model_fields]
    if path and value is None and _is_list(kind, data, path):
        keys = []  # each key of a list's parts stands behind a number
    if isinstance(value, (list, tuple)):
        keys = list(range(len(value)))
    elif isinstance(value, Mapping):
        keys += [key for key in value if key not in keys]
    for key in keys:
        if path or key not in ABOUT:
            if isinstance(key, str):
                yield label_of(data, (*path, key))
            yield from _labels(kind, data, (*path, key))


def _is_list(kind: type[StrictModel], data: Any, path: Path) -> bool:
    section = path[:-1]
    return any(
        get_origin(one.model_fields[str(path[-1])].annotation) is tuple
        for one in chosen(kinds_at(kind, data, section), value_at(data, section))
        if path[-1] in one.model_fields
    )


def value_at(data: Any, path: Path) -> Any:
    """The part of plain data at a path, None where there is none."""
    for part in path:
        if isinstance(data, Mapping):
            data = data.get(part)
        elif isinstance(data, (list, tuple)) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            return None
    return data


def _untagged(data: Any, location: Path) -> Path:
    """pydantic's location without the names of the union branches it took."""
    path: list[str | int] = []
    for number, part in enumerate(location):
        is_last = number == len(location) - 1
        if (
            isinstance(data, Mapping)
            and part not in data
            and not (is_last and part != name_of(data))
        ):
            continue
        if isinstance(part, str) and not isinstance(data, Mapping):
            continue
        path.append(part)
        data = value_at(data, (part,))
    return tuple(path)


def _error(
    kind: type[StrictModel], data: Mapping[str, Any], path: Path, error: Mapping[str, Any]
) -> ConfigError:
    reason, context, value = error["type"], error.get("ctx", {}), error["input"]
    if isinstance(raised := context.get("error"), ConfigError):
        return raised.raised_as(ConfigError, path=path + raised.path)
    if reason == "extra_forbidden":
        return unknown_key(kind, data, path)
    if reason == "union_tag_not_found":
        return _no_name(kind, data, path)
    if reason == "union_tag_invalid":
        names = [tag_of(one) or "" for one in kinds_at(kind, data, path)]
        what = next((part for part in reversed(path) if isinstance(part, str)), "component")
        found = f"{quoted(str(value['name']))} is no {what}{suggestion(str(value['name']), names)}"
        return ConfigError(found, path=(*path, "name"), kind="unknown_name")
    off = reason.startswith("greater_than") and value == 0 and _may_be_off(kind, data, path)
    found = f"{label_of(data, path)} is {quoted(value)}"
    hint = _remedy(reason, context, error["msg"])
    if reason in ("model_type", "model_attributes_type"):
        hint += _such_as(kinds_at(kind, data, path), value)
    return ConfigError(found, hint, path=path, kind=reason, can_be_off=off)


def _may_be_off(kind: type[StrictModel], data: Any, path: Path) -> bool:
    """May the last key of a path be absent?"""
    here = chosen(kinds_at(kind, data, path[:-1]), value_at(data, path[:-1]))
    fields = [one.model_fields[str(path[-1])] for one in here if path[-1] in one.model_fields]
    return bool(fields) and not any(field.is_required() for field in fields)


def _such_as(kinds: Sequence[type[StrictModel]], value: Any) -> str:
    """The example of the component that is named by the value, or the first there is, to be
    copied; empty where none has one.
    """
    named = [one for one in kinds if isinstance(value, str) and tag_of(one) == value]
    for one in named or kinds:
        if (example := getattr(one, "example", {})) or named:
            name = {"name": tag_of(one)} if tag_of(one) else {}
            return f", such as {written({**name, **example})}"
    return ""


def _missing(
    kind: type[StrictModel], data: Any, path: Path, keys: Sequence[str | int]
) -> ConfigError:
    """Keys that are not there; the path is that of the section."""
    place = _place(kind, data, path)
    if isinstance(
        last := keys[-1], int
    ):  # of a list of fixed length, whose first keys[0] are there
        found, hint = f"{place} is a list of {keys[0]}", f"write {last + 1} values"
        return ConfigError(found, hint, path=path, kind="missing")
    them, these = ("them", "these") if len(keys) > 1 else ("it", "this one")
    example = _example(kind, data, path, keys)
    such = ", ".join(f"{key}: {written(value)}" for key, value in example.items())
    hint = f"add {such or them}: an absent key means off, and {these} cannot be off"
    found = f"{place} has no {', '.join(map(str, keys))}"
    fix = {f"{label_of(data, path)}.{key}": value for key, value in example.items()}
    return ConfigError(found, hint, path=path, kind="missing", fix=fix)


def _example(
    kind: type[StrictModel], data: Any, path: Path, keys: Sequence[str | int]
) -> dict[str, Any]:
    """The component's own example of the keys that are missing; empty where it has not all."""
    for one in chosen(kinds_at(kind, data, path), value_at(data, path)):
        example = getattr(one, "example", {})
        if all(key in example for key in keys):
            return {str(key): example[key] for key in keys}
    return {}


def _no_name(kind: type[StrictModel], data: Mapping[str, Any], path: Path) -> ConfigError:
    """A component without a name: perhaps the name's key is mistyped."""
    kinds = kinds_at(kind, data, path)
    for key in value_at(data, path) or ():
        if not any(key in one.model_fields for one in kinds):
            return unknown_key(kind, data, (*path, key))
    names = ", ".join(sorted(str(tag_of(one)) for one in kinds))
    return ConfigError(
        f"{_place(kind, data, path)} has no name",
        f"add name: one of {names}",
        path=path,
        kind="missing",
    )


def _remedy(reason: str, context: Mapping[str, Any], message: str) -> str:
    if reason in _WANTED:
        return _WANTED[reason]
    if reason in _BOUNDS:
        key, word = _BOUNDS[reason]
        return f"it must be {word} {context[key]:g}"
    if reason == "literal_error":
        return f"write {context['expected']}"
    if reason == "string_pattern_mismatch":
        return (
            f"write {_MADE_OF.get(context['pattern'], 'text that matches ' + context['pattern'])}"
        )
    return " ".join(message.removeprefix("Value error, ").split())


def _place(kind: type[StrictModel], data: Any, path: Path) -> str:
    return label_of(data, path) or f"this {kind.file_is}"
