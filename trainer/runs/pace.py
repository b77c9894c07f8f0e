"""What a step of a run took, from its speed.jsonl: the median, how even, and on how busy a machine.

A mean over the whole run is one of everything else that ran beside it; the median of many steps is
not, as long as most of them were undisturbed.
"""

from __future__ import annotations

import contextlib
import statistics
from pathlib import Path

from trainer.base.disk import UnfitFile, read_regular
from trainer.base.json_text import json_of
from trainer.recipe.plan import Plan


def pace_of(path: Path, plan: Plan) -> dict[str, float]:
    """A row's step_s, step_spread_share and load_per_core; without those that the file lacks.

    Where images grow with the run, each size has a median of its own, weighted by its steps.
    """
    steps_s, loads = _read(path, plan.recipe.batch.images)
    if not steps_s:
        return {}
    by_px: dict[int, list[float]] = {}
    for step, step_s in steps_s:
        by_px.setdefault(plan.train_px_at(step - 1), []).append(step_s)
    medians = {px: statistics.median(values) for px, values in by_px.items()}
    mean_s = statistics.fmean(medians[plan.train_px_at(step - 1)] for step, _ in steps_s)
    pace = {"step_s": float(f"{mean_s:.4g}")}
    if len(steps_s) > 1:
        shares = [step_s / medians[px] for px, values in by_px.items() for step_s in values]
        first, _, third = statistics.quantiles(shares, n=4, method="inclusive")
        pace["step_spread_share"] = round(third - first, 3)
    if loads:
        pace["load_per_core"] = round(statistics.fmean(loads), 2)
    return pace


def _read(path: Path, batch_images: int) -> tuple[list[tuple[int, float]], list[float]]:
    """((step, seconds of a step), loads per core) of the file's lines; broken ones are passed over,
    as it is a log and nothing that a run depends on.
    """
    steps_s, loads = [], []
    try:
        texts = read_regular(path).splitlines()
    except (OSError, UnfitFile):
        return [], []
    for text in texts:
        with contextlib.suppress(ValueError, KeyError, TypeError, ZeroDivisionError):
            line = json_of(text)
            steps_s.append((int(line["step"]), batch_images / float(line["images_per_s"])))
            loads.append(float(line["load_per_core"]))
    return steps_s, loads
