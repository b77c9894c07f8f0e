"""`rsb lr-find`: text to typed values, like its fellows in cli."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.base.signals import StopRequest
from trainer.cli.options import (
    AgainFlag,
    Data,
    DataDir,
    Device,
    Gpus,
    ModelName,
    Precision,
    Procs,
    RecipeName,
    Results,
    Runs,
    Set,
    Workers,
    app,
    user_errors,
)  # fmt: skip


@app.command("lr-find")
@user_errors
def lr_find(
    recipe: RecipeName = "A1",
    model: ModelName = "resnet50",
    data: Data = "digits",
    data_dir: DataDir = None,
    set_: Set = "",
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
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = "auto",
    runs: Runs = Path("runs"),
    results: Results = Path("results"),
    again: AgainFlag = False,
    gpus: Gpus = None,
    procs: Procs = None,
) -> None:
    """Find the learning rate by a LR finder run along the recipe's own training path; or any other
    number of the recipe, with --ramp.
    """
    with (
        StopRequest() as stop
    ):  # signals count from here on; the import below takes seconds (torch)
        from trainer.cli.lr_find_ranks import find_on_ranks  # torch takes seconds

        machine = {"precision": precision, "workers": workers, "runs": runs, "results": results}
        request = ramp, low, high, steps, seeds, curve
        asked = recipe, model, data, data_dir, set_, again
        code = find_on_ranks(asked, request, device, machine, gpus, procs, stop)
    raise typer.Exit(code)
