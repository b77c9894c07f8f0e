"""What a run asks before each step and each write: is the folder still its own, is a fault due?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from trainer.runs.lock import Lock


class FaultInjection(Protocol):
    """Faults on purpose, for tests of what a run promises."""

    def before_step(self, step: int, state) -> None:
        """Before step 0, 1 ...: whatever is to happen in it."""

    def before_write(self, path: Path) -> None:
        """Before a checkpoint or a line of metrics is written. Raises OSError for a full disk."""

    def wrap(self, state) -> Callable | None:
        """What makes a training stream a faulty one, if any of its faults are due."""


@dataclass(frozen=True)
class Guard:
    """The lock on a run's folder, which rank 0 holds, and the faults to inject; mostly neither."""

    lock: Lock | None = None
    faults: FaultInjection | None = None

    def check(self) -> None:
        """Raise LockLost once another process has taken the folder over."""
        if self.lock is not None:
            self.lock.check()

    def before_step(self, step: int, state) -> None:
        """Raise LockLost; let the faults of this step happen."""
        self.check()
        if self.faults is not None:
            self.faults.before_step(step, state)

    def before_write(self, path: Path) -> None:
        """Raise LockLost, or OSError where the disk is full on purpose."""
        self.check()
        if self.faults is not None:
            self.faults.before_write(path)

    def wrap(self, state) -> Callable | None:
        """What takes the training stream's place, or None."""
        return self.faults.wrap(state) if self.faults is not None else None
