"""`python -m trainer`, the same program as the console command `rsb`."""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import signal
import sys
import warnings
from pathlib import Path

from trainer.base.cores import let_threads_sleep
from trainer.base.disk import why
from trainer.base.exits import EXIT_UNWRITTEN
from trainer.base.output import guard_standard_streams
from trainer.base.signals import SIGNALS, EarlySignals

# They hear signals, and continue without standard output: what they make stands in files.
_LONG = ("train", "ablate", "lr-find", "reproduce")


def main() -> None:
    """Run one command and end with its exit code.

    The only place that changes anything of the process: standard streams, signal handlers,
    warning filters and how threads wait.
    """
    ending = _Ending()
    let_threads_sleep()
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    is_long = first in _LONG or "=" in first  # recipe=A1 alone trains
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # é where only ASCII is allowed: \\xe9
            stream.reconfigure(errors="backslashreplace")
    output = guard_standard_streams()
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        # PIL's advice about single image files; check-data lists them
        warnings.filterwarnings("ignore", module=r"PIL\.")
        if is_long:  # its imports take seconds, in which a signal may arrive
            stack.enter_context(EarlySignals())
        if sys.argv[1:2] == ["doctor"]:
            # before Typer is imported: it, or a package that it needs, may be what is broken
            from trainer.tools.doctor import answer_words

            answer_words(sys.argv[2:])
        from trainer.cli.main import run_program  # Typer, after the signal handlers are installed

        code = run_program()
    for number in SIGNALS:  # all is said and done: Python's own end says nothing
        signal.signal(number, signal.SIG_IGN)
    output.flush()
    if not is_long and output.trouble and output.trouble.errno not in (errno.EPIPE, errno.EBADF):
        print(f"error: standard output: cannot write ({why(output.trouble)})", file=sys.stderr)
        code = EXIT_UNWRITTEN
    if Path(sys.argv[0]).stem in ("rsb", "__main__"):  # not where another program has called this
        ending.code = code or 0
    sys.exit(code)


class _Ending:
    """The end of this process with an exit code, once one is set: after Python's threads and all
    that others have registered, and without taking half a million objects apart, which is two
    seconds of processor time.
    """

    code: int | None = None

    def __init__(self) -> None:
        atexit.register(self._end)  # the first one registered is called last

    def _end(self) -> None:
        if self.code is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.code)


if __name__ == "__main__":
    main()
