"""`launch-slurm`: a training command as a job file for sbatch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.base.plugins import load_plugins
from trainer.cli.options import Plugins, app, user_errors

if TYPE_CHECKING:
    from trainer.runs.job import Job


@app.command(
    "launch-slurm", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
@user_errors
def launch_slurm(
    context: typer.Context,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus: Annotated[
        int,
        typer.Option(min=0, help="GPUs, and so ranks, of each machine; 0: one rank on the CPU."),
    ] = 1,
    cpus: Annotated[int, typer.Option(min=1, help="Cores of each rank.")] = 8,
    hours: Annotated[float, typer.Option(min=0.1, max=8760, help="The job's time.")] = 24.0,
    sbatch: Annotated[
        str, typer.Option(help='Further words for sbatch: "--partition=big --account=me".')
    ] = "",
    job: Annotated[Path, typer.Option(help="The file to write.")] = Path("job.sh"),
    plugins: Plugins = "",
) -> None:
    """Write a job file that trains on a Slurm cluster: saved before its time is over, and put into
    the queue again.

    All other words are those of `train`.
    """
    from trainer.base.errors import printable
    from trainer.runs.job import Job

    load_plugins(plugins)
    words = [
        *context.args,
        *(() if gpus else ("--device", "cpu")),
        *(("--plugins", plugins) if plugins else ()),
    ]
    asked = (
        typer.main.get_command(app)
        .commands["train"]
        .make_context(context.command_path, list(words))
        .params
    )
    asked = {("overrides" if name == "set_" else name): value for name, value in asked.items()}
    fields = ("recipe", "model", "data", "data_dir", "seed", "overrides", "bad_images", "again")
    slurm = {"nodes": nodes, "gpus": gpus, "cpus": cpus, "hours": hours, "extra": sbatch}
    _write_job(["train", *words], Job(**{name: asked[name] for name in fields}), slurm, job)
    typer.echo(
        f"{printable(str(job))}: {nodes * (gpus or 1)} ranks; submit it with: sbatch {printable(str(job))}"
    )


def _write_job(words: list[str], job: Job, slurm: dict, path: Path) -> None:
    """Write the job file of a training command, refused now where every rank would refuse it later.

    words: of the command. slurm: nodes, gpus, cpus, hours and extra, as slurm_job takes them.

    Raises UserError.
    """
    from trainer.base.disk import write_atomically
    from trainer.distributed.launch import slurm_job
    from trainer.models.build import check_model_name
    from trainer.runs.job import plan_of

    world_size = slurm["nodes"] * (slurm["gpus"] or 1)
    plan = plan_of(dataclasses.replace(job, world_size=world_size))
    check_model_name(job.model)
    name = "-".join((plan.recipe.name, plan.model, plan.profile.name, f"s{plan.seed}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, slurm_job(words, name, **slurm).encode())
