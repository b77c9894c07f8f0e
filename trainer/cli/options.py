"""The program's options, each declared once, and how a user's error becomes one line."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from trainer.base.errors import OverrideError, printable
from trainer.base.exits import EXIT_FAILED, EXIT_STOPPED
from trainer.base.memory import line_of
from trainer.base.plugins import load_plugins
from trainer.base.provenance import package_version
from trainer.base.signals import Stopped
from trainer.cli.hints import HINTS
from trainer.recipe.shipped import find_recipe
from trainer.runs.lock import LockLost

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"rsb {package_version('rsb')}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version."),
    ] = False,
) -> None:
    """Training recipes as versioned, sourced contracts: ResNet strikes back and its peers."""


RecipeName = Annotated[
    str,
    typer.Option(help="A recipe: A1 (its newest version), A1.v1, or a path to a .yaml file."),
]
ModelName = Annotated[
    str,
    typer.Option(
        help="A timm model, one of those of trainer/README.md, or torchvision:<name>; "
        "results/matrix.md has families."
    ),
]
Data = Annotated[
    str,
    typer.Option(
        help="digits, fashion-mnist, mnist (also <name>-grey, one channel), cifar10, cifar100, "
        "imagenet-1k, an image folder, a folder of tar shards, parquet or `datasets`, or a data "
        "profile's .yaml (see check-data)."
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", "--data_dir", help="Folder of the data set, or to download it to."),
]
SeedNumber = Annotated[int, typer.Option(help="Random seed: which repeat this is.")]
Set = Annotated[
    str, typer.Option("--set", help='Overrides of the recipe: "epochs=5 loss.name=ce".')
]
Weights = Annotated[
    str,
    typer.Option(
        help="Start from these weights: a .safetensors or .pth file, a run's name or folder, or "
        "timm:resnet50.a1_in1k or torchvision:resnet50.IMAGENET1K_V2; recorded with their sha256."
    ),
]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda[:N], xpu[:N] or mps (the last two untried).")
]
Precision = Annotated[
    str,
    typer.Option(
        help="auto (on a GPU bf16, or fp16 where it has no bf16; float32 on the CPU), float32, "
        "tf32, bf16 or fp16."
    ),
]
Workers = Annotated[
    str, typer.Option(help="Dataloader processes: auto or a number. Never changes a result.")
]
Loader = Annotated[
    str,
    typer.Option(
        help="Dataloader: auto (ffcv where it is installed and there are lossless .beton files, "
        "else torch), torch, pil (torch, with every JPEG file decoded in full by PIL) or ffcv."
    ),
]
Runs = Annotated[Path, typer.Option(help="Folder of the run folders.")]
Results = Annotated[Path, typer.Option(help="Folder of the stored rows.")]
Stores = Annotated[
    str,
    typer.Option(
        help="Folder of the stored rows; of several, with spaces, all are read, and the first is "
        "written to."
    ),
]
MetricName = Annotated[
    str,
    typer.Option(
        "--metric",
        help="top1 (a task's main score), top5, loss, ema (top-1 of the weight average) or mIoU.",
    ),
]
AgainFlag = Annotated[
    bool, typer.Option("--again/--no-again", help="Start a new run where the row exists already.")
]
Gpus = Annotated[int | None, typer.Option(min=1, help="Number of ranks, one GPU each.")]
Procs = Annotated[int | None, typer.Option(min=1, help="Number of ranks on the CPU.")]
Numa = Annotated[
    str,
    typer.Option(
        help="With --gpus, bind each rank to cores near its GPU, as torchrun does: off, node, "
        "socket, exclusive or core-complex."
    ),
]
PartOf = Annotated[
    str | None, typer.Option(hidden=True, help="For the row: the ablation or cell of this run.")
]
CheckpointS = Annotated[
    float,
    typer.Option(
        "--checkpoint-s", "--checkpoint_s", min=0, help="Least seconds between two checkpoints."
    ),
]
MicroBatchMode = Annotated[
    str,
    typer.Option(
        "--micro-batch",
        "--micro_batch",
        help="recipe (its batch.norm_images), or auto: on out-of-memory the step is retried "
        "in smaller micro-batches.",
    ),
]
Checkpointing = Annotated[
    int,
    typer.Option(
        "--activation-checkpointing",
        "--activation_checkpointing",
        min=0,
        max=1,
        help="1: recompute activations in the backward pass; less memory, more time, same result.",
    ),
]
Compile = Annotated[
    int,
    typer.Option(
        min=0, max=1, help="1: compile the model (torch.compile); same result up to rounding."
    ),
]
CompileMode = Annotated[
    str,
    typer.Option(
        "--compile-mode",
        "--compile_mode",
        help="Of torch.compile: default, or max-autotune-no-cudagraphs (minutes of trying).",
    ),
]
CudaGraphs = Annotated[
    int,
    typer.Option(
        "--cuda-graphs",
        "--cuda_graphs",
        min=0,
        max=1,
        help="1: launch a micro-batch's passes as one CUDA graph; same result up to rounding.",
    ),
]
HalfGroupNorm = Annotated[
    int,
    typer.Option(
        "--half-group-norm",
        "--half_group_norm",
        min=0,
        max=1,
        help="1: under bf16 and fp16 group norms read and write these; statistics in float32.",
    ),
]
Profile = Annotated[
    int,
    typer.Option(
        min=0, max=1, help="1: torch's profiler: a trace of a few steps, in the run folder."
    ),
]
Track = Annotated[
    str,
    typer.Option(
        help="Trackers beside TensorBoard: wandb, mlflow, trackio; several with commas. Offline "
        "and local unless their own variables (WANDB_MODE, MLFLOW_TRACKING_URI) say otherwise."
    ),
]
Inject = Annotated[
    str,
    typer.Option(
        help="Fault injection: kill@37,nan@50,oom@12,enospc@80,slow@5:3s,bad_image@100,term@20,"
        "raise@9."
    ),
]
KeepEvery = Annotated[
    int,
    typer.Option(
        "--keep-every",
        "--keep_every",
        min=0,
        help="Epochs between two checkpoints to keep; 0: keep only the last two.",
    ),
]
StopIf = Annotated[
    str,
    typer.Option(
        "--stop-if",
        "--stop_if",
        help="off_track: save and end (exit 1) where two evaluations in a row are below those of "
        "earlier rows; the same command without it resumes.",
    ),
]
Expect = Annotated[
    str,
    typer.Option(
        help="Rows to compare evaluations with: a run (all seeds of its recipe), "
        "<ablation>/<cell> or a recipe; default: the same recipe, model and data."
    ),
]
Debug = Annotated[
    str,
    typer.Option(
        help="nan: name the first layer and gradient that is not finite, dead gradients and loss "
        "spikes; slower, same result."
    ),
]
Keep = Annotated[
    str,
    typer.Option(
        help="best: keep the weights of the epoch with the best score too (best.safetensors); the "
        "result stays the last epoch's."
    ),
]
EvalEvery = Annotated[
    int,
    typer.Option(
        "--eval-every",
        "--eval_every",
        min=1,
        help="Epochs from one evaluation to the next; the last epoch always has one.",
    ),
]
EvalBatch = Annotated[
    int,
    typer.Option(
        "--eval-batch", "--eval_batch", min=1, help="Images at once in an evaluation of a run."
    ),
]
LogEvery = Annotated[
    int,
    typer.Option(
        "--log-every", "--log_every", min=1, help="Steps between two lines of losses and speeds."
    ),
]
TestSizes = Annotated[
    str,
    typer.Option(
        "--test-px",
        "--test_px",
        help='Image sizes to score the finished model at too: "224 256 288"; in the row beside the '
        "result, which stays that of the recipe's own size.",
    ),
]
BadImages = Annotated[
    str,
    typer.Option(
        "--bad-images",
        "--bad_images",
        help="fail, or skip: replace unreadable images by others, counted, at most 1 %.",
    ),
]
PluginFiles = Annotated[
    str,
    typer.Option(
        help="Python files with components of your own: my_losses.py, several with commas."
    ),
]


def with_runs(overrides: str, runs: Path) -> str:
    """The overrides of set=, a teacher's `run:` as of the folder of runs."""
    if "run:" not in overrides or runs == Path("runs"):
        return overrides
    from trainer.recipe.overrides import as_text, overrides_of  # pydantic: not for --help

    return as_text(_in_folder(overrides_of(overrides), runs))


def _in_folder(items: Mapping[str, Any], runs: Path) -> dict[str, Any]:
    """Overrides in which the runs of `weights` are those of a folder."""
    found = dict(items)
    for label, value in items.items():
        if isinstance(value, Mapping):
            found[label] = _in_folder(value, runs)
        elif label.rpartition(".")[2] == "weights" and str(value).startswith("run:"):
            found[label] = str(runs / value.removeprefix("run:"))
    return found


def _set_hint(error: Exception) -> str:
    """What another program's word means here, where it was given as set="batch_size=64"; empty
    where the error has a remedy of its own, or the word is the right one.
    """
    if not isinstance(error, OverrideError) or error.fix or len(error.labels) != 1:
        return ""
    if error.kind == "unknown_key" and error.hint:
        return ""
    (word,) = error.labels
    hint = HINTS.get(word, "").format("...")
    is_other = hint.startswith(("set=", "weights=")) and not hint.startswith(f'set="{word}=')
    return f"; use {hint}" if is_other else ""


def user_errors(command):
    """Decorate a command: it gets the option --plugins, and a user's error is one line on standard
    error and exit 2.

    A command with a parameter `plugins` of its own loads them itself.
    """
    signature = inspect.signature(command, eval_str=True)
    loads_itself = "plugins" in signature.parameters

    @functools.wraps(command)
    def wrapped(*positional, **named):
        try:
            if not loads_itself:
                load_plugins(named.pop("plugins", ""))
            _check_names(named)
            return command(*positional, **named)
        except Stopped as error:
            typer.echo(f"stopped by {printable(str(error))}; rerun the same command", err=True)
            raise typer.Exit(EXIT_STOPPED) from None
        except LockLost as error:
            typer.echo(f"error: {error}; ending", err=True)
            raise typer.Exit(EXIT_FAILED) from None
        except Exception as error:
            line = line_of(error)
            if line is None:
                raise
            typer.echo(f"error: {line}{_set_hint(error)}", err=True)
            raise typer.Exit(2) from None

    if not loads_itself:
        only_named = inspect.Parameter.KEYWORD_ONLY
        given = inspect.Parameter("plugins", only_named, default="", annotation=PluginFiles)
        parameters = [*signature.parameters.values(), given]
        wrapped.__signature__ = signature.replace(parameters=parameters)
        own = inspect.get_annotations(command, eval_str=True)
        wrapped.__annotations__ = own | {"plugins": PluginFiles}
    return wrapped


def _check_split(folder: Path) -> None:
    """Refuse a folder of class folders where a recipe needs train/ and val/. Raises DataError."""
    from trainer.data.datasets.packed import refuse_unsplit
    from trainer.data.image_folder import has_class_folders

    if has_class_folders(folder):
        refuse_unsplit(folder)


def _check_names(given: Mapping[str, Any]) -> None:
    """Refuse a recipe or a dataset that does not exist, and what cannot be read of a recipe or of
    set=, before torch is imported, which takes seconds. Raises UserError.
    """
    if not any(given.get(name) for name in ("recipe", "data", "set_")):
        return
    # pydantic: not for --help
    from trainer.recipe.load import read_plain
    from trainer.recipe.outline import Outline
    from trainer.recipe.overrides import check_keys, overrides_of
    from trainer.recipe.profiles import check_data_name

    overrides = overrides_of(given.get("set_") or "")
    if given.get("recipe"):
        data = read_plain(find_recipe(given["recipe"]))
        if isinstance(data, dict):
            check_keys(Outline, data, overrides)
    if given.get("data"):
        check_data_name(given["data"])
        if given.get("recipe"):
            _check_split(Path(given["data"]))
