"""A LR finder run on any number of ranks, from what was asked to what is printed."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from trainer.base.exits import EXIT_DONE, EXIT_STOPPED
from trainer.base.memory import keep_freed_memory
from trainer.base.settings import check_writable
from trainer.base.signals import Stopped, StopRequest
from trainer.data.workers import Watch
from trainer.distributed.communicator import Ranks, meet
from trainer.distributed.env import find_place, rank_device
from trainer.distributed.launch import asked_ranks, check_gpus, launch
from trainer.distributed.numa import asked_binding
from trainer.lr_finder import output
from trainer.lr_finder.api import Request, run, set_up
from trainer.lr_finder.baseline import check_hold_out
from trainer.models.trained import given_weights
from trainer.recipe.plan import check_settings
from trainer.runs import summary as show
from trainer.runs.job import Job, plan_of
from trainer.runs.plan_notes import warmup_note
from trainer.runs.run import ALONE_S
from trainer.runs.start import say


def find_on_ranks(
    asked: tuple[str, str, str, Path | None, str, str, bool],
    request: tuple[str, float | None, float | None, int | None, int, str | None],
    device: str,
    machine: dict[str, Any],
    gpus: int | None,
    procs: int | None,
    stop: StopRequest,
) -> int:
    """The LR finder run of `lr-find` on as many ranks as were asked for, or have been started;
    gives the exit code.

    asked: recipe, model, data, data_dir, overrides, weights and again, as the command has them.
    request: the fields of Request. machine: the rest of what make_settings takes.

    Raises UserError.
    """
    recipe, model, data, data_dir, overrides, weights, again = asked
    given = given_weights(weights, model, machine["runs"])
    job = Job(recipe, model, data, data_dir, 0, overrides, again=again, weights=given)
    place = find_place(os.environ)
    num_ranks = asked_ranks(gpus, procs, device, place)
    numa = asked_binding(machine["numa"], gpus, place, os.environ)
    if place is None and num_ranks > 1:
        check_gpus(gpus)
        plan_of(dataclasses.replace(job, world_size=num_ranks), check_hold_out)
        return launch(num_ranks, sys.argv[1:], stop, numa)
    device = rank_device("cpu" if procs else "cuda" if gpus and device == "auto" else device, place)
    with meet(place, device, say, stop.check) as ranks:
        machine = {**machine, "device": device, "cores": ranks.cores, "numa": numa}
        return _find(
            dataclasses.replace(job, world_size=ranks.world_size),
            Request(*request),
            machine,
            ranks,
            stop,
        )


def _find(
    job: Job, request: Request, machine: dict[str, Any], ranks: Ranks, stop: StopRequest
) -> int:
    out = show.console()
    out.quiet = not ranks.is_first
    setup = set_up(job, request, machine, ranks, out, stop)
    check_settings(setup.plan, setup.settings)
    if ranks.is_first:
        check_writable("runs", setup.settings.runs)
    output.print_plan_head(out, setup)
    warmup_note(out, setup.plan)
    if (setup.settings.runs / setup.name / "suggestion.json").exists() and not job.again:
        out.print(f"{setup.name} has a result already; use again=1 to rerun it", markup=False)
    keep_freed_memory()
    with output.TerminalLog(out, setup.lengths.most_steps) as lines:
        try:
            watch = Watch(lambda: stop.check(0.0 if ranks.is_alone else ALONE_S), say)
            found = run(setup, True, lines, lambda: ranks.check(stop), ranks, watch)
        except Stopped as signal_name:
            out.print(
                f"stopped by {signal_name} after {lines.num_trials} trials, which are kept; rerun"
                " the same command to resume",
                markup=False,
            )
            return EXIT_STOPPED
    output.result(out, found)
    return EXIT_DONE
