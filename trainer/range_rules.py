"""What the curves of a range test say: four rules, the edge, how far seeds agree. Pure NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

RULES = ("steepest", "valley", "minimum / 10", "edge / 10")
OF_THE_FALL, OF_THE_RISE = RULES[:2], RULES[2:]
CURVES = ("train", "heldout", "both")

MOST_DISAGREEMENT = 3.0  # between seeds, and between the rules of the fall and of the rise: beyond it there is no suggestion
LEAST_POINTS = 8
LEAST_FALL_SHARE = 0.01  # of the level it falls from: less is no learning
LEAST_FALL_ERRORS = 6.0  # standard errors of a window's mean: the lowest of many windows of mere noise lies some 3 down
TURNED_UP_SHARE = 0.1  # of the fall lost again: the edge
SPIKE_STEPS = 5  # a median over as many steps takes out what lasts two of them


@dataclass(frozen=True)
class Curve:
    """One trial, step by step as really taken: a step that fp16 skipped is not in it.

    values: [n] the ramped scalar as used. losses: [n] training loss in nats, the mean over each step's images.
    held_out: (steps [m] int, places in values; losses [m] in nats): after those steps, on the fixed slice of train.
    start_loss: of the slice before the first step; None without a slice. ended: "ramp" (all values were taken),
    "diverged" or "not a number". seed, purpose ("ramp", "probe" or "race"): what was asked for.
    """

    values: np.ndarray
    losses: np.ndarray
    held_out: tuple[np.ndarray, np.ndarray]
    start_loss: float | None
    ended: str
    seed: int
    purpose: str


@dataclass(frozen=True)
class Floors:
    """The loss of the best constant logits, in nats: what is lost down to it is the bias being learned.

    train: under the training targets, mixed and smoothed; held_out: under the slice's. None: there is no such level.
    """

    train: float | None = None
    held_out: float | None = None


@dataclass(frozen=True)
class Spread:
    """The median, lowest and highest value over seeds; num_seeds of them found one."""

    median: float
    lowest: float
    highest: float
    num_seeds: int


@dataclass(frozen=True)
class Candidate:
    """A value that was raced. losses: its loss after the last step in nats, by seed; infinite where it diverged."""

    value: float
    losses: Mapping[int, float]


@dataclass(frozen=True)
class Suggestion:
    """The recommended value and why, in one sentence; value is None where there is no reliable one, and why not.

    rules: what each of RULES finds, over seeds; None where most seeds find nothing. edge: where the ramp's loss turns
    up, over seeds. stable, unstable: constant values between which a short run begins to grow; None where no probe
    found it. candidates: what the race measured, values ascending. curves: every trial, in the order taken.
    smoothing: share of the past in each step of the moving average, by the curve it smoothed.
    """

    value: float | None
    reason: str
    rules: Mapping[str, Spread | None]
    edge: Spread | None
    stable: float | None
    unstable: float | None
    candidates: tuple[Candidate, ...]
    curves: tuple[Curve, ...]
    smoothing: Mapping[str, float]
    floors: Floors
