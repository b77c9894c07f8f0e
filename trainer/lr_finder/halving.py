"""Short trials that measure what the rules only guess: probes of constant values, and a race of candidates. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from trainer.lr_finder.rules import Candidate, Curve, Floors, start_of

# trial(seed, values [N], purpose): from the seed's initial weights one optimizer step with each value, in order
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

    num_ramp_steps: of each seed's ramp. num_probes, num_probe_steps: constant values, on the first seed.
    num_candidates: raced on the first seed; num_repeats: further race trials, of the two best on other seeds.
    num_run_steps: of the run that the value is for; 0 where it is as long as a race.
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
        """What a longer run leaves of a learning rate that was best in a race: the square root of the lengths' ratio, at least a third.

        The best constant step of stochastic gradient descent falls with the square root of the number of steps (Nemirovski
        et al. 2009, Robust stochastic approximation). On the digits a third was measured for a run of nine races; beyond
        that the law was not: a third of the race's best lies about where the old rule has it, a tenth below the edge.
        """
        return (
            min(1.0, max(1 / APART, math.sqrt(self.num_race_steps / self.num_run_steps)))
            if self.num_run_steps
            else 1.0
        )

    @property
    def most_steps(self) -> int:
        """Optimizer steps of the whole range test, where no trial ends early."""
        num_race_trials = self.num_candidates + self.num_repeats
        probes, race = self.num_probes * self.num_probe_steps, num_race_trials * self.num_race_steps
        return self.num_seeds * self.num_ramp_steps + probes + race


def probe(
    trial: Trial, seed: int, ladder: Ladder, edge: float, lengths: Lengths
) -> tuple[float | None, float | None]:
    """The largest constant value found stable and the smallest found unstable, by bisection around the edge.

    None: no probe was so. On a quadratic bowl they close in on 2 / its largest curvature.
    """
    low, high = max(ladder.bottom, edge * PROBED_FROM), min(ladder.top, edge * PROBED_TO)
    stable = unstable = None
    for _ in range(lengths.num_probes):
        middle = ladder.between(low, high)
        if is_stable(trial(seed, np.full(lengths.num_probe_steps, middle), "probe")):
            low = stable = middle
        else:
            high = unstable = middle
    return stable, unstable


def is_stable(curve: Curve) -> bool:
    """Did a trial of one constant value end no higher than it began?"""
    steps, held_out = curve.held_out
    if curve.ended != "ramp":
        return False
    if curve.start_loss is not None and len(held_out):
        return bool(held_out[-1] <= curve.start_loss)
    return last_loss(curve) <= curve.losses[0]


def last_loss(curve: Curve) -> float:
    """What a trial ended at: its last held-out loss; without a slice, the median of its last tenth; infinite if it broke off."""
    if curve.ended != "ramp":
        return math.inf
    held_out = curve.held_out[1]
    loss = (
        held_out[-1]
        if len(held_out)
        else np.median(curve.losses[-max(1, len(curve.losses) // 10) :])
    )
    return float(loss) if math.isfinite(loss) else math.inf


class Ladder:
    """The values that may be raced: rungs down from the ramp's last value, two rungs to a factor of APART.

    They depend on the ramp alone, so that a spike in a curve does not move them. On an evenly spaced ramp the rungs are
    evenly spaced too, sixteen of them.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.top, self.bottom = float(values[-1]), float(values[0])
        self._is_even = bool(
            np.allclose(np.diff(values), (values[-1] - values[0]) / (len(values) - 1))
        )

    def at(self, rung: int) -> float:
        if self._is_even:
            return self.top - rung * (self.top - self.bottom) / 16
        return self.top * APART ** (-rung / 2)

    def has(self, rung: int) -> bool:
        return rung >= 0 and self.at(rung) >= self.bottom * (1 - 1e-9)

    def between(self, low: float, high: float) -> float:
        """The middle of two values, as the ramp is spaced."""
        return (low + high) / 2 if self._is_even else math.sqrt(low * high)

    def nearest(self, value: float) -> int:
        """The even rung nearest to a value."""
        if self._is_even:
            return 2 * round(8 * (self.top - value) / (self.top - self.bottom))
        return 2 * round(math.log(self.top / value, APART))


@dataclass
class Race:
    """Candidates trained for a short while by the recipe's own schedule; the lowest last loss wins.

    unstable: no value from here up is raced. losses: by rung, by seed.
    """

    trial: Trial
    seeds: Sequence[int]
    ladder: Ladder
    lengths: Lengths
    shape: np.ndarray
    unstable: float | None
    losses: dict[int, dict[int, float]] = field(default_factory=dict)
    start_loss: float | None = None

    def run(self, middle: float) -> None:
        """Climb from the middle to a candidate that both neighbours lose against; look half-way; repeat the best two."""
        start = self.ladder.nearest(middle)
        while not self._may(start) and self.ladder.has(start + 2):
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

    def _may(self, rung: int) -> bool:
        return self.ladder.has(rung) and (
            self.unstable is None or self.ladder.at(rung) < self.unstable
        )

    def _race(self, rung: int) -> bool:
        """Race a rung on the first seed, unless it was, may not be, or none is left; was it raced now?"""
        if (
            rung in self.losses
            or not self._may(rung)
            or len(self.losses) >= self.lengths.num_candidates
        ):
            return False
        self._measure(rung, self.seeds[0])
        return True

    def _measure(self, rung: int, seed: int) -> None:
        curve = self.trial(seed, self.ladder.at(rung) * self.shape, "race")
        if self.start_loss is None:
            self.start_loss = (
                start_of(curve.losses) if curve.start_loss is None else curve.start_loss
            )
        self.losses.setdefault(rung, {})[seed] = last_loss(curve)

    def _loss(self, rung: int) -> float:
        return self.losses.get(rung, {}).get(self.seeds[0], math.inf)

    def _winner(self) -> int:
        return min(self.losses, key=lambda rung: (self._loss(rung), -rung))

    def _repeat_best(self) -> None:
        """Race the best two on other seeds, where they are near each other."""
        ordered = sorted(self.losses, key=lambda rung: (self._loss(rung), -rung))[:2]
        if len(ordered) < 2 or not math.isfinite(self._loss(ordered[1])):
            return
        near = NEAR_SHARE * max(self.start_loss - self._loss(ordered[0]), 0.0)
        if self._loss(ordered[1]) - self._loss(ordered[0]) > near:
            return
        for seed in self.seeds[1 : 1 + self.lengths.num_repeats // 2]:
            for rung in ordered:
                self._measure(rung, seed)

    def candidates(self) -> tuple[Candidate, ...]:
        """What was measured, values ascending."""
        return tuple(
            Candidate(self.ladder.at(rung), dict(self.losses[rung]))
            for rung in sorted(self.losses, reverse=True)
        )

    def result(self, floors: Floors) -> tuple[float | None, str]:
        """The winner and why; or None, and why none."""
        if not self.losses:
            return None, "no candidate lies below the values that are unstable; try a smaller from="
        best = self._winner()
        level = min(
            self.start_loss, self.start_loss if floors.held_out is None else floors.held_out
        )
        if not level - self._loss(best) > LEAST_WON_SHARE * abs(level):
            return (
                None,
                f"no candidate of the race ends clearly below {level:.4g} nats after {len(self.shape)} steps",
            )
        for towards, side in (("larger", -1), ("smaller", 1)):
            if any(side * rung > side * best for rung in self.losses):
                continue
            if self._may(best + 2 * side):
                return (
                    None,
                    f"the race still improves towards {towards} values after {len(self.losses)} of them",
                )
            if not self.ladder.has(best + 2 * side):
                end = "larger to=" if side < 0 else "smaller from="
                return None, f"the race still improves at the end of the ramp; try a {end}"
        winner = self._settled(best)
        value, count = self.ladder.at(winner), len(self.losses[winner])
        seeds = f", {count} seeds" if count > 1 else ""
        return (
            value,
            f"{value:.3g} has the lowest loss of {len(self.losses)} values raced for {len(self.shape)} steps{seeds}",
        )

    def _settled(self, best: int) -> int:
        """The better of the best two over the seeds that both were raced on; the smaller where seeds disagree."""
        repeated = [rung for rung, losses in self.losses.items() if len(losses) > 1]
        if len(repeated) < 2:
            return best
        small, large = max(repeated), min(repeated)
        gains = [self.losses[small][seed] - self.losses[large][seed] for seed in self.losses[small]]
        error = float(np.std(gains, ddof=1)) / math.sqrt(len(gains))
        return large if float(np.mean(gains)) > error else small
