"""What a sweep shows: one live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from trainer.ablation.cell_run import Repeat, Shared, run_folder_of
from trainer.ablation.failures import cell_folder
from trainer.ablation.runner import (
    DIVERGED,
    ELSEWHERE,
    FAILED,
    FINISHED,
    RUNNING,
    STOPPED,
    WAITING,
    Standing,
)
from trainer.base.errors import printable
from trainer.base.json_text import json_of

PLAIN_LINE_S = 60.0  # least time between two lines of what runs, where the output is not a terminal
_REFRESH_S = 0.5
_NUM_TAIL_BYTES = 8192
_ORDER = (RUNNING, ELSEWHERE, FAILED, DIVERGED, STOPPED, FINISHED, WAITING)
_STYLES = {
    RUNNING: "cyan",
    ELSEWHERE: "cyan",
    FAILED: "bold red",
    DIVERGED: "red",
    STOPPED: "yellow",
    FINISHED: "green",
    WAITING: "dim",
}


@dataclass(frozen=True)
class Reading:
    """How far a run has come, as its folder tells; None where it does not yet."""

    step: int = 0
    loss_nats: float | None = None
    top1_pct: float | None = None
    images_per_s: float | None = None

    def left_s(self, repeat: Repeat) -> float | None:
        """Seconds of training left at the speed of the last line; evaluations come on top."""
        if not self.images_per_s:
            return None
        return (
            (repeat.plan.num_steps - self.step)
            * repeat.plan.recipe.batch.images
            / self.images_per_s
        )


def read_progress(folder: Path | None) -> Reading:
    """The last lines of a run folder's curves; a line that is just being written is left out."""
    if folder is None:
        return Reading()
    lines = _last_lines(folder / "metrics.jsonl")
    speeds = _last_lines(folder / "speed.jsonl")
    return Reading(
        step=max(_numbers(lines, "step"), default=0),
        loss_nats=_last(lines, "loss_nats"),
        top1_pct=_last(lines, "top1_pct"),
        images_per_s=_last(speeds, "images_per_s"),
    )


def _numbers(lines: Sequence[dict], name: str) -> list[float]:
    return [line[name] for line in lines if isinstance(line.get(name), (int, float))]


def _last(lines: Sequence[dict], name: str) -> float | None:
    return (_numbers(lines, name) or [None])[-1]


def _last_lines(path: Path) -> list[dict]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _NUM_TAIL_BYTES))
            texts = file.read().splitlines()
    except OSError:
        return []
    lines = []
    for text in texts:
        try:
            line = json_of(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


class SweepTable:
    """Shows a sweep's standings; a context. Called with them as often as one likes, it draws twice
    a second.
    """

    def __init__(self, console: Console, shared: Shared, title: str) -> None:
        self._console, self._shared, self._title = console, shared, title
        # no thread of Rich's own: the process forks
        still = {"auto_refresh": False, "redirect_stdout": False, "redirect_stderr": False}
        self._live = Live(console=console, **still) if console.is_terminal else None
        self._folders: dict[str, Path] = {}
        self._told: dict[str, str] = {}
        self._drawn_s = 0.0
        self._line_s = time.monotonic()

    def __enter__(self) -> SweepTable:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, standings: Sequence[Standing]) -> None:
        if self._live is None:
            self._tell(standings)
        elif time.monotonic() - self._drawn_s >= _REFRESH_S or not any(
            one.state == RUNNING for one in standings
        ):
            self._drawn_s = time.monotonic()
            self._live.update(self.table(standings), refresh=True)

    def table(self, standings: Sequence[Standing]) -> Table:
        """What runs and what went wrong first; as many lines as the terminal has."""
        table = Table(
            "cell",
            "seed",
            "epoch",
            "loss",
            "top-1",
            "state",
            "time left",
            title=self._title,
            caption=summary(standings),
        )
        for column in (1, 2, 3, 4, 6):
            table.columns[column].justify = "right"
        in_order = sorted(standings, key=lambda one: _ORDER.index(one.state))
        most = max(3, self._console.height - 8)
        for standing in in_order[:most]:
            table.add_row(*map(escape, self._cells(standing)), style=_STYLES[standing.state])
        if len(in_order) > most:
            table.add_row(f"… {len(in_order) - most} more", *[""] * 6, style="dim")
        return table

    def _cells(self, standing: Standing) -> tuple[str, ...]:
        repeat, row = standing.repeat, standing.row
        name, seed = printable(repeat.cell), str(repeat.seed)
        if row is not None:
            loss, top1 = (
                _number(value, digits) for value, digits in ((row.loss_nats, 4), (row.top1_pct, 2))
            )
            return (
                name,
                seed,
                f"{row.epochs}" if row.status == "finished" else "",
                loss,
                top1,
                standing.state,
                "",
            )
        if standing.state not in (RUNNING, ELSEWHERE):
            what = printable(standing.failure.error) if standing.failure else ""
            return name, seed, "", "", "", standing.state + (f": {what[:60]}" if what else ""), ""
        reading = read_progress(self._folder(repeat))
        epoch = f"{reading.step / repeat.plan.steps_per_epoch:.1f}/{repeat.plan.recipe.epochs}"
        left_s = reading.left_s(repeat)
        left = "" if left_s is None else str(timedelta(seconds=round(left_s)))
        return (
            name,
            seed,
            epoch,
            _number(reading.loss_nats, 4),
            _number(reading.top1_pct, 2),
            standing.state,
            left,
        )

    def _folder(self, repeat: Repeat) -> Path | None:
        if repeat.key not in self._folders:
            found = run_folder_of(self._shared, repeat)
            if found is None:
                return None
            self._folders[repeat.key] = found
        return self._folders[repeat.key]

    def _tell(self, standings: Sequence[Standing]) -> None:
        """A line for each change of state, and now and then one for what runs."""
        is_due = time.monotonic() - self._line_s >= PLAIN_LINE_S
        if is_due:
            self._line_s = time.monotonic()
        for standing in standings:
            key, is_new = (
                standing.repeat.key,
                self._told.get(standing.repeat.key, WAITING) != standing.state,
            )
            if is_new and not standing.is_done_before or is_due and standing.state == RUNNING:
                self._say(line_of(self._cells(standing)))
            self._told[key] = standing.state

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def line_of(cells: tuple[str, ...]) -> str:
    """One standing as a line."""
    name, seed, epoch, loss, top1, state, left = cells
    named = {"epoch": epoch, "loss": loss, "top-1": top1 and f"{top1} %", "time left": left}
    facts = "  ".join(f"{what} {value}" for what, value in named.items() if value)
    return f"{name}  seed {seed}  {state}" + (f"  {facts}" if facts else "")


def summary(standings: Sequence[Standing]) -> str:
    """How many are in which state: `12 runs: 9 finished (2 before), 3 waiting`."""
    counts = Counter(standing.state for standing in standings)
    before = sum(standing.is_done_before for standing in standings)
    parts = [
        f"{counts[state]} {state}"
        for state in (FINISHED, DIVERGED, FAILED, STOPPED, RUNNING, ELSEWHERE, WAITING)
        if counts[state]
    ]
    return f"{len(standings)} run{'s' * (len(standings) != 1)}: {', '.join(parts)}" + (
        f" ({before} before this call)" if before else ""
    )


def closing_lines(standings: Sequence[Standing], shared: Shared, ablation: str) -> list[str]:
    """What a sweep leaves to its reader: the counts, each failure with its error and where its
    output lies.
    """
    lines = [summary(standings)]
    for standing in standings:
        if standing.failure is not None:
            failure, path = (
                standing.failure,
                cell_folder(shared.runs, standing.repeat.key) / "output.txt",
            )
            where = f"; output {path}" if path.exists() else ""
            lines.append(
                f"failed  {failure.cell}  seed {failure.seed}  exit {failure.exit_code}: {printable(failure.error)}{where}"
            )
    states = {standing.state for standing in standings}
    if states & {FAILED, STOPPED, WAITING, ELSEWHERE}:
        lines.append(
            f"make ablate ablation={ablation}: the same command goes on, and tries again what failed"
        )
    return lines


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
