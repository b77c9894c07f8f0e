"""The commands about stored rows: table, compare, reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.base.errors import UserError
from trainer.base.signals import StopRequest
from trainer.cli import options
from trainer.cli.options import app, user_errors

Anyway = Annotated[
    bool,
    typer.Option(
        "--anyway/--no-anyway", help="Run although recipe, data or versions have changed."
    ),
]


def _commands():
    from trainer.cli import table_show  # scipy and rich: not for --help and other commands

    return table_show


@app.command()
@user_errors
def table(
    ablation: Annotated[
        str,
        typer.Option(
            help="An ablation or a path to its .yaml; default: list all with their progress."
        ),
    ] = "",
    metric: options.MetricName = "top1",
    sort: Annotated[str, typer.Option(help='Columns, -name for descending: "-mean cell".')] = "",
    columns: Annotated[str, typer.Option(help='Columns to show: "cell n mean difference".')] = "",
    filter_: Annotated[
        str, typer.Option("--filter", help='Which cells: "mean > 90 and n >= 3".')
    ] = "",
    format_: Annotated[
        str, typer.Option("--format", help="terminal, md, csv or tex.")
    ] = "terminal",
    runs: options.Runs = Path("runs"),
    results: options.Stores = "results",
) -> None:
    """An ablation's table from its rows, also stored as <results>/<ablation>.{md,csv,tex,html}."""
    _commands().show_table(ablation, results, runs, metric, sort, columns, filter_, format_)


@app.command()
@user_errors
def compare(
    a: Annotated[
        str, typer.Option(help="A run: its name, or its folder; with --ablation a cell's name.")
    ] = "",
    b: Annotated[str, typer.Option(help="The run or the cell to compare it with.")] = "",
    ablation: Annotated[
        str, typer.Option(help="Compare two cells of this ablation: all their seeds.")
    ] = "",
    runs: options.Runs = Path("runs"),
    results: options.Results = Path("results"),
) -> None:
    """The differences of two rows, and their learning curves where the run folders are here; of
    two cells of an ablation the difference b - a, paired by seed, with its interval.
    """
    missing = [f"{name}=" for name, run in (("a", a), ("b", b)) if not run]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing; compare two runs with a=<run> b=<run>, two cells "
            "with ablation=<name> a=<cell> b=<cell>"
        )
    if ablation:
        _commands().show_cells(ablation, a, b, results, runs)
    else:
        _commands().show_comparison(a, b, results, runs)


@app.command()
@user_errors
def reproduce(
    row: Annotated[str, typer.Option(help="A run's name, or its folder.")],
    recipe: Annotated[
        str, typer.Option(help="The recipe file, if it is not one of the suite's.")
    ] = "",
    data: Annotated[
        str, typer.Option(help="The dataset, if it is not at the row's own name.")
    ] = "",
    data_dir: options.DataDir = None,
    device: options.Device = "auto",
    precision: Annotated[
        str, typer.Option(help="float32, tf32, bf16 or fp16; default: the row's.")
    ] = "",
    workers: options.Workers = "auto",
    runs: options.Runs = Path("runs"),
    results: options.Results = Path("results"),
    anyway: Anyway = False,
) -> None:
    """Rerun a row from its own record, as a new run; exit 1 if the result differs."""
    with (
        StopRequest() as stop
    ):  # signals count from here on; the import below takes seconds (torch)
        from trainer.cli.reproduce_commands import rerun  # torch takes seconds

        machine = device, precision, workers, runs, results
        raise typer.Exit(rerun(row, recipe, data, data_dir, machine, anyway, stop))
