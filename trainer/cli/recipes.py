"""Commands about recipes: plan, explain, diff, recipes, which."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.base.errors import UserError
from trainer.base.memory import importing
from trainer.cli import options
from trainer.cli.options import app, user_errors
from trainer.cli.recipe_list import list_recipes, name_recipe
from trainer.recipe.published import scores_of_model

_RUN_OPTIONS = ("recipe", "model", "data", "seed", "set_", "weights", "gpus", "procs")
_ABLATION_OPTIONS = ("measure", "workers")


@importing()
def _commands():
    from trainer.cli import recipe_commands  # torch, timm, pydantic: only once options are parsed

    return recipe_commands


@app.command()
@user_errors
def plan(
    context: typer.Context,
    recipe: options.RecipeName = "A1",
    model: options.ModelName = "resnet50",
    data: options.Data = "digits",
    data_dir: options.DataDir = None,
    seed: options.SeedNumber = 0,
    set_: options.Set = "",
    weights: options.Weights = "",
    ablation: Annotated[
        str, typer.Option(help="An ablation: its cells, their stored rows, estimated hours.")
    ] = "",
    measure: Annotated[
        int,
        typer.Option(min=0, help="With --ablation: steps to time for the estimate, 0 for none."),
    ] = 20,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    workers: options.Workers = "auto",
    results: options.Results = Path("results"),
    gpus: options.Gpus = None,
    procs: options.Procs = None,
) -> None:
    """Print the plan of a run without training: steps, images, learning rates, micro-batches,
    deviations, model size, and an estimate of time, memory and cores. Needs no GPU, not even with
    --gpus, and no images.

    With --ablation, the plan of an ablation; its time estimate needs the images.
    """
    _check_options(context, ablation)
    commands = _commands()
    if ablation:
        machine = {"device": device, "precision": precision, "workers": workers}
        commands.plan_ablation(ablation, data_dir, machine, results, measure)
    else:
        given = commands.given_weights(weights, model, Path("runs"))
        job = commands.Job(recipe, model, data, data_dir, seed, set_, weights=given)
        commands.plan(job, gpus, procs, device, precision, results)


def _check_options(context: typer.Context, ablation: str) -> None:
    """Refuse options that would be ignored: those of a run with --ablation, those of an ablation
    without it.

    Raises UserError.
    """
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        if ablation and name in _RUN_OPTIONS:
            raise UserError(f"{name.rstrip('_')}=: ablation={ablation} sets it; use one of the two")
        if not ablation and name in _ABLATION_OPTIONS:
            raise UserError(
                f"{name}=: only for the plan of an ablation; use ablation=<name>, or leave it out"
            )


@app.command()
@user_errors
def explain(
    recipe: options.RecipeName = "A1",
    model: options.ModelName = "resnet50",
    data: Annotated[
        str,
        typer.Option(help="Include what this data set's profile changes; default: none."),
    ] = "",
    data_dir: options.DataDir = None,
    set_: options.Set = "",
    weights: options.Weights = "",
    off: Annotated[
        bool, typer.Option("--off", help="Include components that are off in this recipe.")
    ] = False,
) -> None:
    """Print every value of a recipe and where it comes from (the recipe file, assumed, per_model,
    data profile, override), and the modules that its model section replaces.
    """
    commands = _commands()
    given = commands.given_weights(weights, model, Path("runs"))
    job = commands.Job(recipe, model, data, data_dir, 0, set_, weights=given)
    commands.explain(job, with_off=off)


@app.command()
@user_errors
def diff(
    a: Annotated[str, typer.Option(help="A recipe.")] = "",
    b: Annotated[str, typer.Option(help="The recipe to compare it with.")] = "",
) -> None:
    """Print the values in which two recipes differ."""
    missing = [f"{name}=" for name, recipe in (("a", a), ("b", b)) if not recipe]
    if missing:
        raise UserError(f"{' and '.join(missing)} not given: diff needs two recipes; use a=A1 b=A3")
    _commands().diff(a, b)


@app.command()
@user_errors
def recipes(
    model: Annotated[
        str,
        typer.Option(
            help="Only recipes with a published score of this timm model, the best first, with "
            "epochs, sizes, cost, and what timm measures of the weights."
        ),
    ] = "",
) -> None:
    """List the recipes: what is special about each, published top-1, source."""
    if not model:
        list_recipes()
        return
    scores_of_model(model)  # a model without scores is refused before torch is imported
    from trainer.cli.recipe_choice import list_recipes_of  # torch: counts a model's multiply-adds

    list_recipes_of(model)


@app.command()
@user_errors
def which(
    weights: Annotated[
        str, typer.Option(help="Public weights by timm's name: resnet50.a1_in1k.")
    ] = "",
) -> None:
    """Name the recipe that made public weights of timm, with its published score and what timm
    measures of them.
    """
    if not weights:
        raise UserError("weights= not given: which names a recipe; use weights=resnet50.a1_in1k")
    name_recipe(weights)
