"""Commands about data: check-data reads every image, split makes train/ and val/, data packs a
split into one file, parity compares ffcv's loader of such files with torch's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.base.memory import importing
from trainer.cli import options
from trainer.cli.options import app, user_errors

Src = Annotated[
    Path | None,
    typer.Option(help="Folder of the source images; default: data, or data-dir."),
]


@importing()
def _commands():
    from trainer.cli import data_commands  # torch, timm, pydantic: only once options are parsed

    return data_commands


@app.command("check-data")
@user_errors
def check_data(
    data: options.Data = "digits",
    data_dir: options.DataDir = None,
    workers: options.Workers = "auto",
    profile: Annotated[
        Path | None,
        typer.Option(help="Write a data profile of these images to this .yaml, for data=."),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(help="Folder for a page: images of each class, counts, what was found."),
    ] = None,
) -> None:
    """Decode every image; list unreadable and unusual ones; of files of your own, measure and show
    a data profile. Exit 1 where training would fail.
    """
    raise typer.Exit(0 if _commands().check_data(data, data_dir, workers, profile, page) else 1)


@app.command()
@user_errors
def split(
    data: Annotated[
        str,
        typer.Option(
            help="A folder of class folders: <data>/<class>/…; or a .csv, .tsv or .parquet with"
            " columns path, label and perhaps split."
        ),
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder to make; default: <data>-split, beside it.")
    ] = None,
    share: Annotated[
        float, typer.Option(help="Of each class's images that are for validation, in (0, 1).")
    ] = 0.2,
    again: Annotated[
        bool, typer.Option(help="Make a split that is there anew: images came or went.")
    ] = False,
    train_split: Annotated[
        str,
        typer.Option(
            "--train-split",
            "--train_split",
            help="The folder of <data> that is the training split, where it is not called train/.",
        ),
    ] = "",
    val_split: Annotated[
        str,
        typer.Option(
            "--val-split", "--val_split", help="Likewise of validation: not val/, validation/ ..."
        ),
    ] = "",
) -> None:
    """Make train/ and val/, of links, of a folder of class folders, of one whose splits are called
    otherwise, or of a table of paths and labels. An image's split is the folder's or the table's,
    or depends on the names in its class alone, so that the same images are split in the same way
    everywhere.
    """
    from trainer.cli.split_data import split_data  # numpy: only once options are parsed

    split_data(data, out, share, again, train_split, val_split)


@app.command("data")
@user_errors
def write_data(
    data: options.Data = "digits",
    src: Src = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the .beton files; default: the image folder itself."),
    ] = None,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="beton: JPEG files as they are, for loader=ffcv. raw: pixels, which any loader "
            "reads from the memory map without decoding; out must be a folder of its own.",
        ),
    ] = "beton",
    side: Annotated[
        int | None,
        typer.Option(
            help="With format=raw: shrink shorter sides to this many px by PIL's bicubic; "
            "0: none; default: 256."
        ),
    ] = None,
    max_side: Annotated[
        int,
        typer.Option(
            "--max-side", "--max_side", help="Shrink longer sides to this many px; 0: none."
        ),
    ] = 0,
    jpeg_share: Annotated[
        float | None,
        typer.Option(
            "--jpeg-share",
            "--jpeg_share",
            help="Share of images to store as JPEG; default: JPEG files are copied as they are, "
            "others stored raw.",
        ),
    ] = None,
    quality: Annotated[int, typer.Option(help="JPEG quality of images encoded here.")] = 90,
    workers: options.Workers = "auto",
) -> None:
    """Write train.beton and val.beton, each with its .json; rerun to resume. Every image is decoded
    again from what was written. Needs no ffcv.
    """
    commands = _commands()
    storage = commands.storage_of(format_, side, max_side, jpeg_share, quality)
    commands.write_data(data, src, out, format_, storage, workers)


@app.command()
@user_errors
def parity(
    data: options.Data = "digits",
    data_dir: options.DataDir = None,
    src: Src = None,
    recipe: options.RecipeName = "A1",
    seed: options.SeedNumber = 0,
    set_: options.Set = "",
    images: Annotated[int, typer.Option(min=1, help="Least number of images to compare.")] = 2048,
    run: Annotated[
        str,
        typer.Option(
            help="A run whose exported model evaluates both; default: a nearest-class-mean "
            "classifier."
        ),
    ] = "",
    runs: options.Runs = Path("runs"),
    results: options.Results = Path("results"),
) -> None:
    """Loader equivalence: torch's loader on the source images against ffcv on their .beton files,
    by order, crop boxes, pixels and top-1 of a fixed model. Writes
    results/parity/<data>-<6 hex>.json; exit 1 where a difference exceeds its tolerance.
    """
    commands = _commands()
    job = commands.Job(recipe, "resnet50", data, data_dir, seed, set_)
    raise typer.Exit(0 if commands.parity(job, src, images, run, runs, results) else 1)
