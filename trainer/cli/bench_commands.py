"""What `bench` does: it needs torch, which `--help` must not wait for."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from trainer.base.disk import write_atomically
from trainer.base.errors import UserError
from trainer.base.memory import keep_freed_memory
from trainer.base.settings import make_settings
from trainer.base.terminal import open_terminal
from trainer.data.dataset import open_data
from trainer.data.datasets.beton import chosen_loader
from trainer.data.profile import data_folder
from trainer.runs.job import Job, plan_of
from trainer.tools.bench_data import image_folder, photo_files
from trainer.tools.bench_gpu import MAX_BENCH_S, PAGES, bench_page
from trainer.tools.bench_run import bottleneck_of, machine_facts, measure, run_facts

# what a CPU does in seconds


_SMALL = "image.train_px=64 image.test_px=64 batch.images=64 batch.norm_images=64"


def run_bench(
    recipe: str,
    model: str,
    data: str,
    data_dir: Path | None,
    src: Path | None,
    set_: str,
    device: str,
    gpu: int,
    precision: str,
    workers: str,
    loader: str,
    rounds: int,
    results: Path,
) -> None:
    """The body of `bench`, whose options these are. Raises UserError."""
    began_s = time.perf_counter()

    keep_freed_memory()
    settings = make_settings("cuda" if gpu else device, precision, workers, loader=loader)
    on_gpu = settings.device.startswith("cuda")
    set_ = set_ or ("" if on_gpu or data else _SMALL)
    with tempfile.TemporaryDirectory() as made:
        data = data or str(_folder(Path(made), src, on_gpu))
        plans = [
            plan_of(Job(page, name, data, data_dir, 0, set_))
            for page, name in _asked(recipe, model, on_gpu)
        ]
        folder = data_folder(data, data_dir)
        settings = replace(settings, loader=chosen_loader(loader, folder))
        opened = open_data(plans[0].profile, folder, settings.loader == "ffcv")
        if on_gpu:
            measure_on_gpu(plans, settings, opened, folder, rounds, results, began_s)
        else:
            _measure(plans[0], settings, opened, rounds, results)


def _asked(recipe: str, model: str, on_gpu: bool) -> list[tuple[str, str]]:
    """Pages and models: on a GPU those that its targets are for, unless another is named."""
    if not on_gpu:
        return [(recipe or "A3", model or "resnet18")]

    return [(recipe or PAGES[0][0], model or PAGES[0][1])] if recipe or model else list(PAGES)


def _folder(made: Path, src: Path | None, on_gpu: bool) -> Path:
    files = photo_files(src, made / "files", 128)
    if not files:
        raise UserError(f"src={src}: holds no .jpg; use a folder or a tar of JPEG files")
    return (
        image_folder(made / "data", files, 8192, 1000, 1000)
        if on_gpu
        else image_folder(made / "data", files, 1024, 256)
    )


def _measure(plan, settings, data, num_rounds: int, results: Path) -> None:
    out = open_terminal(120)
    out.print(
        f"{plan.model} by {plan.recipe.name}: each part {num_rounds} times in turns, then as many"
        " whole steps ...",
        markup=False,
    )
    rates = measure(plan, settings, data, num_rounds, num_steps=num_rounds)
    found = bottleneck_of(rates, settings)
    out.print(bench_table(rates, found.limit))
    out.print(found.text, markup=False)
    _write(
        results,
        settings,
        {"benchmark": "run"} | machine_facts(settings, data) | run_facts(plan, rates, found),
    )


def measure_on_gpu(
    plans, settings, data, folder: Path | None, num_rounds: int, results: Path, began_s: float
) -> None:
    """Measure plans one after another in what is left of the time; each is printed and stored when
    it is done.

    began_s: of time.perf_counter, since when the time is counted.
    """
    out = open_terminal(120)
    out.print(
        f"{', '.join(f'{plan.model} by {plan.recipe.name}' for plan in plans)}: about"
        f" {MAX_BENCH_S / 60:.0f} minutes",
        markup=False,
    )
    facts = (
        {"benchmark": "run on a GPU", "bound_s": MAX_BENCH_S}
        | machine_facts(settings, data)
        | {"runs": []}
    )
    for number, plan in enumerate(plans):
        left_s = MAX_BENCH_S - (time.perf_counter() - began_s)
        page, found, targets = bench_page(
            plan, settings, data, folder, num_rounds, left_s / (len(plans) - number)
        )
        facts["runs"].append(page)
        facts["took_s"] = round(time.perf_counter() - began_s, 1)
        _write(results, settings, facts)
        out.print(
            f"\n{plan.model} by {page['recipe']}, {page['train_px']} px, {page['batch_images']}"
            " images a step",
            markup=False,
        )
        out.print(bench_table(found.rates, found.rates["step"].images_per_s))
        out.print(page["verdict"], markup=False)
        out.print(floor_table(page))
        out.print(targets_table(targets))
    out.print(f"took {facts['took_s']:.0f} s", markup=False)


def _write(results: Path, settings, facts: dict) -> None:
    path = results / "bench" / f"run-{'cuda' if settings.device.startswith('cuda') else 'cpu'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(facts, indent=2) + "\n").encode())


def bench_table(rates: dict, limit: float):
    """One line for each part: its rate, its spread, and its share of the step's rate."""
    table = Table("part", "images/s", "quartiles", "x step alone")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, rate in rates.items():
        low, high = rate.quartiles
        alone = " (one core)" if name == "decode" else ""
        table.add_row(
            name + alone,
            f"{rate.images_per_s:,.0f}",
            f"{low:,.0f} to {high:,.0f}",
            f"{rate.images_per_s / limit:.2f}",
        )
    return table


def floor_table(page: dict):
    """What a page's facts say must be done at least, and what was achieved of it."""
    floor, ms = page["floor"], page["optimizer_ms"]
    table = Table("floor", "counted", "achieved")
    passes = ", ".join(f"{name} {value:g}" for name, value in floor["tflop_per_s"].items())
    table.add_row(
        "forward and backward",
        f"{floor['train_gflop_per_image']:g} GFLOP an image",
        f"TFLOP/s: {passes}",
    )
    steps = ", ".join(
        f"{name} {value:g} ({ms[name]['median']:g} ms)"
        for name, value in floor["optimizer_gb_per_s"].items()
    )
    table.add_row(
        f"a step of {page['optimizer']}",
        f"{floor['optimizer_bytes_per_step'] / 1e6:,.0f} MB",
        f"GB/s: {steps}",
    )
    if "transfer_gb_per_s" in floor:
        table.add_row(
            "transfer",
            f"{floor['image_bytes'] / 1e6:g} MB an image",
            f"GB/s: {floor['transfer_gb_per_s']:g}",
        )
    return table


def targets_table(targets: list):
    """One line for each target: what was wanted, what was found, reached or missed."""
    table = Table("target", "wanted", "found", "")
    for target in targets:
        table.add_row(target.what, target.wanted, target.found, target.word)
    return table
