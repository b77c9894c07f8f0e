"""Signals that ask a run to save and end: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (a cluster's warning)."""

from __future__ import annotations

import os
import signal
import sys

from trainer.base.exits import EXIT_INTERRUPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_early: list[str] = []  # what came before there was a StopRequest


class Stopped(Exception):
    """A signal asked for the end in the middle of something that need not be finished."""


class StopRequest:
    """A context in which the signals are noted instead of obeyed; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._before: dict[int, object] = {}
        self._is_interrupted = False

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            before = signal.signal(number, self._note)
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            self._before[number] = usual if before is _note_early else before
        if _early:
            self._is_interrupted = signal.SIGINT.name in _early
            self.signal_name = _early.pop()
            _early.clear()
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


def listen_early() -> None:
    """Note the signals from now on, for the StopRequest that will be made once all is imported."""
    for number in SIGNALS:
        signal.signal(number, _note_early)


def _note_early(number: int, frame) -> None:
    if number == signal.SIGINT and signal.SIGINT.name in _early:
        _end_at_once()
    _early.append(signal.Signals(number).name)


def _end_at_once() -> None:
    """End without a look at anything: no library may take this for an exception of its own, and go on."""
    if sys.stdout is not None and sys.stdout.isatty():
        os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # the progress bar had hidden the cursor
    os._exit(EXIT_INTERRUPTED)
