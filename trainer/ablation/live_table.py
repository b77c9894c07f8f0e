"""A sweep's log: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

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
    RunStatus,
)
from trainer.base.commands import command
from trainer.base.errors import printable
from trainer.base.json_text import last_lines
from trainer.base.scores import main_score, score_label
from trainer.runs.chance import chance_warning
from trainer.runs.results import Row

PLAIN_LINE_S = 60.0  # log interval of running cells where the output is not a terminal
_REFRESH_S = 0.5
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
class RunProgress:
    """How far a run is, by its folder's files; None where they do not say yet."""

    step: int = 0
    loss_nats: float | None = None
    score_pct: float | None = None
    images_per_s: float | None = None

    def left_s(self, repeat: Repeat) -> float | None:
        """Seconds of training left at the last throughput, evaluations not included."""
        if not self.images_per_s:
            return None
        return (
            (repeat.plan.num_steps - self.step)
            * repeat.plan.recipe.batch.images
            / self.images_per_s
        )


def read_progress(folder: Path | None, scored: str = "model") -> RunProgress:
    """Read from the last lines of a run folder's curves; a partly written line is skipped. scored:
    the weights whose score is shown, "model" or "average".
    """
    if folder is None:
        return RunProgress()
    lines = last_lines(folder / "metrics.jsonl")
    speeds = last_lines(folder / "speed.jsonl")
    return RunProgress(
        step=int(max(_numbers(lines, "step"), default=0)),
        loss_nats=_last(lines, "loss_nats"),
        score_pct=_last_score(lines, scored),
        images_per_s=_last(speeds, "images_per_s"),
    )


def _numbers(lines: Sequence[dict], name: str) -> list[float]:
    return [line[name] for line in lines if isinstance(line.get(name), (int, float))]


def _last(lines: Sequence[dict], name: str) -> float | None:
    numbers = _numbers(lines, name)
    return numbers[-1] if numbers else None


def _last_score(lines: Sequence[dict], scored: str) -> float | None:
    found = [main_score(line) for line in lines if line.get("weights", scored) == scored]
    return next((each[1] for each in reversed(found) if each), None)


class SweepTable:
    """Shows the statuses of a sweep's runs; a context manager. It may be called with them at any
    rate: it draws at most twice a second.
    """

    def __init__(self, console: Console, shared: Shared, title: str) -> None:
        self._console, self._shared, self._title = console, shared, title
        # no refresh thread: the process forks, and a fork must not inherit a thread's locks
        live = Live(
            console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._live = live if console.is_terminal else None
        self._folders: dict[str, Path] = {}
        self._logged: dict[str, str] = {}
        self._drawn_s = 0.0
        self._line_s = time.monotonic()

    def __enter__(self) -> SweepTable:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, statuses: Sequence[RunStatus]) -> None:
        if self._live is None:
            self._log(statuses)
        elif time.monotonic() - self._drawn_s >= _REFRESH_S or not any(
            one.state == RUNNING for one in statuses
        ):
            self._drawn_s = time.monotonic()
            self._live.update(self.table(statuses), refresh=True)

    def table(self, statuses: Sequence[RunStatus]) -> Table:
        """Running and failed cells first; as many lines as the terminal has."""
        table = Table(
            "cell",
            "seed",
            "epoch",
            "loss",
            _score_of(statuses),
            "state",
            "time left",
            title=self._title,
            caption=summary(statuses),
        )
        for column in (1, 2, 3, 4, 6):
            table.columns[column].justify = "right"
        in_order = sorted(statuses, key=lambda one: _ORDER.index(one.state))
        most = max(3, self._console.height - 8)
        for status in in_order[:most]:
            table.add_row(*map(escape, self._cells(status)), style=_STYLES[status.state])
        if len(in_order) > most:
            table.add_row(f"… {len(in_order) - most} more", *[""] * 6, style="dim")
        return table

    def _cells(self, status: RunStatus) -> tuple[str, ...]:
        repeat, row = status.repeat, status.row
        name, seed = printable(repeat.cell), str(repeat.seed)
        if row is not None:
            loss, score = (
                _number(value, digits) for value, digits in ((row.loss_nats, 4), (row.main_pct, 2))
            )
            return (
                name,
                seed,
                f"{row.epochs}" if row.status == "finished" else "",
                loss,
                score,
                status.state,
                "",
            )
        if status.state not in (RUNNING, ELSEWHERE):
            what = printable(status.failure.error) if status.failure else ""
            return name, seed, "", "", "", status.state + (f": {what[:60]}" if what else ""), ""
        average = repeat.plan.recipe.average
        scored = "average" if average and average.is_scored else "model"
        reading = read_progress(self._folder(repeat), scored)
        epoch = f"{reading.step / repeat.plan.steps_per_epoch:.1f}/{repeat.plan.recipe.epochs}"
        left_s = reading.left_s(repeat)
        left = "" if left_s is None else str(timedelta(seconds=round(left_s)))
        return (
            name,
            seed,
            epoch,
            _number(reading.loss_nats, 4),
            _number(reading.score_pct, 2),
            status.state,
            left,
        )

    def _folder(self, repeat: Repeat) -> Path | None:
        if repeat.key not in self._folders:
            found = run_folder_of(self._shared, repeat)
            if found is None:
                return None
            self._folders[repeat.key] = found
        return self._folders[repeat.key]

    def _log(self, statuses: Sequence[RunStatus]) -> None:
        """One line for each change of state, and one per log interval for each running cell."""
        is_due = time.monotonic() - self._line_s >= PLAIN_LINE_S
        if is_due:
            self._line_s = time.monotonic()
        for status in statuses:
            key, is_new = (
                status.repeat.key,
                self._logged.get(status.repeat.key, WAITING) != status.state,
            )
            if (is_new and not status.is_done_before) or (is_due and status.state == RUNNING):
                self._print(status_line(self._cells(status), _score_of([status])))
            self._logged[key] = status.state

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _score_of(statuses: Sequence[RunStatus]) -> str:
    """What the main score of these runs is called."""
    names = {status.repeat.plan.recipe.of_task.scores[0] for status in statuses}
    return score_label(names.pop()) if len(names) == 1 else "score"


def status_line(cells: tuple[str, ...], score: str) -> str:
    """One status as a plain line. score: what it is called."""
    name, seed, epoch, loss, found, state, left = cells
    named = {"epoch": epoch, "loss": loss, score: found and f"{found} %", "time left": left}
    facts = "  ".join(f"{what} {value}" for what, value in named.items() if value)
    return f"{name}  seed {seed}  {state}" + (f"  {facts}" if facts else "")


def summary(statuses: Sequence[RunStatus]) -> str:
    """Counts by state: `12 runs: 9 finished, 3 waiting (2 before this call)`."""
    counts = Counter(status.state for status in statuses)
    before = sum(status.is_done_before for status in statuses)
    parts = [
        f"{counts[state]} {state}"
        for state in (FINISHED, DIVERGED, FAILED, STOPPED, RUNNING, ELSEWHERE, WAITING)
        if counts[state]
    ]
    return f"{len(statuses)} run{'s' * (len(statuses) != 1)}: {', '.join(parts)}" + (
        f" ({before} before this call)" if before else ""
    )


def closing_lines(statuses: Sequence[RunStatus], shared: Shared, ablation: str) -> list[str]:
    """The last lines of a sweep: counts by state, each failure with its error and the path of its
    output, and where no score is above chance.
    """
    lines = [summary(statuses)]
    for status in statuses:
        if status.failure is not None:
            failure = status.failure
            path = cell_folder(shared.runs, status.repeat.key) / "output.txt"
            where = f"; output {path}" if path.exists() else ""
            lines.append(
                f"failed  {failure.cell}  seed {failure.seed}  exit {failure.exit_code}: "
                f"{printable(failure.error)}{where}"
            )
    groups: dict[str, list[Row]] = {}
    for status in statuses:
        if status.row is not None:
            plan = status.repeat.plan
            groups.setdefault(f"{plan.model} on {plan.profile.name}", []).append(status.row)
    for group, rows in groups.items():
        if line := chance_warning(rows):
            lines.append(f"note    {group}: {line}")
    states = {status.state for status in statuses}
    if states & {FAILED, STOPPED, WAITING, ELSEWHERE}:
        lines.append(
            f"rerun {command('ablate', ablation=ablation)} to resume; failed runs are tried again"
        )
    return lines


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
