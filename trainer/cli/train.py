"""Training on any number of ranks, and the job file that takes it to a cluster."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from pathlib import Path

from rich.console import Console

from trainer.base.disk import write_atomically
from trainer.base.errors import printable
from trainer.base.exits import EXIT_STOPPED
from trainer.base.memory import keep_freed_memory
from trainer.base.settings import check_writable, make_settings
from trainer.base.signals import Stopped, StopRequest
from trainer.data.dataset import open_data
from trainer.data.datasets.beton import chosen_loader
from trainer.data.profile import data_folder
from trainer.distributed.communicator import Ranks, meet
from trainer.distributed.env import Place, find_place, rank_device
from trainer.distributed.launch import asked_ranks, check_gpus, launch, slurm_job
from trainer.models.build import check_model_name
from trainer.recipe.plan import check_settings
from trainer.runs import summary as show
from trainer.runs.job import Job, plan_of, run_job
from trainer.runs.results import Row, rows_folder
from trainer.tools.faults import Faults, check_faults, parse_faults


def train_job(
    job: Job,
    device: str,
    machine: dict,
    gpus: int | None,
    procs: int | None,
    stop: StopRequest,
    inject: str = "",
) -> int:
    """Train a job on as many ranks as were asked for, or as have been started; gives the exit code.

    machine: the rest of what make_settings takes. inject: faults on purpose, as inject= has them.

    Raises UserError.
    """
    place = find_place(os.environ)
    num_ranks = asked_ranks(gpus, procs, device, place)
    if place is None and num_ranks > 1:
        return _launched(job, num_ranks, gpus, stop)
    device = rank_device("cpu" if procs else "cuda" if gpus and device == "auto" else device, place)
    with meet(place, device, say, stop.check) as ranks:
        try:
            return train_rank(job, device, machine, place, ranks, show.console(), stop, inject)[0]
        except Stopped as signal_name:
            if ranks.is_first:
                say(f"stopped by {signal_name} before the first step; the same command goes on")
            return EXIT_STOPPED


def say(line: str) -> None:
    """One line on standard output, at once."""
    print(printable(line), flush=True)


def _launched(job: Job, num_ranks: int, gpus: int | None, stop: StopRequest) -> int:
    """Refuse once, here, what every rank would refuse; then start them with this process's own words."""
    check_gpus(gpus)
    plan_of(dataclasses.replace(job, world_size=num_ranks))
    check_model_name(job.model)
    return launch(num_ranks, sys.argv[1:], stop)


def train_rank(
    job: Job,
    device: str,
    machine: dict,
    place: Place | None,
    ranks: Ranks,
    console: Console,
    stop: StopRequest,
    inject: str = "",
) -> tuple[int, Row | None]:
    """Train a job on this process's rank, with all that is said on the way: (exit code, row or None, as run_job).

    machine: the rest of what make_settings takes.

    Raises UserError.
    """
    console.quiet = not ranks.is_first
    ranks.check(stop)
    keep_freed_memory()
    job = dataclasses.replace(job, world_size=ranks.world_size)
    plan = plan_of(job)
    check_model_name(job.model)
    swaps = show.surgery(plan)
    with ranks.first_here():
        folder = data_folder(job.data, job.data_dir)
        loader = chosen_loader(
            machine.get("loader", "torch"), folder, lambda line: console.print(line, markup=False)
        )
        opened = open_data(plan.profile, folder, in_beton=loader == "ffcv")
    ranks.check(stop)
    num_ranks_here = place.local_world_size if place else 1
    settings = make_settings(
        device,
        **machine | {"loader": loader},
        in_memory=opened.train.is_in_memory,
        num_ranks_here=num_ranks_here,
    )
    check_settings(plan, settings)
    faults = parse_faults(inject)
    check_faults(faults, plan)
    if ranks.is_first:
        check_writable("runs", settings.runs)
        check_writable("results", rows_folder(settings.results))
    show.plan_in_brief(console, plan, settings, swaps)
    ranks.check(stop)
    code, row = run_job(
        job,
        plan,
        settings,
        opened,
        console,
        stop,
        ranks,
        functools.partial(Faults, faults) if faults else None,
    )
    if row is not None:
        show.row(console, row, settings, plan)
    return code, row


def write_job(words: list[str], job: Job, slurm: dict, path: Path) -> None:
    """Write the job file of a training command, refused now where every rank would refuse it later.

    words: of the command. slurm: nodes, gpus, cpus, hours and extra, as slurm_job takes them.

    Raises UserError.
    """
    world_size = slurm["nodes"] * (slurm["gpus"] or 1)
    plan = plan_of(dataclasses.replace(job, world_size=world_size))
    check_model_name(job.model)
    name = "-".join((plan.recipe.name, plan.model, plan.profile.name, f"s{plan.seed}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, slurm_job(words, name, **slurm).encode())
