"""What the LR finder prints, and what it writes into its run folder."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from trainer.base import provenance
from trainer.base.disk import write_atomically
from trainer.base.json_text import json_file
from trainer.base.plugins import loaded_plugins
from trainer.lr_finder.plots import draw, is_even, plot, plot_columns
from trainer.lr_finder.rules import Curve, Spread
from trainer.lr_finder.trial import TrialLog
from trainer.recipe.plan import Plan
from trainer.runs import summary as show

CURVE_COLUMNS = ("trial", "purpose", "seed", "step", "value", "loss_nats", "held_out_nats")
_WORDS = {"ramp": "ramp", "probe": "stability probe", "race": "candidate trial"}


def lr_find_name(plan: Plan, data_fingerprint: str, asked: Mapping[str, Any]) -> str:
    """`lr-find-<recipe>.v<N>-<model>-<data>-<6 hex of the run's science and of all that was
    asked>`.
    """
    science = plan.run_name(data_fingerprint).rpartition("-")[2]
    digest = hashlib.sha256(json.dumps([science, asked], sort_keys=True).encode()).hexdigest()[:6]
    recipe = f"{plan.recipe.name}.v{plan.recipe.version}"
    return f"lr-find-{recipe}-{plan.model}-{plan.profile.name}-{digest}"


class TrialFolder:
    """Finished trials, one file each, so that a kill loses the one that was running. folder: None
    keeps them in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._kept: dict[str, dict[str, Any]] = {}

    def read(self, seed: int, values: np.ndarray, purpose: str) -> dict[str, Any] | None:
        """The curve of a trial that was finished before, as plain data; or None."""
        name = _trial_name(seed, values, purpose)
        path = self.folder / f"{name}.json" if self.folder else None
        try:
            return json_file(path) if path and path.exists() else self._kept.get(name)
        except ValueError:
            return None  # damaged: it is run again

    def write(self, facts: dict[str, Any], values: np.ndarray) -> None:
        """Keep the curve of a trial that was asked for these values."""
        name = _trial_name(facts["seed"], values, facts["purpose"])
        if self.folder is None:
            self._kept[name] = facts
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / f"{name}.json", (json.dumps(facts) + "\n").encode())


def _trial_name(seed: int, values: np.ndarray, purpose: str) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(values, dtype="<f8").tobytes()).hexdigest()[:8]
    return f"{purpose}-s{seed}-{digest}"


def write_results(found) -> None:
    """Write curve.csv, the pictures, TensorBoard's events and, last, suggestion.json into a
    LRFinderResult's folder.
    """
    folder = found.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "curve.csv", curve_table(found.suggestion.curves).encode())
    figure = draw(found)
    for kind in ("png", "svg"):
        picture = io.BytesIO()
        figure.savefig(picture, format=kind, metadata={"Date": None} if kind == "svg" else None)
        write_atomically(folder / f"curve.{kind}", picture.getbuffer())
    _write_tensorboard(folder, found.suggestion.curves)
    write_atomically(
        folder / "suggestion.json", (json.dumps(plain_suggestion(found), indent=2) + "\n").encode()
    )


def curve_table(curves: tuple[Curve, ...]) -> str:
    """Every step of every trial as CSV, one line each; held_out_nats only where the slice was
    measured.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CURVE_COLUMNS)
    for number, curve in enumerate(curves):
        measured = dict(zip(*(part.tolist() for part in curve.held_out), strict=True))
        for step, (value, loss) in enumerate(
            zip(curve.values.tolist(), curve.losses.tolist(), strict=True)
        ):
            writer.writerow(
                (
                    number,
                    curve.purpose,
                    curve.seed,
                    step,
                    repr(value),
                    repr(loss),
                    measured.get(step, ""),
                )
            )
    return out.getvalue()


def plain_suggestion(found) -> dict[str, Any]:
    """A LRFinderResult as suggestion.json holds it: what was found, for what it holds, and how it
    was measured.
    """
    suggestion, plan = found.suggestion, found.plan
    facts = {
        "value": suggestion.value,
        "reason": suggestion.reason,
        "command": found.command,
        "scalar": found.scalar.label,
        "page_value": found.scalar.own,
        "recipe": f"{plan.recipe.name}.v{plan.recipe.version}",
        "digest": plan.recipe.digest,
        "model": plan.model,
        "data": plan.profile.name,
        "data_fingerprint": found.data_fingerprint,
        "batch_images": plan.recipe.batch.images,
        "num_held_out": found.num_held_out,
        "rules": {name: one and dataclasses.asdict(one) for name, one in suggestion.rules.items()},
        "edge": suggestion.edge and dataclasses.asdict(suggestion.edge),
        "stable": suggestion.stable,
        "unstable": suggestion.unstable,
        "candidates": [
            {
                "value": one.value,
                "losses": {str(seed): _number(loss) for seed, loss in one.losses.items()},
            }
            for one in suggestion.candidates
        ],
        "smoothing": dict(suggestion.smoothing),
        "floors": dataclasses.asdict(suggestion.baselines),
        "asked": found.asked,
        "num_trials": len(suggestion.curves),
        "num_steps": sum(len(curve.losses) for curve in suggestion.curves),
        "device": provenance.device_name(found.settings.device),
        "precision": found.settings.precision,
        "versions": provenance.versions() | loaded_plugins(),
    }
    return facts


def _number(loss: float) -> float | None:
    """JSON has no infinity: a trial that diverged has no loss."""
    return loss if np.isfinite(loss) else None


def _write_tensorboard(folder: Path, curves: tuple[Curve, ...]) -> None:
    """TensorBoard: each trial's losses by step, the ramp's values, and the picture."""
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # its own, of the same command before
    with SummaryWriter(folder / "tensorboard") as writer:
        for number, curve in enumerate(curves):
            name = f"{curve.purpose}_{number:02d}_s{curve.seed}"
            for step, (value, loss) in enumerate(zip(curve.values, curve.losses, strict=True)):
                writer.add_scalar(f"{name}/loss_nats", loss, step)
                writer.add_scalar(f"{name}/value", value, step)
            for step, loss in zip(*curve.held_out, strict=True):
                writer.add_scalar(f"{name}/held_out_nats", loss, step)
        with Image.open(folder / "curve.png") as picture:
            writer.add_image("curve", np.asarray(picture.convert("RGB")), 0, dataformats="HWC")


def print_plan_head(out: Console, setup) -> None:
    """The lines above a LR finder run: page, deviations, batch, range, how long it will be."""
    plan, lengths, scalar = setup.plan, setup.lengths, setup.scalar
    out.print(f"[bold]{plan.recipe.name}.v{plan.recipe.version}[/] {escape(plan.recipe.title)}")
    out.print(f"{plan.model} on {escape(plan.profile.name)}", highlight=False)
    show.deviations(out, plan)
    out.print(show.batch_line(plan))
    own = "off" if scalar.own is None else f"{scalar.own:g}"
    way = "in equal steps" if is_even(setup.values) else "in equal ratios"
    out.print(
        f"{scalar.label} from {setup.values[0]:g} to {setup.values[-1]:g} {way}; the recipe has"
        f" {own}",
        markup=False,
    )
    left, held = setup.data.train.num_images, setup.data.val.num_images
    out.print(
        f"held out: {held} of {left + held} training images; the validation split is not looked at"
    )
    out.print(
        f"{lengths.num_seeds} ramps of {lengths.num_ramp_steps} steps, up to {lengths.num_probes}"
        f" probes of {lengths.num_probe_steps} and {lengths.num_candidates + lengths.num_repeats}"
        f" candidate trials of {lengths.num_race_steps}: at most {lengths.most_steps:,} steps"
    )
    settings = setup.settings
    out.print(f"{settings.device}, {settings.precision}, {settings.num_threads} threads")


class TerminalLog(TrialLog):
    """A bar while trials run, where the output is a terminal; and one line for each that is
    over.
    """

    def __init__(self, out: Console, most_steps: int) -> None:
        self.out, self.num_trials, self._facts = out, 0, ""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=out, transient=True, disable=not out.is_terminal)
        self._task = self._bar.add_task("", total=most_steps, facts="")
        self._started_s = time.monotonic()

    def __enter__(self) -> TerminalLog:
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    def start(self, seed: int, purpose: str, num_steps: int) -> None:
        self._started_s = time.monotonic()
        self._bar.update(self._task, description=f"{purpose}, seed {seed}")

    def step(self, value: float, loss_nats: float) -> None:
        self._bar.update(self._task, advance=1, facts=f"{value:.2e}  loss {loss_nats:.4f}")

    def end(self, curve: Curve, was_kept: bool) -> None:
        self.num_trials += 1
        self.out.print(
            trial_line(curve, None if was_kept else time.monotonic() - self._started_s),
            markup=False,
        )


def trial_line(curve: Curve, seconds: float | None) -> str:
    """One trial in a line. seconds: None where it was found in the folder."""
    took = "cached" if seconds is None else f"{seconds:.1f} s"
    end = {
        "ramp": "",
        "diverged": ", diverged",
        "not a number": ", then the loss was NaN or infinite",
    }[curve.ended]
    name = f"{_WORDS[curve.purpose]}, seed {curve.seed}"
    if not len(curve.losses):
        return f"{name:34} no step{end}  ({took})"
    what = {
        "ramp": f"up to {curve.values[-1]:.3g}",
        "probe": f"at {curve.values[-1]:.3g}",
        "race": f"up to {curve.values.max():.3g}",
    }[curve.purpose]
    held_out = f"  held-out {curve.held_out[1][-1]:.4f}" if len(curve.held_out[1]) else ""
    return (
        f"{name:34} {len(curve.losses):4} steps {what:14} loss"
        f" {curve.losses[-1]:.4f}{held_out}{end}  ({took})"
    )


def result(out: Console, found) -> None:
    """The whole answer: the plot, the rules, the race, the value and why, the batch it holds for,
    the command.
    """
    suggestion = found.suggestion
    out.print()
    for line in plot(found, plot_columns(out)):
        out.print(line, soft_wrap=False, no_wrap=True)
    out.print()
    out.print(rules_table(found))
    if suggestion.candidates:
        out.print(race_table(found))
    smoothing = ", ".join(f"{which} {share:.2f}" for which, share in suggestion.smoothing.items())
    out.print(
        "smoothing: each point of the moving average keeps this share of the one before it:"
        f" {smoothing}",
        markup=False,
    )
    if suggestion.stable is not None or suggestion.unstable is not None:
        out.print(stable_line(found), markup=False)
    out.print()
    if suggestion.value is None:
        out.print(suggestion.reason, style="bold yellow", markup=False, highlight=False)
    else:
        own = "" if found.scalar.own is None else f" (the recipe has {found.scalar.own:.3g})"
        out.print(
            f"{found.scalar.label} {suggestion.value:.3g}{own}: {suggestion.reason}",
            style="bold green",
            markup=False,
            highlight=False,
        )
        for line in batch_lines(found):
            out.print(line, markup=False)
    if found.folder:
        out.print(
            f"files  {found.folder}: curve.png, curve.svg, curve.csv, suggestion.json, tensorboard",
            markup=False,
        )
    if found.command:
        out.print(f"train  {found.command}", style="bold", markup=False, highlight=False)


def rules_table(found) -> Table:
    """What each rule finds: the median over seeds, the lowest and the highest."""
    table = Table("rule", "median", "lowest", "highest", "seeds", box=None, pad_edge=False)
    for name, spread in {
        **found.suggestion.rules,
        "edge (loss turns up)": found.suggestion.edge,
    }.items():
        table.add_row(name, *_cells(spread))
    return table


def _cells(spread: Spread | None) -> tuple[str, ...]:
    if spread is None:
        return ("-", "-", "-", "0")
    return (
        *(f"{value:.3g}" for value in (spread.median, spread.lowest, spread.highest)),
        str(spread.num_seeds),
    )


def race_table(found) -> Table:
    """What the race measured: each candidate's last held-out loss, by seed."""
    candidates = found.suggestion.candidates
    seeds = sorted({seed for one in candidates for seed in one.losses})
    table = Table(
        "candidates: final held-out loss",
        *(f"seed {seed}" for seed in seeds),
        box=None,
        pad_edge=False,
    )
    for one in candidates:
        cells = {
            seed: f"{loss:.4f}" if math.isfinite(loss) else "diverged"
            for seed, loss in one.losses.items()
        }
        is_best = one.value == found.suggestion.value
        table.add_row(
            f"{one.value:.3g}",
            *(cells.get(seed, "") for seed in seeds),
            style="bold green" if is_best else None,
        )
    return table


def stable_line(found) -> str:
    """Between which constant values a short run begins to grow."""
    stable, unstable = found.suggestion.stable, found.suggestion.unstable
    if stable is None:
        return f"largest stable constant value: below {unstable:.3g}, the smallest that was probed"
    return f"largest stable constant value: {stable:.3g}" + (
        "" if unstable is None else f"; {unstable:.3g} diverges"
    )


def batch_lines(found) -> list[str]:
    """For which batch a learning rate holds, and what the recipe's own rule makes of it for
    others.
    """
    if not found.scalar.is_rate:
        return []
    recipe, value = found.plan.recipe, found.suggestion.value
    images, rule = recipe.batch.images, recipe.lr.scaling
    line = f"holds for {images} images per step, over however many ranks and micro-batches"
    if rule is None:
        return [f"{line}; the recipe has no rule for another batch"]
    lr = recipe.lr.model_copy(update={"peak": value})
    others = ", ".join(
        f"{count} images {lr.scaled(images, count):.3g}"
        for count in (images // 2, 2 * images, 4 * images)
        if count
    )
    return [f"{line}; by the recipe's {rule} rule: {others}"]
