"""Notebook display of the API's objects: figures without pyplot, console output as HTML."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterable

from matplotlib.figure import Figure
from rich.console import Console

from trainer.base.terminal import Terminal

_LEFT = 'style="text-align: left"'


class NotebookFigure(Figure):
    """A matplotlib Figure that a notebook displays by itself.

    IPython can display a Figure only after pyplot, which has global state, was imported; this one
    renders its own PNG.
    """

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def printed(show: Callable[[Console], None]) -> str:
    """What a function prints, as plain text."""
    file = io.StringIO()
    show(Terminal(file=file, width=120, force_terminal=False, force_jupyter=False))
    return file.getvalue()


def html_of_text(text: str) -> str:
    """Text as preformatted HTML, which keeps its columns aligned."""
    return f'<pre style="white-space: pre; overflow-x: auto">{html.escape(text)}</pre>'


def html_of_pairs(title: str, pairs: Iterable[tuple[str, object]]) -> str:
    """A two-column HTML table with a title."""
    cells = ((html.escape(name), html.escape(str(value))) for name, value in pairs)
    rows = "".join(
        f"<tr><th {_LEFT}>{name}</th><td {_LEFT}>{value}</td></tr>" for name, value in cells
    )
    return f"<table><caption {_LEFT}><b>{html.escape(title)}</b></caption>{rows}</table>"
