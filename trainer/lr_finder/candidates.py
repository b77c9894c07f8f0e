"""Short trials that measure what the rules only guess: probes of constant values, and a race of
candidates. Pure.
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
    Reading,
    Spread,
    Suggestion,
    disagreement,
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
APART = 3.0  # neighbouring candidates of the race
PROBED_FROM, PROBED_TO = (
    1 / 16,
    1.5,
)  # of the edge: a ramp over a noise-free bowl turns up late, what shrank must grow back
NEAR_SHARE = 0.1  # of the winner's fall: candidates as near are raced again on other seeds
LEAST_WON_SHARE = 0.01  # of the level: a race that ends no lower has taught nothing


@dataclass(frozen=True)
class Lengths:
    """How long the trials are, and how many there are at most.

    num_ramp_steps: of each seed's ramp. num_probes, num_probe_steps: constant values, on the first
    seed. num_candidates: raced on the first seed; num_repeats: further race trials, of the two best
    on other seeds. num_run_steps: of the run that the value is for; 0 where it is as long as a
    race.
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
        """What a longer run leaves of a learning rate that was best in a race: the square root of
        the lengths' ratio, at least a third.

        The best constant step of stochastic gradient descent falls with the square root of the
        number of steps (Nemirovski et al. 2009, Robust stochastic approximation). On the digits a
        third was measured for a run of nine races; beyond that the law was not: a third of the
        race's best lies about where the old rule has it, a tenth below the edge.
        """
        return (
            min(1.0, max(1 / APART, math.sqrt(self.num_race_steps / self.num_run_steps)))
            if self.num_run_steps
            else 1.0
        )

    @property
    def most_steps(self) -> int:
        """Optimizer steps of the whole LR finder run, where no trial ends early."""
        num_race_trials = self.num_candidates + self.num_repeats
        probes, race = self.num_probes * self.num_probe_steps, num_race_trials * self.num_race_steps
        return self.num_seeds * self.num_ramp_steps + probes + race


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
    held_out = curve.held_out[1]
    loss = (
        held_out[-1]
        if len(held_out)
        else np.median(curve.losses[-max(1, len(curve.losses) // 10) :])
    )
    return float(loss) if math.isfinite(loss) else math.inf


class CandidateGrid:
    """The values that may be raced: values down from the ramp's last value, two values to a factor
    of APART.

    They depend on the ramp alone, so that a spike in a curve does not move them. On an evenly
    spaced ramp the values are evenly spaced too, sixteen of them.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.top, self.bottom = float(values[-1]), float(values[0])
        self._is_even = bool(
            np.allclose(np.diff(values), (values[-1] - values[0]) / (len(values) - 1))
        )

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

    unstable: no value from here up is raced. losses: by index, by seed.
    """

    trial: Trial
    seeds: Sequence[int]
    grid: CandidateGrid
    lengths: Lengths
    shape: np.ndarray
    unstable: float | None
    losses: dict[int, dict[int, float]] = field(default_factory=dict)
    start_loss: float | None = None

    def run(self, middle: float) -> None:
        """Climb from the middle to a candidate that both neighbours lose against; look half-way;
        repeat the best two.
        """
        start = self.grid.nearest(middle)
        while not self._may(start) and self.grid.has(start + 2):
            start += 2
        self._race(start)
        if not self.losses:
            return
        while any(self._race(self._winner() + side) for side in (-2, 2)):
            pass
        if (
            self.lengths.horizon_share == 1
        ):  # a share of the winner is a guess of less precision than half a step
            beside = sorted((self._loss(self._winner() + side), side) for side in (-2, 2))
            self._race(self._winner() + beside[0][1] // 2)
        self._repeat_best()

    def _may(self, index: int) -> bool:
        return self.grid.has(index) and (
            self.unstable is None or self.grid.at(index) < self.unstable
        )

    def _race(self, index: int) -> bool:
        """CandidateSearch a index on the first seed, unless it was, may not be, or none is left;
        was it raced now?
        """
        if (
            index in self.losses
            or not self._may(index)
            or len(self.losses) >= self.lengths.num_candidates
        ):
            return False
        self._measure(index, self.seeds[0])
        return True

    def _measure(self, index: int, seed: int) -> None:
        curve = self.trial(seed, self.grid.at(index) * self.shape, "race")
        if self.start_loss is None:
            self.start_loss = (
                start_of(curve.losses) if curve.start_loss is None else curve.start_loss
            )
        self.losses.setdefault(index, {})[seed] = last_loss(curve)

    def _loss(self, index: int) -> float:
        return self.losses.get(index, {}).get(self.seeds[0], math.inf)

    def _winner(self) -> int:
        return min(self.losses, key=lambda index: (self._loss(index), -index))

    def _repeat_best(self) -> None:
        """CandidateSearch the best two on other seeds, where they are near each other."""
        ordered = sorted(self.losses, key=lambda index: (self._loss(index), -index))[:2]
        if len(ordered) < 2 or not math.isfinite(self._loss(ordered[1])):
            return
        near = NEAR_SHARE * max(self.start_loss - self._loss(ordered[0]), 0.0)
        if self._loss(ordered[1]) - self._loss(ordered[0]) > near:
            return
        for seed in self.seeds[1 : 1 + self.lengths.num_repeats // 2]:
            for index in ordered:
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
        level = min(
            self.start_loss, self.start_loss if baselines.held_out is None else baselines.held_out
        )
        if not level - self._loss(best) > LEAST_WON_SHARE * abs(level):
            return (
                None,
                f"no candidate ends clearly below {level:.4g} nats after {len(self.shape)} steps",
            )
        for towards, side in (("larger", -1), ("smaller", 1)):
            if any(side * index > side * best for index in self.losses):
                continue
            if self._may(best + 2 * side):
                return (
                    None,
                    (
                        f"the loss still improves towards {towards} values after {len(self.losses)}"
                        " candidates"
                    ),
                )
            if not self.grid.has(best + 2 * side):
                end = "larger to=" if side < 0 else "smaller from="
                return None, f"the best candidate lies at the end of the range; try a {end}"
        winner = self._settled(best)
        value, count = self.grid.at(winner), len(self.losses[winner])
        seeds = f", {count} seeds" if count > 1 else ""
        return (
            value,
            (
                f"{value:.3g} has the lowest loss of {len(self.losses)} candidates, each trained"
                f" for {len(self.shape)} steps{seeds}"
            ),
        )

    def _settled(self, best: int) -> int:
        """The better of the best two over the seeds that both were raced on; the smaller where
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
    race_shape: np.ndarray,
    curve: str = "both",
    is_rate: bool = True,
) -> Suggestion:
    """The whole decision: every trial it needs, then one value or the reason why there is none.

    values: [num_ramp_steps] ascending, all above 0 unless they are evenly spaced. race_shape:
    [num_race_steps] shares in [0, 1] of the candidate at each step of the race: the recipe's own
    schedule shrunk to so many steps; ones for a scalar that has no schedule. curve: which of CURVES
    the rules read; the race is judged on the held-out loss where there is one. is_rate: the values
    are learning rates, of which a long run takes smaller ones than a short race.
    """
    curves: list[Curve] = []

    def recorded(seed: int, given: np.ndarray, purpose: str) -> Curve:
        curves.append(trial(seed, given, purpose))
        return curves[-1]

    ramps = [recorded(seed, values, "ramp") for seed in seeds]
    readings = [read(ramp, baselines, curve) for ramp in ramps]
    found = _Decision(
        {rule: spread([reading.rules[rule] for reading in readings]) for rule in RULES},
        _edge(readings),
    )
    why_not, grid = trouble(readings), CandidateGrid(values)
    if found.edge:
        found.stable, found.unstable = probe(recorded, seeds[0], grid, found.edge.median, lengths)
    if not why_not:
        race = CandidateSearch(recorded, seeds, grid, lengths, race_shape, found.unstable)
        race.run(_middle(found.rules))
        found.candidates = race.candidates()
        found.value, found.reason = race.result(baselines)
        found.fit_to_run(lengths.horizon_share if is_rate else 1.0, lengths)
        why_not = (
            disagreement(found.value, found.rules, found.edge.median)
            if found.value
            else found.reason
        )
    strengths = {
        which: smoothing_for(len(series(ramps[0], which)[1])) for which in ("train", "heldout")
    }
    return Suggestion(
        value=None if why_not else found.value,
        reason=(
            f"no reliable suggestion: {why_not}"
            if why_not
            else f"{found.reason}; a ramp's loss turns up at {found.edge.median:.3g}"
        ),
        rules=found.rules,
        edge=found.edge,
        stable=found.stable,
        unstable=found.unstable,
        candidates=found.candidates,
        curves=tuple(curves),
        smoothing=strengths,
        baselines=baselines,
    )


@dataclass
class _Decision:
    rules: Mapping[str, Spread | None]
    edge: Spread | None
    stable: float | None = None
    unstable: float | None = None
    value: float | None = None
    reason: str = ""
    candidates: tuple[Candidate, ...] = ()

    def fit_to_run(self, share: float, lengths: Lengths) -> None:
        """Take a share of the race's best, for a run that is longer."""
        if self.value and share < 1:
            fitting = self.value * share
            # where it was raced too it is that very number
            self.value = next(
                (one.value for one in self.candidates if np.isclose(one.value, fitting, rtol=1e-9)),
                fitting,
            )
            self.reason += f", and {share:.2g} of it suits a run of {lengths.num_run_steps}"


def _edge(readings: Sequence[Reading]) -> Spread | None:
    return spread([reading.edge for reading in readings])


def _middle(rules: Mapping[str, Spread | None]) -> float:
    return float(np.median([found.median for found in rules.values() if found]))
