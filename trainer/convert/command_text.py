"""The command in a text: a whole command line with its launcher, flags alone, or a page with one
command in it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from trainer.base.errors import UserError, printable
from trainer.recipe.load import LARGEST_RECIPE_KIB, parse

_PER_NODE = ("--nproc_per_node", "--nproc-per-node", "--num_processes")
_NODES = ("--nnodes",)
_SHELL_ENDS = re.compile(r"(\||\|\||>|>>|<|&|&&|;|[12]?>.*)")


def read_source(text: str) -> tuple[str, dict[str, Any] | None]:
    """The text that `args=` means, and its values where it is the YAML of an args.yaml. A path
    gives what is in its file.

    Raises UserError for a file that is missing or no text, or for YAML that is none.
    """
    stem = text.strip()
    if stem and not stem.startswith("-") and (not re.search(r"\s", stem) or _is_file(stem)):
        stem_path, place = Path(stem), printable(stem)
        text = _file_text(stem_path, place)
        if PurePath(stem).suffix in (".yaml", ".yml") or not re.search(r"(^|\s)--?\w", text):
            data, _ = parse(text, place)
            if not isinstance(data, dict):
                raise UserError("holds no key: value lines", "give an args.yaml", place=place)
            return place, data
    return text, None


def _is_file(stem: str) -> bool:
    try:
        return Path(stem).is_file()
    except OSError:  # a command, longer than any name
        return False


def _file_text(path: Path, place: str) -> str:
    try:
        raw = path.read_bytes()
        if len(raw) > LARGEST_RECIPE_KIB * 1024:
            raise UserError(
                f"{len(raw)} bytes", f"give at most {LARGEST_RECIPE_KIB} KiB", place=place
            )
        return raw.decode()
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})",
            'give an args.yaml, a text file with the command, or the flags: args="--model ..."',
            place=f"args={place}",
        ) from None
    except UnicodeDecodeError:
        raise UserError("is not UTF-8 text", "save it as text", place=place) from None


@dataclass(frozen=True)
class Command:
    """One command. line: all of it. words: those behind the script. gpus: where the launcher names
    them. script: its name, "" for flags alone.
    """

    line: str
    words: list[str]
    gpus: int | None = None
    script: str = ""


def find_command(text: str, scripts: Collection[str]) -> Command:
    """The command of one of these scripts in a text, or flags alone.

    Raises UserError where there is no command, or more than one.
    """
    lines = _logical_lines(text)
    if text.strip().startswith("-"):
        line = " ".join(lines)
        return Command(line, _split(line))
    commands = [line for line in lines if _script_end(_split(line), scripts)]
    if len(commands) != 1:
        raise UserError(
            f"{len(commands) or 'no'} command{'s' if len(commands) > 1 else ''} of"
            f" {' or '.join(scripts)} in it",
            "give one, or its flags alone",
            place="args",
            kind="no_command" if not commands else "several_commands",
        )
    words = _split(commands[0])
    place = _script_end(words, scripts)
    assert place is not None
    script = PurePath(words[place - 1]).name
    after = _before_shell_ends(words[place:])
    if script.endswith(".sh") and after and after[0].isdigit():  # distributed_train.sh 8 ...
        return Command(commands[0], after[1:], int(after[0]), script)
    per_node, nodes = (_number_of(words[:place], names) for names in (_PER_NODE, _NODES))
    return Command(commands[0], after, per_node and per_node * (nodes or 1), script)


def _logical_lines(text: str) -> list[str]:
    """Lines without comments; one that ends in a backslash, or is followed by one of flags, goes
    on.
    """
    lines: list[str] = []
    goes_on = False
    for line in map(str.strip, text.splitlines()):
        if line.startswith(("#", "```")):
            goes_on = False
            continue
        if lines and (goes_on or line.startswith("-")):
            lines[-1] += " " + line.rstrip("\\").strip()
        elif line:
            lines.append(line.rstrip("\\").strip())
        goes_on = line.endswith("\\")
    return lines


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # prose, with an apostrophe in it
        return line.split()


def _script_end(words: Sequence[str], scripts: Collection[str]) -> int | None:
    """The place behind the script in a command; None for words that only name it."""
    for place, word in enumerate(words, start=1):
        if PurePath(word).name in scripts:
            return place if any(after.startswith("-") for after in words[place:]) else None
    return None


def _before_shell_ends(words: Sequence[str]) -> list[str]:
    kept: list[str] = []
    for word in words:
        if _SHELL_ENDS.fullmatch(word):
            break
        if word not in ("$@", "$*"):
            kept.append(word.removesuffix(";"))
    return kept


def _number_of(words: Sequence[str], names: Sequence[str]) -> int | None:
    """The number given to one of these options, `--nnodes=2` or `--nnodes 2`."""
    for place, word in enumerate(words):
        name, _, value = word.partition("=")
        if name in names:
            value = value or (words[place + 1] if place + 1 < len(words) else "")
            return int(value) if value.isascii() and value.isdigit() else None
    return None
