"""Commands that take a model elsewhere: export, latency, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.base.memory import importing
from trainer.base.signals import StopRequest
from trainer.cli import inference, options
from trainer.cli.options import app, user_errors


@importing()
def _commands():
    from trainer.cli import export_commands  # torch, timm: only once options are parsed

    return export_commands


@app.command()
@user_errors
def export(
    to: Annotated[str, typer.Option(help="onnx, openvino, torch_export or torchscript.")],
    run: inference.Run = "",
    model: inference.Model = "",
    weights: inference.WeightsFile = "",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the files; default: export/<to> in the run's folder."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Photos to compare answers on; default: a few drawn images."),
    ] = None,
    int8: Annotated[
        bool,
        typer.Option(help="An int8 model, its ranges found on --images (onnx, openvino)."),
    ] = False,
    data: Annotated[
        str,
        typer.Option(help="A folder of class folders, to count right answers on."),
    ] = "",
    batch: inference.Batch = 32,
    test_px: inference.TestPx = "",
    crop: inference.Crop = None,
    interpolation: inference.Interpolation = "",
    workers: options.Workers = "auto",
    runs: options.Runs = Path("runs"),
    again: Annotated[bool, typer.Option(help="Overwrite an exported model.")] = False,
) -> None:
    """Write a model as a file that other programs run, for any number of images at once; beside it
    preprocessing.json and use.py, which classifies image files without this package. Exit 1, and
    no file, where it does not answer as the model does.
    """
    with StopRequest() as stop:
        commands = _commands()
        is_same = commands.export(
            commands.Asked(run, model, weights, runs, test_px, crop, interpolation),
            to,
            out,
            commands.Photos(images, Path(data) if data else None, batch, stop.check),
            int8,
            commands.make_settings("cpu", "float32", workers),
            again,
        )
    raise typer.Exit(0 if is_same else 1)


@app.command()
@user_errors
def latency(
    run: inference.Run = "",
    model: inference.Model = "",
    weights: inference.WeightsFile = "",
    out: Annotated[
        Path | None,
        typer.Option(help="Name of the table: <out>.md, .csv, .png; default: beside the exports."),
    ] = None,
    batches: Annotated[str, typer.Option(help='Images at once: "1 32".')] = "1 32",
    threads: Annotated[
        str, typer.Option(help='Numbers of threads: "1 8"; default: 1, and as many as cores.')
    ] = "",
    seconds: Annotated[float, typer.Option(min=0, help="Of every engine in every case.")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns in which these are spent.")] = 5,
    compile: options.Compile = 1,
    test_px: inference.TestPx = "",
    runs: options.Runs = Path("runs"),
    again: Annotated[bool, typer.Option(help="Overwrite a table.")] = False,
) -> None:
    """Time a model's answers on the CPU: by torch, by torch.compile (minutes), by onnxruntime, by
    OpenVINO, and by int8 models that export has written. They take turns.
    """
    with StopRequest() as stop:
        with importing():
            from trainer.cli import latency_commands as commands  # torch, timm: as above

        commands.latency(
            commands.Asked(run, model, weights, runs, test_px, None, ""),
            out,
            batches,
            threads,
            seconds,
            rounds,
            bool(compile),
            again,
            stop.check,
        )


@app.command()
@user_errors
def push(
    run: inference.Run,
    repo: Annotated[str, typer.Option(help="Repository of the Hub: user/name; made if need be.")],
    license: Annotated[
        str, typer.Option(help="The model's licence, as the Hub names it: mit, cc-by-4.0.")
    ] = "",
    private: Annotated[bool, typer.Option(help="Only for you to see, where it is made.")] = True,
    runs: options.Runs = Path("runs"),
) -> None:
    """Upload a finished run's model with a model card to the Hugging Face Hub, as timm reads it."""
    from trainer.cli.push_command import push as push_run  # torch: once options are parsed

    push_run(run, repo, license, private, runs)
