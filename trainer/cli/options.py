"""The program, its options, each declared once, and how what a user wrote wrong becomes one
line.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Annotated

import typer

from trainer.base.exits import EXIT_FAILED
from trainer.base.memory import line_of
from trainer.base.plugins import load_plugins
from trainer.runs.lock import LockLost

app = typer.Typer(
    help="Training recipes as versioned, sourced contracts: ResNet strikes back and its peers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Recipe = Annotated[
    str, typer.Option(help="A page: A1 (its newest version), A1.v1, or a path to a .yaml file.")
]
Model = Annotated[str, typer.Option(help="Any timm model of the ResNet or ConvNeXt family.")]
Data = Annotated[
    str,
    typer.Option(
        help="digits, fashion-mnist, mnist (also <name>-grey, one channel), cifar10, cifar100, imagenet-1k, an image folder, "
        "a folder of tar shards, parquet or `datasets`, a profile's .yaml."
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", "--data_dir", help="Where the data set lies, or is downloaded to."),
]
Seed = Annotated[int, typer.Option(help="Which repeat this is.")]
Set = Annotated[
    str, typer.Option("--set", help='Departures from the page: "epochs=5 loss.name=ce".')
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[
    str,
    typer.Option(
        help="auto (on a GPU bf16, or fp16 where it has no bf16; float32 on the CPU), float32, bf16 or fp16."
    ),
]
Workers = Annotated[
    str, typer.Option(help="Loader processes: auto or a number. Never changes a result.")
]
Loader = Annotated[
    str,
    typer.Option(
        help="Who reads images: auto (ffcv where it is installed and lossless .beton files lie there, else torch), torch, pil (torch with every JPEG file decoded whole by PIL) or ffcv."
    ),
]
Runs = Annotated[Path, typer.Option(help="Folder of the run folders.")]
Results = Annotated[Path, typer.Option(help="The store of result rows.")]
Again = Annotated[
    bool, typer.Option("--again/--no-again", help="Make a new run where the row is there already.")
]
Gpus = Annotated[int | None, typer.Option(min=1, help="Ranks, each on a GPU of its own.")]
Procs = Annotated[int | None, typer.Option(min=1, help="Ranks on the CPU.")]
PartOf = Annotated[
    str | None, typer.Option(hidden=True, help="For the row: what the run is a part of.")
]
CheckpointS = Annotated[
    float,
    typer.Option(
        "--checkpoint-s", "--checkpoint_s", min=0, help="Least seconds between two checkpoints."
    ),
]
MicroBatch = Annotated[
    str,
    typer.Option(
        "--micro-batch",
        "--micro_batch",
        help="page, or auto: where memory runs out, the same step in smaller pieces.",
    ),
]
Checkpointing = Annotated[
    int,
    typer.Option(
        "--activation-checkpointing",
        "--activation_checkpointing",
        min=0,
        max=1,
        help="1: less memory, more time, the same result.",
    ),
]
Compile = Annotated[
    int,
    typer.Option(
        min=0,
        max=1,
        help="1: the model's passes as compiled code (torch.compile); the same result to rounding.",
    ),
]
Inject = Annotated[
    str,
    typer.Option(
        help="Faults on purpose: kill@37,nan@50,oom@12,enospc@80,slow@5:3s,bad_image@100,term@20,raise@9."
    ),
]
KeepEvery = Annotated[
    int,
    typer.Option(
        "--keep-every",
        "--keep_every",
        min=0,
        help="Epochs between two checkpoints that stay; 0: only the last two do.",
    ),
]
BadImages = Annotated[
    str,
    typer.Option(
        "--bad-images",
        "--bad_images",
        help="fail, or skip: take another image instead, counted, at most 1 %.",
    ),
]


Plugins = Annotated[
    str,
    typer.Option(
        help="Python files with components of your own: my_losses.py, several with commas."
    ),
]


def user_errors(command):
    """Turn what a user wrote wrong into one line on standard error and exit 2; and load plugins
    before the command runs.

    A command with a parameter `plugins` of its own loads them itself.
    """
    signature = inspect.signature(command, eval_str=True)
    loads_itself = "plugins" in signature.parameters

    @functools.wraps(command)
    def wrapped(*positional, **named):
        """The command, whose refusals are one line."""
        try:
            if not loads_itself:
                load_plugins(named.pop("plugins", ""))
            return command(*positional, **named)
        except LockLost as error:
            typer.echo(f"error: {error}; ending", err=True)
            raise typer.Exit(EXIT_FAILED) from None
        except Exception as error:
            line = line_of(error)
            if line is None:
                raise
            typer.echo(f"error: {line}", err=True)
            raise typer.Exit(2) from None

    if not loads_itself:
        given = inspect.Parameter(
            "plugins", inspect.Parameter.KEYWORD_ONLY, default="", annotation=Plugins
        )
        wrapped.__signature__ = signature.replace(
            parameters=[*signature.parameters.values(), given]
        )
        wrapped.__annotations__ = inspect.get_annotations(command, eval_str=True) | {
            "plugins": Plugins
        }
    return wrapped
