"""A sweep: run every cell of an ablation that has no row yet, once, over any number of calls."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from trainer.ablation.cell_run import (
    Repeat,
    Shared,
    is_running,
    num_failed,
    record_failure,
    row_names,
    stored_row_of,
)
from trainer.ablation.dry_run import DryTrial, dry_run_shape, mark_tried, try_shapes, untried
from trainer.ablation.failures import (
    Failure,
    drop_failure,
    read_failure,
    store_failure,
)
from trainer.base.errors import UserError
from trainer.base.exits import EXIT_CLAIMED, EXIT_DIVERGED, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from trainer.base.signals import StopRequest
from trainer.runs.remote_rows import pull_rows, push_missing
from trainer.runs.results import Row, rows_folder

POLL_S = 0.5
_ELSEWHERE_POLL_S = 2.0
_ASK_AGAIN_S = 5.0

WAITING, RUNNING, ELSEWHERE = "waiting", "running", "running elsewhere"
FINISHED, DIVERGED, FAILED, STOPPED = "finished", "diverged", "failed", "stopped"


class Backend(Protocol):
    """A backend: processes of this machine (LocalCells) or a cluster (RayCells)."""

    num_slots: int

    @property
    def num_running(self) -> int: ...
    def start(self, what: Repeat) -> None: ...
    def ended(self, timeout_s: float) -> list[tuple[Repeat, int]]: ...
    def stop(self) -> None: ...
    def streamed(self, function: Callable[..., Iterator], *given) -> Iterator: ...
    def close(self) -> None: ...


@dataclass
class RunStatus:
    """The status of one run, a cell with a seed, in this sweep.

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

    retries: how often this call retries a failed run. fail_fast: after the first failure start
    nothing more, and stop what runs. watch: called about twice a second with all statuses.
    """

    def __init__(
        self,
        repeats: Sequence[Repeat],
        shared: Shared,
        backend: Backend,
        stop: StopRequest,
        watch: Callable[[Sequence[RunStatus]], None],
        retries: int = 0,
        fail_fast: bool = False,
    ) -> None:
        self.shared, self.backend, self.stop, self.watch = shared, backend, stop, watch
        self.retries, self.fail_fast = retries, fail_fast
        self.statuses = [RunStatus(repeat, num_failed(repeat, shared)) for repeat in repeats]
        self._by_key = {status.repeat.key: status for status in self.statuses}
        self._looked_s = self._asked_s = 0.0

    def run(self) -> int:
        """Run what has no row; gives the exit code: 0 all finished, 3 some diverged, 1 some failed,
        75 stopped by a signal.

        Raises UserError where a cell's trial step fails by a user's error.
        """
        self._find_rows()
        self._try_shapes()
        while True:
            if self._is_ending():
                self._ask_to_stop()
            else:
                self._start_what_fits()
            self.watch(self.statuses)
            if not self.backend.num_running and (
                self._is_ending() or not self._in(WAITING, ELSEWHERE)
            ):
                if self.shared.url:  # rows that an earlier network error kept from it
                    push_missing(self.shared.url, rows_folder(self.shared.results))
                return self._exit_code()
            for repeat, code in self.backend.ended(POLL_S):
                self._settle(self._by_key[repeat.key], code)
            self._look_elsewhere()

    def _in(self, *states: str) -> list[RunStatus]:
        return [status for status in self.statuses if status.state in states]

    def _is_ending(self) -> bool:
        return self.stop.is_requested or (self.fail_fast and bool(self._in(FAILED)))

    def _find_rows(self) -> None:
        if self.shared.url:
            prefixes = tuple({status.repeat.prefix for status in self.statuses})
            mirror = rows_folder(self.shared.results)
            push_missing(self.shared.url, mirror)
            pull_rows(self.shared.url, mirror, prefixes)
        names = row_names(self.shared)
        for status in self.statuses:
            row = stored_row_of(self.shared, status.repeat, names)
            if row is not None:
                self._accept(status, row)
                status.is_done_before = True

    def _try_shapes(self) -> None:
        """Run one trial step of every new shape, so that failures show before any run starts."""
        shapes = untried((status.repeat for status in self._in(WAITING)), self.shared)
        while shapes and not self.stop.is_requested:
            self.watch(self.statuses)
            for trial in self.backend.streamed(try_shapes, dict(shapes), self.shared):
                self._judge(trial, shapes.pop(trial.shape))
                if self.stop.is_requested:
                    return
            if shapes and not self.stop.is_requested:  # the process died in the first of those left
                shape, repeat = next(iter(shapes.items()))
                self._judge(
                    DryTrial(shape, "the process was ended from outside (out of memory?)"), repeat
                )
                del shapes[shape]

    def _judge(self, trial: DryTrial, tried: Repeat) -> None:
        if trial.error is None:
            mark_tried(self.shared, trial.shape)
            return
        if trial.is_users:
            raise UserError(f"cell {tried.cell}: {trial.error}")
        lines = [*trial.log_tail, f"in the trial step before the sweep: {trial.error}"]
        for status in self._in(WAITING):
            repeat = status.repeat
            if dry_run_shape(repeat.plan) == trial.shape:
                status.failure = store_failure(
                    self.shared.runs,
                    repeat.key,
                    cell=repeat.cell,
                    seed=repeat.seed,
                    run=None,
                    exit_code=EXIT_FAILED,
                    output=lines,
                )
                status.state = FAILED

    def _row_names(self) -> list[str]:
        """The names of the store's rows; where its URL does not answer, those of the mirror."""
        if self.shared.url:
            prefixes = tuple({status.repeat.prefix for status in self.statuses})
            with contextlib.suppress(UserError):
                pull_rows(self.shared.url, rows_folder(self.shared.results), prefixes)
        return row_names(self.shared)

    def _start_what_fits(self) -> None:
        names = None
        for status in self._in(WAITING):
            if self.backend.num_running >= self.backend.num_slots:
                return
            names = self._row_names() if names is None else names
            if self._is_settled_elsewhere(status, names):
                continue
            if is_running(self.shared, status.repeat):
                status.state = ELSEWHERE
                continue
            status.state = RUNNING
            status.num_failed_then = num_failed(status.repeat, self.shared)
            self.backend.start(status.repeat)

    def _look_elsewhere(self) -> None:
        """Poll runs of other processes: finished, failed, or abandoned and free to start here."""
        if time.monotonic() - self._looked_s < _ELSEWHERE_POLL_S:
            return
        self._looked_s = time.monotonic()
        names = self._row_names() if self._in(ELSEWHERE) else []
        for status in self._in(ELSEWHERE):
            is_free = not is_running(self.shared, status.repeat)
            if not self._is_settled_elsewhere(status, names) and is_free:
                status.state = WAITING

    def _is_settled_elsewhere(self, status: RunStatus, names: list[str]) -> bool:
        row = stored_row_of(self.shared, status.repeat, names)
        if row is not None:
            self._accept(status, row)
            return True
        return self._has_failed_for_good(status)

    def _has_failed_for_good(self, status: RunStatus) -> bool:
        num = num_failed(status.repeat, self.shared) - status.num_failed_before
        if num <= self.retries:
            return False
        status.state, status.failure = (
            FAILED,
            read_failure(self.shared.runs, status.repeat.key),
        )
        return True

    def _accept(self, status: RunStatus, row: Row) -> None:
        drop_failure(self.shared.runs, status.repeat.key)
        status.row, status.failure = row, None
        status.state = FINISHED if row.status == "finished" else DIVERGED

    def _settle(self, status: RunStatus, code: int) -> None:
        """Set the status of a run whose process has ended."""
        row = stored_row_of(self.shared, status.repeat, self._row_names())
        if row is not None:
            self._accept(status, row)
        elif code == EXIT_CLAIMED:
            status.state = ELSEWHERE
        elif code == EXIT_STOPPED or (code < 0 and self._is_ending()):
            status.state = STOPPED
        else:
            if (
                num_failed(status.repeat, self.shared) == status.num_failed_then
            ):  # the process died before it could record its failure
                record_failure(status.repeat, self.shared, code)
            if not self._has_failed_for_good(status):
                status.state = WAITING

    def _ask_to_stop(self) -> None:
        """Ask again after a while: a process that was starting may have missed the signal."""
        if time.monotonic() - self._asked_s >= _ASK_AGAIN_S:
            self._asked_s = time.monotonic()
            self.backend.stop()

    def _exit_code(self) -> int:
        if self.stop.is_requested and self._in(WAITING, ELSEWHERE, STOPPED):
            return EXIT_STOPPED
        if self._in(FAILED):
            return EXIT_FAILED
        if self._in(STOPPED):
            return EXIT_STOPPED
        return EXIT_DIVERGED if self._in(DIVERGED) else EXIT_DONE
