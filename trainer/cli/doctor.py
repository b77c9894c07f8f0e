"""`doctor`, beside its fellows; the program itself answers it before Typer is imported, see
`__main__`.
"""

from __future__ import annotations

from pathlib import Path

import typer

from trainer.cli.options import Results, Runs, app, user_errors


@app.command()
@user_errors
def doctor(runs: Runs = Path("runs"), results: Results = Path("results")) -> None:
    """Look at Python, packages, GPUs, disk and locale, decode an image, make a step on each device;
    exit 1 where `make recipe=A1 model=resnet50` would fail.
    """
    from trainer.tools.doctor import answer  # subprocesses, platform probes: not for --help

    raise typer.Exit(answer({"runs": str(runs), "results": str(results)}))
