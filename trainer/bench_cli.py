"""`bench`: what each part of a run could do alone, what the whole does, and what holds it up."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from trainer.cli import DataDir, Device, Loader, Precision, Results, Set, Workers, app, user_errors

_SMALL = "image.train_px=64 image.test_px=64 batch.images=64 batch.norm_images=64"  # what a CPU does in seconds


@app.command()
@user_errors
def bench(
    recipe: Annotated[str, typer.Option(help="A page; absent: A2 on a GPU, A3 on the CPU.")] = "",
    model: Annotated[str, typer.Option(help="A model; absent: resnet50 on a GPU, resnet18 on the CPU.")] = "",
    data: Annotated[str, typer.Option(help="As train takes it; absent: JPEG photos of an ImageNet image's size.")] = "",
    data_dir: DataDir = None,
    src: Annotated[Path | None, typer.Option(help="A folder or a tar of JPEG files to use in place of those photos.")] = None,
    set_: Set = "",
    device: Device = "auto",
    gpu: Annotated[int, typer.Option(min=0, max=1, help="1: measure on a GPU, or say that there is none.")] = 0,
    precision: Precision = "auto",
    workers: Workers = "auto",
    loader: Loader = "auto",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of the parts, and whole steps.")] = 8,
    results: Results = Path("results"),
) -> None:
    """Time decoding, augmenting, the transfer, model, optimizer, evaluation and whole steps; JSON in results/bench."""
    from trainer.job import Job, plan_of
    from trainer.memory import keep_freed_memory
    from trainer.profiles import data_folder
    from trainer.settings import make_settings

    keep_freed_memory()
    settings = make_settings("cuda" if gpu else device, precision, workers, loader=loader)
    on_gpu = settings.device.startswith("cuda")
    recipe, model = recipe or ("A2" if on_gpu else "A3"), model or ("resnet50" if on_gpu else "resnet18")
    set_ = set_ or ("" if on_gpu or data else _SMALL)
    with tempfile.TemporaryDirectory() as made:
        from trainer.data.beton import chosen_loader
        from trainer.data.opened import open_data

        data = data or str(_folder(Path(made), src, 8192 if on_gpu else 1024))
        plan, folder = plan_of(Job(recipe, model, data, data_dir, 0, set_)), data_folder(data, data_dir)
        settings = replace(settings, loader=chosen_loader(loader, folder))
        _measure(plan, settings, open_data(plan.profile, folder, settings.loader == "ffcv"), rounds, results)


def _folder(made: Path, src: Path | None, num_train: int) -> Path:
    from trainer.bench_data import files_of, image_folder
    from trainer.errors import UserError

    files = files_of(src, made / "files", 128)
    if not files:
        raise UserError(f"src={src}: holds no .jpg; a folder or a tar of JPEG files would do")
    return image_folder(made / "data", files, num_train, 256)


def _measure(plan, settings, data, num_rounds: int, results: Path) -> None:
    from trainer import provenance
    from trainer.bench_run import measure, verdict
    from trainer.checkpoint import write_atomically
    from trainer.terminal import open_terminal

    rates = measure(plan, settings, data, num_rounds, num_steps=num_rounds)
    found = verdict(rates, settings)
    facts = {
        "benchmark": "run", "recipe": f"{plan.recipe.name}.v{plan.recipe.version}", "model": plan.model,
        "device": provenance.device_name(settings.device), "precision": settings.precision, "num_workers": settings.num_workers,
        "num_threads": settings.num_threads, "loader": data.loader_name(settings), "train_px": plan.recipe.image.train_px,
        "batch_images": plan.recipe.batch.images, "norm_images": plan.recipe.batch.norm_images, "versions": provenance.versions(),
        "verdict": found.text, "limit_images_per_s": round(found.limit, 2), "loader_images_per_s": round(found.data, 2),
        "parts": {name: rate.as_facts() for name, rate in rates.items()},
    }  # fmt: skip
    out = open_terminal(120)
    out.print(table_of(rates, found.limit))
    out.print(found.text, markup=False)
    path = results / "bench" / f"run-{'cuda' if settings.device.startswith('cuda') else 'cpu'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(facts, indent=2) + "\n").encode())


def table_of(rates: dict, limit: float):
    """One line for each part: its rate, its spread, and its share of the step's rate."""
    from rich.table import Table

    table = Table("part", "images/s", "quartiles", "x step alone")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, rate in rates.items():
        low, high = rate.quartiles
        alone = " (one core)" if name == "decode" else ""
        table.add_row(name + alone, f"{rate.images_per_s:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{rate.images_per_s / limit:.2f}")
    return table
