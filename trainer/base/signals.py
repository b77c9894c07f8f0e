"""Signals that ask a run to save and end: SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (a cluster's warning)
and SIGHUP (the terminal is closed). What was ignored before, as nohup and a shell's `&` have it,
stays so.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from trainer.base.exits import EXIT_INTERRUPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

Action = Callable[[int, FrameType | None], Any] | int | None  # what signal.signal gives and takes


class Stopped(Exception):
    """A signal asked for the end in the middle of something that need not be finished."""


class StoppedAlone(Exception):
    """The same of one rank of several, where the others cannot come along: nothing can be saved
    together.
    """


def handle_signals(handler: Action) -> dict[int, Action]:
    """Install a handler for those of SIGNALS that are not ignored; gives what each did before."""
    return {
        number: signal.signal(number, handler)
        for number in SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }


class StopRequest:
    """A context in which the signals are noted instead of obeyed; a second Ctrl-C ends the process
    at once.

    For a command line: whoever trains from Python gives one that is not entered, which changes no
    handler and asks for nothing.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._requested_s = 0.0
        self._before: dict[int, Action] = {}
        self._is_interrupted = False

    def __enter__(self) -> StopRequest:
        for number, before in handle_signals(self._note).items():
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

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._is_interrupted:
            _end_at_once()
        self._is_interrupted |= number == signal.SIGINT
        if self.signal_name is None:
            self._requested_s = time.monotonic()
        self.signal_name = signal.Signals(number).name

    @property
    def is_requested(self) -> bool:
        """Has a signal come?"""
        return self.signal_name is not None

    def check(self, after_s: float = 0.0) -> None:
        """Raise Stopped once a signal has come, and so many seconds have passed since the first."""
        if self.is_requested and time.monotonic() - self._requested_s >= after_s:
            raise Stopped(self.signal_name)


class EarlySignals:
    """A context that notes the signals for the StopRequest that is made in it once all is
    imported.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._before: dict[int, Action] = {}

    def __enter__(self) -> EarlySignals:
        self._before = handle_signals(self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, action in self._before.items():
            signal.signal(number, action)

    def before(self, number: int) -> Action:
        """What a signal did before this context."""
        return self._before[number]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT.name in self.seen:
            _end_at_once()
        self.seen.append(signal.Signals(number).name)


def _early(action: Action) -> EarlySignals | None:
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
