"""The one tree of errors that a user can cause. The command line turns each into one line and exit 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What the user wrote is wrong: one line that says where, what was found and what would do."""


class PlanError(UserError):
    """The recipe, the data set and the machine do not fit together."""


def printable(text: str) -> str:
    """Text on one line, what a terminal would obey written out: \\x1b."""
    return "".join(
        mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the known word closest to `word`, or the empty string."""
    cutoff = 0.6 if len(word) > 2 else 0.5  # one letter of two
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {near[0]}?)" if near else ""
