"""`rsb lr-find`: text to typed values, like its fellows in cli."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.base.memory import importing
from trainer.base.settings import check_numa
from trainer.base.signals import StopRequest
from trainer.cli import options
from trainer.cli.options import app, user_errors, with_runs


@app.command("lr-find")
@user_errors
def lr_find(
    recipe: options.RecipeName = "A1",
    model: options.ModelName = "resnet50",
    data: options.Data = "digits",
    data_dir: options.DataDir = None,
    set_: options.Set = "",
    weights: options.Weights = "",
    seeds: Annotated[
        int, typer.Option(help="Repeats, each with its own first weights and order.")
    ] = 3,
    low: Annotated[
        float | None, typer.Option("--from", help="The first value; 1e-6 for the learning rate.")
    ] = None,
    high: Annotated[
        float | None, typer.Option("--to", help="The last value; 10 for the learning rate.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps of a ramp; 200, fewer where the run is short."),
    ] = None,
    ramp: Annotated[
        str,
        typer.Option(
            help=(
                "exponential or linear, of the learning rate; or any other number of the recipe:"
                " weight_decay."
            )
        ),
    ] = "exponential",
    curve: Annotated[
        str | None, typer.Option(help="What the rules read: train, heldout or both.")
    ] = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    workers: options.Workers = "auto",
    runs: options.Runs = Path("runs"),
    results: options.Results = Path("results"),
    again: options.AgainFlag = False,
    gpus: options.Gpus = None,
    procs: options.Procs = None,
    numa: options.Numa = "off",
) -> None:
    """Find the learning rate by a LR finder run along the recipe's own training path; or any other
    number of the recipe, with --ramp.
    """
    with (
        StopRequest() as stop
    ):  # signals count from here on; the import below takes seconds (torch)
        check_numa(numa)
        with importing():
            from trainer.cli.lr_find_ranks import find_on_ranks  # torch takes seconds

        machine = {"precision": precision, "workers": workers, "runs": runs, "results": results}
        machine["numa"] = numa
        request = ramp, low, high, steps, seeds, curve
        asked = recipe, model, data, data_dir, with_runs(set_, runs), weights, again
        code = find_on_ranks(asked, request, device, machine, gpus, procs, stop)
    raise typer.Exit(code)
