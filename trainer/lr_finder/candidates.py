"""Short trials that measure what the rules only guess: probes of constant values, and candidates
that every seed trains. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from trainer.lr_finder.rules import (
    RULES,
    BaselineLosses,
    Candidate,
    Curve,
    Spread,
    Suggestion,
    is_even,
    is_stable,
    last_loss,
    read,
    series,
    smoothing_for,
    spread,
    start_of,
)

# trial(seed, values [N], purpose): from the seed's initial weights one optimizer step with each
# value, in order
Trial = Callable[[int, np.ndarray, str], Curve]
APART = 3.0  # neighbouring candidates
# of the edge: a ramp over a noise-free bowl turns up late, what shrank must grow back
PROBED_FROM, PROBED_TO = 1 / 16, 1.5
# candidates' steps between what single seeds find: beyond it there is no suggestion
MOST_STEPS_APART = 1.0
# of the mean of what single seeds find, in those steps: two answers of 0.13 differ by more than a
# factor of 1.5 once in twenty times; beyond it there is another seed
MOST_ERROR_STEPS = 0.13
LEAST_WON_SHARE = 0.01  # of the level: candidates that end no lower have taught nothing
LEAST_WON_ERRORS = 2.0  # standard errors, over seeds, of what is won below the level
CONSTANT_LEVEL = "the loss of the best constant prediction"
_START_LEVEL = "the loss before the first step"


@dataclass(frozen=True)
class Lengths:
    """How long the trials are, and how many there are at most.

    num_ramp_steps: of each ramp. num_probes, num_probe_steps: constant values, on the first seed.
    num_candidates: tried on the first seed; num_repeats: further trials, of the best and its
    neighbours on other seeds; num_race_steps: of each of these. num_run_steps: of the run that the
    value is for; 0 where it is as long as a candidate's trial. num_more_seeds: that are tried too
    where the first ones do not agree.
    """

    num_seeds: int
    num_ramp_steps: int
    num_probes: int
    num_probe_steps: int
    num_candidates: int
    num_repeats: int
    num_race_steps: int
    num_run_steps: int = 0
    num_more_seeds: int = 0

    @property
    def num_ramps(self) -> int:
        """Ramps only say where candidates begin: two are enough to see how far they are apart."""
        return min(2, self.num_seeds)

    @property
    def horizon_share(self) -> float:
        """What a longer run leaves of a learning rate that was best in short trials: the cube root
        of the lengths' ratio, at least a third.

        The best constant step of stochastic gradient descent falls with the square root of the
        number of steps where noise is all that matters (Nemirovski et al. 2009, Robust stochastic
        approximation), and not at all where there is none. A cube root lies between: 0.48 for
        runs of nine trials' length. On the digits such runs had their best rate at 0.49 of the
        trials' when it was chosen, and at 0.93 once three seeds were run (results/lr-find.md).
        Longer runs were not measured, so the share falls no further than to a third.
        """
        if not self.num_run_steps:
            return 1.0
        return min(1.0, max(1 / APART, (self.num_race_steps / self.num_run_steps) ** (1 / 3)))

    @property
    def most_steps(self) -> int:
        """Optimizer steps of the whole LR finder run, where no trial ends early."""
        ramps, probes = self.num_ramps * self.num_ramp_steps, self.num_probes * self.num_probe_steps
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


class CandidateGrid:
    """The values that may be candidates: from the ramp's last value down, two to a factor of APART.

    They depend on the ramp alone, so that a spike in a curve does not move them. On an evenly
    spaced ramp the values are evenly spaced too, sixteen of them.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.top, self.bottom = float(values[-1]), float(values[0])
        self._is_even = is_even(values)

    def at(self, index: float) -> float:
        """The value at an index, the highest at 0; between two for a fraction."""
        if self._is_even:
            return self.top - index * (self.top - self.bottom) / 16
        return self.top * APART ** (-index / 2)

    def has(self, index: int) -> bool:
        """Is there a value at this index?"""
        return index >= 0 and self.at(index) >= self.bottom * (1 - 1e-9)

    def between(self, low: float, high: float) -> float:
        """The middle of two values, as the ramp is spaced."""
        return (low + high) / 2 if self._is_even else math.sqrt(low * high)

    def place(self, value: float) -> float:
        """The index, with fractions, of a value."""
        if self._is_even:
            return 16 * (self.top - value) / (self.top - self.bottom)
        return 2 * math.log(self.top / value, APART)

    def nearest(self, value: float) -> int:
        """The even index nearest to a value."""
        return 2 * round(self.place(value) / 2)


@dataclass
class CandidateSearch:
    """Candidates trained for a short while by the recipe's own schedule.

    The first seed climbs to a candidate that both neighbours lose against; these three are then
    trained on every other seed, and on more where these do not agree. The answer is where a
    parabola through their mean losses is lowest. level: the loss of knowing nothing, or that before
    the first step where it is lower; what ends higher, or diverged, counts as that. level_name: the
    same in words. obstacle: what keeps candidates from learning, with its remedy; empty where
    longer trials may help. losses: by index, by seed.
    """

    trial: Trial
    seeds: Sequence[int]
    grid: CandidateGrid
    lengths: Lengths
    shape: np.ndarray
    level: float
    level_name: str = CONSTANT_LEVEL
    obstacle: str = ""
    losses: dict[int, dict[int, float]] = field(default_factory=dict)
    num_seeds: int = 0  # that the best is to be tried on

    def run(self, start: float) -> None:
        """Climb from the start on the first seed; then try the best and its neighbours on all
        seeds, and go on where that moves the best.
        """
        index = self.grid.nearest(start)
        while index > 0 and not self.grid.has(index):
            index -= 2
        self._measure(index, self.seeds[0])
        self.num_seeds = self.lengths.num_seeds
        while True:
            while any([self._try(self._best() + side) for side in (-2, 2)]):
                pass
            if self._repeat(self._best()):
                continue
            if not self._wants_a_seed():
                return
            self.num_seeds += 1

    def _try(self, index: int) -> bool:
        """Try a candidate on the first seed, unless it was, the range has none such, or no trial is
        left; was it tried now?
        """
        is_last = len(self.losses) >= self.lengths.num_candidates
        if index in self.losses or is_last or not self.grid.has(index):
            return False
        self._measure(index, self.seeds[0])
        return True

    def _repeat(self, best: int) -> bool:
        """Try a candidate and its neighbours on all seeds, where there is something to learn and
        there are trials left; was any made?
        """
        around = [index for index in self._around(best) if index in self.losses]
        missing = [
            (index, seed)
            for seed in self.seeds[1 : self.num_seeds]
            for index in around
            if seed not in self.losses[index]
        ]
        num_made = sum(len(losses) - 1 for losses in self.losses.values())
        if (
            len(around) < 3
            or num_made + len(missing) > self.lengths.num_repeats
            or not self._has_learned(best)
        ):
            return False
        for index, seed in missing:
            self._measure(index, seed)
        return bool(missing)

    def _wants_a_seed(self) -> bool:
        """Is there another, and is the mean of what the seeds find too uncertain without it?"""
        best = self._best()
        count = len(self.losses[best])
        if (
            not 1 < count == self.num_seeds < len(self.seeds)
            or self._one_sided(best)
            or not self._has_learned(best)
        ):
            return False
        if self._is_within_noise(best):
            return True
        places = [self.grid.place(value) / 2 for value in self._by_seed(best)]
        return float(np.std(places, ddof=1)) / math.sqrt(count) > MOST_ERROR_STEPS

    def _by_seed(self, best: int) -> list[float]:
        """What each seed finds alone."""
        losses = [self._counted(index) for index in self._around(best)]
        return [self._lowest_point(best, *of_seed) for of_seed in zip(*losses, strict=True)]

    def _measure(self, index: int, seed: int) -> None:
        curve = self.trial(seed, self.grid.at(index) * self.shape, "race")
        if not self.losses:
            start = curve.start_loss
            if start is None and len(curve.losses):
                start = start_of(curve.losses)
            if start is not None and start < self.level:
                self.level, self.level_name = start, _START_LEVEL
        self.losses.setdefault(index, {})[seed] = last_loss(curve)

    def _around(self, index: int) -> tuple[int, int, int]:
        return index - 2, index, index + 2

    def _counted(self, index: int) -> list[float]:
        """A candidate's losses, none above the level."""
        return [min(loss, self.level) for loss in self.losses[index].values()]

    def _mean(self, index: int) -> float:
        return float(np.mean(self._counted(index)))

    def _best(self) -> int:
        """The lowest mean among those tried on most seeds; of equal ones the smaller value."""
        most = max(map(len, self.losses.values()))
        tried = [index for index, losses in self.losses.items() if len(losses) == most]
        return min(tried, key=lambda index: (self._mean(index), -index))

    def _has_learned(self, index: int) -> bool:
        return self.level - self._mean(index) > LEAST_WON_SHARE * abs(self.level)

    def _is_within_noise(self, index: int) -> bool:
        """Does a candidate lie below the level by no more than the seeds differ by chance? Of one
        seed nothing is known.
        """
        won = self.level - np.array(self._counted(index))
        if len(won) < 2:
            return False
        error = float(np.std(won, ddof=1)) / math.sqrt(len(won))
        return float(np.mean(won)) <= LEAST_WON_ERRORS * error

    def candidates(self) -> tuple[Candidate, ...]:
        """What was measured, values ascending."""
        return tuple(
            Candidate(
                self.grid.at(index),
                dict(self.losses[index]),
                float(np.mean(list(self.losses[index].values()))),
                self._mean(index),
            )
            for index in sorted(self.losses, reverse=True)
        )

    def result(self) -> tuple[float | None, Spread | None, str]:
        """The value, what each seed alone says, and why; or None, and why none."""
        best = self._best()
        length = f"{len(self.shape)} steps"
        if not self._has_learned(best):
            why = (
                f"no candidate ends clearly below {self.level:.4g} nats, {self.level_name}, after"
                f" {length}; {self.obstacle or 'try more steps=, or other from= and to='}"
            )
            return None, None, why
        why = self._one_sided(best)
        if why:
            return None, None, why
        longer = self.obstacle or "try more seeds= or steps="
        if self._is_within_noise(best):
            why = (
                f"{self.grid.at(best):.3g} ends lowest, at {self._mean(best):.4f} nats, which is"
                f" below {self.level:.4g}, {self.level_name}, by no more than the noise between"
                f" {len(self.losses[best])} seeds; {longer}"
            )
            return None, None, why
        own = spread(self._by_seed(best))
        assert own is not None
        if self._steps_between(own.lowest, own.highest) > MOST_STEPS_APART:
            return (
                None,
                own,
                f"the seeds disagree: each alone, after {length}, they find {own.lowest:.3g} to"
                f" {own.highest:.3g}; {longer}",
            )
        value = self._lowest_point(best, *map(self._mean, self._around(best)))
        return value, own, self._reason(best, value, own)

    def _one_sided(self, best: int) -> str:
        """Why the best candidate is no answer, where one of its neighbours was not tried as it
        was.
        """
        sides = ("larger", "larger to=", "from=", -2), ("smaller", "smaller from=", "to=", 2)
        for towards, end, other_end, side in sides:
            if not self.grid.has(best + side):
                return f"the best candidate lies at the end of the range; try a {end}"
            if len(self.losses.get(best + side, ())) < len(self.losses[best]):
                count, behind = len(self.losses), self.grid.at(best - side)
                return (
                    f"the loss still improves towards {towards} values after {count} candidates;"
                    f" try {other_end}{behind:.3g}"
                )
        return ""

    def _lowest_point(self, best: int, larger: float, middle: float, smaller: float) -> float:
        """Where a parabola through the losses of a candidate and its neighbours is lowest, at most
        at a neighbour.
        """
        bend, slope = larger - 2 * middle + smaller, larger - smaller
        steps = slope / (2 * bend) if bend > 0 else math.copysign(math.inf, slope) if slope else 0
        return self.grid.at(best + 2 * min(1.0, max(-1.0, steps)))

    def _steps_between(self, low: float, high: float) -> float:
        """How many neighbouring candidates two values lie apart."""
        return (self.grid.place(low) - self.grid.place(high)) / 2

    def _reason(self, best: int, value: float, own: Spread) -> str:
        """What the candidates' table says, in words."""
        larger, _, smaller = (f"{self.grid.at(i):.3g}" for i in self._around(best))
        means = [f"{self._mean(index):.4f}" for index in self._around(best)]
        # those tried on the first seed only have no mean to compare
        count = sum(len(losses) == own.num_seeds for losses in self.losses.values())
        over = f" on {own.num_seeds} seeds" if own.num_seeds > 1 else ""
        mean = " in the mean" if over else ""
        alone = f" ({own.lowest:.3g} to {own.highest:.3g} by each seed alone)" if over else ""
        losses = [self.losses[index].values() for index in self._around(best)]
        is_cut = max(map(max, losses)) > self.level
        cut = f" ({counted_as(self.level, self.level_name)})" if is_cut else ""
        return (
            f"of {count} candidates trained for {len(self.shape)} steps{over},"
            f" {self.grid.at(best):.3g} ends lowest{mean} at {means[1]} nats, {smaller} at"
            f" {means[2]} and {larger} at {means[0]}{cut}; a parabola through the three is lowest"
            f" at {value:.3g}{alone}"
        )


def counted_as(level: float, name: str) -> str:
    """How a loss above the level enters the comparison of candidates, in words."""
    return f"a loss above {level:.4g}, {name}, counts as {level:.4g}"


def lengths_for(
    num_run_steps: int, num_seeds: int = 3, num_ramp_steps: int | None = None
) -> Lengths:
    """The lengths for a run of num_run_steps: 200 steps a ramp on large data, fewer where the run
    itself is short.

    num_ramp_steps: asked for in place of that number; all other lengths follow it.
    """
    steps = num_ramp_steps or min(200, max(40, num_run_steps // 9))
    more_seeds = 2 if num_seeds > 1 else 0
    return Lengths(
        num_seeds=num_seeds,
        num_ramp_steps=steps,
        num_probes=6 if steps >= 100 else 2,
        num_probe_steps=min(30, max(12, steps // 4)),
        num_candidates=6 if steps >= 100 else 5,
        num_repeats=4 * (num_seeds - 1) + 3 * more_seeds,
        num_race_steps=steps,
        num_run_steps=num_run_steps,
        num_more_seeds=more_seeds,
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
    own: float | None = None,
    level_name: str = CONSTANT_LEVEL,
    obstacle: str = "",
) -> Suggestion:
    """The whole decision: every trial it needs, then one value or the reason why there is none.

    seeds: num_seeds of them, then those that more may be taken from. values: [num_ramp_steps]
    ascending, all above 0 unless they are evenly spaced. shape:
    [num_race_steps] shares in [0, 1] of a candidate at each step of its trial: the recipe's own
    schedule shrunk to so many steps; ones for a scalar that has no schedule. curve: which of CURVES
    the rules read; candidates are judged on the held-out loss where there is one. is_rate: the
    values are learning rates, of which a long run takes smaller ones than a short trial. own: the
    recipe's value, where candidates start if no ramp says anything. level_name, obstacle: as
    CandidateSearch has them.

    Ramps and rules say where to begin, however far they are apart; the candidates decide.
    """
    curves: list[Curve] = []

    def recorded(seed: int, given: np.ndarray, purpose: str) -> Curve:
        curves.append(trial(seed, given, purpose))
        return curves[-1]

    ramps = [recorded(seed, values, "ramp") for seed in seeds[: lengths.num_ramps]]
    readings = [read(ramp, baselines, curve) for ramp in ramps]
    rules = {rule: spread([reading.rules[rule] for reading in readings]) for rule in RULES}
    edge, grid = spread([reading.edge for reading in readings]), CandidateGrid(values)
    stable = unstable = None
    if edge:
        stable, unstable = probe(recorded, seeds[0], grid, edge.median, lengths)
    level = math.inf if baselines.held_out is None else baselines.held_out
    search = CandidateSearch(recorded, seeds, grid, lengths, shape, level, level_name, obstacle)
    search.run(_middle(grid, [*rules.values(), edge], own))
    value, interval, reason = search.result()
    if value is None:
        reason = _none_because(reason, [reading.reason for reading in readings])
    elif interval and is_rate and lengths.horizon_share < 1:
        value, interval, reason = _for_the_run(value, interval, reason, lengths)
    return Suggestion(
        value=value,
        interval=interval,
        reason=reason,
        rules=rules,
        edge=edge,
        stable=stable,
        unstable=unstable,
        candidates=search.candidates(),
        level_nats=search.level,
        level_name=search.level_name,
        curves=tuple(curves),
        smoothing={
            which: smoothing_for(len(series(ramps[0], which)[1])) for which in ("train", "heldout")
        },
        baselines=baselines,
    )


def _none_because(reason: str, of_ramps: Sequence[str]) -> str:
    """Why there is no value. of_ramps: why each ramp said nothing, empty where it said something;
    told where half of them or more said nothing.
    """
    unread = [each for each in of_ramps if each]
    in_ramp = f"; in a ramp {unread[0]}" if 2 * len(unread) >= len(of_ramps) else ""
    return f"no reliable suggestion: {reason}{in_ramp}"


def _middle(grid: CandidateGrid, found: Sequence[Spread | None], own: float | None) -> float:
    """Where candidates start: in the middle of all that rules and edges span; else at the recipe's
    value, else in the middle of the range.
    """
    spans = [one for one in found if one]
    if spans:
        return grid.between(min(one.lowest for one in spans), max(one.highest for one in spans))
    is_within = own is not None and grid.bottom <= own <= grid.top
    return own if own is not None and is_within else grid.between(grid.bottom, grid.top)


def _for_the_run(
    value: float, interval: Spread, reason: str, lengths: Lengths
) -> tuple[float, Spread, str]:
    """A share of the value, for a run that is longer than its trials."""
    share = lengths.horizon_share
    scaled = (interval.median * share, interval.lowest * share, interval.highest * share)
    reason += f"; {share:.2g} of it suits a run of {lengths.num_run_steps}: {value * share:.3g}"
    return value * share, Spread(*scaled, interval.num_seeds), reason
