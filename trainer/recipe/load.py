"""YAML text to typed values, or one error with file, line and what to do.

A recipe is read as strictly as it can be: YAML 1.1 takes `no` for false, `1:30` for 90 and `010`
for 8, and says nothing about a key written twice. Here each of these is an error, and so is all
that would let a recipe say something elsewhere than where it is read: anchors, aliases, merge keys,
tags. `5e-3`, text in YAML 1.1 and a number in YAML 1.2, is a number, here and in set=.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from trainer.base.component import StrictModel
from trainer.base.errors import ConfigError, UserError, all_of, printable
from trainer.base.errors import Path as ValuePath
from trainer.recipe.check import check, quoted
from trainer.recipe.tree import to_yaml

Kind = TypeVar("Kind", bound=StrictModel)

LARGEST_RECIPE_KIB = 256
DEEPEST_NESTING = 20

_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_FRACTION = re.compile(r"-?(0|[1-9][0-9]{0,17})\.[0-9]{1,40}([eE][-+][0-9]{1,4})?")
# 5e-3, 1.5e3: text in YAML 1.1
_WITH_EXPONENT = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,40})?[eE][-+]?[0-9]{1,4}")
# one way to match: no text takes long
_ALMOST_A_NUMBER = re.compile(r"[-+]?(\d+(_\d+)*(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
# Nor what turns the direction of the text around it: a line would read otherwise than it says.
_UNPRINTABLE = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u061b\u061d-\u200d\u2010-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\ufefe\uff00-\ufffd"
    "\U00010000-\U0010ffff]"
)
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Positions:
    """Where each part of a recipe stands: `lines` counts from 1, by path of keys and list
    positions.
    """

    place: str
    lines: dict[ValuePath, int] = field(default_factory=dict)

    def line(self, path: ValuePath) -> int:
        """The line of a path, or of the nearest section around it."""
        while path not in self.lines:
            path = path[:-1]
        return self.lines[path]

    def error(self, path: ValuePath, found: str, hint: str = "") -> ConfigError:
        """An error about one path of the recipe."""
        return ConfigError(found, hint, path=path, place=self.place, line=self.line(path))

    def located(self, error: UserError, path: ValuePath, about: str = "") -> ConfigError:
        """An error from elsewhere as one about a path of the recipe; one that has its own line in a
        file stays as it is.
        """
        if isinstance(error, ConfigError) and error.line is not None:
            return error
        found = ": ".join(filter(None, [about, error.place, error.found]))
        return error.raised_as(
            ConfigError, found=found, path=path, place=self.place, line=self.line(path)
        )


def load_yaml(path: Path | str, kind: type[Kind]) -> tuple[Kind, Positions]:
    """One YAML file as a value of `kind`, and where each of its keys stands.

    Raises ConfigError for the first thing that is wrong with the file, its YAML, or its values.
    """
    place = _shown(Path(path))
    return _parsed(_text(Path(path), place), place, kind)


def read_plain(path: Path) -> Any:
    """What a YAML file says, as plain data, whether or not it is a recipe. Raises ConfigError for
    one that cannot be read or is no YAML of ours.
    """
    place = _shown(path)
    return parse(_text(path, place), place)[0]


@functools.lru_cache(maxsize=256)
def _parsed(text: str, place: str, kind: type[Kind]) -> tuple[Kind, Positions]:
    """A command reads the same recipe several times, and a recipe is frozen: it is parsed once."""
    return parse_recipe(text, place, kind)


def parse_recipe(text: str, place: str, kind: type[Kind]) -> tuple[Kind, Positions]:
    """YAML text as a value of `kind`; `place` stands in the errors where a file's name would."""
    data, positions = parse(text, place)
    if not isinstance(data, dict):
        raise positions.error((), f"{quoted(data)} where a recipe begins", "write key: value lines")
    try:
        return check(kind, data, positions.line), positions
    except ConfigError as error:
        found = (error, *error.others)
        raise all_of(positions.located(one, one.path) for one in found) from None


def parse(text: str, place: str) -> tuple[Any, Positions]:
    """YAML text as plain data (dict, tuple, str, bool, int, float, None), and where each part of it
    stands.

    Raises ConfigError for text that is not YAML, or is YAML of the kinds that mislead.
    """
    if found := _UNPRINTABLE.search(text.removeprefix("\ufeff")):
        line = text.count("\n", 0, found.start()) + 1
        raise ConfigError(
            f"the character {found.group()!a}", "a recipe is printable text", place=place, line=line
        )
    reader = _Reader(Positions(place))
    return reader.value(_compose(text, place), ()), reader.positions


def _text(path: Path, place: str) -> str:
    line = 1
    try:
        if not path.is_file():
            found, hint = (
                "is a folder, not a recipe" if path.is_dir() else "is no file",
                "give the path of a .yaml file",
            )
        elif path.stat().st_size > LARGEST_RECIPE_KIB * 1024:
            found, hint = (
                f"{path.stat().st_size} bytes",
                f"a recipe holds at most {LARGEST_RECIPE_KIB} KiB",
            )
        else:
            return (raw := path.read_bytes()).decode()
    except OSError as error:
        found, hint = f"cannot be read ({error.strerror})", "check its path and permissions"
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        found, hint = f"the byte 0x{raw[error.start]:02x}", "save the recipe as UTF-8"
    raise ConfigError(found, hint, place=place, line=line)


def _shown(path: Path) -> str:
    """A path as the user would write it: relative where it lies under the current folder, always on
    one line.
    """
    with contextlib.suppress(ValueError, OSError, RuntimeError):
        path = path.resolve().relative_to(Path.cwd())
    return printable(str(path))


class _Composer(yaml.SafeLoader):
    """PyYAML up to its tree of nodes; no object is ever built from a tag."""

    def __init__(self, text: str, place: str):
        super().__init__(text)
        self.place, self.depth = place, 0

    def compose_node(self, parent, index):
        """One node, unless it is an anchor, an alias, tagged or too deep: called by PyYAML."""
        event, refused = self.peek_event(), None
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            refused = "an anchor or alias", "write the value out where it is used"
        elif event.tag is not None:
            refused = f"the tag {event.tag[:40]!a}", "leave it out"
        elif self.depth == DEEPEST_NESTING:
            refused = f"nested more than {DEEPEST_NESTING} deep", "a recipe is flat"
        if refused:
            raise ConfigError(*refused, place=self.place, line=event.start_mark.line + 1)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _compose(text: str, place: str) -> yaml.Node:
    line, node = 1, None
    found, hint = "nothing is written here", "write key: value lines"
    try:
        node = _Composer(text, place).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        found, hint = _yaml_problem(" ".join(str(error.problem or error.context).split()))
    except ConfigError:
        raise
    except (
        yaml.YAMLError,
        ValueError,
        OverflowError,
    ) as error:  # as for "\UFFFFFFFF" and long versions through
        found, hint = f"this is not YAML ({' '.join(str(error).split())[:80]})", "fix it"
    if node is None:
        raise ConfigError(found, hint, place=place, line=line)
    return node


def _yaml_problem(problem: str) -> tuple[str, str]:
    """What PyYAML calls a problem, in a user's words: it has one exception for all of them, and no
    codes.
    """
    if "'\\t'" in problem:
        return "a tab", "indent and separate with spaces"
    if "another document" in problem:
        return "a second document", "a recipe is one, without ---"
    return f"this is not YAML: {problem}", "fix the line or quote the text"


class _Reader:
    """Nodes to plain data. `positions` is filled on the way."""

    def __init__(self, positions: Positions):
        self.positions = positions

    def value(self, node: yaml.Node, path: ValuePath) -> Any:
        self.positions.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return tuple(
                self.value(item, (*path, number)) for number, item in enumerate(node.value)
            )
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: ValuePath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            if key in mapping:
                first = self.positions.lines[(*path, key)]
                raise self._error(
                    key_node, f"{quoted(key)} is written twice, first in line {first}", "keep one"
                )
            self.positions.lines[(*path, key)] = key_node.start_mark.line + 1
            mapping[key] = self.value(value_node, (*path, key))
        return mapping

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(node, "a key that is a list or a mapping", "a key is one word")
        if node.tag == _TAG + "merge":
            raise self._error(
                node, "the merge key <<", "write the keys out, a recipe inherits nothing"
            )
        key = self._str(node) if node.tag == _TAG + "str" else None
        if not isinstance(key, str):
            raise self._error(
                node, f"the key {node.value[:40]!a} is not text", "quote it if it is meant"
            )
        return key

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text, kind = node.value, node.tag.removeprefix(_TAG)
        if kind == "str":
            return self._str(node)
        if kind == "bool" and text in ("true", "false"):
            return text == "true"
        if kind == "null" and text == "null":
            return None
        if kind == "int" and _WHOLE.fullmatch(text):
            return int(text)
        if kind == "float" and _FRACTION.fullmatch(text) and math.isfinite(float(text)):
            return float(text)
        raise self._error(node, *_misread(text, kind), can_be_off=kind == "null")

    def _str(self, node: yaml.ScalarNode) -> str | float:
        text = node.value
        if _UNPRINTABLE.search(text):
            raise self._error(node, "an escaped character that cannot be printed", "leave it out")
        if node.style is not None or not _ALMOST_A_NUMBER.fullmatch(text):
            return text
        number = float(text) if len(text) <= 40 else math.inf
        if not math.isfinite(number):
            raise self._error(
                node, f"{text[:40]} is no finite number", "write one, or quote it for text"
            )
        if _WITH_EXPONENT.fullmatch(text):
            return number
        written = to_yaml(int(text) if text.isdigit() else number)
        raise self._error(
            node, f"{text} is text in YAML", f"write {written.split()[0]}, or quote it for text"
        )

    def _error(
        self, node: yaml.Node, found: str, hint: str, can_be_off: bool = False
    ) -> ConfigError:
        line = node.start_mark.line + 1
        return ConfigError(
            found,
            hint,
            place=self.positions.place,
            line=line,
            kind="misleading",
            can_be_off=can_be_off,
        )


def _misread(text: str, kind: str) -> tuple[str, str]:
    """What YAML makes of a text, and what to write."""
    found = f"{text[:40]!a}"
    if kind == "bool":
        value = str(text.lower() in ("yes", "on", "true")).lower()
        return f"{found} is read as {value} by YAML", f"write {value}, or quote it for text"
    if kind == "null":
        return f"{found} is read as null by YAML", "give a value"
    if kind in ("int", "float"):
        return (
            f"{found} is not read as it looks",
            "write a plain finite number such as 90, 0.5 or 5.0e-3",
        )
    if kind == "timestamp":
        return f"{found} is read as a date by YAML", "quote it for text"
    return f"{found} means something else in YAML", "quote it for text"
