"""Commands: text to typed values. No science; a user's mistake becomes one line and exit 2.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import trainer.cli.bench  # noqa: F401  it adds its commands
import trainer.cli.data  # noqa: F401  it adds its commands
import trainer.cli.doctor  # noqa: F401  it adds its commands
import trainer.cli.drill  # noqa: F401  it adds its commands
import trainer.cli.lr_find  # noqa: F401  it adds its commands
import trainer.cli.slurm  # noqa: F401  it adds its commands
import trainer.cli.table  # noqa: F401  it adds its commands
import trainer.cli.verify  # noqa: F401  it adds its commands
from trainer.cli.ablate import ablate
from trainer.cli.options import (
    Again,
    BadImages,
    Checkpointing,
    CheckpointS,
    Compile,
    Data,
    DataDir,
    Device,
    Gpus,
    Inject,
    KeepEvery,
    Loader,
    MicroBatch,
    Model,
    PartOf,
    Precision,
    Procs,
    Recipe,
    Results,
    Runs,
    Seed,
    Set,
    Workers,
    app,
    user_errors,
)


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
    """Train a model by a recipe and store the run's row. The same command goes on where a run was
    stopped.
    """
    from trainer.base.signals import StopRequest

    with StopRequest() as stop:
        from trainer.base.settings import check_loader
        from trainer.runs.job import Job
        from trainer.runs.start import train_job
        from trainer.tools.faults import parse_injection

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
        code = train_job(job, device, machine, gpus, procs, stop, parse_injection(inject))
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
    """What a run would do: steps, images, learning rates, micro-batches, deviations, the model.
    Needs no GPU and no images.

    With --ablation what an ablation would do; its estimate of time needs the images.
    """
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
    """Every value of a page and where it came from: page, assumed, the model's own lines, profile,
    override; and what its model section replaces in the model.
    """
    from trainer.data.profile import find_profile
    from trainer.recipe.explain import explain_rows, explain_table
    from trainer.recipe.plan import make_plan
    from trainer.recipe.profiles import PROFILES
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
    """Decode every image; list the ones that cannot be read and the odd ones. Exit 1 where training
    would fail.
    """
    from trainer.base.settings import num_cores, worker_count
    from trainer.data.check import check_data as check
    from trainer.data.dataset import open_data
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
    """Score the exported model of a run again; exit 1 where it is not the row's score, which on a
    GPU or in another precision may be one image in a thousand off.
    """
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
    """One real step of every page on every family, or the reason why not; the whole table goes into
    results/matrix.md.
    """
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
