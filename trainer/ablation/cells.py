"""Cells of an ablation: their jobs, their plans, and their overrides as text."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.base.commands import command as command_line
from trainer.base.errors import OverrideError, PlanError
from trainer.recipe.overrides import overrides_of

if TYPE_CHECKING:  # tables know cells without torch; only plans need it
    from trainer.recipe.plan import Plan
    from trainer.runs.job import Job

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_READ_AS_ANOTHER = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
_BRACKETS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "[]{}"}


@dataclass(frozen=True)
class Cell:
    """One variant of an ablation, for all its seeds.

    name: as the table's first column says it, unique in its ablation. overrides: the exact text of
    set= that makes this cell, the budget included. levels: (factor, level) pairs, for grouping and
    plots. is_base: differences are taken against it; one per group. group: cells are compared
    within it: "resnet18 on digits". published: the paper's top-1 for this cell in per cent, of the
    paper's model and data as published_source says them. loss: the loss that it trains with, as
    JSON, for values of one loss are no measure of another; "" where it is not known. plan: for the
    first seed; None where a cell was made by hand.
    """

    name: str
    recipe: str
    model: str
    data: str
    overrides: str
    levels: tuple[tuple[str, str], ...]
    is_base: bool
    group: str
    published: float | None = None
    published_source: str = ""
    loss: str = field(default="", compare=False)
    plan: Plan | None = field(default=None, repr=False, compare=False)

    @property
    def planned(self) -> Plan:
        """The plan of a cell of a loaded ablation."""
        assert self.plan is not None
        return self.plan

    def job(self, seed: int, data_dir: Path | None = None) -> Job:
        """The job of one seed, as a user would give it."""
        return _jobs().Job(self.recipe, self.model, self.data, data_dir, seed, self.overrides)


def _jobs():
    from trainer.runs import (
        job,
    )  # it imports torch, which reading an ablation's table does not need

    return job


def plan_of_cell(cell: Cell, seed: int) -> Plan:
    """The plan of one seed of a cell; no image is read, and for a cell of an ablation file no
    file either.

    Raises UserError as plan_of does.
    """
    if cell.plan is None:
        return _jobs().plan_of(cell.job(seed))
    if not 0 <= seed < 2**32:
        raise PlanError(f"seed={seed}: outside 0 .. 4294967295; use seed=0")
    return replace(cell.plan, seed=seed)


def overrides_text(overrides: Mapping[str, Any]) -> str:
    """Overrides by path as the text for set= that parses to the same.

    Raises OverrideError for a path or a value that cannot be written that way.
    """
    text = " ".join(_item(f"{label}={_written(value)}") for label, value in overrides.items())
    if overrides_of(text) != dict(overrides):
        found, hint = (
            "cannot be told apart from other overrides",
            "write paths as lr.peak, and plain values",
        )
        raise OverrideError(found, hint, place=f"set={text}", labels=tuple(overrides))
    return text


def _item(text: str) -> str:
    """Unquoted where set= parses it the same, else quoted for shlex."""
    try:
        return text if shlex.split(text) == text.split(" ") else shlex.quote(text)
    except ValueError:  # an apostrophe
        return shlex.quote(text)


def _written(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{_written(key)}: {_written(part)}" for key, part in value.items())
            + "}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_written, value)) + "]"
    if isinstance(value, str) and _WORD.fullmatch(value) and value.lower() not in _READ_AS_ANOTHER:
        return value
    written = json.dumps(value, ensure_ascii=False)
    # the parser of set= counts brackets within strings too
    return written.translate(_BRACKETS) if isinstance(value, str) else written


def command(cell: Cell, seed: int) -> str:
    """The shell command of one run of a cell."""
    words = {
        "recipe": cell.recipe,
        "model": cell.model,
        "data": cell.data,
        "seed": str(seed),
        "set": cell.overrides,
    }
    return command_line(**words)
