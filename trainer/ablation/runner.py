"""A sweep: every cell of an ablation that has no row yet, run to its row, once, however often it is
called.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from trainer.ablation.cell_run import (
    Repeat,
    Shared,
    find_row,
    num_failed,
    record_failure,
    row_names,
)
from trainer.ablation.dry_run import Trial, mark_tried, shape_of, try_shapes, untried
from trainer.ablation.failures import (
    Failure,
    cell_folder,
    drop_failure,
    read_failure,
    store_failure,
)
from trainer.base.errors import UserError
from trainer.base.exits import EXIT_CLAIMED, EXIT_DIVERGED, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from trainer.base.signals import StopRequest
from trainer.runs.lock import owner_of
from trainer.runs.remote_rows import pull_rows, push_missing
from trainer.runs.results import Row, rows_folder

POLL_S = 0.5
_ELSEWHERE_POLL_S = 2.0
_ASK_AGAIN_S = 5.0

WAITING, RUNNING, ELSEWHERE = "waiting", "running", "running elsewhere"
FINISHED, DIVERGED, FAILED, STOPPED = "finished", "diverged", "failed", "stopped"


class Workers(Protocol):
    """Who runs the work: processes of this machine (LocalCells) or a cluster (RayCells)."""

    num_slots: int

    @property
    def num_running(self) -> int: ...
    def start(self, what: Repeat) -> None: ...
    def ended(self, timeout_s: float) -> list[tuple[Repeat, int]]: ...
    def stop(self) -> None: ...
    def streamed(self, function: Callable[..., Iterator], *given) -> Iterator: ...
    def close(self) -> None: ...


@dataclass
class Standing:
    """How one seed of a cell stands in this sweep.

    num_failed_before: attempts that had failed when the sweep began; num_failed_then: when the last
    attempt did. is_done_before: its row was there already.
    """

    repeat: Repeat
    num_failed_before: int
    num_failed_then: int = 0
    state: str = WAITING
    row: Row | None = None
    failure: Failure | None = None
    is_done_before: bool = False


class Sweep:
    """One call's work on an ablation.

    retries: how often a cell that failed is tried again by this call. fail_fast: begin nothing more
    after the first failure, and stop what runs. watch: called about twice a second with all
    standings.
    """

    def __init__(
        self,
        repeats: Sequence[Repeat],
        shared: Shared,
        workers: Workers,
        stop: StopRequest,
        watch: Callable[[Sequence[Standing]], None],
        retries: int = 0,
        fail_fast: bool = False,
    ) -> None:
        self.shared, self.workers, self.stop, self.watch = shared, workers, stop, watch
        self.retries, self.fail_fast = retries, fail_fast
        self.standings = [Standing(repeat, num_failed(repeat, shared)) for repeat in repeats]
        self._by_key = {standing.repeat.key: standing for standing in self.standings}
        self._looked_s = self._asked_s = 0.0

    def run(self) -> int:
        """Run what has no row: 0 all finished, 3 some diverged, 1 some failed, 75 stopped by a
        signal.

        Raises UserError where a cell's first step meets something that the user wrote.
        """
        self._find_rows()
        self._try_shapes()
        while True:
            if self._is_ending():
                self._ask_to_stop()
            else:
                self._start_what_fits()
            self.watch(self.standings)
            if not self.workers.num_running and (
                self._is_ending() or not self._in(WAITING, ELSEWHERE)
            ):
                if self.shared.url:  # what a network's error has kept from it
                    push_missing(self.shared.url, rows_folder(self.shared.results))
                return self._exit_code()
            for repeat, code in self.workers.ended(POLL_S):
                self._settle(self._by_key[repeat.key], code)
            self._look_elsewhere()

    def _in(self, *states: str) -> list[Standing]:
        return [standing for standing in self.standings if standing.state in states]

    def _is_ending(self) -> bool:
        return self.stop.is_requested or (self.fail_fast and bool(self._in(FAILED)))

    def _find_rows(self) -> None:
        if self.shared.url:
            prefixes = tuple({standing.repeat.prefix for standing in self.standings})
            mirror = rows_folder(self.shared.results)
            push_missing(self.shared.url, mirror)
            pull_rows(self.shared.url, mirror, prefixes)
        names = row_names(self.shared)
        for standing in self.standings:
            row = find_row(self.shared, standing.repeat, names)
            if row is not None:
                self._take(standing, row)
                standing.is_done_before = True

    def _try_shapes(self) -> None:
        """Make one step of every new shape; what fails there fails before anything else runs."""
        shapes = untried((standing.repeat for standing in self._in(WAITING)), self.shared)
        while shapes and not self.stop.is_requested:
            self.watch(self.standings)
            for trial in self.workers.streamed(try_shapes, dict(shapes), self.shared):
                self._judge(trial, shapes.pop(trial.shape))
                if self.stop.is_requested:
                    return
            if (
                shapes and not self.stop.is_requested
            ):  # the process died of the one that it had come to
                shape, repeat = next(iter(shapes.items()))
                self._judge(
                    Trial(shape, "the process was ended from outside (out of memory?)"), repeat
                )
                del shapes[shape]

    def _judge(self, trial: Trial, tried: Repeat) -> None:
        if trial.error is None:
            mark_tried(self.shared, trial.shape)
            return
        if trial.is_users:
            raise UserError(f"cell {tried.cell}: {trial.error}")
        lines = [*trial.log_tail, f"in the one step before the sweep: {trial.error}"]
        for standing in self._in(WAITING):
            repeat = standing.repeat
            if shape_of(repeat.plan) == trial.shape:
                facts = {"cell": repeat.cell, "seed": repeat.seed, "run": None}
                standing.failure = store_failure(
                    self.shared.runs, repeat.key, exit_code=EXIT_FAILED, output=lines, **facts
                )
                standing.state = FAILED

    def _row_names(self) -> list[str]:
        """The names of the store's rows; of one behind a URL that does not answer, those that are
        known.
        """
        if self.shared.url:
            prefixes = tuple({standing.repeat.prefix for standing in self.standings})
            with contextlib.suppress(UserError):
                pull_rows(self.shared.url, rows_folder(self.shared.results), prefixes)
        return row_names(self.shared)

    def _start_what_fits(self) -> None:
        names = None
        for standing in self._in(WAITING):
            if self.workers.num_running >= self.workers.num_slots:
                return
            names = self._row_names() if names is None else names
            if self._is_settled_elsewhere(standing, names):
                continue
            if owner_of(cell_folder(self.shared.runs, standing.repeat.key)) is not None:
                standing.state = ELSEWHERE
                continue
            standing.state = RUNNING
            standing.num_failed_then = num_failed(standing.repeat, self.shared)
            self.workers.start(standing.repeat)

    def _look_elsewhere(self) -> None:
        """Other callers' cells: done by now, failed, or given up and ours to take."""
        if time.monotonic() - self._looked_s < _ELSEWHERE_POLL_S:
            return
        self._looked_s = time.monotonic()
        names = self._row_names() if self._in(ELSEWHERE) else []
        for standing in self._in(ELSEWHERE):
            is_free = owner_of(cell_folder(self.shared.runs, standing.repeat.key)) is None
            if not self._is_settled_elsewhere(standing, names) and is_free:
                standing.state = WAITING

    def _is_settled_elsewhere(self, standing: Standing, names: list[str]) -> bool:
        row = find_row(self.shared, standing.repeat, names)
        if row is not None:
            self._take(standing, row)
            return True
        return self._has_failed_for_good(standing)

    def _has_failed_for_good(self, standing: Standing) -> bool:
        num = num_failed(standing.repeat, self.shared) - standing.num_failed_before
        if num <= self.retries:
            return False
        standing.state, standing.failure = (
            FAILED,
            read_failure(self.shared.runs, standing.repeat.key),
        )
        return True

    def _take(self, standing: Standing, row: Row) -> None:
        drop_failure(self.shared.runs, standing.repeat.key)
        standing.row, standing.failure = row, None
        standing.state = FINISHED if row.status == "finished" else DIVERGED

    def _settle(self, standing: Standing, code: int) -> None:
        """What a process's end means for its cell."""
        row = find_row(self.shared, standing.repeat, self._row_names())
        if row is not None:
            self._take(standing, row)
        elif code == EXIT_CLAIMED:
            standing.state = ELSEWHERE
        elif code == EXIT_STOPPED or (code < 0 and self._is_ending()):
            standing.state = STOPPED
        else:
            if (
                num_failed(standing.repeat, self.shared) == standing.num_failed_then
            ):  # it could not say so itself
                record_failure(standing.repeat, self.shared, code)
            if not self._has_failed_for_good(standing):
                standing.state = WAITING

    def _ask_to_stop(self) -> None:
        """Asked again after a while: a process that was just being made may not have heard it."""
        if time.monotonic() - self._asked_s >= _ASK_AGAIN_S:
            self._asked_s = time.monotonic()
            self.workers.stop()

    def _exit_code(self) -> int:
        if self.stop.is_requested and self._in(WAITING, ELSEWHERE, STOPPED):
            return EXIT_STOPPED
        if self._in(FAILED):
            return EXIT_FAILED
        if self._in(STOPPED):
            return EXIT_STOPPED
        return EXIT_DIVERGED if self._in(DIVERGED) else EXIT_DONE
