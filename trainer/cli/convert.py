"""Commands that make recipes from other programs' commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.options import app, user_errors

_ArgsText = Annotated[
    str,
    typer.Option(
        "--args",
        help="The command in quotes, its flags alone, a text file with it, or an args.yaml.",
    ),
]
_NumGpus = Annotated[
    int | None,
    typer.Option(min=1, help="GPUs that the command runs on, where its launcher does not say."),
]
_OutFile = Annotated[
    Path | None, typer.Option(help="The recipe to write; default: my-<model>.v1.yaml here.")
]


def _convert(
    program: str, text: str, gpus: int | None, out: Path | None, version: str = ""
) -> None:
    from trainer.cli.convert_commands import convert  # timm, pydantic: once options are parsed

    if not convert(program, text, gpus, out, version):
        raise typer.Exit(1)


@app.command()
@user_errors
def from_timm(
    args: _ArgsText = "",
    gpus: _NumGpus = None,
    out: _OutFile = None,
    version: Annotated[
        str,
        typer.Option(help="timm's version, whose defaults fill in: 0.5.4; default: the newest's."),
    ] = "",
) -> None:
    """Make a recipe from a command of timm's train.py, or its args.yaml. Exit code 1 where a
    recipe cannot say all of it; the recipe is written, and names what it lacks.
    """
    _convert("timm", args, gpus, out, version)


@app.command()
@user_errors
def from_torchvision(args: _ArgsText = "", gpus: _NumGpus = None, out: _OutFile = None) -> None:
    """Make a recipe from a command of torchvision's references/classification/train.py."""
    _convert("torchvision", args, gpus, out)


@app.command()
@user_errors
def from_convnext(args: _ArgsText = "", gpus: _NumGpus = None, out: _OutFile = None) -> None:
    """Make a recipe from a command of ConvNeXt's main.py or run_with_submitit.py."""
    _convert("convnext", args, gpus, out)
