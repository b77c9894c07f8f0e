"""What `bench` does: it needs torch, which `--help` must not wait for."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from trainer.base.disk import write_atomically
from trainer.base.errors import UserError
from trainer.base.memory import keep_freed_memory
from trainer.base.settings import Settings, make_settings
from trainer.base.terminal import open_terminal
from trainer.data.dataset import OpenedData, open_data
from trainer.data.datasets.beton import chosen_loader
from trainer.data.profile import data_folder
from trainer.recipe.plan import Plan
from trainer.recipe.schema import from_random_weights, load_recipe
from trainer.recipe.shipped import find_recipe
from trainer.runs.job import Job, plan_of
from trainer.tools import bench
from trainer.tools.bench_gpu import MAX_BENCH_S, RUNS, Target, bench_run, targets_of

# what a CPU does in seconds
_SMALL = "image.train_px=64 image.test_px=64 batch.images=64 batch.norm_images=64"


def _small_set(name: str) -> str:
    """_SMALL for a recipe: a mixing unit of its own is no more than the batch."""
    mix = load_recipe(find_recipe(name)).mix
    return f"{_SMALL} mix.images=64" if mix and mix.images else _SMALL


def run_bench(
    recipe: str,
    model: str,
    data: str,
    data_dir: Path | None,
    src: Path | None,
    set_: str,
    machine: Mapping[str, Any],
    rounds: int,
    results: Path,
) -> None:
    """The body of `bench`, whose options these are. machine: what make_settings takes.

    Raises UserError.
    """
    began_s = time.perf_counter()
    keep_freed_memory()
    settings = make_settings(**machine)
    on_gpu = settings.device.startswith("cuda")
    is_small = not (set_ or on_gpu or data)
    with tempfile.TemporaryDirectory() as made:
        data = data or str(_folder(Path(made), src, on_gpu))
        plans = [
            _plan(Job(name, of, data, data_dir, 0, _small_set(name) if is_small else set_))
            for name, of in _asked(recipe, model, on_gpu)
        ]
        folder = data_folder(data, data_dir)
        settings = replace(settings, loader=chosen_loader(machine["loader"], folder))
        opened = open_data(plans[0].profile, folder, settings.loader == "ffcv")
        if on_gpu:
            measure_on_gpu(plans, settings, opened, folder, rounds, results, began_s)
        else:
            _measure(plans[0], settings, opened, rounds, results)


def _plan(job: Job) -> Plan:
    """The plan of a job, from random weights where a run would name others: they are as fast."""
    plan = plan_of(job)
    return replace(plan, recipe=from_random_weights(plan.recipe))


def _asked(recipe: str, model: str, on_gpu: bool) -> list[tuple[str, str]]:
    """Recipes and models: on a GPU those that its targets are for, unless another is named."""
    if on_gpu and not (recipe or model):
        return list(RUNS)
    default = RUNS[0] if on_gpu else ("A3", "resnet18")
    return [(recipe or default[0], model or default[1])]


def _folder(made: Path, src: Path | None, on_gpu: bool) -> Path:
    files = bench.photo_files(src, made / "files", 128)
    if not files:
        raise UserError(f"src={src}: holds no .jpg; use a folder or a tar of JPEG files")
    sizes = (8192, 1000, 1000) if on_gpu else (1024, 256, 2)
    return bench.image_folder(made / "data", files, *sizes)


def _measure(
    plan: Plan, settings: Settings, data: OpenedData, num_rounds: int, results: Path
) -> None:
    out = open_terminal(120)
    out.print(
        f"{plan.model} by {plan.recipe.name}: each part {num_rounds} times in turns, then as many"
        " whole steps ...",
        markup=False,
    )
    rates = bench.measure(plan, settings, data, num_rounds, num_steps=num_rounds)
    found = bench.bottleneck_of(rates, settings)
    out.print(bench_table(rates, found.limit))
    out.print(found.text, markup=False)
    facts = bench.machine_facts(settings, data) | bench.run_facts(plan, rates, found)
    _write(results, settings, {"benchmark": "run"} | facts)


def measure_on_gpu(
    plans: Sequence[Plan],
    settings: Settings,
    data: OpenedData,
    folder: Path | None,
    num_rounds: int,
    results: Path,
    began_s: float,
) -> None:
    """Measure plans one after another in what is left of the time; each is printed and stored when
    it is done.

    began_s: of time.perf_counter, since when the time is counted.
    """
    out = open_terminal(120)
    names = ", ".join(f"{plan.model} by {plan.recipe.name}" for plan in plans)
    out.print(f"{names}: about {MAX_BENCH_S / 60:.0f} minutes", markup=False)
    runs: list[dict[str, Any]] = []
    facts = {"benchmark": "run on a GPU", "bound_s": MAX_BENCH_S}
    facts |= bench.machine_facts(settings, data) | {"runs": runs}
    for number, plan in enumerate(plans):
        left_s = MAX_BENCH_S - (time.perf_counter() - began_s)
        run, found = bench_run(
            plan, settings, data, folder, num_rounds, left_s / (len(plans) - number)
        )
        runs.append(run)
        facts["took_s"] = round(time.perf_counter() - began_s, 1)
        _write(results, settings, facts)
        size = f"{run['train_px']} px, {run['batch_images']} images a step"
        out.print(f"\n{plan.model} by {run['recipe']}, {size}", markup=False)
        out.print(bench_table(found.rates, found.rates["step"].images_per_s))
        out.print(run["verdict"], markup=False)
        out.print(baseline_table(run))
        out.print(targets_table(targets_of(found)))
    out.print(f"took {facts['took_s']:.0f} s", markup=False)


def _write(results: Path, settings: Settings, facts: Mapping[str, Any]) -> None:
    path = results / "bench" / f"run-{settings.device.partition(':')[0]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(facts, indent=2) + "\n").encode())


def bench_table(rates: Mapping[str, bench.Rate], limit: float) -> Table:
    """One line for each part: its rate, its spread, and its share of the step's rate."""
    table = Table("part", "images/s", "quartiles", "x step alone")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, rate in rates.items():
        low, high = rate.quartiles
        what = f"{name} (one core)" if name == "decode" else name
        share = f"{rate.images_per_s / limit:.2f}"
        table.add_row(what, f"{rate.images_per_s:,.0f}", f"{low:,.0f} to {high:,.0f}", share)
    return table


def baseline_table(run: Mapping[str, Any]) -> Table:
    """What a run's facts say must be done at least, and what was achieved of it."""
    baseline, ms = run["baseline"], run["optimizer_ms"]
    table = Table("baseline", "counted", "achieved")
    passes = ", ".join(f"{name} {value:g}" for name, value in baseline["tflop_per_s"].items())
    flops = f"{baseline['train_gflop_per_image']:g} GFLOP an image"
    table.add_row("forward and backward", flops, f"TFLOP/s: {passes}")
    steps = ", ".join(
        f"{name} {value:g} ({ms[name]['median']:g} ms)"
        for name, value in baseline["optimizer_gb_per_s"].items()
    )
    moved = f"{baseline['optimizer_bytes_per_step'] / 1e6:,.0f} MB"
    table.add_row(f"a step of {run['optimizer']}", moved, f"GB/s: {steps}")
    if "transfer_gb_per_s" in baseline:
        image = f"{baseline['image_bytes'] / 1e6:g} MB an image"
        table.add_row("transfer", image, f"GB/s: {baseline['transfer_gb_per_s']:g}")
    return table


def targets_table(targets: Sequence[Target]) -> Table:
    """One line for each target: what was wanted, what was found, reached or missed."""
    table = Table("target", "wanted", "found", "")
    for target in targets:
        table.add_row(target.what, target.wanted, target.found, target.verdict)
    return table
