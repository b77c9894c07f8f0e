"""What the command runs prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import typer
from rich.table import Table
from rich.text import Text

from trainer.base.commands import command
from trainer.base.errors import printable
from trainer.base.terminal import open_terminal
from trainer.runs.own_runs import OwnRun, own_runs, score_text

_COLUMNS = ["run", "recipe", "model", "data", "epochs", "state", "top-1 %", "deviations", "folder"]
_IN_NAME = ("recipe", "model", "data")
_WIDE = 160  # columns of a terminal that has room for all
_MOST_DEVIATIONS = 4  # named in the table
_LONG = 40  # characters: a digest says nothing in a table
_OF_WEIGHTS = ("model.pretrained.", "image.mean=", "image.std=")  # what weights= brings: last
_MOST_ROWS_ALONE = 20  # without a run folder, in the table


def list_runs(runs: Path, results: Path, as_json: bool) -> None:
    """One line for each run, or a JSON list of them."""
    found = own_runs(runs, results)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=2))
        return
    if not found:
        typer.echo(printable(f"no run in {runs}; `{command(recipe='A3', model='resnet18')}`"))
        return
    alone = [one.run for one in found if one.folder is None]
    left_out = set(alone[:-_MOST_ROWS_ALONE])
    out = open_terminal()
    # a run's name says the recipe, model and data once more: they go first where it is narrow
    shown = _COLUMNS if out.width >= _WIDE else [name for name in _COLUMNS if name not in _IN_NAME]
    table = Table(*shown)
    for column in table.columns:
        column.no_wrap = column.header in ("epochs", "state", "top-1 %")
    for one in found:
        if one.run not in left_out or one.folder:
            cells = dict(zip(_COLUMNS, _cells(one, runs), strict=True))
            table.add_row(*(Text(cells[name], overflow="fold") for name in shown))
    out.print(table)
    if left_out:
        out.print(f"and {len(left_out)} older rows without a run folder: json=1", markup=False)


def _cells(one: OwnRun, runs: Path) -> tuple[str, ...]:
    done = "?" if one.epochs_done is None else f"{one.epochs_done:g}"
    epochs = "" if one.epochs is None else f"{done} of {one.epochs:g}"
    listed = sorted(one.deviations, key=lambda each: each.startswith(_OF_WEIGHTS))
    changed = [each if len(each) < _LONG else f"{each[:_LONG]}..." for each in listed]
    changed = changed[:_MOST_DEVIATIONS]
    if len(one.deviations) > len(changed):
        changed.append(f"{len(one.deviations) - len(changed)} more")
    named = (one.recipe or "", one.model or "", one.data or "")
    folder = f"{runs}/" if one.folder else "none"
    return one.run, *named, epochs, one.state, score_text(one), " ".join(changed), folder
