"""From trials to one recommended value: ramps, readings, probes of constant values, a race of candidates. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.range_rules import Curve, Floors, Suggestion

# trial(seed, values [N], purpose): from the seed's initial weights one optimizer step with each value, in order
Trial = Callable[[int, np.ndarray, str], Curve]


@dataclass(frozen=True)
class Lengths:
    """How long the trials are, and how many there are at most.

    num_ramp_steps: of each seed's ramp. num_probes, num_probe_steps: constant values, on the first seed.
    num_candidates: raced on the first seed; num_repeats: further race trials, of the best ones on the other seeds.
    """

    num_seeds: int
    num_ramp_steps: int
    num_probes: int
    num_probe_steps: int
    num_candidates: int
    num_repeats: int
    num_race_steps: int

    @property
    def most_steps(self) -> int:
        """Optimizer steps of the whole range test, where no trial ends early."""
        num_race_trials = self.num_candidates + self.num_repeats
        probes, race = self.num_probes * self.num_probe_steps, num_race_trials * self.num_race_steps
        return self.num_seeds * self.num_ramp_steps + probes + race


def lengths_for(num_run_steps: int, num_seeds: int = 3, num_ramp_steps: int | None = None) -> Lengths:
    """The lengths for a run of num_run_steps: 200 steps a ramp on large data, fewer where the run itself is short."""
    raise NotImplementedError


def decide(
    trial: Trial,
    seeds: Sequence[int],
    values: np.ndarray,
    floors: Floors,
    lengths: Lengths,
    race_shape: np.ndarray,
    curve: str = "both",
) -> Suggestion:
    """The whole decision: every trial it needs, then one value or the reason why there is none.

    values: [num_ramp_steps] ascending, all above 0 unless they are evenly spaced. race_shape: [num_race_steps] shares
    in [0, 1] of the candidate at each step of the race: the recipe's own schedule shrunk to so many steps; ones for a
    scalar that has no schedule. curve: which of CURVES the rules read; the race is judged on the held-out loss where
    there is one.
    """
    raise NotImplementedError
