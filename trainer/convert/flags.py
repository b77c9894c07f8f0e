"""The flags of another program, each with what becomes of it here, and their values as given."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.base.errors import UserError, did_you_mean

SWITCH, YES_NO, PAIRS = "switch", "yes_no", "pairs"
Fate = Literal["recipe", "setting", "data", "nothing", "unsayable"]


@dataclass(frozen=True)
class Flag:
    """One flag of another program.

    names: as written, `-b`, `--batch-size`; a positional one without dashes. kind: a type, a list
    of one type for several values, or SWITCH, YES_NO (true or false), PAIRS (key=value).
    fate: "recipe": its converter reads it; "setting": it is said elsewhere here, `note` says how;
    "data": it is a fact of the data, which a profile holds; "nothing": a path, logging and the
    like; "unsayable": a recipe cannot say any other value than the default, `note` says what it is.
    master: the key of the flag without which this one does nothing.
    """

    names: tuple[str, ...]
    kind: Any
    default: Any
    fate: Fate
    note: str = ""
    master: str = ""

    @property
    def key(self) -> str:
        """As argparse and args.yaml name it: `batch_size`."""
        return self.label.lstrip("-").replace("-", "_")

    @property
    def label(self) -> str:
        """Its long name."""
        return next((name for name in self.names if name.startswith("--")), self.names[0])


def flags(fate: Fate, *rows: tuple, master: str = "") -> tuple[Flag, ...]:
    """Flags of one fate; each row is (names with spaces between, kind, default, note or none)."""
    return tuple(
        Flag(tuple(names.split()), kind, default, fate, " ".join(note), master)
        for names, kind, default, *note in rows
    )


class Args:
    """The values of a command's flags, given or by default. What is read of them is noted, so that
    what was given and had no effect can be named.

    program: as messages name it, with its version. is_complete: all flags are given, as args.yaml
    does; then those at their default are not worth a word.
    """

    def __init__(
        self,
        program: str,
        known: Sequence[Flag],
        given: Mapping[str, Any],
        defaults: Mapping[str, Any],
        is_complete: bool = False,
    ) -> None:
        self.program, self.given, self._is_complete = program, given, is_complete
        self._flags = {flag.key: flag for flag in known}
        self._defaults = {key: flag.default for key, flag in self._flags.items()}
        self._defaults |= defaults
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self.given.get(key, self._defaults[key])

    def has(self, key: str) -> bool:
        """Does the program have such a flag?"""
        return key in self._flags

    def is_given(self, key: str) -> bool:
        """Does the command itself give this flag a value?"""
        return key in self.given

    def label(self, key: str) -> str:
        """The flag as its program spells it, such as `--lr`."""
        return self._flags[key].label

    def written(self, key: str) -> str:
        """The flag with its value, as one would write it."""
        value = self.given.get(key, self._defaults[key])
        if value is True:
            return self.label(key)
        items = value if isinstance(value, (list, tuple)) else [value]
        return " ".join([self.label(key), *map(str, items)])

    def of_fate(self, fate: Fate) -> Iterator[Flag]:
        """The given flags of one fate, in the order of the table."""
        for key, flag in self._flags.items():
            is_worth_it = not self._is_complete or not self._is_off(key)
            if flag.fate == fate and key in self.given and is_worth_it:
                yield flag

    def unread(self) -> Iterator[Flag]:
        """The given flags that a recipe could have said, and that nothing asked for."""
        return (flag for flag in self.of_fate("recipe") if flag.key not in self._read)

    def unsayable(self) -> Iterator[Flag]:
        """The flags with a value that no recipe can say."""
        for flag in self.of_fate("unsayable"):
            is_active = not flag.master or not self._is_off(flag.master)
            if is_active and not self._is_off(flag.key):
                yield flag

    def _is_off(self, key: str) -> bool:
        value = self.given.get(key, self._defaults[key])
        is_empty = value is None or value is False or value in ("", [], (), {})
        return is_empty or value == self._defaults[key]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(message, "write the command as its own program takes it", place=self.prog)


def read_words(words: Sequence[str], known: Sequence[Flag], program: str) -> dict[str, Any]:
    """The values that a command line gives, by key, as argparse reads them: abbreviations, `=`.

    Raises UserError for a value that does not fit, an ambiguous abbreviation, or flags that the
    program does not have, all of them, each with the nearest that it has.
    """
    parser = _Parser(prog=program, add_help=False, argument_default=argparse.SUPPRESS)
    for flag in known:
        names = flag.names if flag.names[0].startswith("-") else (flag.key,)
        parser.add_argument(*names, **_argparse_words(flag))
    found, rest = parser.parse_known_args(list(words))
    if rest:
        labels = [name for flag in known for name in flag.names]
        unknown = [word.partition("=")[0] for word in rest if word.startswith("-")]
        named = [f"{word}{did_you_mean(word, labels)}" for word in unknown or rest]
        raise UserError(
            f"{program} has no {', '.join(named)}",
            "mend it or leave it out",
            place="args",
            kind="unknown_flag",
        )
    return {key: value for key, value in vars(found).items() if value is not argparse.SUPPRESS}


def _argparse_words(flag: Flag) -> dict[str, Any]:
    if not flag.names[0].startswith("-"):
        return {"nargs": "?"}
    words: dict[str, Any] = {"dest": flag.key}
    if flag.kind == SWITCH:
        return words | {"action": "store_true"}
    if flag.kind == PAIRS:
        return words | {"nargs": "*", "type": str}
    if isinstance(flag.kind, list):
        return words | {"nargs": "+", "type": flag.kind[0]}
    if flag.note == "optional":  # such as --torchcompile, whose value may be left out
        return words | {"nargs": "?", "const": True}
    return words | {"type": _yes_no if flag.kind == YES_NO else flag.kind}


def _yes_no(text: str) -> bool:
    if text.lower() not in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("yes", "true", "t", "y", "1")


def read_mapping(data: Mapping[str, Any], known: Sequence[Flag], program: str) -> dict[str, Any]:
    """The values of an args.yaml, by key; those of keys that the program does not have stay there.

    Raises UserError for a value of another type.
    """
    by_name = {
        name.lstrip("-").replace("-", "_"): flag
        for flag in known
        for name in flag.names
        if name.startswith("--") or name == flag.label
    }
    found = {}
    for key, value in data.items():
        flag = by_name.get(key.replace("-", "_"))
        found[flag.key if flag else key] = _typed(flag, value, program) if flag else value
    return found


def _typed(flag: Flag, value: Any, program: str) -> Any:
    """A value of YAML as the flag's type. A null is the value None, which may be other than the
    default.
    """
    if value is None or flag.kind == PAIRS:
        return value
    if flag.kind in (SWITCH, YES_NO):
        fits = isinstance(value, bool)
    elif isinstance(flag.kind, list):
        value = list(value) if isinstance(value, (tuple, list)) else [value]
        fits = all(_is_of(flag.kind[0], item) for item in value)
    else:
        fits = _is_of(flag.kind, value) or flag.note == "optional"
        value = float(value) if fits and flag.kind is float else value
    if not fits:
        raise UserError(
            f"{flag.key}: {value!r} is no value of {program}'s {flag.label}",
            "write what the program takes",
            place="args",
            kind="wrong_type",
        )
    return value


def _is_of(kind: type, value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, kind)
