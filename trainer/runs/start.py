"""Training on any number of ranks, and the job file that takes it to a cluster."""

from __future__ import annotations

import dataclasses
import os
import sys

from rich.console import Console

from trainer.base.cache import cache_note
from trainer.base.errors import UserError, printable
from trainer.base.exits import EXIT_STOPPED
from trainer.base.memory import keep_freed_memory
from trainer.base.settings import check_writable, make_settings
from trainer.base.signals import Stopped, StopRequest
from trainer.base.terminal import recorded
from trainer.data.dataset import OpenedData, open_data
from trainer.data.datasets.beton import chosen_loader
from trainer.data.profile import data_folder
from trainer.distributed.communicator import Ranks, meet
from trainer.distributed.env import find_place, rank_device
from trainer.distributed.launch import asked_ranks, check_gpus, launch, stop_with_launcher
from trainer.distributed.numa import asked_binding
from trainer.models.build import check_model_name
from trainer.recipe.plan import Plan, check_settings
from trainer.runs import summary as show
from trainer.runs.job import Job, plan_of, run_job
from trainer.runs.loggers.logger import log_result
from trainer.runs.results import Row, rows_folder
from trainer.tasks.teacher import open_teacher


def train_job(
    job: Job,
    device: str,
    machine: dict,
    gpus: int | None,
    procs: int | None,
    stop: StopRequest,
    faults=None,
) -> int:
    """Train a job on as many ranks as were asked for, or as have been started; gives the exit code.

    machine: the rest of what make_settings takes. faults: to inject
    (trainer.tools.faults.Injection), or None.

    Raises UserError.
    """
    place = find_place(os.environ)
    num_ranks = asked_ranks(gpus, procs, device, place)
    numa = asked_binding(machine.get("numa", "off"), gpus, place, os.environ)
    if place is None and num_ranks > 1:
        return _launched(job, num_ranks, gpus, numa, stop)
    machine = machine | {"numa": numa}
    if place is not None:
        stop_with_launcher()
    device = rank_device("cpu" if procs else "cuda" if gpus and device == "auto" else device, place)
    with meet(place, device, say, stop.check) as ranks:
        try:
            return train_rank(job, device, machine, ranks, show.console(), stop, faults)[0]
        except Stopped as signal_name:
            if ranks.is_first:
                say(
                    f"stopped by {signal_name} before the first step; rerun the same command to"
                    " resume"
                )
            return EXIT_STOPPED


def say(line: str) -> None:
    """One line on standard output, at once."""
    print(printable(line), flush=True)


def _launched(job: Job, num_ranks: int, gpus: int | None, numa: str, stop: StopRequest) -> int:
    """Refuse once, here, what every rank would refuse; then start them with this process's own
    words.
    """
    check_gpus(gpus)
    plan_of(dataclasses.replace(job, world_size=num_ranks))
    check_model_name(job.model)
    return launch(num_ranks, sys.argv[1:], stop, numa)


def train_rank(
    job: Job,
    device: str,
    machine: dict,
    ranks: Ranks,
    console: Console,
    stop: StopRequest,
    faults=None,
) -> tuple[int, Row | None]:
    """Train a job on this process's rank, with all that is said on the way: (exit code, row or
    None, as run_job).

    machine: the rest of what make_settings takes. faults: to inject, or None.

    Raises UserError.
    """
    console.quiet = not ranks.is_first
    ranks.check(stop)
    keep_freed_memory()
    job = dataclasses.replace(job, world_size=ranks.world_size)
    plan = plan_of(job)
    check_model_name(job.model)
    swaps, teacher = show.module_replacements(plan), open_teacher(plan)
    with ranks.first_here():
        opened, loader = _opened(job, plan, machine, console)
    ranks.check(stop)
    settings = make_settings(
        device,
        **machine | {"loader": loader},
        in_memory=opened.train.is_in_memory,
        cores=ranks.cores,
    )
    if settings.debug and not ranks.is_alone:
        raise UserError("debug=nan: looks at the layers of one rank", "use one: the same samples")
    check_settings(plan, settings)
    if faults is not None:
        faults.check(plan)
    if ranks.is_first:
        check_writable("runs", settings.runs)
        check_writable("results", rows_folder(settings.results))
    console.record = ranks.is_first  # for log.txt
    show.plan_in_brief(console, plan, settings, swaps, teacher)
    del teacher  # the training opens its own
    _show_data(console, opened)
    ranks.check(stop)
    code, row = run_job(job, plan, settings, opened, console, stop, ranks, faults)
    is_new = not recorded(console)  # else no log has taken the header: the run has its row already
    console.record = is_new
    if row is not None:
        show.row(console, row, settings, plan)
        if is_new:
            log_result(settings.runs / row.run, recorded(console))
    return code, row


def _opened(job: Job, plan: Plan, machine: dict, console: Console) -> tuple[OpenedData, str]:
    """The data of a job, and the loader that its files and its settings allow."""
    folder = data_folder(job.data, job.data_dir)
    loader = chosen_loader(
        machine.get("loader", "torch"), folder, lambda line: console.print(line, markup=False)
    )
    return open_data(plan.profile, folder, in_beton=loader == "ffcv"), loader


def _show_data(console: Console, opened: OpenedData) -> None:
    """What a user may not expect of the data: one line each."""
    show.changed_images(console, opened)
    show.ignored_lines(console, opened.ignored)
    show.stand_in_line(console, opened.split)
    if note := cache_note():
        console.print(note, markup=False)
