"""`python -m trainer`, the same program as the console command `rsb`."""

from __future__ import annotations

import contextlib
import sys
import warnings

from trainer.base.signals import EarlySignals


def main() -> None:
    """Run one command and end with its exit code.

    The only place that changes anything of the process: signal handlers and warning filters, both
    put back at the end.
    """
    words = sys.argv[1:]
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.filterwarnings(
            "ignore", module=r"PIL\."
        )  # advice about files, which check-data lists
        if words[:1] == ["train"]:  # the imports take a second, in which a signal may come
            stack.enter_context(EarlySignals())
        if words[:1] == [
            "doctor"
        ]:  # asked where Typer, or what it needs, may be the one that is broken
            from trainer.tools.doctor_show import answer_words

            answer_words(words[1:])
        sys.exit(_run())


def _run() -> int:
    """Run one command; words that it does not take are one line and exit 2."""
    import typer  # here, so that the signals are noted by now

    from trainer.base.errors import printable
    from trainer.cli.main import app

    try:
        from typer import TyperException as click_error
    except ImportError:  # a Typer that still stands on click
        from click import ClickException as click_error
    try:
        return app(prog_name="rsb", standalone_mode=False)
    except click_error as error:
        message = error.format_message().rstrip(".")
        if message:  # else no command was named, and the help stands there already
            asked = error.ctx.command_path if getattr(error, "ctx", None) else "rsb"
            typer.echo(f"error: {printable(message)}; see {asked} --help", err=True)
        return error.exit_code
    except typer.Abort:
        return 1


if __name__ == "__main__":
    main()
