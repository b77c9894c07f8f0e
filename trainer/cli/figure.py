"""The command figure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.cli import options
from trainer.cli.options import app, user_errors


@app.command()
@user_errors
def figure(
    ablation: Annotated[str, typer.Option(help="An ablation or a path to its .yaml.")] = "",
    what: Annotated[str, typer.Option(help="effects, curves or cost.")] = "effects",
    size: Annotated[float, typer.Option(help="Width in inches; 5.5: a paper's column.")] = 5.5,
    format_: Annotated[
        str, typer.Option("--format", help="svg, pdf or png, several with spaces; default: all.")
    ] = "",
    out: Annotated[
        str, typer.Option(help="File to write; default: <results>/<ablation>.<what>.<format>.")
    ] = "",
    metric: options.MetricName = "top1",
    runs: options.Runs = Path("runs"),
    results: options.Stores = "results",
) -> None:
    """A figure of an ablation for a paper: all cells in one, as SVG, PDF and PNG."""
    from trainer.cli import figure_draw  # matplotlib: not for --help and other commands

    figure_draw.draw(ablation, what, size, format_, out, metric, runs, results)
