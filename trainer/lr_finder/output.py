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
from collections.abc import Callable, Mapping
from datetime import timedelta
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
from trainer.base.plugins import loaded_plugins
from trainer.lr_finder.baseline import FEW_HELD
from trainer.lr_finder.candidates import counted_as
from trainer.lr_finder.plots import draw, interval_text, plot, plot_columns
from trainer.lr_finder.rules import Candidate, Curve, is_even
from trainer.lr_finder.trial import TrialLog
from trainer.recipe.plan import Plan
from trainer.runs import summary as show
from trainer.runs.loggers.logger import PLAIN_LINE_S
from trainer.runs.plan_lines import batch_line

CURVE_COLUMNS = ("trial", "purpose", "seed", "step", "value", "loss_nats", "held_out_nats")
_WORDS = {"ramp": "ramp", "probe": "stability probe", "race": "candidate trial"}
_FAR_ABOVE = 2.0  # times the loss of equal odds
_ENDS = {
    "ramp": "",
    "diverged": ", diverged",
    "not a number": ", then the loss was NaN or infinite",
}


def lr_find_name(plan: Plan, data_fingerprint: str, asked: Mapping[str, Any]) -> str:
    """`lr-find-<recipe>.v<N>-<model>-<data>-<6 hex of the run's science and of all that was
    asked>`.
    """
    science = plan.run_name(data_fingerprint).rpartition("-")[2]
    digest = hashlib.sha256(json.dumps([science, asked], sort_keys=True).encode()).hexdigest()[:6]
    recipe = f"{plan.recipe.name}.v{plan.recipe.version}"
    return f"lr-find-{recipe}-{plan.model}-{plan.profile.name}-{digest}"


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
    text = json.dumps(plain_suggestion(found), indent=2) + "\n"
    write_atomically(folder / "suggestion.json", text.encode())


def curve_table(curves: tuple[Curve, ...]) -> str:
    """Every step of every trial as CSV, one line each; held_out_nats only where the slice was
    measured.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CURVE_COLUMNS)
    for number, curve in enumerate(curves):
        measured = dict(zip(*(part.tolist() for part in curve.held_out), strict=True))
        steps = zip(curve.values.tolist(), curve.losses.tolist(), strict=True)
        for step, pair in enumerate(steps):
            trial = number, curve.purpose, curve.seed, step
            writer.writerow((*trial, *map(repr, pair), measured.get(step, "")))
    return out.getvalue()


def plain_suggestion(found) -> dict[str, Any]:
    """A LRFinderResult as suggestion.json holds it: what was found, for what it holds, and how it
    was measured.
    """
    suggestion, plan = found.suggestion, found.plan
    return {
        "value": suggestion.value,
        "interval": suggestion.interval and dataclasses.asdict(suggestion.interval),
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
                "losses": _plain_losses(one),
                "mean": _plain(one.mean),
                "counted_as": _plain(one.counted),
            }
            for one in suggestion.candidates
        ],
        "level": {"nats": _plain(suggestion.level_nats), "name": suggestion.level_name},
        "smoothing": dict(suggestion.smoothing),
        "floors": dataclasses.asdict(suggestion.baselines),
        "asked": found.asked,
        "num_trials": len(suggestion.curves),
        "num_steps": sum(len(curve.losses) for curve in suggestion.curves),
        "device": provenance.device_name(found.settings.device),
        "precision": found.settings.precision,
        "versions": provenance.versions() | loaded_plugins(),
    }


def _plain_losses(candidate: Candidate) -> dict[str, float | None]:
    return {str(seed): _plain(loss) for seed, loss in candidate.losses.items()}


def _plain(loss: float) -> float | None:
    """JSON has no infinity: a trial that diverged has no loss."""
    return loss if math.isfinite(loss) else None


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
            # sorted by name: after all curves
            writer.add_image("view/curve", np.asarray(picture.convert("RGB")), 0, dataformats="HWC")


def print_plan_head(out: Console, setup) -> None:
    """The lines above a LR finder run: recipe, deviations, batch, range, how long it will be."""
    plan, lengths, scalar = setup.plan, setup.lengths, setup.scalar
    out.print(f"[bold]{plan.recipe.name}.v{plan.recipe.version}[/] {escape(plan.recipe.title)}")
    out.print(f"{plan.model} on {escape(plan.profile.name)}", highlight=False)
    show.deviations(out, plan)
    out.print(batch_line(plan))
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
    average = plan.recipe.average
    if average is not None and average.replaces_model:
        out.print(
            f"note: the ramps and trials run without {average.name}, which moves the weights as a"
            " run trains: its best rate may be another",
            style="yellow",
            markup=False,
        )
    if held < FEW_HELD:
        out.print(
            f"note: {held} images tell rates apart only by their loss, and hardly; more images tell"
            " more, more seeds= share the same ones",
            style="yellow",
            markup=False,
        )
    out.print(
        f"{lengths.num_ramps} ramps of {lengths.num_ramp_steps} steps, up to {lengths.num_probes}"
        f" probes of {lengths.num_probe_steps} and {lengths.num_candidates + lengths.num_repeats}"
        f" candidate trials of {lengths.num_race_steps}: at most {lengths.most_steps:,} steps"
    )
    settings = setup.settings
    threads = f"{settings.num_threads} thread{'s' * (settings.num_threads != 1)}"
    out.print(f"{settings.device}, {settings.precision}, {threads}")


class TerminalLog(TrialLog):
    """A bar while trials run where the output is a terminal, else a line now and then; and one line
    for each that is over.

    most_steps: of all trials. clock: seconds, ever rising.
    """

    def __init__(
        self, out: Console, most_steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.out, self.num_trials, self._clock = out, 0, clock
        facts = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}")
        self._bar = Progress(
            *facts, TimeElapsedColumn(), console=out, transient=True, disable=not out.is_terminal
        )
        self._task = self._bar.add_task("", total=most_steps, facts="")
        self._most_steps, self._name = most_steps, ""
        # steps: of this trial until now and in all; taken by trials that ran here; which no
        # later trial can take
        self._step = self._num_steps = self._num_taken = self._num_gone = 0
        self._num_run, self._seconds = 0, 0.0  # trials that ran to their end here, and their time
        self._started_s = self._last_line_s = clock()

    def __enter__(self) -> TerminalLog:
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    def start(self, seed: int, purpose: str, num_steps: int) -> None:
        self._started_s = self._clock()
        self._name, self._step, self._num_steps = f"{_WORDS[purpose]}, seed {seed}", 0, num_steps
        self._bar.update(self._task, description=f"{purpose}, seed {seed}")

    def step(self, value: float, loss_nats: float) -> None:
        self._step += 1
        facts = f"{value:.2e}  loss {loss_nats:.4f}"
        self._bar.update(self._task, advance=1, facts=facts)
        now_s = self._clock()
        if self.out.is_terminal or now_s - self._last_line_s < PLAIN_LINE_S:
            return
        self._last_line_s = now_s
        line = f"{self._name:34} step {self._step}/{self._num_steps}  {facts}"
        self.out.print(line + self._left(now_s), markup=False)

    def _left(self, now_s: float) -> str:
        """The time that is left, if no trial ends early; empty until one has ended."""
        if not self._num_run:
            return ""
        step_s = (self._seconds + now_s - self._started_s) / (self._num_taken + self._step)
        left_s = step_s * (self._most_steps - self._num_gone - self._step)
        return f"  time left at most {timedelta(seconds=round(left_s))}"

    def end(self, curve: Curve, asked: float, was_kept: bool) -> None:
        self.num_trials += 1
        seconds = None if was_kept else self._clock() - self._started_s
        self._num_gone += len(curve.losses) if was_kept else self._num_steps
        if seconds is not None:
            self._num_run, self._seconds = self._num_run + 1, self._seconds + seconds
            self._num_taken += self._step
            self._last_line_s = self._clock()
        self.out.print(trial_line(curve, asked, seconds), markup=False)


def trial_line(curve: Curve, asked: float, seconds: float | None) -> str:
    """One trial in a line. asked: as TrialLog.end has it. seconds: None where it was found in the
    folder.
    """
    took = "cached" if seconds is None else f"{seconds:.1f} s"
    end, name = _ENDS[curve.ended], f"{_WORDS[curve.purpose]}, seed {curve.seed}"
    if not len(curve.losses):
        return f"{name:34} no step at {asked:.3g}{end}  ({took})"
    is_ramp = curve.purpose == "ramp"  # ends where the loss does
    what = f"up to {curve.values.max():.3g}" if is_ramp else f"at {asked:.3g}"
    held_out = f"  held-out {curve.held_out[1][-1]:.4f}" if len(curve.held_out[1]) else ""
    return (
        f"{name:34} {len(curve.losses):4} steps {what:14} loss"
        f" {curve.losses[-1]:.4f}{held_out}{end}  ({took})"
    )


def result(out: Console, found) -> None:
    """The whole answer: the plot, the rules, the candidates, the value and why, the batch it holds
    for, the command.
    """
    suggestion = found.suggestion
    out.print()
    for row in plot(found, plot_columns(out)):
        out.print(row, soft_wrap=False, no_wrap=True)
    out.print()
    out.print(rules_table(found))
    if suggestion.candidates:
        out.print(candidates_table(found))
        if any(one.is_cut for one in _compared(found)):
            line = f"counted as: {counted_as(suggestion.level_nats, suggestion.level_name)}"
            out.print(line, markup=False)
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
        out.print(suggestion.reason, style="bold yellow", markup=False)
    else:
        own = "" if found.scalar.own is None else f" (the recipe has {found.scalar.own:.3g})"
        line = f"{found.scalar.label} {suggestion.value:.3g}{interval_text(suggestion.interval)}"
        line += f"{own}: {suggestion.reason}"
        out.print(line, style="bold green", markup=False)
        if found.scalar.is_rate:
            out.print(validity_line(found), markup=False)
    if note := start_note(found):
        out.print(note, style="yellow", markup=False)
    if found.folder:
        files = "curve.png, curve.svg, curve.csv, suggestion.json, tensorboard"
        out.print(f"files  {found.folder}: {files}", markup=False)
    if found.command:
        out.print(f"train  {found.command}", style="bold", markup=False)


def start_note(found) -> str:
    """What to do where trials start far above the loss of answers at equal odds, as a classifier
    does whose first weights are large; else empty.
    """
    starts = [one.start_loss for one in found.suggestion.curves if one.start_loss is not None]
    odds = found.equal_odds_nats
    if not starts or odds is None or (start := float(np.median(starts))) < _FAR_ABOVE * odds:
        return ""
    return (
        f"note: the loss starts at {start:.3g} nats, where answers at equal odds have {odds:.3g}:"
        " the classifier's first weights are too large, and a rate is found that shrinks them;"
        ' set="model.head_init_scale=0.001" starts it near zero'
    )


def rules_table(found) -> Table:
    """What each rule finds: the median over seeds, the lowest and the highest."""
    table = Table("rule", "median", "lowest", "highest", "seeds", box=None, pad_edge=False)
    rows = {**found.suggestion.rules, "edge (loss turns up)": found.suggestion.edge}
    for name, spread in rows.items():
        if spread is None:
            table.add_row(name, "-", "-", "-", "0")
        else:
            values = (f"{one:.3g}" for one in (spread.median, spread.lowest, spread.highest))
            table.add_row(name, *values, str(spread.num_seeds))
    return table


def candidates_table(found) -> Table:
    """Each candidate's last held-out loss, by seed, their mean and, where that is another, the one
    that is compared.
    """
    candidates, compared = found.suggestion.candidates, _compared(found)
    seeds = sorted({seed for one in candidates for seed in one.losses})
    means = ["mean", "counted as"] if any(one.is_cut for one in compared) else ["mean"]
    headings = "candidates: final held-out loss", *(f"seed {seed}" for seed in seeds), *means
    table = Table(*headings, box=None, pad_edge=False)
    for one in candidates:
        losses = (_loss_text(one.losses.get(seed)) for seed in seeds)
        both = one.mean, one.counted
        shown = (_loss_text(loss) if one in compared else "" for loss in both[: len(means)])
        table.add_row(f"{one.value:.3g}", *losses, *shown)
    return table


def _compared(found) -> list[Candidate]:
    """The candidates that every seed trained."""
    candidates = found.suggestion.candidates
    most = max((len(one.losses) for one in candidates), default=0)
    return [one for one in candidates if len(one.losses) == most]


def _loss_text(loss: float | None) -> str:
    if loss is None:
        return ""
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def stable_line(found) -> str:
    """Between which constant values a short run begins to grow."""
    stable, unstable = found.suggestion.stable, found.suggestion.unstable
    if stable is None:
        return f"largest stable constant value: below {unstable:.3g}, the smallest that was probed"
    return f"largest stable constant value: {stable:.3g}" + (
        "" if unstable is None else f"; {unstable:.3g} diverges"
    )


def validity_line(found) -> str:
    """For which batch a learning rate holds, and what the recipe's own rule makes of it for
    others.
    """
    recipe, value = found.plan.recipe, found.suggestion.value
    images, rule = recipe.batch.images, recipe.lr.scaling
    line = f"holds for {images} images per step, over however many ranks and micro-batches"
    if rule is None:
        return f"{line}; the recipe has no rule for another batch"
    lr = recipe.lr.model_copy(update={"peak": value})
    others = ", ".join(
        f"{count} images {lr.scaled(images, count):.3g}"
        for count in (images // 2, 2 * images, 4 * images)
        if count
    )
    return f"{line}; by the recipe's {rule} rule: {others}"
