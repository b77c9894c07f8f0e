"""One trial: from a seed's initial weights along the recipe's training path, with a given value at
every step.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.base.disk import write_atomically
from trainer.base.json_text import json_file
from trainer.base.settings import Settings
from trainer.data.dataset import OpenedData
from trainer.data.workers import Watch
from trainer.distributed.communicator import Ranks, alone
from trainer.engine.state import TrainingState, algorithms_kept, set_algorithms
from trainer.engine.train import optimizer_step
from trainer.lr_finder.baseline import HeldOut
from trainer.lr_finder.batches import SeedBatches
from trainer.lr_finder.ramp import HyperparameterSetter, Scalar
from trainer.lr_finder.rules import Curve
from trainer.recipe.plan import Plan

NUM_MEASURES = 20  # of a ramp, on the held-out slice
# steps in a trial that fp16 may skip; its scale starts at 2**16, and each of them halves it
MOST_SKIPPED = 40
_WINDOW = 5  # losses whose median is compared: a spike of one step or two is no divergence
# pytorch-lr-finder and fastai stop at a multiple of the best; here it is one of the fall
_FACTOR = 4.0


class TrialFolder:
    """Finished trials as plain data, one file each, so that a kill loses the one that was running.

    folder: None keeps them in memory. Rank 0 alone looks there.
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


class TrialLog:
    """What is told of trials while they run; this one tells nothing."""

    def start(self, seed: int, purpose: str, num_steps: int) -> None:
        """A trial begins."""

    def step(self, value: float, loss_nats: float) -> None:
        """A step of it was taken."""

    def end(self, curve: Curve, asked: float, was_kept: bool) -> None:
        """It is over, or was found among those that were kept. asked: its largest value; of a
        candidate the candidate, which its schedule need not reach.
        """


@dataclass
class _Record:
    """A trial as far as it has come."""

    start_loss: float
    values: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    ended: str = "ramp"
    lowest: float = math.inf

    def add(self, value: float, loss: float) -> None:
        self.values.append(value)
        self.losses.append(loss)

    def has_diverged(self) -> bool:
        """Does the median of the last losses lie further above the best than four times what was
        won until then?

        At least the start's own height is allowed: where nothing was won yet, noise would end the
        trial.
        """
        if len(self.losses) < _WINDOW:
            return False
        start = min(self.losses[0], float(np.median(self.losses[:_WINDOW])))
        now = float(np.median(self.losses[-_WINDOW:]))
        self.lowest = min(self.lowest, now, start)
        return now > self.lowest + max(_FACTOR * (start - self.lowest), abs(start))

    def curve(self, seed: int, purpose: str) -> Curve:
        """What was measured until now, of the seed's trial of that purpose."""
        return Curve(
            values=np.array(self.values),
            losses=np.array(self.losses),
            held_out=(np.array(self.places, dtype=np.int64), np.array(self.held_out)),
            start_loss=self.start_loss,
            ended=self.ended,
            seed=seed,
            purpose=purpose,
        )


class Trials:
    """Runs trials of one scalar; what a trial has found is kept, and it is never run twice.

    plan: without a schedule, over what the slice leaves of train. peak: the recipe's learning rate.
    rate_shape: shares of it in a candidate's trial, where the scalar is another number; a ramp and
    a probe then stay at the peak. check: called before every step, by all ranks; watch.check: by
    one that waits for images; what they raise ends the trial. Ranks end together: what ends a trial
    is the same number on all.
    """

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        data: OpenedData,
        scalar: Scalar,
        rate_shape: np.ndarray,
        kept: TrialFolder,
        log: TrialLog | None = None,
        check: Callable[[], None] = lambda: None,
        ranks: Ranks = alone(),
        watch: Watch = Watch(),
    ) -> None:
        self.plan, self.settings, self.data, self.scalar = plan, settings, data, scalar
        self.rate_shape, self.kept, self.log = rate_shape, kept, log or TrialLog()
        self.check, self.ranks, self.watch = check, ranks, watch
        self.held_out = HeldOut(plan, settings, data, ranks, watch)
        self.batches = SeedBatches(settings, data, ranks, watch)
        self._start_losses: dict[int, float] = {}

    def __call__(self, seed: int, values: np.ndarray, purpose: str) -> Curve:
        """The curve of one trial: an optimizer step with each value [N], in order, as far as the
        loss is a number.
        """
        facts = self.kept.read(seed, values, purpose) if self.ranks.is_first else None
        facts = self.ranks.broadcast(facts)
        if facts is not None:
            curve = curve_from_json(facts)
        else:
            self.log.start(seed, purpose, len(values))
            plan = replace(self.plan, seed=seed, num_steps=len(values) + MOST_SKIPPED)
            curve = self._run(plan, values, purpose)
            if self.ranks.is_first:
                self.kept.write(curve_to_json(curve), values)
        is_shaped = purpose == "race" and self.scalar.is_rate
        asked = values.max() / (self.rate_shape.max() if is_shaped else 1.0)
        self.log.end(curve, float(asked), was_kept=facts is not None)
        return curve

    def _run(self, plan: Plan, values: np.ndarray, purpose: str) -> Curve:
        set_algorithms(self.settings)
        peaks, rates = self._rates(values, purpose)
        first = self.scalar.plan_at(plan, self.scalar.used(values[0]), rates[0])
        state = TrainingState(first, self.settings, self.ranks)
        state.plan = plan
        hyperparameter = HyperparameterSetter(self.scalar, state)
        record = _Record(self._start_loss(plan.seed, state))
        window = self.batches.of(plan)
        every = max(1, len(values) // NUM_MEASURES) if purpose == "ramp" else len(values)
        taken = 0
        for step in range(plan.num_steps):
            self.check()
            hyperparameter.set(values[taken], rates[taken], peaks[taken])
            if self.scalar.section == "augment":
                alone_here = replace(self.settings, num_workers=0)
                window = self.data.train_stream(state.plan, alone_here, step, self.ranks)
            loss, is_taken = _step(state, window, step)
            if not math.isfinite(loss):
                record.ended = "not a number"
                break
            if not is_taken:
                continue
            record.add(self.scalar.used(values[taken]), loss)
            self.log.step(record.values[-1], loss)
            if record.has_diverged():
                record.ended = "diverged"
                break
            taken += 1
            if (taken % every == 0 or taken == len(values)) and not self._measure(state, record):
                break
            if taken == len(values):
                break
        else:
            record.ended = "not a number"  # fp16 found gradients beyond its range at every scale
        return record.curve(plan.seed, purpose)

    def _start_loss(self, seed: int, state: TrainingState) -> float:
        """The slice's loss before the first step: of the same weights in all trials of a seed,
        unless the scalar is one of the model.
        """
        if seed not in self._start_losses or self.scalar.is_of_model:
            self._start_losses[seed] = self.held_out.loss(state.model)
        return self._start_losses[seed]

    def _rates(self, values: np.ndarray, purpose: str) -> tuple[np.ndarray, np.ndarray]:
        """The peak that each step stands for, and its learning rate: [N] each."""
        is_candidate = purpose == "race"
        if self.scalar.is_rate:
            return (np.full(len(values), values.max()) if is_candidate else values), values
        peaks = np.full(len(values), self.plan.recipe.lr.peak)
        return peaks, peaks * (self.rate_shape[: len(values)] if is_candidate else 1.0)

    def _measure(self, state: TrainingState, record: _Record) -> bool:
        """Note the slice's loss after the step just taken, if it is one."""
        loss = self.held_out.loss(state.model)
        if not math.isfinite(loss):
            record.ended = "not a number"
            return False
        record.places.append(len(record.losses) - 1)
        record.held_out.append(loss)
        return True


def _step(state: TrainingState, window: Iterator, step: int) -> tuple[float, bool]:
    """The loss of one optimizer step, and whether the weights were moved: fp16 skips what its scale
    makes infinite.
    """
    before = state.scaler.get_scale() if state.scaler.is_enabled() else 1.0
    loss = optimizer_step(state, window, step).item()
    return loss, not state.scaler.is_enabled() or state.scaler.get_scale() >= before


def curve_to_json(curve: Curve) -> dict[str, Any]:
    """A curve as plain data; Python writes floats so that they read back bit for bit."""
    steps, losses = (part.tolist() for part in curve.held_out)
    facts = asdict(curve) | {"held_out": {"steps": steps, "losses": losses}}
    return facts | {"values": curve.values.tolist(), "losses": curve.losses.tolist()}


def curve_from_json(facts: dict[str, Any]) -> Curve:
    """The curve that `curve_to_json` wrote."""
    held_out = facts["held_out"]
    arrays = {key: np.array(facts[key], dtype=float) for key in ("values", "losses")}
    steps = np.array(held_out["steps"], dtype=np.int64)
    measured = steps, np.array(held_out["losses"], dtype=float)
    return Curve(**{**facts, **arrays, "held_out": measured})


@contextmanager
def untouched(device: str) -> Iterator[None]:
    """Leaves the process as it was: generators of torch, NumPy and Python, torch's threads, default
    type, GPU and cuDNN's choice.
    """
    is_wanted = device != "cpu" and torch.cuda.is_available()
    is_in_use = is_wanted or torch.cuda.is_initialized()
    gpus = list(range(torch.cuda.device_count())) if is_in_use else []
    generators = random.getstate(), np.random.get_state()
    num_threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    current = torch.cuda.current_device() if gpus else None
    try:
        with torch.random.fork_rng(devices=gpus), algorithms_kept():
            yield
    finally:
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_num_threads(num_threads)
        torch.set_default_dtype(dtype)
        if current is not None:
            torch.cuda.set_device(current)
        elif torch.cuda.is_available():
            # not started yet: each seeding was put off for its start, the last of them counts
            torch.cuda.manual_seed_all(torch.initial_seed())
