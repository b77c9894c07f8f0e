"""The terminal: what is printed is text, whatever it was made of.

A file's name, a row or a recipe may hold what a terminal obeys: to rename the window, to wipe a
line, to write in the other direction. All that the program prints goes through this console, which
writes such characters out: \\x1b.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable

from rich.console import Console
from rich.segment import Segment

_SPACES = ("Zs",)  # category of the spaces that str.isprintable takes for none


class Terminal(Console):
    """Rich's console on which no text can do more than be read; nor is a long one searched for what
    to colour.
    """

    def __init__(self, **facts) -> None:
        super().__init__(**{"highlight": False, **facts})

    def render(self, renderable, options=None) -> Iterable[Segment]:
        """The segments of what is printed; Rich's own movements of the cursor are no text, and
        stay.
        """
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(readable(segment.text), segment.style)


def recorded(console: Console) -> str:
    """What a console that records has printed, as plain text; from here on it does not record."""
    if not console.record:
        return ""
    text = console.export_text(clear=True)
    console.record = False
    return text


def readable(text: str) -> str:
    """Text with its line ends, all else that a terminal would obey written out."""
    return "".join(map(_readable, text))


def _readable(mark: str) -> str:
    if mark in "\n\t" or mark.isprintable() or unicodedata.category(mark) in _SPACES:
        return mark
    return mark.encode("unicode_escape").decode()


def open_terminal(least_columns: int = 140, stderr: bool = False) -> Terminal:
    """The terminal; where the output goes into a file or a pipe, lines are wide enough for every
    table.
    """
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else least_columns
    return Terminal(soft_wrap=True, width=width, stderr=stderr)
