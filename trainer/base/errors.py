"""The one tree of errors that a user can cause. The command line turns each into one line and exit
2.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

# Keys and list positions from the top of a file's values to one of them: ("augment", 2, "area").
Path = tuple[str | int, ...]


LONGEST_QUOTE = 200
_LONGEST_LINE = 3000
_MOST_BEGIN = 6  # known words that all begin with a wrong one
_MOST_OTHERS = 8  # faults of one file beside the first


class UserError(ValueError):
    """What the user wrote is wrong. The one line that is shown is made from the fields: `place:
    found; hint`.

    found: what was found. hint: what to do. path: of the value, where the error is about one. kind:
    a code for programs, such as `missing`. place: a file, or the option of the command line; line:
    of the file, from 1. can_be_off: leaving the key out is a way out too. fix:
    overrides by label that would mend it.
    """

    def __init__(
        self,
        found: str,
        hint: str = "",
        *,
        path: Path = (),
        kind: str = "",
        place: str = "",
        line: int | None = None,
        can_be_off: bool = False,
        fix: Mapping[str, Any] | None = None,
    ):
        super().__init__(found)
        self.fix = fix or {}
        self.found, self.hint, self.path, self.kind = found, hint, path, kind
        self.place, self.line, self.can_be_off = place, line, can_be_off

    def __str__(self) -> str:
        place = self.place if self.line is None else f"{self.place}:{self.line}"
        off = "leave the key out to turn it off" if self.can_be_off else ""
        hint = ", or ".join(filter(None, [self.hint, off]))
        return one_line(
            (f"{place}: " if place else "") + self.found + (f"; {hint}" if hint else "")
        )

    def raised_as(self, error: type[Error], **changed: Any) -> Error:
        """The same error as one of another class, with some fields changed."""
        fields = ("found", "hint", "path", "kind", "place", "line", "can_be_off", "fix")
        return error(**{name: getattr(self, name) for name in fields} | changed)


Error = TypeVar("Error", bound=UserError)


class ConfigError(UserError):
    """A value of a YAML file that does not fit, or a file that cannot be read. others: what else is
    wrong in the same data.
    """

    others: tuple[ConfigError, ...] = ()


def all_of(errors: Iterable[ConfigError]) -> ConfigError:
    """The first of some errors in files by its line, with the others, each place once, in its
    hint.
    """
    by_place: dict[tuple, ConfigError] = {}
    for error in sorted(errors, key=lambda error: error.line or 0):
        by_place.setdefault((error.place, error.line, error.path), error)
    first, *others = by_place.values()
    if not others:
        return first
    listed = []
    for one in others[:_MOST_OTHERS]:
        where = f"line {one.line}: " if one.place == first.place else f"{one.place}:{one.line}: "
        listed.append(f"{where}{one.found}" + (f" ({one.hint})" if one.hint else ""))
    if len(others) > len(listed):
        listed.append(f"and {len(others) - len(listed)} more")
    hint = "; ".join([*filter(None, [first.hint]), f"also {listed[0]}", *listed[1:]])
    return first.raised_as(ConfigError, hint=hint)


class OverrideError(UserError):
    """An override that does not fit its recipe. place: the items as given. labels: their paths, as
    given.
    """

    def __init__(self, found: str, hint: str = "", *, labels: tuple[str, ...] = (), **fields: Any):
        super().__init__(found, hint, **fields)
        self.labels = labels


class PlanError(UserError):
    """The recipe, the data set and the machine do not fit together."""


class DataError(UserError):
    """A dataset is missing, damaged, or does not match its profile."""


def one_line(text: str) -> str:
    """Text as the one line of an error: printable, and of what was given at most 200 characters.

    What was given stands before the first colon, or has no blanks; what may be a path stays whole.
    """
    place, colon, rest = printable(text).partition(": ")
    line = (_shortened(place) if colon else place) + colon + rest
    line = re.sub(rf"\S{{{LONGEST_QUOTE + 1},}}", lambda found: _shortened(found[0]), line)
    return _shortened(line, _LONGEST_LINE)


def _shortened(text: str, most: int = LONGEST_QUOTE) -> str:
    """The first and the last characters of a text that is longer."""
    parts = text.split("/")
    is_path = len(parts) > 1 and len(text) < 4096 and max(map(len, parts)) < 256
    if len(text) <= most or (is_path and most == LONGEST_QUOTE):
        return text
    return f"{text[: most // 2]}...{text[3 - most + most // 2 :]}"


def printable(text: str) -> str:
    """Text on one line, control characters escaped: \\x1b."""
    return "".join(
        mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the known word closest to `word`, ` (did you mean X, Y or Z?)` for
    the few that begin with it, or the empty string.
    """
    known = list(known)
    begin = [each for each in known if each.startswith(word)] if word else []
    if 1 < len(begin) <= _MOST_BEGIN:
        return f" (did you mean {', '.join(begin[:-1])} or {begin[-1]}?)"
    if len(begin) == 1 and len(word) > 2:
        return f" (did you mean {begin[0]}?)"
    cutoff = 0.6 if len(word) > 2 else 0.5  # one letter of two
    near = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f" (did you mean {near[0]}?)" if near else ""
