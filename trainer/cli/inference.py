"""Commands that ask a trained model: predict, eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.base.errors import UserError
from trainer.base.memory import importing
from trainer.base.signals import StopRequest
from trainer.cli import options
from trainer.cli.options import app, user_errors

Run = Annotated[str, typer.Option(help="A finished run's name, or its folder.")]
Model = Annotated[str, typer.Option(help="A timm model; with --weights, in place of a run.")]
WeightsFile = Annotated[
    str, typer.Option(help="A .safetensors or .pth file, a folder, or timm:resnet50.a1_in1k.")
]
Batch = Annotated[int, typer.Option(min=1, help="Images at once.")]
TestPx = Annotated[
    str,
    typer.Option(
        "--test-px",
        "--test_px",
        help='Side of the model\'s input, or several: "224 256"; default: as it was trained for.',
    ),
]
Crop = Annotated[
    float | None, typer.Option(min=0.01, max=1, help="Share of the resized image that is kept.")
]
Interpolation = Annotated[
    str, typer.Option(help="bicubic, bilinear or bilinear_no_antialias; default: the model's.")
]
DataFolder = Annotated[
    str,
    typer.Option(help="A folder of class folders; default: the run's own validation images."),
]
Page = Annotated[
    Path | None,
    typer.Option(help="Folder for a page on classes, confusions, calibration, worst images."),
]
Real = Annotated[
    Path | None,
    typer.Option(help="ReaL's real.json: a score of ImageNet's val by its labels too."),
]
AmongPresent = Annotated[
    bool,
    typer.Option(
        "--among-present",
        "--among_present",
        help="Only the classes that the data has may be answered, as ImageNet-A and -R ask.",
    ),
]
Flip = Annotated[bool, typer.Option(help="Also ask about each image mirrored.")]
Knn = Annotated[
    int | None,
    typer.Option(min=1, help="Score its features by so many nearest training images (20)."),
]


@importing()
def _commands():
    from trainer.cli import inference_commands  # torch, timm: only once options are parsed

    return inference_commands


@app.command()
@user_errors
def predict(
    images: Annotated[Path, typer.Option(help="An image, or a folder of them at any depth.")],
    run: Run = "",
    model: Model = "",
    weights: WeightsFile = "",
    out: Annotated[Path, typer.Option(help="File of the answers: .csv, .json or .parquet.")] = Path(
        "predictions.csv"
    ),
    top_k: Annotated[int, typer.Option("--top-k", "--top_k", min=1, help="Classes an image.")] = 5,
    sheet: Annotated[
        bool, typer.Option(help="Also a picture of the surest and the least sure answers.")
    ] = True,
    batch: Batch = 64,
    test_px: TestPx = "",
    crop: Crop = None,
    interpolation: Interpolation = "",
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    workers: options.Workers = "auto",
    runs: options.Runs = Path("runs"),
    again: Annotated[bool, typer.Option(help="Overwrite a file of answers.")] = False,
) -> None:
    """Write a model's best classes for every image of a folder, with their probabilities (softmax);
    at several image sizes (test_px="224 256") a file for each; of a run of segmentation masks and
    overlays, into the folder <out> without its ending. Rerun the same command to resume.
    """
    with StopRequest() as stop:
        commands = _commands()
        asked = commands.Asked(run, model, weights, runs, test_px, crop, interpolation)
        settings = commands.make_settings(device, precision, workers)
        if (folder := asked.folder_of_pictures()) is not None:
            commands.predict_pictures(folder, images, out, settings, again, stop.check)
            return
        commands.predict(
            asked.at_sizes(), images, out, top_k, batch, settings, sheet, again, stop.check
        )


@app.command("eval")
@user_errors
def evaluate(
    run: Run = "",
    model: Model = "",
    weights: WeightsFile = "",
    data: DataFolder = "",
    page: Page = None,
    real: Real = None,
    among_present: AmongPresent = False,
    flip: Flip = False,
    knn: Knn = None,
    batch: Batch = 128,
    test_px: TestPx = "",
    crop: Crop = None,
    interpolation: Interpolation = "",
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    workers: options.Workers = "auto",
    data_dir: options.DataDir = None,
    runs: options.Runs = Path("runs"),
    results: options.Results = Path("results"),
    again: Annotated[bool, typer.Option(help="Overwrite a page.")] = False,
) -> None:
    """Evaluate a model. A run alone: its exported model again on its own images; exit 1 where the
    score is not the row's (on a GPU or in another precision one image in a thousand may differ).
    With --data, --page or other image sizes (test_px="224 256"): the scores there. With --knn: of
    its features, whatever it was trained for.
    """
    with StopRequest() as stop:
        is_otherwise = any(
            (data, page, real, among_present, flip, test_px, crop, interpolation, model, weights)
        )
        if knn is not None:
            if is_otherwise or not run:
                raise UserError(f"knn={knn}: scores a run as it was evaluated", "use run= alone")
            commands, settings = _commands(), (device, precision, workers, runs, results)
            made = commands.make_settings(*settings)
            commands.nearest(run, knn, data_dir, runs, made, stop.check)
            return
        if not is_otherwise:
            if not run:
                raise UserError("run=: not given", "use run=<a run>, or model= weights= and data=")
            from trainer.cli.run_commands import evaluate as evaluate_again

            is_same = evaluate_again(run, device, precision, workers, data_dir, runs, results)
            raise typer.Exit(0 if is_same else 1)
        commands = _commands()
        commands.evaluate(
            commands.Asked(run, model, weights, runs, test_px, crop, interpolation).at_sizes(),
            data,
            data_dir,
            page,
            real,
            among_present,
            flip,
            batch,
            commands.make_settings(device, precision, workers),
            again,
            stop.check,
        )
