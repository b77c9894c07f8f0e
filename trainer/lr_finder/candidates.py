"""Short trials that measure what the rules only guess: probes of constant values, and successive
halving of candidates. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trainer.lr_finder.rules import (
    RULES,
    BaselineLosses,
    Candidate,
    Curve,
    Spread,
    Suggestion,
    disagreement,
    is_even,
    read,
    series,
    smoothing_for,
    spread,
    start_of,
    trouble,
)

# trial(seed, values [N], purpose): from the seed's initial weights one optimizer step with each
# value, in order
Trial = Callable[[int, np.ndarray, str], Curve]
APART = 3.0  # neighbouring candidates
# of the edge: a ramp over a noise-free bowl turns up late, what shrank must grow back
PROBED_FROM, PROBED_TO = 1 / 16, 1.5
NEAR_SHARE = 0.1  # of the best one's fall: candidates as near are tried again on other seeds
LEAST_WON_SHARE = 0.01  # of the level: candidates that end no lower have taught nothing


@dataclass(frozen=True)
class Lengths:
    """How long the trials are, and how many there are at most.

    num_ramp_steps: of each seed's ramp. num_probes, num_probe_steps: constant values, on the first
    seed. num_candidates: tried on the first seed; num_repeats: further trials, of the two best on
    other seeds; num_race_steps: of each of these. num_run_steps: of the run that the value is for;
    0 where it is as long as a candidate's trial.
    """

    num_seeds: int
    num_ramp_steps: int
    num_probes: int
    num_probe_steps: int
    num_candidates: int
    num_repeats: int
    num_race_steps: int
    num_run_steps: int = 0

    @property
    def horizon_share(self) -> float:
        """What a longer run leaves of a learning rate that was best in short trials: the square
        root of the lengths' ratio, at least a third.

        The best constant step of stochastic gradient descent falls with the square root of the
        number of steps (Nemirovski et al. 2009, Robust stochastic approximation). On the digits a
        third was measured for a run of nine trials' length; beyond that the law was not: a third of
        the best candidate lies about where the old rule has it, a tenth below the edge.
        """
        if not self.num_run_steps:
            return 1.0
        return min(1.0, max(1 / APART, math.sqrt(self.num_race_steps / self.num_run_steps)))

    @property
    def most_steps(self) -> int:
        """Optimizer steps of the whole LR finder run, where no trial ends early."""
        ramps, probes = self.num_seeds * self.num_ramp_steps, self.num_probes * self.num_probe_steps
        return ramps + probes + (self.num_candidates + self.num_repeats) * self.num_race_steps


def probe(
    trial: Trial, seed: int, grid: CandidateGrid, edge: float, lengths: Lengths
) -> tuple[float | None, float | None]:
    """The largest constant value found stable and the smallest found unstable, by bisection around
    the edge.

    None: no probe was so. On a quadratic bowl they close in on 2 / its largest curvature.
    """
    low, high = max(grid.bottom, edge * PROBED_FROM), min(grid.top, edge * PROBED_TO)
    stable = unstable = None
    for _ in range(lengths.num_probes):
        middle = grid.between(low, high)
        if is_stable(trial(seed, np.full(lengths.num_probe_steps, middle), "probe")):
            low = stable = middle
        else:
            high = unstable = middle
    return stable, unstable


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


class CandidateGrid:
    """The values that may be candidates: from the ramp's last value down, two to a factor of APART.

    They depend on the ramp alone, so that a spike in a curve does not move them. On an evenly
    spaced ramp the values are evenly spaced too, sixteen of them.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.top, self.bottom = float(values[-1]), float(values[0])
        self._is_even = is_even(values)

    def at(self, index: int) -> float:
        if self._is_even:
            return self.top - index * (self.top - self.bottom) / 16
        return self.top * APART ** (-index / 2)

    def has(self, index: int) -> bool:
        return index >= 0 and self.at(index) >= self.bottom * (1 - 1e-9)

    def between(self, low: float, high: float) -> float:
        """The middle of two values, as the ramp is spaced."""
        return (low + high) / 2 if self._is_even else math.sqrt(low * high)

    def nearest(self, value: float) -> int:
        """The even index nearest to a value."""
        if self._is_even:
            return 2 * round(8 * (self.top - value) / (self.top - self.bottom))
        return 2 * round(math.log(self.top / value, APART))


@dataclass
class CandidateSearch:
    """Candidates trained for a short while by the recipe's own schedule; the lowest last loss wins.

    The best two are kept and tried on further seeds (successive halving). unstable: no value from
    here up is tried. losses: by index, by seed.
    """

    trial: Trial
    seeds: Sequence[int]
    grid: CandidateGrid
    lengths: Lengths
    shape: np.ndarray
    unstable: float | None
    losses: dict[int, dict[int, float]] = field(default_factory=dict)
    start_loss: float = math.nan  # of the first candidate's trial

    def run(self, middle: float) -> None:
        """Climb from the middle to a candidate that both neighbours lose against; look half-way;
        repeat the best two.
        """
        start = self.grid.nearest(middle)
        while not self._may(start) and self.grid.has(start + 2):
            start += 2
        self._try(start)
        if not self.losses:
            return
        while any(self._try(self._winner() + side) for side in (-2, 2)):
            pass
        # a share of the winner is a guess of less precision than half a step
        if self.lengths.horizon_share == 1:
            beside = min((self._loss(self._winner() + side), side) for side in (-2, 2))
            self._try(self._winner() + beside[1] // 2)
        self._repeat_best()

    def _may(self, index: int) -> bool:
        return self.grid.has(index) and (
            self.unstable is None or self.grid.at(index) < self.unstable
        )

    def _try(self, index: int) -> bool:
        """Try a candidate on the first seed, unless it was, may not be, or none is left; was it
        tried now?
        """
        is_last = len(self.losses) >= self.lengths.num_candidates
        if index in self.losses or is_last or not self._may(index):
            return False
        self._measure(index, self.seeds[0])
        return True

    def _measure(self, index: int, seed: int) -> None:
        curve = self.trial(seed, self.grid.at(index) * self.shape, "race")
        if not self.losses:
            given = curve.start_loss
            self.start_loss = start_of(curve.losses) if given is None else given
        self.losses.setdefault(index, {})[seed] = last_loss(curve)

    def _loss(self, index: int) -> float:
        return self.losses.get(index, {}).get(self.seeds[0], math.inf)

    def _best(self) -> list[int]:
        """Indices, the lowest loss on the first seed first; of equal ones the smaller value."""
        return sorted(self.losses, key=lambda index: (self._loss(index), -index))

    def _winner(self) -> int:
        return self._best()[0]

    def _repeat_best(self) -> None:
        """Try the best two on other seeds, where they are near each other."""
        best = self._best()[:2]
        if len(best) < 2 or not math.isfinite(self._loss(best[1])):
            return
        near = NEAR_SHARE * max(self.start_loss - self._loss(best[0]), 0.0)
        if self._loss(best[1]) - self._loss(best[0]) > near:
            return
        for seed in self.seeds[1 : 1 + self.lengths.num_repeats // 2]:
            for index in best:
                self._measure(index, seed)

    def candidates(self) -> tuple[Candidate, ...]:
        """What was measured, values ascending."""
        return tuple(
            Candidate(self.grid.at(index), dict(self.losses[index]))
            for index in sorted(self.losses, reverse=True)
        )

    def result(self, baselines: BaselineLosses) -> tuple[float | None, str]:
        """The winner and why; or None, and why none."""
        if not self.losses:
            return None, "no candidate lies below the values that are unstable; try a smaller from="
        best = self._winner()
        level, count = self.start_loss, len(self.losses)
        if baselines.held_out is not None:
            level = min(level, baselines.held_out)
        length = f"{len(self.shape)} steps"
        if not level - self._loss(best) > LEAST_WON_SHARE * abs(level):
            return None, f"no candidate ends clearly below {level:.4g} nats after {length}"
        for towards, end, side in (("larger", "larger to=", -1), ("smaller", "smaller from=", 1)):
            if any(side * index > side * best for index in self.losses):
                continue
            if self._may(best + 2 * side):
                return (
                    None,
                    f"the loss still improves towards {towards} values after {count} candidates",
                )
            if not self.grid.has(best + 2 * side):
                return None, f"the best candidate lies at the end of the range; try a {end}"
        winner = self._settled(best)
        value, num_seeds = self.grid.at(winner), len(self.losses[winner])
        seeds = f", {num_seeds} seeds" if num_seeds > 1 else ""
        reason = f"{value:.3g} has the lowest loss of {count} candidates, each trained for {length}"
        return value, f"{reason}{seeds}"

    def _settled(self, best: int) -> int:
        """The better of the best two over the seeds that both were tried on; the smaller where
        seeds disagree.
        """
        repeated = [index for index, losses in self.losses.items() if len(losses) > 1]
        if len(repeated) < 2:
            return best
        small, large = max(repeated), min(repeated)
        gains = [self.losses[small][seed] - self.losses[large][seed] for seed in self.losses[small]]
        error = float(np.std(gains, ddof=1)) / math.sqrt(len(gains))
        return large if float(np.mean(gains)) > error else small


def lengths_for(
    num_run_steps: int, num_seeds: int = 3, num_ramp_steps: int | None = None
) -> Lengths:
    """The lengths for a run of num_run_steps: 200 steps a ramp on large data, fewer where the run
    itself is short.

    num_ramp_steps: asked for in place of that number; all other lengths follow it.
    """
    steps = num_ramp_steps or min(200, max(40, num_run_steps // 9))
    return Lengths(
        num_seeds=num_seeds,
        num_ramp_steps=steps,
        num_probes=6 if steps >= 100 else 2,
        num_probe_steps=min(30, max(12, steps // 4)),
        num_candidates=6 if steps >= 100 else 5,
        num_repeats=2 * min(num_seeds - 1, 2 if steps >= 100 else 1),
        num_race_steps=steps,
        num_run_steps=num_run_steps,
    )


def decide(
    trial: Trial,
    seeds: Sequence[int],
    values: np.ndarray,
    baselines: BaselineLosses,
    lengths: Lengths,
    shape: np.ndarray,
    curve: str = "both",
    is_rate: bool = True,
) -> Suggestion:
    """The whole decision: every trial it needs, then one value or the reason why there is none.

    values: [num_ramp_steps] ascending, all above 0 unless they are evenly spaced. shape:
    [num_race_steps] shares in [0, 1] of a candidate at each step of its trial: the recipe's own
    schedule shrunk to so many steps; ones for a scalar that has no schedule. curve: which of CURVES
    the rules read; candidates are judged on the held-out loss where there is one. is_rate: the
    values are learning rates, of which a long run takes smaller ones than a short trial.
    """
    curves: list[Curve] = []

    def recorded(seed: int, given: np.ndarray, purpose: str) -> Curve:
        curves.append(trial(seed, given, purpose))
        return curves[-1]

    ramps = [recorded(seed, values, "ramp") for seed in seeds]
    readings = [read(ramp, baselines, curve) for ramp in ramps]
    rules = {rule: spread([reading.rules[rule] for reading in readings]) for rule in RULES}
    edge, grid = spread([reading.edge for reading in readings]), CandidateGrid(values)
    stable = unstable = value = None
    candidates: tuple[Candidate, ...] = ()
    if edge:
        stable, unstable = probe(recorded, seeds[0], grid, edge.median, lengths)
    reason = trouble(readings)
    if edge and not reason:
        search = CandidateSearch(recorded, seeds, grid, lengths, shape, unstable)
        search.run(float(np.median([found.median for found in rules.values() if found])))
        candidates = search.candidates()
        value, reason = search.result(baselines)
        if is_rate:
            value, reason = _for_the_run(value, reason, candidates, lengths)
        value, reason = _checked(value, reason, rules, edge)
    return Suggestion(
        value=value,
        reason=reason if value is not None else f"no reliable suggestion: {reason}",
        rules=rules,
        edge=edge,
        stable=stable,
        unstable=unstable,
        candidates=candidates,
        curves=tuple(curves),
        smoothing={
            which: smoothing_for(len(series(ramps[0], which)[1])) for which in ("train", "heldout")
        },
        baselines=baselines,
    )


def _for_the_run(
    value: float | None, reason: str, candidates: Sequence[Candidate], lengths: Lengths
) -> tuple[float | None, str]:
    """A share of the best candidate, for a run that is longer than its trial."""
    share = lengths.horizon_share
    if value is None or share == 1:
        return value, reason
    fitting = value * share
    # where it was tried too it is that very number
    same = (one.value for one in candidates if np.isclose(one.value, fitting, rtol=1e-9))
    reason += f", and {share:.2g} of it suits a run of {lengths.num_run_steps}"
    return next(same, fitting), reason


def _checked(
    value: float | None, reason: str, rules: Mapping[str, Spread | None], edge: Spread
) -> tuple[float | None, str]:
    """No value where all rules disagree with it."""
    if value is None:
        return None, reason
    why_not = disagreement(value, rules, edge.median)
    if why_not:
        return None, why_not
    return value, f"{reason}; a ramp's loss turns up at {edge.median:.3g}"
