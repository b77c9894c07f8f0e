"""The Python API: what the command line does, for a notebook or a script; `import trainer` has it.

    from trainer import evaluate, load_recipe, load_run, lr_find, plan, train

    recipe = load_recipe("A3")
    plan(recipe, "resnet18", set={"epochs": 2})           steps, learning rates, deviations
    run = train(recipe, "resnet18", set={"epochs": 2})
    run.row.top1_pct, run.history, run.plot(), run.model
    evaluate(run)                                         evaluate its exported weights again
    load_run(run.name)                                    an earlier run, the same object
    lr_find(recipe, "resnet18").suggestion

Runs, rows and weights are bit for bit those of `make` with the same arguments: either finds what
the other has trained. Invalid arguments raise UserError, a ValueError whose text says where, what
is wrong and what to write instead.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas
from torch import nn

from trainer.base.disk import read_regular
from trainer.base.errors import UserError
from trainer.base.exits import EXIT_FAILED, EXIT_STOPPED, EXIT_UNWRITTEN
from trainer.base.json_text import json_of
from trainer.base.plugins import load_plugins
from trainer.base.plural import counted
from trainer.base.scores import score_label
from trainer.base.settings import make_settings, settings_from_arguments
from trainer.base.signals import Stopped, StopRequest
from trainer.base.terminal import Terminal
from trainer.distributed.communicator import alone
from trainer.engine.evaluate import Scores
from trainer.lr_finder.api import LRFinderResult, Request, set_up
from trainer.lr_finder.api import run as run_lr_finder
from trainer.lr_finder.trial import untouched
from trainer.models.build import assemble
from trainer.models.trained import given_weights
from trainer.notebook import NotebookFigure, html_of_pairs, html_of_text, printed
from trainer.recipe.plan import Plan
from trainer.recipe.schema import Recipe
from trainer.recipe.schema import load_recipe as load_file
from trainer.recipe.shipped import find_recipe, recipe_paths
from trainer.runs import summary as show
from trainer.runs.append_only_log import LARGEST_METRICS_BYTES
from trainer.runs.job import Job, plan_of
from trainer.runs.rescore import rescore
from trainer.runs.results import Row, read_row_file
from trainer.runs.run_folder import find_run_folder, open_model
from trainer.runs.start import train_rank

__all__ = ["Run", "ShownPlan", "evaluate", "load_recipe", "load_run", "lr_find", "plan", "train"]


Plugins = str | Path | Sequence[str | Path]


def load_recipe(name: str | Path, *, plugins: Plugins = ()) -> Recipe:
    """A recipe by its name, "A3" for the newest version or "A3.v1", or the one in a .yaml file.

    `print(recipe.to_yaml())` shows it. plugins: as `train` takes it.

    Raises UserError for an unknown name, or a file with an error.
    """
    _load_plugins(plugins)
    return load_file(find_recipe(str(name)))


def plan(
    recipe: str | Path | Recipe = "A1",
    model: str = "resnet50",
    data: str | Path = "digits",
    data_dir: Path | str | None = None,
    seed: int = 0,
    set: Mapping[str, Any] | str = "",
    *,
    weights: str | Path = "",
    plugins: Plugins = (),
) -> ShownPlan:
    """The plan of `train` with the same arguments: steps, images, learning rates, deviations.

    Needs no GPU and no images.

    set: overrides by dotted path, {"epochs": 2, "loss.name": "ce", "mix": None}, or as text
    "epochs=2 loss.name=ce mix=null". weights, plugins: as `train` takes them.

    Raises UserError for invalid arguments.
    """
    _load_plugins(plugins)
    with _job(recipe, model, data, data_dir, seed, set, weights) as job:
        return ShownPlan(**vars(plan_of(job)))


def train(
    recipe: str | Path | Recipe = "A1",
    model: str = "resnet50",
    data: str | Path = "digits",
    data_dir: Path | str | None = None,
    seed: int = 0,
    set: Mapping[str, Any] | str = "",
    *,
    weights: str | Path = "",
    device: str = "auto",
    precision: str = "auto",
    workers: int | str = "auto",
    loader: str = "auto",
    runs: Path | str = "runs",
    results: Path | str = "results",
    again: bool = False,
    bad_images: str = "fail",
    checkpoint_s: float = 60.0,
    keep_every: int = 0,
    stop_if: str = "",
    expect: str = "",
    debug: str = "",
    keep: str = "",
    test_px: str = "",
    eval_every: int = 1,
    eval_batch: int = 128,
    log_every: int = 10,
    micro_batch: str = "recipe",
    activation_checkpointing: bool = False,
    compile: bool = False,
    compile_mode: str = "default",
    cuda_graphs: bool = False,
    half_group_norm: bool = False,
    profile: bool = False,
    track: str = "",
    plugins: Plugins = (),
    progress: bool = True,
) -> Run:
    """Train a model by a recipe in this process; gives its run, or the stored one of the same
    arguments.

    set: as `plan` takes it. weights: to start from, a file, a run or "timm:<model>.<tag>". plugins:
    Python files with components of your own, which stay loaded.
    progress: print the lines that the command prints. Every other argument means the same as the
    `make` variable of its name.

    An interrupt (Ctrl-C, a notebook's stop button) saves the run and raises KeyboardInterrupt; the
    same call resumes it. The process's random generators, threads and signal handlers stay as they
    were.

    Raises UserError for invalid arguments, OSError where the final files cannot be written.
    """
    machine = settings_from_arguments(locals())  # every argument that is a setting, under its name
    _load_plugins(plugins)
    with _job(recipe, model, data, data_dir, seed, set, weights, runs, bad_images, again) as job:
        return _trained(job, device, machine, progress)


def _trained(job: Job, device: str, machine: dict[str, Any], progress: bool) -> Run:
    """Train a job in this process, which stays as it was. Raises KeyboardInterrupt, UserError and
    OSError as `train` does.
    """
    runs = Path(machine["runs"])
    width = None if progress and sys.stdout.isatty() else 140
    # plain text in a notebook too: rich would turn every line into an output of its own
    unseen = None if progress else io.StringIO()
    console = Terminal(file=unseen, width=width, soft_wrap=True, force_jupyter=False)
    with untouched(device), Interrupt() as interrupt:
        try:
            code, row = train_rank(job, device, machine, alone(), console, interrupt)
        except Stopped:
            code, row = EXIT_STOPPED, None
    if code == EXIT_STOPPED:
        raise KeyboardInterrupt(f"stopped and saved in {runs}; the same call of train resumes it")
    if code == EXIT_FAILED and row is None:
        raise UserError("stop_if=off_track: the run is off track, and saved", "leave stop_if out")
    if code == EXIT_UNWRITTEN or row is None:
        log = unseen.getvalue() if unseen else "see the last lines printed"
        raise OSError(f"{runs}: the final files of the run could not be written; {log}")
    return Run(runs / row.run, row)


def lr_find(
    recipe: str | Path | Recipe = "A1",
    model: str = "resnet50",
    data: str | Path = "digits",
    data_dir: Path | str | None = None,
    set: Mapping[str, Any] | str = "",
    *,
    weights: str | Path = "",
    seeds: int = 3,
    low: float | None = None,
    high: float | None = None,
    steps: int | None = None,
    ramp: str = "exponential",
    curve: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    workers: int | str = "auto",
    runs: Path | str | None = None,
    again: bool = False,
    plugins: Plugins = (),
) -> LRFinderResult:
    """Find the learning rate, or another hyperparameter: `.suggestion`, `.plot()`.

    set: as `plan` takes it. low, high: from= and to=. runs: write the files of `make lr-find` into
    a folder under it; None writes nothing. weights, plugins: as `train` takes them.

    `.command` names the recipe's file: save a recipe that was changed in memory (`to_yaml()`) to
    use it. The process and its random generators stay as they were.

    Raises UserError for invalid arguments.
    """
    _load_plugins(plugins)
    request = Request(ramp, low, high, steps, seeds, curve)
    machine: dict[str, Any] = {
        "device": device,
        "precision": precision,
        "workers": str(workers),
        "runs": Path(runs or "runs"),
    }
    with (
        _job(recipe, model, data, data_dir, 0, set, weights, machine["runs"], again=again) as job,
        untouched(device),
    ):
        return run_lr_finder(set_up(job, request, machine), is_written=runs is not None)


def load_run(run: str | Path, runs: Path | str = "runs", *, plugins: Plugins = ()) -> Run:
    """An earlier run, by its name under `runs` or by its folder: the object that `train` gave.

    plugins: as `train` takes it, where the run's recipe needs them.

    Raises UserError where it is no run folder, or its row is damaged.
    """
    _load_plugins(plugins)
    folder = find_run_folder(str(run), Path(runs))
    path = folder / "row.json"
    return Run(folder, read_row_file(path) if path.exists() else None)


def evaluate(
    run: Run | str | Path,
    *,
    data_dir: Path | str | None = None,
    device: str = "auto",
    precision: str = "auto",
    workers: int | str = "auto",
    runs: Path | str = "runs",
    plugins: Plugins = (),
) -> Scores:
    """Evaluate the exported weights of a finished run again, on the validation images.

    run: as `train` gave it, or what `load_run` takes. plugins: as `train` takes it.

    Raises UserError where the run has not finished, or its images are not found.
    """
    _load_plugins(plugins)
    folder = run.folder if isinstance(run, Run) else find_run_folder(str(run), Path(runs))
    with untouched(device):
        settings = make_settings(device, precision, str(workers), folder.parent)
        _, scores, _ = rescore(folder, settings, Path(data_dir) if data_dir else None)
    return scores


class ShownPlan(Plan):
    """A plan that prints as by `make plan`, in a notebook too; printing builds the model."""

    def __str__(self) -> str:
        return printed(lambda out: show.plan_in_full(out, self, *assemble(self)))

    def _repr_html_(self) -> str:
        return html_of_text(str(self))


@dataclass(frozen=True)
class Run:
    """A run: its folder and its row.

    row: None where it has not ended yet. folder: checkpoints, curves and weights; it does not exist
    here where only the row was found, of a run on another machine.
    """

    folder: Path
    row: Row | None

    @property
    def name(self) -> str:
        """The run's name, which is its folder's."""
        return self.folder.name

    @property
    def is_finished(self) -> bool:
        """Has it trained to its end, and not diverged?"""
        return self.row is not None and self.row.status == "finished"

    @cached_property
    def model(self) -> nn.Module:
        """The model whose score is in the row, on the CPU, in eval mode. Raises UserError."""
        return open_model(self.folder)

    @property
    def history(self) -> pandas.DataFrame:
        """The curves, one row per line of metrics.jsonl, NaN where a line lacks a value.

        step, epoch. Training: loss_nats (mean since the previous line), lr. Evaluation: weights
        ("model" or "average"), top1_pct, top5_pct (of another task its own scores), val_loss_nats.

        Raises UserError where the folder is not here.
        """
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            raise UserError(f"{path}: not found; use runs=<folder of the run folders>")
        lines = read_regular(path, LARGEST_METRICS_BYTES).split(b"\n")
        whole = [json_of(line) for line in lines if line.endswith(b"}")]  # one may be half written
        named = [name for line in whole for name in line if name.endswith("_pct")]
        scores = list(dict.fromkeys(named)) or ["top1_pct", "top5_pct"]
        return pandas.DataFrame(whole, columns=[*_COLUMNS, *scores, "val_loss_nats"])

    def plot(self) -> NotebookFigure:
        """The curves as a matplotlib Figure: losses on the left, the main score on the right."""
        history = self.history
        main = next((name for name in history.columns if name.endswith("_pct")), "top1_pct")
        figure = NotebookFigure(figsize=(9, 3.2), dpi=100, layout="constrained")
        losses, scores = figure.subplots(1, 2)
        trained = history.dropna(subset="loss_nats")
        losses.plot(trained["epoch"], trained["loss_nats"], label="train, augmented")
        for weights, part in history.dropna(subset=main).groupby("weights"):
            label = "val" if weights == "model" else "val (average)"
            losses.plot(part["epoch"], part["val_loss_nats"], "o-", markersize=3, label=label)
            scores.plot(part["epoch"], part[main], "o-", markersize=3, label=label)
        losses.set(xlabel="epoch", ylabel="loss (nats)")
        scores.set(xlabel="epoch", ylabel=f"{score_label(main)} (%)")
        for axes in (losses, scores):
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend()
        figure.suptitle(self.name, fontsize=10)
        return figure

    def __repr__(self) -> str:
        if self.row is None:
            return f"Run {self.name}: not ended; rerun the call that started it to resume"
        row = self.row
        score = f", {row.main_label} {row.main_pct:.2f} %" if self.is_finished else ""
        return f"Run {self.name}: {self.row.status}{score}"

    def _repr_html_(self) -> str:
        row = self.row
        if row is None:
            return html_of_text(repr(self))
        pairs: list[tuple[str, object]]
        pairs = [
            ("status", row.status),
            ("steps", f"{row.steps:,} ({counted(row.epochs, 'epoch')})"),
        ]
        if self.is_finished:
            images = f" of {row.num_val_images:,} images"
            for name, value in row.percentages.items():
                pairs.append((score_label(name), f"{value:.2f} %{images}"))
                images = ""
            pairs.append(("val loss", f"{row.loss_nats:.4f} nats"))
        pairs += [
            ("training", f"{row.train_s:,.0f} s, {row.images_per_s:,.0f} images/s"),
            ("folder", self.folder),
        ]
        pairs += [
            (f"deviation ({change.origin})", f"{change.path}: {change.before} → {change.after}")
            for change in row.deviations
        ]
        return html_of_pairs(row.run, pairs)


_COLUMNS = ("step", "epoch", "loss_nats", "lr", "weights")


class Interrupt(StopRequest):
    """A StopRequest for use inside somebody else's process: it handles Ctrl-C, no other signal.

    The second Ctrl-C ends training at once; it resumes from the last checkpoint. Outside the main
    thread, where Python allows no signal handlers, it handles nothing.
    """

    def __enter__(self) -> Interrupt:
        self._is_main_thread = threading.current_thread() is threading.main_thread()
        if self._is_main_thread:
            self._handler_before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        if self._is_main_thread:
            signal.signal(signal.SIGINT, self._handler_before)

    def _handle(self, number: int, frame) -> None:
        if self.is_requested:
            raise KeyboardInterrupt
        self.signal_name = signal.SIGINT.name


def _load_plugins(plugins: Plugins) -> None:
    """Plugins as plugins= names them, or as a list of paths; raises UserError."""
    paths = [plugins] if isinstance(plugins, (str, Path)) else plugins
    load_plugins(",".join(map(str, paths)))


@contextlib.contextmanager
def _job(
    recipe: str | Path | Recipe,
    model: str,
    data: str | Path,
    data_dir,
    seed: int,
    set,
    weights: str | Path = "",
    runs: Path | str = "runs",
    bad_images: str = "fail",
    again: bool = False,
) -> Iterator[Job]:
    """The job of a call. A job names its recipe: one changed in memory is written to a temporary
    file.
    """
    with tempfile.TemporaryDirectory() as folder:
        name = str(recipe)
        if isinstance(recipe, Recipe):
            name = f"{recipe.name}.v{recipe.version}"
            if name not in [path.stem for path in recipe_paths()] or load_recipe(name) != recipe:
                name = str(Path(folder) / "recipe.yaml")
                Path(name).write_text(recipe.to_yaml())
        where = Path(data_dir) if data_dir else None
        start = given_weights(str(weights), model, Path(runs))
        text = text_of(set)
        yield Job(name, model, str(data), where, seed, text, bad_images, again, weights=start)


def text_of(overrides: Mapping[str, Any] | str) -> str:
    """Overrides as text for set=, every number to its last bit.

    {"epochs": 2, "mix": None} is "epochs=2 mix=null".
    """
    if isinstance(overrides, str):
        return overrides
    items = (f"{path}={json.dumps(value, default=_plain)}" for path, value in overrides.items())
    return " ".join(map(shlex.quote, items))


def _plain(value: Any) -> Any:
    """A NumPy scalar as a Python number."""
    if hasattr(value, "item"):
        return value.item()
    kinds = "numbers, strings, True, False, None, lists, dicts"
    raise UserError(f"set: {value!r} cannot be a value of a recipe; valid: {kinds}")
