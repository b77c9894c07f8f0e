"""`python -m trainer`, the same program as the console command `rsb`."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings

from trainer.base.signals import EarlySignals


def main() -> None:
    """Run one command and end with its exit code.

    The only place that changes anything of the process: signal handlers and warning filters, both
    restored at the end, and what standard output does with characters that it cannot encode.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # é where only ASCII is allowed: \\xe9
            stream.reconfigure(errors="backslashreplace")
    command = sys.argv[1:2]
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        # PIL's advice about single image files; check-data lists them
        warnings.filterwarnings("ignore", module=r"PIL\.")
        if command == ["train"]:  # its imports take seconds, in which a signal may arrive
            stack.enter_context(EarlySignals())
        if command == ["doctor"]:
            # before Typer is imported: it, or a package that it needs, may be what is broken
            from trainer.tools.doctor_show import answer_words

            answer_words(sys.argv[2:])
        from trainer.cli.main import run_program  # Typer, after the signal handlers are installed

        sys.exit(run_program())


if __name__ == "__main__":
    main()
