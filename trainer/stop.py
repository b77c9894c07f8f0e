"""Signals that ask a run to save and end: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (a cluster's warning)."""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """A signal asked for the end in the middle of something that need not be finished."""


class StopRequest:
    """A context in which the signals are noted instead of obeyed; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, action in self._before.items():
            signal.signal(number, action)

    def _note(self, number: int, frame) -> None:
        self.signal_name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def is_requested(self) -> bool:
        return self.signal_name is not None

    def check(self) -> None:
        """Raise Stopped once a signal has come."""
        if self.is_requested:
            raise Stopped(self.signal_name)
