"""Commands that test the machine and the suite itself: doctor looks at the machine, drill injects
faults, matrix tries every recipe on every model family.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.base.memory import importing
from trainer.cli.options import Results, Runs, app, user_errors
from trainer.tools.doctor import diagnose


@importing()
def _commands():
    from trainer.cli import tool_commands  # torch, timm, pydantic: only once options are parsed

    return tool_commands


@app.command()
@user_errors
def doctor(runs: Runs = Path("runs"), results: Results = Path("results")) -> None:
    """Look at Python, packages, GPUs, disk and locale, decode an image, make a step on each device;
    exit 1 where `make recipe=A1 model=resnet50` would fail.
    """
    # for --help: the program answers before Typer is imported, see `__main__`
    raise typer.Exit(diagnose({"runs": str(runs), "results": str(results)}))


@app.command()
@user_errors
def drill(
    only: Annotated[
        str, typer.Option(help="Only faults of these kinds: kill,oom; default: all.")
    ] = "",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Tests at a time; default: one per CPU core.")
    ] = None,
) -> None:
    """Fault-injection tests: train on digits under every fault of --inject and compare with an
    undisturbed run. Exit 1 where a result is not as promised.

    It runs on the CPU, where equal means bit for bit; on your own machines use rsb train --inject.
    """
    raise typer.Exit(0 if _commands().drill(only, jobs) else 1)


@app.command()
@user_errors
def matrix(
    models: Annotated[
        str, typer.Option(help="Only these models, separated by spaces; default: all.")
    ] = "",
    recipes: Annotated[
        str, typer.Option(help="Only these recipes, separated by spaces; default: all.")
    ] = "",
    results: Results = Path("results"),
) -> None:
    """Compatibility matrix: one optimizer step of every recipe on every model family, or the reason
    why not; the whole matrix is written to results/matrix.md.
    """
    _commands().matrix(models, recipes, results)
