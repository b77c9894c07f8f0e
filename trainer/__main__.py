"""`python -m trainer`, the same program as the console command `rsb`."""

from __future__ import annotations

import sys

from trainer.base.signals import listen_early

if sys.argv[1:2] == ["train"]:  # the imports below take a second, in which a signal may come
    listen_early()

if sys.argv[1:2] == [
    "doctor"
]:  # asked where Typer, or what it needs, may be the one that is broken
    from trainer.tools.doctor_show import answer_words

    answer_words(sys.argv[2:])

import typer  # noqa: E402

from trainer.base.errors import printable  # noqa: E402
from trainer.cli.main import app  # noqa: E402

try:
    from typer import TyperException
except ImportError:  # a Typer that still stands on click
    from click import ClickException as TyperException


def main() -> None:
    """Run one command and end with its exit code; words that it does not take are one line and exit 2."""
    try:
        code = app(prog_name="rsb", standalone_mode=False)
    except TyperException as error:
        message = error.format_message().rstrip(".")
        if message:  # else no command was named, and the help stands there already
            asked = error.ctx.command_path if getattr(error, "ctx", None) else "rsb"
            typer.echo(f"error: {printable(message)}; see {asked} --help", err=True)
        code = error.exit_code
    except typer.Abort:
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
