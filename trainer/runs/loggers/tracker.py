"""What every tracker answers, in this process (TensorBoard) or in one of its own (the others).

Nothing heavy is imported here: a tracker's own process does it too.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.base.commands import installed_program


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run when it starts.

    run: its name. folder: its folder, absolute. files: names of files in it to keep a copy of.
    config: recipe, deviations, seed, data, versions ... as JSON has them, nested. ablation, cell:
    what to group it by, where it is a part of one.
    """

    run: str
    folder: str
    files: tuple[str, ...]
    config: Mapping[str, Any]
    ablation: str | None = None
    cell: str | None = None


class Tracker:
    """Where curves and pictures of a run go, beside its own files."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One point of each of these curves, after `step` steps."""
        raise NotImplementedError

    def picture(self, name: str, path: Path, step: int) -> None:
        """A PNG file."""
        raise NotImplementedError

    def end(self, status: str, row: Mapping[str, Any] | None) -> None:
        """The run is over: finished, diverged (both have a row), stopped or failed."""
        raise NotImplementedError

    def news(self) -> list[str]:
        """Lines for the reader of the run since the last call."""
        return []


class PackageTracker(Tracker):
    """A tracker of another package, opened by its module's open_tracker(about, run_id).

    run_id: what the package knows the run by; given again to resume it, None at first. where: one
    line on where to look.
    """

    run_id: str
    where: str


def tracker_command(program: str, *words: str) -> str:
    """A command of a tracker's own program, as a shell here takes it."""
    return shlex.join([installed_program(program) or program, *words])
