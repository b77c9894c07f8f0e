"""Commands: text to typed values. No science; a user's mistake becomes one line and exit 2.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.ablate import ablate

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
    """Turn what a user wrote wrong into one line on standard error and exit 2; and load plugins before the command runs.

    A command with a parameter `plugins` of its own loads them itself.
    """
    signature = inspect.signature(command, eval_str=True)
    loads_itself = "plugins" in signature.parameters

    @functools.wraps(command)
    def wrapped(*positional, **named):
        """The command, whose refusals are one line."""
        from trainer.base.exits import EXIT_FAILED
        from trainer.base.memory import line_of
        from trainer.base.plugins import load_plugins
        from trainer.runs.lock import LockLost

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


@app.command()
@user_errors
def train(
    recipe: Recipe = "A1",
    model: Model = "resnet50",
    data: Data = "digits",
    data_dir: DataDir = None,
    seed: Seed = 0,
    set_: Set = "",
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = "auto",
    loader: Loader = "auto",
    bad_images: BadImages = "fail",
    checkpoint_s: CheckpointS = 60.0,
    runs: Runs = Path("runs"),
    results: Results = Path("results"),
    again: Again = False,
    ablation: PartOf = None,
    cell: PartOf = None,
    gpus: Gpus = None,
    procs: Procs = None,
    micro_batch: MicroBatch = "page",
    activation_checkpointing: Checkpointing = 0,
    compile: Compile = 0,
    inject: Inject = "",
    keep_every: KeepEvery = 0,
) -> None:
    """Train a model by a recipe and store the run's row. The same command goes on where a run was stopped."""
    from trainer.base.signals import StopRequest

    with StopRequest() as stop:
        from trainer.cli.train import train_job
        from trainer.base.settings import check_loader
        from trainer.runs.job import Job

        check_loader(loader)
        job = Job(recipe, model, data, data_dir, seed, set_, bad_images, again, ablation, cell)
        machine = {
            "precision": precision,
            "workers": workers,
            "runs": runs,
            "results": results,
            "checkpoint_s": checkpoint_s,
        }
        machine |= {
            "micro_batch": micro_batch,
            "activation_checkpointing": bool(activation_checkpointing),
        }
        machine |= {"keep_every": keep_every, "loader": loader, "compile": bool(compile)}
        code = train_job(job, device, machine, gpus, procs, stop, inject)
    raise typer.Exit(code)


@app.command()
@user_errors
def plan(
    context: typer.Context,
    recipe: Recipe = "A1",
    model: Model = "resnet50",
    data: Data = "digits",
    data_dir: DataDir = None,
    seed: Seed = 0,
    set_: Set = "",
    ablation: Annotated[
        str, typer.Option(help="An ablation: its cells, what has its row, how long the rest takes.")
    ] = "",
    measure: Annotated[
        int, typer.Option(min=0, help="Of an ablation: steps to time for the estimate, 0 for none.")
    ] = 20,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = "auto",
    results: Results = Path("results"),
) -> None:
    """What a run would do: steps, images, learning rates, micro-batches, deviations, the model. Needs no GPU and no images.

    With --ablation what an ablation would do; its estimate of time needs the images."""
    from trainer.cli import plan_ablation as ablation_cli
    from trainer.models.build import assemble
    from trainer.runs import summary as show
    from trainer.runs.job import Job, plan_of

    ablation_cli.check_words(context, ablation)
    if ablation:
        machine = {"device": device, "precision": precision, "workers": workers}
        ablation_cli.print_plan(show.console(), ablation, data_dir, machine, results, measure)
        return
    made = plan_of(Job(recipe, model, data, data_dir, seed, set_))
    show.plan_in_full(show.console(), made, *assemble(made))


app.command()(user_errors(ablate))


@app.command()
@user_errors
def explain(
    recipe: Recipe = "A1",
    model: Model = "resnet50",
    data: Annotated[
        str,
        typer.Option(help="Also what this data set's profile changes; absent: the page itself."),
    ] = "",
    data_dir: DataDir = None,
    set_: Set = "",
    off: Annotated[
        bool, typer.Option("--off", help="Also all that could be on and is not.")
    ] = False,
) -> None:
    """Every value of a page and where it came from: page, assumed, the model's own lines, profile, override; and what
    its model section replaces in the model."""
    from trainer.recipe.explain import explain_rows, explain_table
    from trainer.recipe.plan import make_plan
    from trainer.recipe.profiles import PROFILES
    from trainer.data.profile import find_profile
    from trainer.runs import summary as show
    from trainer.runs.job import Job, resolve

    profile = find_profile(data, data_dir) if data else None
    page, positions, made, deviations = resolve(
        Job(recipe, model, data, data_dir, 0, set_), profile
    )
    # pages are written for ImageNet; the number of classes and of images matters to no part
    swaps = (
        show.surgery(make_plan(made, model=model, profile=profile or PROFILES["imagenet-1k"]))
        if made.model
        else ()
    )
    rows = explain_rows(page, positions, made, model, deviations, with_off=off)
    out = show.console()
    out.print(explain_table(rows, f"{page.name}.v{page.version} for {model}: {page.source}"))
    show.off_note(out, rows)
    show.replaced(out, made, swaps)


@app.command()
@user_errors
def diff(
    a: Annotated[str, typer.Option(help="A page.")] = "",
    b: Annotated[str, typer.Option(help="The page to compare it with.")] = "",
) -> None:
    """What two pages say differently."""
    from trainer.base.errors import UserError
    from trainer.recipe.explain import diff_rows, diff_table
    from trainer.recipe.schema import find_recipe, load_recipe
    from trainer.runs import summary as show

    missing = [f"{name}=" for name, page in (("a", a), ("b", b)) if not page]
    if missing:
        raise UserError(f"{' and '.join(missing)} not given: two pages are compared; use a=A1 b=A3")
    pages = [load_recipe(find_recipe(name)) for name in (a, b)]
    show.console().print(
        diff_table(diff_rows(*pages), *(f"{page.name}.v{page.version}" for page in pages))
    )


@app.command("check-data")
@user_errors
def check_data(
    data: Data = "digits",
    data_dir: DataDir = None,
    workers: Workers = "auto",
) -> None:
    """Decode every image; list the ones that cannot be read and the odd ones. Exit 1 where training would fail."""
    from trainer.data.check import check_data as check
    from trainer.data.dataset import open_data
    from trainer.base.settings import num_cores, worker_count
    from trainer.data.profile import data_folder, find_profile
    from trainer.runs import summary as show

    num_threads = max(1, worker_count(workers, auto=num_cores()))
    profile = find_profile(data, data_dir)
    is_good = show.data_reports(
        show.console(), open_data(profile, data_folder(data, data_dir)), check, num_threads
    )
    raise typer.Exit(0 if is_good else 1)


@app.command("eval")
@user_errors
def evaluate(
    run: Annotated[str, typer.Option(help="A run's name, or its folder.")],
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = "auto",
    data_dir: DataDir = None,
    runs: Runs = Path("runs"),
    results: Results = Path("results"),
) -> None:
    """Score the exported model of a run again; exit 1 where it is not the row's score, which on a GPU or in another
    precision may be one image in a thousand off."""
    from trainer.base.settings import make_settings
    from trainer.runs import summary as show
    from trainer.runs.rescore import rescore
    from trainer.runs.run_folder import find_run_folder

    folder = find_run_folder(run, runs)
    settings = make_settings(device, precision, workers, runs, results)
    raise typer.Exit(
        0 if show.rescored(show.console(), *rescore(folder, settings, data_dir), settings) else 1
    )


@app.command()
@user_errors
def recipes() -> None:
    """The pages that can be named: what is special, source, the best-known score."""
    from trainer.runs import summary as show

    show.recipe_list(show.console())


@app.command()
@user_errors
def matrix(
    models: Annotated[
        str,
        typer.Option(
            help="Only these models, names with spaces between; absent: all of the table."
        ),
    ] = "",
    recipes: Annotated[
        str, typer.Option(help="Only these pages, names with spaces between; absent: all.")
    ] = "",
    results: Results = Path("results"),
) -> None:
    """One real step of every page on every family, or the reason why not; the whole table goes into results/matrix.md."""
    from trainer.base.disk import write_atomically
    from trainer.base.settings import check_writable
    from trainer.runs import summary as show
    from trainer.tools.matrix import as_markdown, chosen_models, chosen_pages, fill

    pages, columns = chosen_pages(recipes), chosen_models(models)
    is_whole, out = not models and not recipes, show.console()
    if is_whole:
        check_writable("results", results)
    with show.progress(out, "cells", len(pages) * len(columns)) as each:
        table = as_markdown(list(fill(pages, columns, each)))
    out.print(table, markup=False)
    if is_whole:
        write_atomically(results / "matrix.md", table.encode())


from trainer.cli import bench as bench_cli
from trainer.cli import data as data_cli
from trainer.cli import doctor as doctor_cli
from trainer.cli import drill as drill_cli
from trainer.cli import lr_find as lr_find_cli
from trainer.cli import slurm as slurm_cli
from trainer.cli import table as table_cli
from trainer.cli import verify as verify_cli
