"""What the curves of a LR finder run say: four rules, the edge, how far seeds agree. Pure NumPy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RULES = ("steepest", "valley", "minimum / 10", "edge / 10")
CURVES = ("train", "heldout", "both")

LEAST_POINTS = 8
LEAST_FALL_SHARE = 0.01  # of the level it falls from: less is no learning
# standard errors of a window's mean: the lowest of many windows of mere noise lies some 3 down
LEAST_FALL_ERRORS = 6.0
LEAST_STEP_SHARE = 0.005  # of the fall: less is no step down a valley, a flat part has none
TURNED_UP_SHARE = 0.1  # of the fall lost again: the edge
# a spike: so many median deviations above the median of so many steps
SPIKE_STEPS, SPIKE_SCATTERS = 5, 6.0


@dataclass(frozen=True)
class Curve:
    """One trial, step by step as really taken: a step that fp16 skipped is not in it.

    values: [n] the ramped scalar as used. losses: [n] training loss in nats, the mean over each
    step's images. held_out: (steps [m] int, places in values; losses [m] in nats): after those
    steps, on the fixed slice of train. start_loss: of the slice before the first step; None without
    a slice. ended: "ramp" (all values were taken), "diverged" or "not a number". seed, purpose
    ("ramp", "probe" or "race"): what was asked for.
    """

    values: np.ndarray
    losses: np.ndarray
    held_out: tuple[np.ndarray, np.ndarray]
    start_loss: float | None
    ended: str
    seed: int
    purpose: str


@dataclass(frozen=True)
class BaselineLosses:
    """The loss of the best constant logits, in nats: what is lost down to it is the bias being
    learned.

    train: under the training targets, mixed and smoothed; held_out: under the slice's. None: there
    is no such level.
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
    """A value that was tried for a short while. losses: its loss after the last step in nats, by
    seed; infinite where it diverged. mean: of them. counted: their mean where none counts for more
    than the level of the Suggestion, by which candidates are compared.
    """

    value: float
    losses: Mapping[int, float]
    mean: float
    counted: float

    @property
    def is_cut(self) -> bool:
        """Does any of its losses count for less than was measured?"""
        return self.counted < self.mean


@dataclass(frozen=True)
class Suggestion:
    """The recommended value and why, in one sentence; value is None where there is no reliable one,
    and why not.

    interval: what each seed's candidates say alone: their median, lowest and highest; None where
    the candidates decide nothing. rules: what each of RULES finds, over seeds; None where most
    seeds find nothing. edge: where the ramp's loss turns up, over seeds. stable, unstable: constant
    values between which a short run begins to grow; None where no probe found it. candidates: what
    was measured of them, values ascending. level_nats: what a candidate that ends higher counts as;
    level_name: what that is in words. curves: every trial, in the order taken. smoothing:
    share of the past in each step of the moving average, by the curve it smoothed.
    """

    value: float | None
    interval: Spread | None
    reason: str
    rules: Mapping[str, Spread | None]
    edge: Spread | None
    stable: float | None
    unstable: float | None
    candidates: tuple[Candidate, ...]
    level_nats: float
    level_name: str
    curves: tuple[Curve, ...]
    smoothing: Mapping[str, float]
    baselines: BaselineLosses


@dataclass(frozen=True)
class Reading:
    """What one seed's curve says. rules: a value by each of RULES, None where it no value. edge:
    the last value before the loss turned up for good, None where it never did. reason: why nothing
    can be read; empty where it can.
    """

    rules: Mapping[str, float | None]
    edge: float | None
    reason: str = ""


def is_even(values: np.ndarray) -> bool:
    """Are the values of a ramp evenly spaced, rather than in equal ratios?"""
    return bool(np.allclose(np.diff(values), (values[-1] - values[0]) / (len(values) - 1)))


def smoothing_for(num_points: int) -> float:
    """The share of the past in each step of the moving average: it spans about a twentieth of the
    curve.
    """
    return max(0.0, 1 - 20 / num_points) if num_points else 0.0


def smoothed(losses: np.ndarray, strength: float) -> np.ndarray:
    """The exponential moving average of losses [n] over both sides of each point, so that it does
    not lag.

    A point d steps away weighs strength ** d, and the weights of each point's neighbours are made
    to add up to 1 (the correction of the bias). strength: in [0, 1); 0 averages nothing. Spikes of
    one or two steps are taken out first, and the explosion at the end is cut at the start's level:
    it would bend all that is near it.
    """
    calm = without_spikes(losses)
    cut = np.minimum(calm, start_of(calm))
    past, future = _decayed(cut, strength), _decayed(cut[::-1], strength)[::-1]
    ones = np.ones(len(cut))
    weights = _decayed(ones, strength) + _decayed(ones, strength)[::-1] - 1
    return (past + future - cut) / weights


def _decayed(losses: np.ndarray, strength: float) -> np.ndarray:
    """The running sums in which what lies d steps back counts strength ** d."""
    sums = itertools.accumulate(losses, lambda total, loss: strength * total + loss)
    return np.fromiter(sums, dtype=float, count=len(losses))


def start_of(losses: np.ndarray) -> float:
    """The level of a ramp's beginning: the median of its first fifth."""
    return float(np.median(losses[: max(SPIKE_STEPS, len(losses) // 5)]))


def without_spikes(losses: np.ndarray) -> np.ndarray:
    """Losses [n] with single high points, far above those around them, brought down to the median
    of SPIKE_STEPS.
    """
    half = SPIKE_STEPS // 2
    if len(losses) <= half:
        return losses
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(losses, half, mode="reflect"), SPIKE_STEPS
    )
    middle = np.median(windows, axis=1)
    scatter = np.median(np.abs(windows - middle[:, None]), axis=1)
    return np.where(losses - middle > SPIKE_SCATTERS * scatter, middle, losses)


def series(curve: Curve, which: str) -> tuple[np.ndarray, np.ndarray]:
    """Values [m] and losses [m] of one of a trial's two curves, "train" or "heldout", as far as
    they are numbers.
    """
    steps, losses = curve.held_out
    if which == "train":
        steps, losses = np.arange(len(curve.losses)), curve.losses
    is_number = np.isfinite(losses)
    return curve.values[steps[is_number]], losses[is_number]


def is_stable(curve: Curve) -> bool:
    """Did a trial of one constant value end no higher than it began?"""
    _steps, held_out = curve.held_out
    if curve.ended != "ramp":
        return False
    if curve.start_loss is not None and len(held_out):
        return bool(held_out[-1] <= curve.start_loss)
    return last_loss(curve) <= curve.losses[0]


def last_loss(curve: Curve) -> float:
    """What a trial ended at: its last held-out loss; without a slice, the median of its last tenth;
    infinite if it diverged.
    """
    if curve.ended != "ramp":
        return math.inf
    held_out, last_tenth = curve.held_out[1], max(1, len(curve.losses) // 10)
    loss = held_out[-1] if len(held_out) else np.median(curve.losses[-last_tenth:])
    return float(loss) if math.isfinite(loss) else math.inf


def read(curve: Curve, baselines: BaselineLosses, which: str) -> Reading:
    """Every rule on a ramp: on its train curve, its heldout curve, or both: the geometric mean of
    what each says.

    No rule looks above the baseline: a fall down to it is the bias being learned. A curve that
    falls to the baseline only and then turns up has an edge, and says nothing else: a short ramp
    may come no further.
    """
    if which == "both":
        return _both(read(curve, baselines, "train"), read(curve, baselines, "heldout"))
    values, losses = series(curve, which)
    if len(losses) < LEAST_POINTS:
        return _nothing(
            f"only {len(losses)} points before the loss was NaN or infinite, not {LEAST_POINTS}"
        )
    strength = smoothing_for(len(losses))
    loss, error = smoothed(losses, strength), _standard_error(losses, strength)
    start, baseline = start_of(loss), baselines.train if which == "train" else baselines.held_out
    level = start if baseline is None else min(start, baseline)
    best = int(np.argmin(loss))
    falls = [above - float(loss[best]) for above in (start, level)]
    from_start, from_level = (
        fall > max(LEAST_FALL_SHARE * abs(level), LEAST_FALL_ERRORS * error) for fall in falls
    )
    if not from_start:
        return _nothing(f"the loss never falls clearly below its start at {start:.4g} nats")
    rise = TURNED_UP_SHARE * (falls[1] if from_level else falls[0])
    edge = _edge(losses, float(loss[best]) + max(rise, 3 * error), best, curve.ended)
    if edge == 0:
        return _nothing("the loss is past its edge from the first step; try a smaller from=")
    if not from_level and edge is None:
        return _nothing(
            f"the loss never falls clearly below the baseline loss of {baseline:.4g} nats, that of"
            " a constant prediction"
        )
    rules = _rules(loss, values, level, falls[1], best) if from_level else dict.fromkeys(RULES)
    at_edge = None if edge is None else float(values[edge])
    return Reading(rules | {"edge / 10": at_edge and at_edge / 10}, at_edge)


def _nothing(reason: str) -> Reading:
    return Reading(dict.fromkeys(RULES), None, reason)


def _rules(
    loss: np.ndarray, values: np.ndarray, level: float, fall: float, best: int
) -> dict[str, float | None]:
    first = int(np.argmax(loss < level))
    return {
        "steepest": float(values[_steepest(loss, values, first, best)]),
        "valley": float(values[_valley(loss / fall, first, best)]),
        "minimum / 10": float(values[best]) / 10,
    }


def _both(train: Reading, held_out: Reading) -> Reading:
    if train.reason or held_out.reason:
        return train if held_out.reason else held_out
    rules = {rule: _mean(train.rules[rule], held_out.rules[rule]) for rule in RULES}
    return Reading(rules, _mean(train.edge, held_out.edge))


def _mean(one: float | None, other: float | None) -> float | None:
    found = [value for value in (one, other) if value is not None]
    return float(np.sqrt(found[0] * found[-1])) if found else None


def _standard_error(losses: np.ndarray, strength: float) -> float:
    """Of a point at an end of the smoothed curve. The noise is that of second differences, which
    hold little of a curve.
    """
    bends = np.diff(losses, 2) / np.sqrt(6)
    scatter = 1.4826 * float(np.median(np.abs(bends)))
    return scatter * float(np.sqrt((1 - strength) / (1 + strength)))


def _edge(losses: np.ndarray, most: float, best: int, ended: str) -> int | None:
    """The last step before the loss rose above `most` and never came back; None where it never
    rose.

    Judged on running medians, which leave a sharp rise where it is; an average would begin to rise
    before it.
    """
    half = max(2, len(losses) // 40)
    around = np.lib.stride_tricks.sliding_window_view(
        np.pad(losses, half, mode="edge"), 2 * half + 1
    )
    above = np.median(around, axis=1) > most
    if above[-1]:
        calm = np.flatnonzero(~above)
        return max(best, int(calm[-1])) if len(calm) else best
    return None if ended == "ramp" else len(losses) - 1


def _steepest(loss: np.ndarray, values: np.ndarray, first: int, best: int) -> int:
    """Where the loss falls fastest with the logarithm of the value, from below the level to the
    lowest.
    """
    if best - first < 2:
        return best
    place = np.log(values) if values[0] > 0 else values
    slope = np.gradient(loss[first : best + 1], place[first : best + 1])
    return first + int(np.argmin(slope))


def _valley(loss: np.ndarray, first: int, best: int) -> int:
    """Two thirds into the longest run of falling points, where those between that rise again are
    left out.

    loss: in units of its whole fall.

    Source: fastai's documentation of its learning-rate finder ("valley").
    """
    points = loss[first : best + 1]
    lengths, before = np.ones(len(points), dtype=int), np.full(len(points), -1)
    for place in range(1, len(points)):
        longer = np.flatnonzero(points[:place] > points[place] + LEAST_STEP_SHARE)
        if len(longer):
            before[place] = longer[np.argmax(lengths[longer])]
            lengths[place] = lengths[before[place]] + 1
    run = [int(np.argmax(lengths))]
    while before[run[-1]] >= 0:
        run.append(int(before[run[-1]]))
    # of its points, not of its length: the few that a flat beginning adds by chance hardly count
    return first + run[round((len(run) - 1) / 3)]


def spread(values: Sequence[float | None]) -> Spread | None:
    """The spread over seeds; None where half of them or more found nothing."""
    found = [value for value in values if value is not None]
    if 2 * len(found) <= len(values):
        return None
    return Spread(float(np.median(found)), min(found), max(found), len(found))
