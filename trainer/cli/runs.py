"""Commands that make, list or check a run: train, runs, watch, verify, launch-slurm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trainer.base.errors import printable
from trainer.base.memory import importing
from trainer.base.plugins import load_plugins
from trainer.base.settings import settings_from_arguments
from trainer.base.signals import StopRequest
from trainer.cli import options
from trainer.cli.options import app, user_errors, with_runs

RunName = Annotated[str, typer.Option(help="A run's name, or its folder.")]


@importing()
def _commands():
    from trainer.cli import run_commands  # torch, timm, pydantic: only once options are parsed

    return run_commands


@app.command()
@user_errors
def train(
    recipe: options.RecipeName = "A1",
    model: options.ModelName = "resnet50",
    data: options.Data = "digits",
    data_dir: options.DataDir = None,
    seed: options.SeedNumber = 0,
    set_: options.Set = "",
    weights: options.Weights = "",
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    workers: options.Workers = "auto",
    loader: options.Loader = "auto",
    bad_images: options.BadImages = "fail",
    checkpoint_s: options.CheckpointS = 60.0,
    runs: options.Runs = Path("runs"),
    results: options.Results = Path("results"),
    again: options.AgainFlag = False,
    ablation: options.PartOf = None,
    cell: options.PartOf = None,
    gpus: options.Gpus = None,
    procs: options.Procs = None,
    numa: options.Numa = "off",
    micro_batch: options.MicroBatchMode = "recipe",
    activation_checkpointing: options.Checkpointing = 0,
    compile: options.Compile = 0,
    compile_mode: options.CompileMode = "default",
    cuda_graphs: options.CudaGraphs = 0,
    half_group_norm: options.HalfGroupNorm = 0,
    profile: options.Profile = 0,
    inject: options.Inject = "",
    keep_every: options.KeepEvery = 0,
    stop_if: options.StopIf = "",
    expect: options.Expect = "",
    debug: options.Debug = "",
    keep: options.Keep = "",
    test_px: options.TestSizes = "",
    eval_every: options.EvalEvery = 1,
    eval_batch: options.EvalBatch = 128,
    log_every: options.LogEvery = 10,
    track: options.Track = "",
) -> None:
    """Train a model by a recipe and store the run's row. Rerun the same command to resume a run
    that was stopped.
    """
    options_given = locals()  # those that are settings are not named again below
    with StopRequest() as stop:  # before the imports, which take seconds
        machine = settings_from_arguments(options_given)
        commands = _commands()
        overrides, given = with_runs(set_, runs), commands.given_weights(weights, model, runs)
        asked = recipe, model, data, data_dir, seed, overrides, bad_images, again, ablation, cell
        code = commands.train_job(
            commands.Job(*asked, weights=given),
            device,
            machine,
            gpus,
            procs,
            stop,
            commands.parse_injection(inject),
        )
    raise typer.Exit(code)


@app.command("runs")
@user_errors
def list_runs(
    runs: options.Runs = Path("runs"),
    results: options.Results = Path("results"),
    json: Annotated[bool, typer.Option("--json", help="A JSON list instead of a table.")] = False,
) -> None:
    """List your runs, the last changed last: recipe, model, data, epochs done, running, stopped,
    killed or finished, score, folder. Rerun the command of a stopped or killed one to resume it.
    """
    from trainer.cli import run_list  # pydantic, rich: only once options are parsed

    run_list.list_runs(runs, results, json)


@app.command()
@user_errors
def watch(
    run: Annotated[
        str, typer.Option(help="Only this run, a name or folder, with the end of its log.")
    ] = "",
    once: Annotated[bool, typer.Option("--once", help="Print once and end.")] = False,
    page: Annotated[
        str,
        typer.Option(help="Write a page that loads itself again: a file, or 1: runs/watch.html."),
    ] = "",
    every: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two looks.")] = 2,
    runs: options.Runs = Path("runs"),
    results: options.Results = Path("results"),
) -> None:
    """Watch your runs until Ctrl-C: state, progress, loss, last score, speed, share of waiting,
    time left. Reads files only.
    """
    from trainer.cli import watch_runs  # pydantic, rich: only once options are parsed

    watch_runs.watch(runs, results, run, once, page, every)


@app.command()
@user_errors
def verify(
    run: RunName,
    evaluate: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Evaluate the exported model again.")
    ] = True,
    device: options.Device = "auto",
    precision: Annotated[
        str,
        typer.Option(
            help="float32, tf32, bf16 or fp16; default: the row's, where the device has it."
        ),
    ] = "",
    workers: options.Workers = "auto",
    data_dir: options.DataDir = None,
    runs: options.Runs = Path("runs"),
    results: options.Results = Path("results"),
) -> None:
    """Check a run folder: checksums, plan, row, store, curves, weights, and the score by a new
    evaluation; exit 1 where a check fails.
    """
    is_good = _commands().verify(run, evaluate, device, precision, workers, data_dir, runs, results)
    raise typer.Exit(0 if is_good else 1)


@app.command(
    "launch-slurm", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
@user_errors
def launch_slurm(
    context: typer.Context,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus: Annotated[
        int,
        typer.Option(min=0, help="GPUs per node, one rank on each; 0: one rank on the CPU."),
    ] = 1,
    cpus: Annotated[int, typer.Option(min=1, help="CPU cores per rank.")] = 8,
    hours: Annotated[float, typer.Option(min=0.1, max=8760, help="Time limit of the job.")] = 24.0,
    sbatch: Annotated[
        str, typer.Option(help='More sbatch options: "--partition=big --account=me".')
    ] = "",
    job: Annotated[Path, typer.Option(help="The job file to write.")] = Path("job.sh"),
    plugins: options.PluginFiles = "",
) -> None:
    """Write a job file that trains on a Slurm cluster; before its time limit the run is saved and
    the job is requeued.

    All other options are those of `train`.
    """
    load_plugins(plugins)
    has_device = any(word.partition("=")[0] == "--device" for word in context.args)
    argv = [
        *context.args,
        *(() if gpus or has_device else ("--device", "cpu")),
        *(("--plugins", plugins) if plugins else ()),
    ]
    group: Any = typer.main.get_command(app)  # app has several commands, so it is a group
    parsed = group.commands["train"].make_context(context.command_path, list(argv)).params
    slurm = {"nodes": nodes, "gpus": gpus, "cpus": cpus, "hours": hours, "extra": sbatch}
    _commands().write_job_file(["train", *argv], parsed, slurm, job)
    path = printable(str(job))
    typer.echo(f"{path}: {nodes * (gpus or 1)} ranks; submit it with: sbatch {path}")
