"""Standard output and error that may break: a pipe whose reader has gone, a full disk, closed."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, TextIO


class Output:
    """A text stream whose loss ends nothing: what cannot be written goes nowhere from then on.

    trouble: why, None while all is written.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.trouble: OSError | None = None
        if stream is None:  # closed by the one who started this program
            stream = open(os.devnull, "w")  # noqa: SIM115  for as long as this process runs
            self.trouble = OSError(errno.EBADF, os.strerror(errno.EBADF))
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of a stream; once one has failed, what is written goes nowhere."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """As of a stream, likewise."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.trouble = error
        # by the descriptor: what is still buffered goes there too, else Python's own flush at the
        # end would fail, and the exit code be another
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


def guard_standard_streams() -> Output:
    """Make both of this process's streams ones whose loss ends nothing; gives standard output."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)  # else the next file opened would be what others print to
    os.close(number)
    sys.stdout, sys.stderr = output, _ = Output(sys.stdout), Output(sys.stderr)
    return output
