"""`data` writes the .beton files that loader=ffcv reads; `parity` certifies that it reads from them
what the torch loader does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.options import Data, DataDir, Recipe, Results, Seed, Set, Workers, app, user_errors

Src = Annotated[
    Path | None, typer.Option(help="Where the source images lie; absent: data itself, or data-dir.")
]


@app.command("data")
@user_errors
def write_data(
    data: Data = "digits",
    src: Src = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the .beton files; absent: the image folder itself."),
    ] = None,
    max_side: Annotated[
        int,
        typer.Option(
            "--max-side", "--max_side", help="Shrink longer sides to so many px; 0: none."
        ),
    ] = 0,
    jpeg_share: Annotated[
        float | None,
        typer.Option(
            "--jpeg-share",
            "--jpeg_share",
            help="Share of the images stored as JPEG; absent: JPEG files keep their own bytes, others lie plainly.",
        ),
    ] = None,
    quality: Annotated[int, typer.Option(help="Of JPEGs that are made here.")] = 90,
    workers: Workers = "auto",
) -> None:
    """Write train.beton and val.beton, each with its .json; a stopped call goes on where it was.
    Every image is decoded again from what was stored. Needs no ffcv.
    """
    from trainer.base.errors import UserError
    from trainer.base.settings import num_cores, worker_count
    from trainer.data.datasets.builtin import open_set
    from trainer.data.ffcv.beton_writer import Storage, write_beton
    from trainer.data.profile import data_folder, find_profile
    from trainer.runs import summary as show

    folder = data_folder(data, src)
    to = out or folder
    if to is None:
        raise UserError(f"data={data}: no folder to write into; use out=<folder>")
    storage = Storage(max_side, jpeg_share, quality)
    num_threads = max(1, worker_count(workers, auto=num_cores()))
    profile, console = find_profile(data, src), show.console()
    for split in ("train", "val"):
        images = open_set(profile, folder, split)
        with show.progress(console, split, images.num_images) as each:
            facts = write_beton(images, to, split, profile, storage, num_threads, each)
        kind = (
            "JPEG files byte for byte, other images pixel by pixel"
            if facts.is_lossless
            else "images changed in storing: a data set of its own"
        )
        console.print(
            f"{to / split}.beton: {facts.num_images} images, {facts.num_bytes / 2**20:.0f} MiB, {kind}",
            markup=False,
            highlight=False,
        )
    console.print(
        f"train from it: data={data} data_dir={to} loader=ffcv", markup=False, highlight=False
    )


@app.command()
@user_errors
def parity(
    data: Data = "digits",
    data_dir: DataDir = None,
    src: Src = None,
    recipe: Recipe = "A1",
    seed: Seed = 0,
    set_: Set = "",
    images: Annotated[int, typer.Option(min=1, help="Images to compare, at least.")] = 2048,
    run: Annotated[
        str,
        typer.Option(
            help="A run whose exported model scores both; absent: the nearest class mean."
        ),
    ] = "",
    runs: Annotated[Path, typer.Option(help="Folder of the run folders.")] = Path("runs"),
    results: Results = Path("results"),
) -> None:
    """The torch loader on the source against ffcv on its .beton: order, boxes, pixels, top-1 of a
    fixed model. Writes results/parity/<data>-<6 hex>.json; exit 1 where they differ by more than it
    allows.
    """
    from trainer.runs import summary as show
    from trainer.runs.job import Job
    from trainer.runs.loader_equivalence import certify, notes, parity_table, write_certificate

    out = show.console()
    out.print(
        f"{data}: at least {images} training images and all of val, each read by both loaders ...",
        markup=False,
        highlight=False,
    )
    found = certify(Job(recipe, "resnet50", data, data_dir, seed, set_), src, images, run, runs)
    out.print(parity_table(found))
    for line in notes(found):
        out.print(line, markup=False)
    out.print(f"certificate: {write_certificate(found, results)}", markup=False, highlight=False)
    raise typer.Exit(0 if found["is_within"] else 1)
