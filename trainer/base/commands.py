"""The commands that are printed: as the reader would type them."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

_SAFE_IN_DOUBLE_QUOTES = re.compile(r'[^"$`\\!\n]*')


def program() -> str:
    """`make` where make has called this program (RSB_CALLED_AS), else `rsb`: both take the same
    words.
    """
    return "make" if os.environ.get("RSB_CALLED_AS") == "make" else "rsb"


def command(*names: str, **words: object) -> str:
    """A command line: command("plan", recipe="A1", model="resnet50"). Without a name it trains.
    Words that are None or empty are left out.
    """
    given = [
        f"{name}={quoted(str(value))}" for name, value in words.items() if value not in (None, "")
    ]
    return " ".join([program(), *names, *given])


def installed_program(name: str) -> str | None:
    """A program beside this Python, by a path from here where it lies below; None without one."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        return None
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def quoted(text: str) -> str:
    """Quoted for a shell: in double quotes, easier to read, where they leave the text literal."""
    if shlex.quote(text) == text:
        return text
    return f'"{text}"' if _SAFE_IN_DOUBLE_QUOTES.fullmatch(text) else shlex.quote(text)
