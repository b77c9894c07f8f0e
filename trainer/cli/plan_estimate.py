"""What `plan` says of time, memory and cores."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import nn

from trainer.base.commands import command
from trainer.base.plural import counted, duration
from trainer.base.settings import Settings, check_precision, make_settings
from trainer.data.loader_speed import (
    FFCV_IMAGES_PER_S,
    core_images_per_s,
    cores_for,
)
from trainer.engine.step_memory import StepMemory, step_memory
from trainer.recipe.plan import Plan
from trainer.recipe.profiles import KNOWN_SETS
from trainer.runs.job import Job
from trainer.tools.estimate import Speed, speed_of

_GIB = 2**30


def planned_settings(device: str, precision: str, on_gpus: bool) -> Settings:
    """The settings of a run on this machine; on_gpus: of one on GPUs, which need not be here."""
    if not on_gpus:
        return make_settings(device, precision)
    check_precision(precision)
    return dataclasses.replace(
        make_settings("cpu"),
        device="cuda",
        precision="bf16" if precision == "auto" else precision,
        channels_last=True,
    )


def print_estimate(
    out: Console,
    plan: Plan,
    settings: Settings,
    results: Path,
    model: nn.Module,
    job: Job,
    teacher: nn.Module | None,
) -> None:
    """Time, memory and cores of a run; job: as it was asked for."""
    in_memory = job.data_dir is None and (plan.profile.images_of or plan.profile.name) in KNOWN_SETS
    on_gpu = settings.device.startswith("cuda")
    device = "GPU" if on_gpu else "process"
    number = counted(plan.world_size, device) if on_gpu else "this machine's CPU"
    # first, as it takes a while: a step is timed, on some machines compiled
    out.print(Text(f"estimate for {number}, {settings.precision}"))
    speed = speed_of(plan, settings, results, model)
    lines = {
        "time": _time(plan, speed, command("bench", **_bench_words(job, on_gpu))),
        f"memory of a {device}": _memory(step_memory(plan, settings, model, teacher), on_gpu),
    }
    if on_gpu and not in_memory:
        lines["cores"] = _cores(plan, speed)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, line in lines.items():
        table.add_row(name, Text(line))
    out.print(Padding(table, (0, 0, 0, 2)), soft_wrap=False)


def _bench_words(job: Job, on_gpu: bool) -> dict[str, object]:
    machine = {"gpu": 1} if on_gpu else {"data": job.data, "data_dir": job.data_dir}
    return {"recipe": job.recipe, "model": job.model, "set": job.overrides, **machine}


def _time(plan: Plan, speed: Speed | None, bench: str) -> str:
    if speed is None:
        return f"not known: no run like it is stored; measured by {bench}"
    num_images = plan.draws_per_epoch * plan.recipe.epochs
    each = f"{plan.world_size} x " if plan.world_size > 1 else ""
    known = "" if speed.is_measured else "; not measured with this suite"
    return (
        f"{'about' if speed.is_measured else 'at least'} {duration(speed.run_s(plan))}:"
        f" {num_images:,} images at {each}{speed.images_per_s:,.0f} images/s,"
        f" {speed.source}{known}; evaluations come on top"
    )


def _memory(memory: StepMemory, on_gpu: bool) -> str:
    parts = {
        "weights": memory.weights,
        "the teacher's": memory.teacher,
        "gradients": memory.gradients,
        "their average": memory.average,
        "optimizer": memory.optimizer,
        f"activations of {counted(memory.images, 'image')} at once": memory.activations,
    }
    listed = ", ".join(
        f"{name} {'not known' if size is None else _gib(size)}"
        for name, size in parts.items()
        if size != 0
    )
    more = (
        "cuDNN's workspace, CUDA's context and what torch's allocator leaves unused"
        if on_gpu
        else "the program itself and its loader processes"
    )
    total = "not known" if memory.total is None else f"about {_gib(memory.total)} GiB"
    return f"{total}: {listed}; by shapes alone: {more} come on top"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.{2 if num_bytes < 10 * _GIB else 1}f}"


def _cores(plan: Plan, speed: Speed | None) -> str:
    per_core = core_images_per_s(plan.recipe.repeats, plan.world_size)
    basis = f"{per_core:.0f} photographs of 224 px a second and core, measured on one machine"
    if speed is None:
        return f"a GPU wants one for each {basis}"
    images_per_s = speed.images_per_s
    number, by_ffcv = cores_for(images_per_s, per_core), cores_for(images_per_s, FFCV_IMAGES_PER_S)
    total = f", {number * plan.world_size} in all" if plan.world_size > 1 else ""
    return f"{number} a GPU{total}: {basis}; with loader=ffcv from pixels {by_ffcv} a GPU"
