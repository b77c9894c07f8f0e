"""The program `rsb`: its groups of commands, and what happens to words that no command takes.

Nothing heavy is imported before a command has read its options: `--help` and a mistyped option
answer before torch, timm or pydantic could be imported. The modules imported here hold signatures;
what a command does is in a module of its own, which the command imports when it is called.
"""

from __future__ import annotations

import shutil
import sys
from typing import Any

import typer

import trainer.cli.ablate
import trainer.cli.bench
import trainer.cli.convert
import trainer.cli.data
import trainer.cli.export
import trainer.cli.figure
import trainer.cli.inference
import trainer.cli.lr_find
import trainer.cli.recipes
import trainer.cli.runs
import trainer.cli.table
import trainer.cli.tools  # noqa: F401  importing these adds their commands to app
from trainer.base.commands import command, program
from trainer.base.errors import UserError, one_line
from trainer.cli.options import app
from trainer.cli.words import help_text, in_words, options_of

try:
    from typer import TyperException as CommandError
except ImportError:  # older versions of Typer are built on click
    from click import ClickException as CommandError  # type: ignore[assignment]


def run_program() -> int:
    """Run the command named by sys.argv; one that cannot be parsed is one line and exit 2."""
    try:
        group: Any = typer.main.get_command(app)
        if program() == "make" and sys.argv[2:] == ["--help"] and sys.argv[1] in group.commands:
            typer.echo(help_text(sys.argv[1], group, shutil.get_terminal_size().columns))
            return 0
        words = options_of(sys.argv[1:], group)
        return app(words, prog_name="rsb", standalone_mode=False)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        return 2
    except CommandError as error:
        message = error.format_message().rstrip(".")
        if message:  # it is empty where no command was named: the help was printed then
            context = getattr(error, "ctx", None)
            path = context.command_path if context else "rsb"
            see = f"{path} --help"
            if program() == "make":  # where options are words
                message = in_words(message)
                see = command("help", of=path.removeprefix("rsb").strip())
            typer.echo(f"error: {one_line(message)}; see {see}", err=True)
        return error.exit_code
    except typer.Abort:
        return 1
