"""What the commands do that make recipes from other programs' commands."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from trainer.base.commands import command
from trainer.base.errors import UserError, printable
from trainer.convert.make import make_recipe, write_recipe
from trainer.runs import summary


def convert(program: str, text: str, gpus: int | None, out: Path | None, version: str) -> bool:
    """Write the recipe of a command, and print what became of its flags. Gives whether the recipe
    says all that the command does. Raises UserError.
    """
    if not text.strip():
        raise UserError(
            f"args= not given: from-{program} needs a command",
            'use args="<its flags>", or args=<file>',
        )
    made = make_recipe(program, text, gpus, version)
    path = write_recipe(made, out)
    console = summary.console()
    lines = [
        f"wrote {path}: {len(made.recipe.assumed)} values assumed, each with its reason",
        *(f"cannot be said: {flag} ({why})" for flag, why in made.lost),
        *(f"a setting of the run: {flag} ({how})" for flag, how in made.settings),
        *(f"without effect in that command: {flag}" for flag in made.idle),
    ]
    for title, flags in (("facts of the data", made.data), ("ignored", made.ignored)):
        lines += [f"{title}: {', '.join(flags)}"] if flags else []
    if made.has_model:
        lines.append(f"next: {command('plan', recipe=path, model=made.model, data='imagenet-1k')}")
    else:
        lines.append(f"timm has no model {made.model}: name another with model=")
    for line in lines:
        console.print(Text(printable(line)))
    return not made.lost
