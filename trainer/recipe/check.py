"""Plain data to typed values, or one refusal: where, what was found, what would do.

pydantic finds what is wrong; this file says it in one sentence that a user can act on, and knows the keys of every
section and ingredient, so that it can suggest the one that was meant.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from trainer.base.component import is_kind, registered, tag_of
from trainer.base.errors import UserError, did_you_mean

Path = tuple[str | int, ...]
Kind = TypeVar("Kind", bound=BaseModel)

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
    r"^[A-Za-z0-9][A-Za-z0-9_-]*$": "letters A to Z, digits, - and _, the first a letter or a digit",
    r"^[\w.+-]+$": "letters, digits and . + - _ only",
}
_LONGEST_QUOTE = 60


class Refusal(UserError):
    """Plain data that is not what it should be.

    path: keys and list positions from the top to the place. sentence: what was found; what would do.
    """

    def __init__(self, path: Path, sentence: str):
        super().__init__(f"{dotted(path)}: {sentence}" if path else sentence)
        self.path = path
        self.sentence = sentence


def refuse(path: Path, sentence: str) -> PydanticCustomError:
    """What a page's own validator raises: the path is counted from the page being validated."""
    return PydanticCustomError("page", "{sentence}", {"path": path, "sentence": sentence})


def check(kind: type[Kind], data: Mapping[str, Any]) -> Kind:
    """Plain data as a value of `kind`.

    Raises Refusal for the first thing that is wrong, in the order of the data.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        refusals = [_refusal(kind, data, found) for found in error.errors(include_url=False)]
    order = {path: number for number, path in enumerate(_paths(data))}
    raise min(_merged(refusals), key=lambda refusal: order[_nearest(refusal.path, order)]) from None


def suggestion(word: str, choices: Iterable[str]) -> str:
    """The nearest choice as a question, or all the choices when none is near."""
    known = sorted(choices)
    return did_you_mean(word, known) or f"; known: {', '.join(known)}"


def dotted(path: Path) -> str:
    """A path as a user writes it: lr.peak, augment.2.magnitude."""
    return ".".join(str(part) for part in path)


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


def kinds_in(annotation: Any) -> list[type[BaseModel]]:
    """The page classes that an annotation names, through unions, tuples and Annotated."""
    if get_origin(annotation) is Annotated:
        return kinds_in(get_args(annotation)[0])
    if (
        isinstance(annotation, type)
        and get_origin(annotation) is None
        and issubclass(annotation, BaseModel)
    ):
        return list(registered(annotation)) if is_kind(annotation) else [annotation]
    return [kind for argument in get_args(annotation) for kind in kinds_in(argument)]


def chosen(kinds: Sequence[type[BaseModel]], data: Any) -> list[type[BaseModel]]:
    """Those of the classes that the data's own `name` chooses; a section is always chosen."""
    name = data.get("name") if isinstance(data, Mapping) else None
    return [kind for kind in kinds if tag_of(kind) in (None, name)]


def kinds_at(kind: type[BaseModel], data: Any, path: Path) -> list[type[BaseModel]]:
    """The classes that may stand at `path` of the data; none where the value is not a section or an ingredient."""
    kinds = [kind]
    for part in path:
        if isinstance(part, str):
            annotations = [
                one.model_fields[part].annotation
                for one in chosen(kinds, data)
                if part in one.model_fields
            ]
            kinds = [found for annotation in annotations for found in kinds_in(annotation)]
        data = _step(data, part)
    return kinds


def unknown_key(
    kinds: Sequence[type[BaseModel]], here: Sequence[type[BaseModel]], path: Path
) -> Refusal:
    """The refusal of the last key of `path`, where `kinds` may stand and `here` are those that the data chose."""
    key = str(path[-1])
    elsewhere = [str(tag_of(one)) for one in kinds if one not in here and key in one.model_fields]
    if elsewhere and here:
        sentence = (
            f"{key} is a key of {' and '.join(elsewhere)}, not of {tag_of(here[0])}; leave it out"
        )
    else:
        sentence = f"{quoted(key)} is no key of {_place(path[:-1])}{suggestion(key, _keys(here))}"
    return Refusal(path, sentence)


def value_at(data: Any, path: Path) -> Any:
    """The part of plain data at a path, None where there is none."""
    for part in path:
        data = _step(data, part)
    return data


def _step(data: Any, part: str | int) -> Any:
    if isinstance(data, Mapping):
        return data.get(part)
    if isinstance(data, (list, tuple)) and isinstance(part, int) and part < len(data):
        return data[part]
    return None


def _untagged(data: Any, location: Path) -> Path:
    """pydantic's location without the names of the union branches it took."""
    path: list[str | int] = []
    for number, part in enumerate(location):
        is_last = number == len(location) - 1
        if (
            isinstance(data, Mapping)
            and part not in data
            and not (is_last and part != data.get("name"))
        ):
            continue
        if isinstance(part, str) and not isinstance(data, Mapping):
            continue
        path.append(part)
        data = _step(data, part)
    return tuple(path)


def _refusal(kind: type[BaseModel], data: Mapping[str, Any], error: Mapping[str, Any]) -> Refusal:
    path, reason, context = _untagged(data, error["loc"]), error["type"], error.get("ctx", {})
    if reason == "page":
        return Refusal(path + tuple(context["path"]), context["sentence"])
    if reason == "extra_forbidden":
        kinds = kinds_at(kind, data, path[:-1])
        return unknown_key(kinds, chosen(kinds, value_at(data, path[:-1])), path)
    if reason == "missing":
        return _Missing(path[:-1], path[-1])
    if reason == "union_tag_not_found":
        return _untold_name(kind, data, path)
    if reason == "union_tag_invalid":
        names = [tag_of(one) or "" for one in kinds_at(kind, data, path)]
        name = str(error["input"]["name"])
        return Refusal(
            (*path, "name"), f"{quoted(name)} is no {_last_word(path)}{suggestion(name, names)}"
        )
    return Refusal(
        path, f"{dotted(path)} is {quoted(error['input'])}; {_remedy(reason, context, error)}"
    )


class _Missing(Refusal):
    """Keys that are not there; the path is that of the section."""

    def __init__(self, path: Path, *keys: str | int):
        self.keys = keys
        if isinstance(keys[0], int):
            super().__init__(
                path, f"{_place(path)} is a list of {keys[0]}; write {keys[-1] + 1} values"
            )
        else:
            these = "these" if len(keys) > 1 else "this one"
            off = f"add {'them' if len(keys) > 1 else 'it'}: an absent key means off, and {these} cannot be off"
            super().__init__(path, f"{_place(path)} has no {', '.join(map(str, keys))}; {off}")


def _untold_name(kind: type[BaseModel], data: Mapping[str, Any], path: Path) -> Refusal:
    """An ingredient without a name: perhaps the name's key is mistyped."""
    kinds = kinds_at(kind, data, path)
    for key in value_at(data, path) or ():
        if key not in _keys(kinds):
            return Refusal(
                (*path, key),
                f"{quoted(key)} is no key of {_place(path)}{suggestion(key, _keys(kinds))}",
            )
    names = ", ".join(sorted(str(tag_of(one)) for one in kinds))
    return Refusal(path, f"{_place(path)} has no name; add name: one of {names}")


def _remedy(reason: str, context: Mapping[str, Any], error: Mapping[str, Any]) -> str:
    if reason in _WANTED:
        return _WANTED[reason]
    if reason in _BOUNDS:
        key, word = _BOUNDS[reason]
        off = (
            ", or leave the key out to turn it off"
            if error["input"] == 0 and reason == "greater_than"
            else ""
        )
        return f"it must be {word} {context[key]:g}{off}"
    if reason == "literal_error":
        return f"write {context['expected']}"
    if reason == "string_pattern_mismatch":
        return (
            f"write {_MADE_OF.get(context['pattern'], 'text that matches ' + context['pattern'])}"
        )
    message = error["msg"].removeprefix("Value error, ")
    return " ".join(message.split())


def _merged(refusals: list[Refusal]) -> list[Refusal]:
    """All missing keys of a section as one, or none where it has a key that is not known: that is the one, mistyped."""
    others = [refusal for refusal in refusals if not isinstance(refusal, _Missing)]
    missing: dict[Path, list[str | int]] = {}
    for refusal in refusals:
        if isinstance(refusal, _Missing) and refusal.path not in {
            other.path[:-1] for other in others
        }:
            missing.setdefault(refusal.path, []).extend(refusal.keys)
    return others + [_Missing(path, *keys) for path, keys in missing.items()]


def _paths(data: Any, path: Path = ()) -> Iterator[Path]:
    """All paths of plain data in its own order, each section before its parts."""
    yield path
    parts = (
        data.items()
        if isinstance(data, Mapping)
        else enumerate(data)
        if isinstance(data, (list, tuple))
        else ()
    )
    for key, part in parts:
        yield from _paths(part, (*path, key))


def _nearest(path: Path, known: Container[Path]) -> Path:
    while path not in known:
        path = path[:-1]
    return path


def _keys(kinds: Iterable[type[BaseModel]]) -> set[str]:
    return {key for kind in kinds for key in kind.model_fields}


def _place(path: Path) -> str:
    return dotted(path) or "this page"


def _last_word(path: Path) -> str:
    words = [part for part in path if isinstance(part, str)]
    return words[-1] if words else "ingredient"
