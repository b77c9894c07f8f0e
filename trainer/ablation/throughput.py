"""Throughput estimates: the time of a run on this machine, measured on a few of its steps."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.base.settings import Settings
from trainer.data.dataset import OpenedData
from trainer.engine.evaluate import evaluate_all
from trainer.engine.state import TrainingState, set_algorithms
from trainer.engine.train import optimizer_step
from trainer.recipe import tree
from trainer.recipe.plan import Plan
from trainer.recipe.schema import ABOUT
from trainer.runs.results import Row

# Keys of a recipe without influence on a step's time, and those of which only the name has one.
_WITHOUT_COST = (*ABOUT, "epochs", "lr", "smoothing", "drop_path", "precise_norm")
_BY_NAME = ("optimizer", "loss", "mix", "average")
_FEWEST_STEPS = 3  # after the warm-up: a single one may have been disturbed
_MOST_BOUNDS = 5.0  # bounds that even so few steps may take


@dataclass(frozen=True)
class Throughput:
    """step_s: of one optimizer step, the fastest of num_steps. evaluation_s: of one evaluation,
    extrapolated from one batch. start_s: until the first step begins, and what that takes longer
    than others.
    """

    step_s: float
    evaluation_s: float
    start_s: float
    num_steps: int

    def run_s(self, plan: Plan) -> float:
        """Seconds of a whole run: its start, training, and an evaluation after each epoch."""
        training_s = plan.num_steps * self.step_s
        return self.start_s + training_s + plan.recipe.epochs * self.evaluation_s


def shape_of(plan: Plan) -> str:
    """A digest of what determines the time of a step: plans of one shape are measured once."""
    return _shape(plan.model, plan.profile.name, tree.plain(plan.recipe))


def shape_of_row(row: Row) -> str | None:
    """The same of a stored run; None where its row has no recipe."""
    if row.resolved_recipe is None:
        return None
    return _shape(row.model, row.data, row.resolved_recipe)


def _shape(model: str, data: str, resolved: Mapping[str, Any]) -> str:
    recipe = {key: value for key, value in resolved.items() if key not in _WITHOUT_COST}
    recipe |= {key: recipe[key].get("name", True) for key in _BY_NAME if key in recipe}
    if "distill" in recipe:
        recipe["distill"] = recipe["distill"]["teacher"]
    shape = [model, data, recipe]
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]


def measure_throughput(
    plan: Plan, settings: Settings, data: OpenedData, num_steps: int, bound_s: float
) -> Throughput:
    """Measure the last steps of a plan, where growing images are largest; the first is a warm-up.

    At most num_steps; fewer where they take longer than bound_s, but at least three, and one where
    three take far longer than that. The fastest counts: others were disturbed by something else.
    """
    first = max(0, plan.num_steps - num_steps - 1)
    seconds: list[float] = []
    start = time.perf_counter()
    set_algorithms(settings)
    state = TrainingState(plan, settings)
    stream = data.train_stream(plan, settings, first)
    built_s = time.perf_counter() - start
    for step in range(first, plan.num_steps):
        began = time.perf_counter()
        optimizer_step(state, stream, step).item()  # waits for the device
        seconds.append(time.perf_counter() - began)
        counted_s = sum(seconds[1:])
        is_enough = len(seconds) > _FEWEST_STEPS and counted_s > bound_s
        if is_enough or counted_s > _MOST_BOUNDS * bound_s:
            break
    evaluation_s = _evaluation_s(plan, settings, state.weights(), data, bound_s)
    counted = seconds[1:] or seconds
    step_s = min(counted)
    start_s = built_s + max(0.0, seconds[0] - step_s)
    return Throughput(step_s, evaluation_s, start_s, len(counted))


def _evaluation_s(
    plan: Plan, settings: Settings, models: dict, data: OpenedData, bound_s: float
) -> float:
    """Seconds of one evaluation, extrapolated from its first batch; the second time that it is
    evaluated counts, unless the first took longer than bound_s.
    """
    batch_s: list[float] = []
    while len(batch_s) < 2 and sum(batch_s) <= bound_s:
        began = time.perf_counter()
        batches = data.val_batches(plan, settings)
        scores = evaluate_all(plan, settings, models, itertools.islice(batches, 1))
        num_images = next(iter(scores.values())).num_images
        batch_s.append(time.perf_counter() - began)
    return min(batch_s) * plan.profile.num_val / num_images
