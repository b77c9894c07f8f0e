"""Signals that ask a run to save and end: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (a cluster's
warning).
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from trainer.base.exits import EXIT_INTERRUPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """A signal asked for the end in the middle of something that need not be finished."""


class StopRequest:
    """A context in which the signals are noted instead of obeyed; a second Ctrl-C ends the process
    at once.

    For a command line: whoever trains from Python gives one that is not entered, which changes no
    handler and asks for nothing.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._before: dict[int, Any] = {}
        self._is_interrupted = False

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            before = signal.signal(number, self._note)
            early = _early(before)
            self._before[number] = early.before(number) if early else before
        if early and early.seen:
            self._is_interrupted |= signal.SIGINT.name in early.seen
            self.signal_name = self.signal_name or early.seen[-1]
            early.seen.clear()
        return self

    def __exit__(self, *exception) -> None:
        for number, action in self._before.items():
            signal.signal(number, action)

    def _note(self, number: int, frame) -> None:
        if number == signal.SIGINT and self._is_interrupted:
            _end_at_once()
        self._is_interrupted |= number == signal.SIGINT
        self.signal_name = signal.Signals(number).name

    @property
    def is_requested(self) -> bool:
        return self.signal_name is not None

    def check(self) -> None:
        """Raise Stopped once a signal has come."""
        if self.is_requested:
            raise Stopped(self.signal_name)


class EarlySignals:
    """A context that notes the signals for the StopRequest that is made in it once all is
    imported.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> EarlySignals:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, action in self._before.items():
            signal.signal(number, action)

    def before(self, number: int) -> Any:
        """What a signal did before this context."""
        return self._before[number]

    def _note(self, number: int, frame) -> None:
        if number == signal.SIGINT and signal.SIGINT.name in self.seen:
            _end_at_once()
        self.seen.append(signal.Signals(number).name)


def _early(action: Any) -> EarlySignals | None:
    """The EarlySignals that a signal's handler belongs to."""
    owner = getattr(action, "__self__", None)
    return owner if isinstance(owner, EarlySignals) else None


def _end_at_once() -> None:
    """End without a look at anything: no library may catch this as an exception of its own, and
    carry on.
    """
    if sys.stdout is not None and sys.stdout.isatty():
        os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # the progress bar had hidden the cursor
    os._exit(EXIT_INTERRUPTED)
