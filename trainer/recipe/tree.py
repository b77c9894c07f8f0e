"""Recipes as plain trees: reading labels, merging, differences. A user may also count:
augment.2.magnitude.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from trainer.base.component import StrictModel
from trainer.base.errors import ConfigError, Path
from trainer.recipe.check import (
    chosen,
    kinds_at,
    label_of,
    name_of,
    quoted,
    suggestion,
    tag_of,
    unknown_key,
    value_at,
)


def plain(value: Any) -> Any:
    """A typed recipe as plain data of what is on: what is off, and a section with nothing in it, is
    left out.

    Off is None, and what a field is when it is absent: False, an empty list. A false that differs
    from an absent key, such as model.zero_init_last, stays.
    """
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        in_order = sorted(value, key=lambda item: item[0] != "name")
        on = {
            key: plain(part)
            for key, part in in_order
            if part is not None and (part or part != fields[key].default)
        }
        return {
            key: part
            for key, part in on.items()
            if part != {} or not isinstance(getattr(value, key), BaseModel)
        }
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(plain(part) for part in value)
    return value


def from_json(data: Any) -> Any:
    """Plain data that was JSON: its lists are the tuples that they were."""
    if isinstance(data, dict):
        return {key: from_json(part) for key, part in data.items()}
    return tuple(map(from_json, data)) if isinstance(data, list) else data


def find(kind: type[StrictModel], data: Mapping[str, Any], label: str) -> Path:
    """The path that a label means in a recipe of `kind`; its last key may be absent from the data,
    that is, off.

    Raises ConfigError for a part that the recipe cannot have, with what was meant.
    """
    path: Path = ()
    for part in label.split("."):
        value = value_at(data, path)
        path = (
            *path,
            _item(data, path, part) if isinstance(value, tuple) else _key(kind, data, path, part),
        )
    return path


def leaves(data: Any, label: str = "") -> dict[str, Any]:
    """All single values of a tree by label; a list of numbers is one value."""
    parts = _parts(data)
    if parts is None:
        return {label: data}
    inner = [leaves(part, f"{label}.{key}" if label else key) for key, part in parts.items()]
    return {key: value for group in inner for key, value in group.items()}


def merged(recipe: Mapping[str, Any], lines: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with lines put over it: mappings merge, all else is replaced, and so is a component
    by another one.
    """
    result = dict(recipe)
    for key, value in lines.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            is_same = value.get("name", old.get("name")) == old.get("name")
            value = merged(old, value) if is_same else value
        result[key] = value
    return result


def replaced(data: Any, path: Path, value: Any) -> Any:
    """A tree with one value in another's place; None takes an item out of its list."""
    if not path:
        return value
    first, rest = path[0], path[1:]
    if isinstance(data, tuple):
        items = [
            replaced(item, rest, value) if number == first else item
            for number, item in enumerate(data)
        ]
        return tuple(item for item in items if item is not None)
    return {**(data or {}), first: replaced((data or {}).get(first), rest, value)}


def differences(before: Any, after: Any, label: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two trees differ: (label, before, after), None for off; a part that is off in one of
    them is one line.
    """
    old, new = _parts(before), _parts(after)
    if old is None or new is None or _is_reordered(before, after, old, new):
        if before != after:
            yield label, before, after
        return
    for key in [*old, *(key for key in new if key not in old)]:
        yield from differences(old.get(key), new.get(key), f"{label}.{key}" if label else key)


def changed(label: str, before: BaseModel, after: BaseModel) -> dict[str, Any]:
    """What differs between two sections or components as overrides: by path, or whole where it is
    another component.
    """
    if type(after) is not type(before):
        return {label: plain(after)}
    return {place: value for place, _, value in differences(plain(before), plain(after), label)}


def without_assumed(
    kind: type[StrictModel], recipe: Mapping[str, Any], changed: Collection[str]
) -> dict[str, Any]:
    """A recipe without the assumptions about what was changed, or is no longer there."""

    def stays(label: str) -> bool:
        if any(f"{label}.".startswith(f"{one}.") for one in changed):
            return False
        try:
            find(kind, recipe, label)
        except ConfigError:
            return False
        return True

    return {
        **recipe,
        "assumed": {label: why for label, why in recipe.get("assumed", {}).items() if stays(label)},
    }


def shown(value: Any, exact: bool = False) -> str:
    """A value as a recipe would write it, numbers to six digits; exact: by the shortest text that
    gives them back.
    """
    if value is None:
        return "off"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        rounded = f"{value:.6g}"
        return repr(value) if exact and float(rounded) != value else rounded
    if isinstance(value, tuple):
        return f"[{', '.join(shown(part, exact) for part in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(part, exact)}" for key, part in value.items()) + "}"
    return str(value)


def to_yaml(data: Any) -> str:
    """Plain data as YAML that a strict reader takes back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Text that YAML could take for something else is quoted; a tuple is a list."""


def _written_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    is_word = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_word else '"')


_Dumper.add_representer(str, _written_text)
_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)


def _parts(data: Any) -> dict[str, Any] | None:
    """The parts of a section by key, or of a list of components by name; None for a single
    value.
    """
    if isinstance(data, Mapping):
        return dict(data)
    if isinstance(data, tuple) and data and all(isinstance(name_of(item), str) for item in data):
        by_name = {name_of(item): item for item in data}
        return by_name if len(by_name) == len(data) else None
    return None


def _is_reordered(before: Any, after: Any, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two lists hold the same names in another order, which no item-by-item line would
    show.
    """
    is_list = isinstance(before, tuple)
    if isinstance(after, tuple) != is_list:
        return True
    return is_list and [name for name in old if name in new] != [
        name for name in new if name in old
    ]


def _item(data: Any, path: Path, part: str) -> int:
    items = value_at(data, path)
    names = [str(name_of(item)) for item in items]
    if part in names:
        return names.index(part)
    if part.isascii() and part.isdigit() and len(part) < 4 and int(part) < len(items):
        return int(part)
    found = f"{quoted(part)} is not in {label_of(data, path)}{suggestion(part, names)}"
    raise ConfigError(found, path=path, kind="unknown_name")


def _key(kind: type[StrictModel], data: Mapping[str, Any], path: Path, part: str) -> str:
    kinds, value, label = kinds_at(kind, data, path), value_at(data, path), label_of(data, path)
    if not kinds and isinstance(
        value, Mapping
    ):  # its keys are free, such as the fields of a timm optimizer
        return part
    if not kinds:
        raise ConfigError(
            f"{label} is a single value; it has no {quoted(part)}", path=path, kind="single_value"
        )
    if value is None and tag_of(kinds[0]) is not None:
        raise ConfigError(
            f"{label} is off", f"set it whole: {label}={{name: ...}}", path=path, kind="off"
        )
    if not any(part in one.model_fields for one in chosen(kinds, value)):
        raise unknown_key(kind, data, (*path, part))
    return part
