"""From trials to one recommended value: ramps, what the rules read in them, probes, a race of candidates. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.lr_finder.halving import Ladder, Lengths, Race, Trial, probe
from trainer.lr_finder.rules import (
    RULES,
    Candidate,
    Curve,
    Floors,
    Reading,
    Spread,
    Suggestion,
    disagreement,
    read,
    series,
    smoothing_for,
    spread,
    trouble,
)


def lengths_for(
    num_run_steps: int, num_seeds: int = 3, num_ramp_steps: int | None = None
) -> Lengths:
    """The lengths for a run of num_run_steps: 200 steps a ramp on large data, fewer where the run itself is short.

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
    floors: Floors,
    lengths: Lengths,
    race_shape: np.ndarray,
    curve: str = "both",
    is_rate: bool = True,
) -> Suggestion:
    """The whole decision: every trial it needs, then one value or the reason why there is none.

    values: [num_ramp_steps] ascending, all above 0 unless they are evenly spaced. race_shape: [num_race_steps] shares
    in [0, 1] of the candidate at each step of the race: the recipe's own schedule shrunk to so many steps; ones for a
    scalar that has no schedule. curve: which of CURVES the rules read; the race is judged on the held-out loss where
    there is one. is_rate: the values are learning rates, of which a long run takes smaller ones than a short race.
    """
    curves: list[Curve] = []

    def recorded(seed: int, given: np.ndarray, purpose: str) -> Curve:
        curves.append(trial(seed, given, purpose))
        return curves[-1]

    ramps = [recorded(seed, values, "ramp") for seed in seeds]
    readings = [read(ramp, floors, curve) for ramp in ramps]
    found = _Found(
        {rule: spread([reading.rules[rule] for reading in readings]) for rule in RULES},
        _edge(readings),
    )
    why_not, ladder = trouble(readings), Ladder(values)
    if found.edge:
        found.stable, found.unstable = probe(recorded, seeds[0], ladder, found.edge.median, lengths)
    if not why_not:
        race = Race(recorded, seeds, ladder, lengths, race_shape, found.unstable)
        race.run(_middle(found.rules))
        found.candidates = race.candidates()
        found.value, found.reason = race.result(floors)
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
        reason=f"no reliable suggestion: {why_not}"
        if why_not
        else f"{found.reason}; a ramp's loss turns up at {found.edge.median:.3g}",
        rules=found.rules,
        edge=found.edge,
        stable=found.stable,
        unstable=found.unstable,
        candidates=found.candidates,
        curves=tuple(curves),
        smoothing=strengths,
        floors=floors,
    )


@dataclass
class _Found:
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
