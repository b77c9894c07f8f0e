"""`bench`: what each part of a run could do alone, what the whole does, and what holds it up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.base.memory import importing
from trainer.cli import options
from trainer.cli.options import app, user_errors


@app.command()
@user_errors
def bench(
    recipe: Annotated[
        str, typer.Option(help="A recipe; default: A2 and convnext on a GPU, A3 on the CPU.")
    ] = "",
    model: Annotated[
        str,
        typer.Option(
            help="A model; default: resnet50 and convnext_tiny on a GPU, resnet18 on the CPU."
        ),
    ] = "",
    data: Annotated[
        str,
        typer.Option(help="As train takes it; default: JPEG photos of an ImageNet image's size."),
    ] = "",
    data_dir: options.DataDir = None,
    src: Annotated[
        Path | None,
        typer.Option(help="A folder or a tar of JPEG files to use in place of those photos."),
    ] = None,
    set_: options.Set = "",
    device: options.Device = "auto",
    gpu: Annotated[
        int, typer.Option(min=0, max=1, help="1: measure on a GPU, or say that there is none.")
    ] = 0,
    precision: options.Precision = "auto",
    workers: options.Workers = "auto",
    loader: options.Loader = "auto",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of the parts, and whole steps.")] = 8,
    results: options.Results = Path("results"),
) -> None:
    """Time decoding, augmenting, the transfer, model, optimizer, evaluation and whole steps; JSON
    in results/bench.

    On a GPU also a loop of timm's parts, both optimizers alone and peak memory, within eight
    minutes.
    """
    with importing():
        from trainer.cli.bench_commands import run_bench  # torch takes seconds

    machine = {"device": "cuda" if gpu else device, "precision": precision}
    machine |= {"workers": workers, "loader": loader}
    run_bench(recipe, model, data, data_dir, src, set_, machine, rounds, results)
