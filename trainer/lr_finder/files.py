"""What a range test leaves in its own folder: every trial's curve, the suggestion, the pictures."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer.base import provenance
from trainer.base.disk import write_atomically
from trainer.base.json_text import json_file
from trainer.base.plugins import loaded_plugins
from trainer.lr_finder.rules import Curve, Floors, series, smoothed, smoothing_for
from trainer.recipe.plan import Plan

COLUMNS = ("trial", "purpose", "seed", "step", "value", "loss_nats", "held_out_nats")


def range_name(plan: Plan, data_fingerprint: str, asked: Mapping[str, Any]) -> str:
    """`lr-find-<recipe>.v<N>-<model>-<data>-<6 hex of the run's science and of all that was asked>`."""
    science = plan.run_name(data_fingerprint).rpartition("-")[2]
    digest = hashlib.sha256(json.dumps([science, asked], sort_keys=True).encode()).hexdigest()[:6]
    return f"lr-find-{plan.recipe.name}.v{plan.recipe.version}-{plan.model}-{plan.profile.name}-{digest}"


class TrialFolder:
    """Finished trials, one file each, so that a kill loses the one that was running. folder: None keeps them in memory."""

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
    """Write curve.csv, the pictures, TensorBoard's events and, last, suggestion.json into a RangeTest's folder."""
    from trainer.lr_finder.pictures import draw

    folder = found.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "curve.csv", curve_table(found.suggestion.curves).encode())
    figure = draw(found)
    for kind in ("png", "svg"):
        picture = io.BytesIO()
        figure.savefig(picture, format=kind, metadata={"Date": None} if kind == "svg" else None)
        write_atomically(folder / f"curve.{kind}", picture.getbuffer())
    _write_board(folder, found.suggestion.curves)
    write_atomically(
        folder / "suggestion.json", (json.dumps(plain_suggestion(found), indent=2) + "\n").encode()
    )


def curve_table(curves: tuple[Curve, ...]) -> str:
    """Every step of every trial as CSV, one line each; held_out_nats only where the slice was measured."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
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
    """A RangeTest as suggestion.json holds it: what was found, for what it holds, and how it was measured."""
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
        "floors": dataclasses.asdict(suggestion.floors),
        "asked": found.asked,
        "num_trials": len(suggestion.curves),
        "num_steps": sum(len(curve.losses) for curve in suggestion.curves),
        "device": provenance.device_name(found.settings.device),
        "precision": found.settings.precision,
        "versions": provenance.versions() | loaded_plugins(),
    }
    return facts


def _number(loss: float) -> float | None:
    """JSON has no infinity: a trial that broke off has no loss."""
    return loss if np.isfinite(loss) else None


def median_curve(curves: list[Curve], which: str) -> tuple[np.ndarray, np.ndarray]:
    """The median over ramps of their smoothed losses, at the values that at least half of them reached."""
    by_value: dict[float, list[float]] = {}
    for curve in curves:
        values, losses = series(curve, which)
        if len(values):
            for value, loss in zip(
                values.tolist(), smoothed(losses, smoothing_for(len(losses))).tolist(), strict=True
            ):
                by_value.setdefault(value, []).append(loss)
    reached = sorted(value for value, losses in by_value.items() if 2 * len(losses) >= len(curves))
    return np.array(reached), np.array([np.median(by_value[value]) for value in reached])


def floor_of(floors: Floors, which: str) -> float | None:
    """The level of one of the two curves."""
    return floors.train if which == "train" else floors.held_out


def _write_board(folder: Path, curves: tuple[Curve, ...]) -> None:
    """TensorBoard: each trial's losses by step, the ramp's values, and the picture."""
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # its own, of the same command before
    with SummaryWriter(folder / "tensorboard") as board:
        for number, curve in enumerate(curves):
            name = f"{curve.purpose}_{number:02d}_s{curve.seed}"
            for step, (value, loss) in enumerate(zip(curve.values, curve.losses, strict=True)):
                board.add_scalar(f"{name}/loss_nats", loss, step)
                board.add_scalar(f"{name}/value", value, step)
            for step, loss in zip(*curve.held_out, strict=True):
                board.add_scalar(f"{name}/held_out_nats", loss, step)
        with Image.open(folder / "curve.png") as picture:
            board.add_image("curve", np.asarray(picture.convert("RGB")), 0, dataformats="HWC")
